//! One pod on this node.
//!
//! [`worker`] is a pod's task: [`observe`] what the engine has, [`plan`] purely, apply the plan, and [`status`] for
//! the API. [`start`] and [`stop`] do the two longer pieces of work; the other modules are the pure parts they are
//! made of.

pub(crate) mod backoff;
pub(crate) mod container;
mod ending;
pub(crate) mod env;
pub(crate) mod expand;
pub(crate) mod fields;
pub(crate) mod hosts;
pub(crate) mod message;
pub(crate) mod network_state;
pub(crate) mod observe;
pub(crate) mod plan;
pub(crate) mod report;
pub(crate) mod start;
mod starting;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod worker;
