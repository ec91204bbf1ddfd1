//! The addresses of a pod's sandbox. They are in the kernel and with the IPAM plugin; this note spares asking either
//! after a restart of the agent. It counts only for the sandbox it names.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A sandbox that is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connected {
    pub(crate) sandbox: String,
    pub(crate) ips: Vec<IpAddr>,
}

const FILE: &str = "network.json";

impl Connected {
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(FILE)).ok()?).ok()
    }

    /// # Errors
    /// The folder is not writable.
    pub(crate) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let fresh = folder.join(".network.json");
        fs::write(&fresh, serde_json::to_vec(self)?)?;
        fs::rename(fresh, folder.join(FILE))
    }

    pub(crate) fn forget(folder: &Path) {
        let _ = fs::remove_file(folder.join(FILE));
    }
}
