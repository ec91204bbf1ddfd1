//! What NetworkPolicy means, said a second time: an oracle to test the compiler and the data plane against.
//!
//! [`oracle`] is written from the text of the API (networking.k8s.io/v1 and the Kubernetes page "Network Policies"; for
//! ClusterNetworkPolicies policy.networking.k8s.io/v1alpha2). It
//! shares no code and no data structure with `orch-policy` or the eBPF programs, and goes a different way on purpose: it
//! compiles nothing, keeps nothing, and walks all objects for every question. [`worlds`] makes clusters to ask about.

#[cfg(test)]
mod compiler;
pub mod frames;
pub mod oracle;
mod tiers;
pub mod worlds;
