//! Where programs, maps and links are kept.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use orch_ebpf_maps::{LAYOUT_VERSION, SERVICES_VERSION};

use crate::attach::has_tcx;
use crate::{Error, Hook};

/// Before the number of the folder for the socket programs' pins.
const SERVICES_PREFIX: &str = "services-v";

/// The folder of the pins: `<root>/sys/fs/bpf/orch/v<layout>`. Every node has its own, also when many nodes share a
/// kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pins {
    mount_point: PathBuf,
    folder: PathBuf,
    has_tcx: bool,
}

impl Pins {
    /// The pins of the node whose files are below `root`.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        let mount_point = root.join("sys/fs/bpf");
        let folder = mount_point.join(format!("orch/v{LAYOUT_VERSION}"));
        Self { mount_point, folder, has_tcx: has_tcx() }
    }

    /// The pins of the socket programs of the same node: a folder of their own, so that each comes and goes alone.
    #[must_use]
    pub fn services_below(root: &Path) -> Self {
        let mount_point = root.join("sys/fs/bpf");
        let folder = mount_point.join(format!("orch/{SERVICES_PREFIX}{SERVICES_VERSION}"));
        Self { mount_point, folder, has_tcx: has_tcx() }
    }

    /// Pins in a folder that is there already, by its path.
    #[must_use]
    pub fn at(folder: &Path) -> Self {
        Self { mount_point: folder.to_owned(), folder: folder.to_owned(), has_tcx: has_tcx() }
    }

    /// The same, on a kernel that has no TCX links (before 6.6), whichever this one is: for tests.
    #[must_use]
    pub fn without_tcx(self) -> Self {
        Self { has_tcx: false, ..self }
    }

    /// Whether programs are on TCX links; else they are filters.
    pub(crate) fn has_tcx(&self) -> bool {
        self.has_tcx
    }

    /// The folder itself.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Mounts the BPF file system if it is not, and makes the folders.
    ///
    /// # Errors
    /// What could not be made.
    pub fn ensure(&self) -> Result<(), Error> {
        let make = |path: &Path| {
            let failed = |source| Error::File { what: "make", path: path.to_owned(), source };
            fs::create_dir_all(path).map_err(failed)
        };
        if !is_bpffs(&self.mount_point) {
            make(&self.mount_point)?;
            mount(Some("bpf"), &self.mount_point, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .map_err(|errno| Error::File {
                    what: "mount the BPF file system at",
                    path: self.mount_point.clone(),
                    source: errno.into(),
                })?;
        }
        for folder in ["maps", "programs", "links"] {
            make(&self.folder.join(folder))?;
        }
        Ok(())
    }

    /// Folders of builds with another layout.
    pub(crate) fn others(&self) -> Vec<PathBuf> {
        self.beside("v")
    }

    /// The same for the socket programs.
    pub(crate) fn other_services(&self) -> Vec<PathBuf> {
        self.beside(SERVICES_PREFIX)
    }

    /// Folders beside this one that have this prefix and a number for a name.
    fn beside(&self, prefix: &str) -> Vec<PathBuf> {
        let is_layout = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            let number = name.and_then(|name| name.strip_prefix(prefix)).unwrap_or_default();
            number.parse::<u32>().is_ok() && *path != self.folder
        };
        let beside = self.folder.parent().and_then(|folder| fs::read_dir(folder).ok());
        beside.into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_layout).collect()
    }

    /// Whether somebody has put programs there.
    #[must_use]
    pub fn are_there(&self) -> bool {
        Hook::POLICY.iter().all(|hook| self.program(hook.program()).exists())
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.folder.join("maps").join(name)
    }

    /// The pin of a program.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("programs").join(name)
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.folder.join("links")
    }

    /// A BPF file system allows no dots in names.
    pub(crate) fn link(&self, ifindex: u32, hook: Hook) -> PathBuf {
        self.links().join(format!("{ifindex}-{}", hook.program()))
    }
}

fn is_bpffs(path: &Path) -> bool {
    // The parent's file system has the same type when the folder is only a folder in a BPF file system: good as well.
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}
