//! The programs a lab is made of: ours stand beside `orchctl`, the others are on the PATH.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Paths of all programs.
#[derive(Debug, Clone)]
pub struct Programs {
    pub orchestrator: PathBuf,
    pub cni_plugins: PathBuf,
    pub pause: PathBuf,
    pub dockerd: PathBuf,
}

impl Programs {
    /// # Errors
    /// One is missing; the error says where it comes from.
    pub fn find() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("path of orchctl")?;
        let folder = own.parent().context("folder of orchctl")?.to_owned();
        let beside = |name: &str| {
            let path = folder.join(name);
            path.is_file().then_some(path).with_context(|| {
                format!("{name} is not beside orchctl in {}; `make build` puts it there", folder.display())
            })
        };
        // Not started by us, but the server and the agents need them: better said now than in a log later.
        on_path("etcd", "etcd-server")?;
        on_path("nft", "nftables")?;
        Ok(Self {
            orchestrator: beside("orchestrator")?,
            cni_plugins: beside("cni-plugins")?,
            pause: beside("orch-pause")?,
            dockerd: on_path("dockerd", "docker.io")?,
        })
    }

    /// A program of ours that only some commands need.
    ///
    /// # Errors
    /// It is not there.
    pub fn beside(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.orchestrator.parent().context("folder of orchctl")?.join(name);
        path.is_file().then_some(path).with_context(|| format!("{name} is not beside orchctl; run `make build`"))
    }
}

fn on_path(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate))
        .with_context(|| {
            format!("{name} is not installed; `make deps` installs it, or `apt-get install {package}` on Debian")
        })
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
