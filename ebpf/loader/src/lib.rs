//! Loads, pins and attaches the eBPF programs of `ebpf/progs`; typed handles on their maps.
//!
//! Programs and maps live in the kernel, held by files in a BPF file system ([`Pins`]): they outlive every process. The
//! agent puts them there ([`install()`]), the `policy` plugin attaches them to a pod's link ([`attach()`]), both write maps
//! ([`Maps`]), and they talk ([`ask()`]). Nothing here decides what is allowed. [`Services`] are an object of their own, at
//! the sockets.
//!
//! Needs Linux 5.10 or newer: TCX links where the kernel has them (6.6), else filters of a `clsact` qdisc.

mod announce;
mod attach;
mod error;
mod filters;
mod install;
mod kept;
mod maps;
mod pins;
mod probe;
mod rows;
mod services;

pub use announce::{
    Announcement, Answer, AskError, Connection, Explanation, PodRef, Request, ask, explain,
};
pub use attach::{
    Hook, attach, detach, detach_hook, is_attached, links_with, supports_fast_path, sweep,
};
pub use error::Error;
pub use install::{OBJECT, install, retire_others, uninstall};
pub use kept::Kept;
pub use maps::{ClassMap, Events, Maps, RuleTable};
pub use pins::Pins;
pub use probe::{Probe, Question, Ran};
pub use services::{
    Services, cgroup_root, install_services, network_namespace_cookie, uninstall_services,
};
