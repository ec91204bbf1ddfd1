//! Cluster DNS on this node (Kubernetes DNS specification 1.1.0).
//!
//! [`zone`] is the cluster as names, built from Services, EndpointSlices and Namespaces; [`answer`] answers a query
//! from it; both are pure. [`forward`] asks the resolvers outside for all other names, [`server`] does the talking. The
//! zone is this process's memory, so names go on being answered while the API server is away.
//!
//! `hickory-server` was the other road: its authorities are zone files in memory with updates and signing, where here
//! every answer is computed, and its catalog would need one more translation than the two small loops do.

pub mod answer;
pub mod forward;
pub mod server;
pub(crate) mod task;
pub mod zone;
