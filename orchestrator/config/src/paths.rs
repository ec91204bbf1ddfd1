//! Every path orch reads or writes, below one root.

use std::path::{Path, PathBuf};

/// Paths of one node (or of one control plane), all below a movable root.
///
/// With the root `/` they are the conventional ones (`/etc/orch`, `/var/lib/orch`, `/run/orch`,
/// `/etc/cni/net.d`, `/opt/cni/bin`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Paths below `root`; `/` for a machine that is one node.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The prefix itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn at(&self, tail: &str) -> PathBuf {
        self.root.join(tail)
    }

    /// Configuration: `<root>/etc/orch`.
    #[must_use]
    pub fn etc(&self) -> PathBuf {
        self.at("etc/orch")
    }

    /// Keys and certificates: `<root>/etc/orch/pki`.
    #[must_use]
    pub fn pki(&self) -> PathBuf {
        self.at("etc/orch/pki")
    }

    /// State that outlives a reboot: `<root>/var/lib/orch`.
    #[must_use]
    pub fn lib(&self) -> PathBuf {
        self.at("var/lib/orch")
    }

    /// State of this boot: `<root>/run/orch`.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.at("run/orch")
    }

    /// Logs of daemons that no init system collects: `<root>/var/log/orch`.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.at("var/log/orch")
    }

    /// Volumes and generated files of pods, one folder per pod UID.
    #[must_use]
    pub fn pods_dir(&self) -> PathBuf {
        self.at("var/lib/orch/pods")
    }

    /// Pinned network namespaces of pod sandboxes.
    #[must_use]
    pub fn netns_dir(&self) -> PathBuf {
        self.at("run/orch/netns")
    }

    /// The node's subnet lease in flannel's format.
    #[must_use]
    pub fn subnet_env(&self) -> PathBuf {
        self.at("run/orch/subnet.env")
    }

    /// What the network agent knows, for `orchctl status`.
    #[must_use]
    pub fn net_status(&self) -> PathBuf {
        self.at("run/orch/net-status.json")
    }

    /// CNI configuration lists.
    #[must_use]
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.at("etc/cni/net.d")
    }

    /// CNI plugin binaries.
    #[must_use]
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.at("opt/cni/bin")
    }

    /// Address leases of the `host-local` plugin.
    #[must_use]
    pub fn cni_data_dir(&self) -> PathBuf {
        self.at("var/lib/cni/networks")
    }

    /// Result cache of the runtime side of CNI.
    #[must_use]
    pub fn cni_cache_dir(&self) -> PathBuf {
        self.at("var/lib/cni")
    }

    /// Data folder of a managed etcd.
    #[must_use]
    pub fn etcd_data(&self) -> PathBuf {
        self.at("var/lib/orch/etcd")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_prefix_moves_every_path() {
        let host = Paths::new("/");
        assert_eq!(host.cni_conf_dir(), Path::new("/etc/cni/net.d"));
        assert_eq!(host.subnet_env(), Path::new("/run/orch/subnet.env"));
        let lab = Paths::new("/srv/lab/node-1");
        assert_eq!(lab.pki(), Path::new("/srv/lab/node-1/etc/orch/pki"));
    }
}
