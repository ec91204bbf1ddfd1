//! Services in the kernel: from Service and EndpointSlice to one nftables table for each address family.
//!
//! [`model`] reads the API objects into plain ports and endpoints, [`ruleset`] writes those (and the pod network's
//! masquerade) as a table, [`proxy`] keeps the kernel equal to it. The first two are pure. `health` answers load balancers.
//! [`connect_time`] does a part of that earlier, at the sockets of pods.

pub mod connect_time;
pub mod model;
pub mod proxy;
pub mod ruleset;

mod conntrack;
pub(crate) mod health;

pub use ruleset::TABLE;
