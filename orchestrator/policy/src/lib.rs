//! The policy compiler: pods, namespaces, nodes, NetworkPolicies and ClusterNetworkPolicies in, what the data plane of one node shall hold out.
//! Pure: no I/O, no clock, no state of its own.
//!
//! The caller reads the API's objects into a [`World`] (once for each change of an object) and calls [`compile()`] with it
//! and the last [`Compiled`]. The output has two parts, which are two kernel maps: *peers*, from address prefixes to a
//! class, and for each endpoint (a pod of this node) a *decision table* over direction × class × protocol × port. A
//! [`Plan`] is what to write to get from one output to the next. [`Compiled::judge`] answers for one packet, and names
//! the policy and rule.
//!
//! What a NetworkPolicy means is in [`spec`](Policy) (reading) and `compile` (combining); where the API leaves room:
//!
//! - Other protocols than TCP, UDP and SCTP pass an isolated pod only by a rule without `ports`.
//! - `ipBlock` means addresses, also those of pods.
//! - Host-network pods are neither subject nor peer; their address is their node's.
//! - What cannot be understood allows nothing.
//! - Of two ClusterNetworkPolicies of one tier and priority, the one whose name comes first is asked first.
//!
//! Start reading in `compile.rs`. An oracle that shares nothing with this crate is `tests/policy`.

mod cluster;
mod compile;
mod index;
mod judge;
mod moves;
mod number;
mod plan;
mod prefix;
mod rows;
mod select;
mod spec;
mod table;
mod world;

pub use cluster::ClusterPolicy;
pub use compile::{Compiled, Peer, PolicyId, RuleRef, compile};
pub use judge::Judgement;
pub use moves::Moves;
pub use plan::{Plan, Publish};
pub use prefix::Prefix;
pub use spec::Policy;
pub use table::{Class, Direction, Ports, Row, RuleId, Table, Verdict};
pub use world::{Name, PeerKind, PodFacts, PortName, Protocol, World};
