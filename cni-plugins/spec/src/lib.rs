//! The words of the CNI specification: configuration, result, errors, names and versions. Types only, no I/O.
//!
//! There is one internal form of everything, and one serialiser per specification version: a plugin works with
//! [`AddResult`] and says [`AddResult::to_value`] with the version its configuration asked for. Names and
//! addresses are parsed once, at the edge, into types that hold good values only ([`ContainerId`], [`IfName`],
//! [`NetworkName`]).
//!
//! Start reading at [`AddResult`] (what plugins answer), [`ConfList`] (what runtimes read) and [`Error`].
//! Source: CNI specification 1.1.0, `SPEC.md` and `CONVENTIONS.md`.

mod args;
mod conf;
mod env;
mod error;
mod name;
mod owner;
mod result;
mod said;
mod version;

pub use args::CniArgs;
pub use conf::{
    ConfList, GC_KEY, GC_KEY_OLD, PluginConf, parse_valid_attachments, valid_attachments_value,
};
pub use env::{Command, Env};
pub use error::{Error, code};
pub use name::{AttachmentId, ContainerId, IfName, NameError, NetworkName, stable_hash};
pub use owner::Owner;
pub use result::{AddResult, Dns, Interface, IpConfig, Route, parse_cidr};
pub use said::{Place, first_said, or_default};
pub use version::Version;

#[cfg(test)]
#[path = "../../corpus/mutate.rs"]
mod mutate;
