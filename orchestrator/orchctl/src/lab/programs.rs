//! The programs a lab is made of: ours stand beside `orchctl`, the others are on the PATH.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::output;

/// Paths of all programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) orchestrator: PathBuf,
    pub(crate) cni_plugins: PathBuf,
    pub(crate) pause: PathBuf,
    pub(crate) dockerd: PathBuf,
    pub(crate) containerd: PathBuf,
}

impl Programs {
    /// # Errors
    /// One is missing; the error says where it comes from.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("path of orchctl")?;
        let folder = own.parent().context("folder of orchctl")?.to_owned();
        let beside = |name: &str| {
            let path = folder.join(name);
            path.is_file().then_some(path).ok_or_else(|| {
                output::hinted(
                    "`make build` puts all programs into target/orch",
                    format!("{name} is not beside orchctl in {}", folder.display()),
                )
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
            containerd: on_path("containerd", "containerd")?,
        })
    }

    /// A program of ours that only some commands need.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn beside(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.orchestrator.parent().context("folder of orchctl")?.join(name);
        path.is_file()
            .then_some(path)
            .with_context(|| format!("{name} is not beside orchctl; run `make build`"))
    }
}

fn on_path(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate))
        .ok_or_else(|| {
            output::hinted(
                format!("`make deps` installs it; on Debian: apt-get install {package}"),
                format!("{name} is not installed"),
            )
        })
}

/// The PATH with the folders of system programs, which the PATH of a shell may lack. Also for what we start: dockerd
/// looks for runc, the server for etcd, the agents for nft.
pub(crate) fn search_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    let all = std::env::split_paths(&path)
        .filter(|folder| !system.contains(folder))
        .chain(system.clone());
    std::env::join_paths(all).unwrap_or(path)
}

pub(crate) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
