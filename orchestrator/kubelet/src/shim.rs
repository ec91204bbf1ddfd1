pub(crate) mod cni {
    use std::path::PathBuf;
    pub(crate) struct Cni {
        pub conf_dir: PathBuf,
        pub bin_dirs: Vec<PathBuf>,
        pub cache_dir: PathBuf,
    }
    pub(crate) struct Attachment {
        pub container_id: String,
        pub netns: String,
        pub ifname: String,
        pub args: Vec<(String, String)>,
        pub capabilities: serde_json::Map<String, serde_json::Value>,
    }
    pub(crate) struct Net {
        pub address: Addr,
    }
    pub(crate) struct Addr;
    impl Addr {
        pub(crate) fn ip(&self) -> std::net::IpAddr {
            [127, 0, 0, 1].into()
        }
    }
    pub(crate) struct AddResult {
        pub ips: Vec<Net>,
    }
    pub(crate) struct L;
    impl Cni {
        pub(crate) fn load(&self) -> Result<L, std::io::Error> {
            Err(std::io::Error::other("no"))
        }
        pub(crate) fn add(&self, _: &L, _: &Attachment) -> Result<AddResult, std::io::Error> {
            Err(std::io::Error::other("no"))
        }
        pub(crate) fn del(&self, _: &L, _: &Attachment) -> Result<(), std::io::Error> {
            Ok(())
        }
    }
}
