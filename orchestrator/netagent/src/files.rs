//! Files that others read: `subnet.env`, the CNI configuration, the status snapshot. All are written beside
//! their place and renamed, so that a reader sees the old or the new one, whole.

use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_config::Paths;

use crate::lease::SubnetKey;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Reading.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Writing.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Writes `content` to `path` by rename, after making its folder.
///
/// # Errors
/// Names the file.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(folder).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

/// As [`write_atomic`], but leaves an equal file alone, with its inode and times.
///
/// # Errors
/// Names the file.
pub fn ensure_content(path: &Path, content: &[u8]) -> Result<bool, FileError> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(false);
    }
    write_atomic(path, content).map(|()| true)
}

/// The node's subnet as flannel writes it for CNI plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole IPv4 pod network and the node's part of it.
    pub ipv4: Option<(Ipv4Network, Ipv4Network)>,
    /// The same of IPv6.
    pub ipv6: Option<(Ipv6Network, Ipv6Network)>,
    /// MTU of pods: the underlay's less the overhead of VXLAN.
    pub mtu: u32,
}

impl SubnetEnv {
    /// The file's text. `FLANNEL_IPMASQ=true` says that the agent masquerades, so that plugins do not.
    #[must_use]
    pub fn render(&self) -> String {
        let ipv4 = self.ipv4.map(|(network, subnet)| {
            let gateway = Ipv4Addr::from_bits(subnet.network().to_bits() + 1);
            let length = subnet.prefix();
            format!("FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={gateway}/{length}\n")
        });
        let ipv6 = self.ipv6.map(|(network, subnet)| {
            let gateway = Ipv6Addr::from_bits(subnet.network().to_bits() + 1);
            let length = subnet.prefix();
            format!("FLANNEL_IPV6_NETWORK={network}\nFLANNEL_IPV6_SUBNET={gateway}/{length}\n")
        });
        format!(
            "{}{}FLANNEL_MTU={}\nFLANNEL_IPMASQ=true\n",
            ipv4.unwrap_or_default(),
            ipv6.unwrap_or_default(),
            self.mtu
        )
    }

    /// Reads the file's text; `None` if something is missing or unreadable.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let get = |name: &str| {
            text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
        };
        let ipv4 =
            get("FLANNEL_NETWORK").zip(get("FLANNEL_SUBNET")).and_then(|(network, subnet)| {
                let subnet: Ipv4Network = subnet.parse().ok()?;
                let base = Ipv4Network::new(subnet.network(), subnet.prefix()).ok()?;
                Some((network.parse().ok()?, base))
            });
        let ipv6 = get("FLANNEL_IPV6_NETWORK").zip(get("FLANNEL_IPV6_SUBNET")).and_then(
            |(network, subnet)| {
                let subnet: Ipv6Network = subnet.parse().ok()?;
                let base = Ipv6Network::new(subnet.network(), subnet.prefix()).ok()?;
                Some((network.parse().ok()?, base))
            },
        );
        (ipv4.is_some() || ipv6.is_some()).then_some(())?;
        Some(Self { ipv4, ipv6, mtu: get("FLANNEL_MTU")?.parse().ok()? })
    }

    /// The node's subnets as the key of their lease has them.
    #[must_use]
    pub fn key(&self) -> SubnetKey {
        SubnetKey {
            v4: self.ipv4.map(|(_, subnet)| subnet),
            v6: self.ipv6.map(|(_, subnet)| subnet),
        }
    }

    /// What the last run of this agent (or a flanneld before it) left.
    #[must_use]
    pub fn observe(path: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(path).ok()?)
    }
}

/// The CNI configuration list that points the runtime at the `vxlan` plugin. A runtime that knows no 1.1.0 (and
/// so neither GC nor STATUS) does not know `cniVersions` either, and reads 1.0.0. Host ports and bandwidth limits come
/// from chained plugins, which are named where they are installed: a list with a missing plugin starts no pod at all.
///
/// With `policy`, the plugin that enforces NetworkPolicies comes last, and is listed whether it is installed or not.
#[must_use]
pub fn conflist(paths: &Paths, device: &str, policy: bool) -> Vec<u8> {
    let mut list = serde_json::json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "orch",
        "plugins": [{
            "type": "vxlan",
            "subnetFile": paths.subnet_env(),
            "delegate": {"bridge": orch_config::POD_BRIDGE, "hairpinMode": true, "isDefaultGateway": true},
            "dataDir": paths.cni_data_dir(),
            "device": device,
        }],
    });
    for (plugin, capability) in [("portmap", "portMappings"), ("bandwidth", "bandwidth")] {
        let installed = paths.cni_bin_dir().join(plugin).exists();
        if let Some(plugins) = list["plugins"].as_array_mut().filter(|_| installed) {
            plugins.push(serde_json::json!({"type": plugin, "capabilities": {capability: true}}));
        }
    }
    if let Some(plugins) = list["plugins"].as_array_mut().filter(|_| policy) {
        plugins.push(crate::policy::plugin_conf(paths));
    }
    let mut text = serde_json::to_vec_pretty(&list).expect("plain data has a JSON form");
    text.push(b'\n');
    text
}

/// Name of the configuration list in the folder of CNI configurations.
pub const CONFLIST: &str = "10-orch.conflist";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_env_has_flannels_names_and_reads_back() {
        let ipv4 = ("10.244.0.0/16".parse().expect("CIDR"), "10.244.3.0/24".parse().expect("CIDR"));
        let env = SubnetEnv { ipv4: Some(ipv4), ipv6: None, mtu: 1450 };
        let text = env.render();
        assert_eq!(
            text,
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(SubnetEnv::parse(&text), Some(env));
        let ipv6 = ("fd00::/48".parse().expect("CIDR"), "fd00:0:0:3::/64".parse().expect("CIDR"));
        let dual = SubnetEnv { ipv6: Some(ipv6), ..env };
        assert!(dual.render().contains("FLANNEL_IPV6_SUBNET=fd00:0:0:3::1/64\n"));
        assert_eq!(SubnetEnv::parse(&dual.render()), Some(dual));
        let alone = SubnetEnv { ipv4: None, ..dual };
        assert!(alone.render().starts_with("FLANNEL_IPV6_NETWORK="));
        assert_eq!(SubnetEnv::parse(&alone.render()), Some(alone));
        assert_eq!(SubnetEnv::parse("FLANNEL_SUBNET=10.244.3.1/24\n"), None);
    }

    #[test]
    fn equal_content_is_not_written_again() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("a/b");
        assert!(ensure_content(&file, b"x").expect("written"));
        assert!(!ensure_content(&file, b"x").expect("left alone"));
        assert!(ensure_content(&file, b"y").expect("written"));
        assert_eq!(
            fs::read_dir(folder.path().join("a")).expect("listed").count(),
            1,
            "no temporary file is left"
        );
    }
}
