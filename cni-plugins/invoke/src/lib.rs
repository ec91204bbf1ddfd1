//! The runtime's side of CNI: configuration lists, chains of plugins, delegation, the result cache.
//!
//! [`Cni`] is what a container runtime has: a folder of configurations, folders of plugins, a cache folder.
//! [`Cni::load`] picks the list, [`Cni::add`], [`del`](Cni::del), [`check`](Cni::check), [`gc`](Cni::gc) and
//! [`status`](Cni::status) run its plugins in the order each verb wants. [`Delegate`] is the part a *plugin*
//! needs: calling another plugin with the configuration it got.
//!
//! Everything here blocks; an asynchronous caller runs it on a blocking thread. Plugins are child processes and
//! each has [`PLUGIN_TIMEOUT`].
//!
//! Source: CNI specification 1.1.0 §3 to §5, and `libcni` of the reference, whose cache format this is.

mod cache;
mod delegate;
mod exec;
mod load;
mod runtime;

pub use cache::CachedAttachment;
pub use delegate::{Builtin, Delegate};
pub use exec::{PLUGIN_TIMEOUT, find_plugin};
pub use runtime::{Attachment, Cni};

use std::io;
use std::path::PathBuf;

use cni_spec::{Command, Error, NetworkName};

/// Why the runtime's side failed. Each text is a whole sentence, cause included.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// The folder has no usable configuration.
    #[error("no network configuration in {}{}", dir.display(), because(problems))]
    NoConf {
        /// The folder.
        dir: PathBuf,
        /// What was wrong with the files that are there.
        problems: Vec<String>,
    },
    /// No list of the folder has this name.
    #[error("no network \"{name}\" in {}", dir.display())]
    NoNetwork {
        /// The folder.
        dir: PathBuf,
        /// The name asked for.
        name: NetworkName,
    },
    /// A file or folder could not be read.
    #[error("read {}: {error}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// The result cache could not be written.
    #[error("write result cache {}: {error}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// The call itself is not right: a name, an argument, a verb the list is too old for.
    #[error("network \"{network}\": {error}")]
    Refused {
        /// The network.
        network: NetworkName,
        /// What is wrong.
        error: Error,
    },
    /// A plugin failed.
    #[error("{command} of plugin {plugin} of network \"{network}\": {error}")]
    Plugin {
        /// The network.
        network: NetworkName,
        /// The plugin.
        plugin: String,
        /// The verb.
        command: Command,
        /// What it said.
        error: Error,
    },
    /// Several failed, and the work went on to the end.
    #[error("{}", joined(.0))]
    Several(Vec<InvokeError>),
}

impl InvokeError {
    /// What a plugin said, if one did.
    #[must_use]
    pub fn cni_error(&self) -> Option<&Error> {
        match self {
            Self::Plugin { error, .. } | Self::Refused { error, .. } => Some(error),
            Self::Several(errors) => errors.iter().find_map(Self::cni_error),
            _ => None,
        }
    }
}

fn because(problems: &[String]) -> String {
    if problems.is_empty() { String::new() } else { format!(": {}", problems.join("; ")) }
}

fn joined(errors: &[InvokeError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
