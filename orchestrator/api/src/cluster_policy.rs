//! `ClusterNetworkPolicy` (policy.networking.k8s.io/v1alpha2), which `k8s-openapi` does not have: the words of the Network
//! Policy API's version 1alpha2.
//!
//! A field that is not known here is as if it were absent, and says so by what is left: a peer without any field. Who
//! enforces the policy then has to fail closed, as the API asks.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use k8s_openapi::{ClusterResourceScope, ListableResource, Metadata, Resource};
use serde::{Deserialize, Serialize};

/// API group of the kind.
pub const GROUP: &str = "policy.networking.k8s.io";
/// The version.
pub const VERSION: &str = "v1alpha2";

/// A policy of the cluster's administrator, above or below those of namespaces.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterNetworkPolicy {
    /// `policy.networking.k8s.io/v1alpha2`.
    pub api_version: Cow<'static, str>,
    /// `ClusterNetworkPolicy`.
    pub kind: Cow<'static, str>,
    /// Name, labels and the rest.
    pub metadata: ObjectMeta,
    /// What is wanted.
    pub spec: ClusterNetworkPolicySpec,
    /// What was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<ClusterNetworkPolicyStatus>,
}

impl Resource for ClusterNetworkPolicy {
    const API_VERSION: &'static str = "policy.networking.k8s.io/v1alpha2";
    const GROUP: &'static str = GROUP;
    const KIND: &'static str = "ClusterNetworkPolicy";
    const VERSION: &'static str = VERSION;
    const URL_PATH_SEGMENT: &'static str = "clusternetworkpolicies";
    type Scope = ClusterResourceScope;
}

impl ListableResource for ClusterNetworkPolicy {
    const LIST_KIND: &'static str = "ClusterNetworkPolicyList";
}

impl Metadata for ClusterNetworkPolicy {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterNetworkPolicySpec {
    /// `Admin`: before NetworkPolicies. `Baseline`: for pods that none of them selects.
    pub tier: String,
    /// 0 to 1000; the lowest is asked first.
    pub priority: i32,
    /// Pods to which it applies.
    pub subject: Subject,
    /// In order; the first that matches decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Vec<IngressRule>>,
    /// As above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterNetworkPolicyStatus {
    /// By type.
    pub conditions: Vec<Condition>,
}

/// Pods: exactly one field is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Subject {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
}

/// Some pods of some namespaces; an empty selector means all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NamespacedPod {
    /// Of the namespaces.
    pub namespace_selector: LabelSelector,
    /// Of the pods.
    pub pod_selector: LabelSelector,
}

/// What happens to connections to the subject.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct IngressRule {
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `Accept`, `Deny` or `Pass`.
    pub action: String,
    /// Sources.
    pub from: Vec<Peer>,
    /// Absent: all traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<Protocol>>,
}

/// What happens to connections of the subject.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EgressRule {
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `Accept`, `Deny` or `Pass`.
    pub action: String,
    /// Destinations.
    pub to: Vec<Peer>,
    /// Absent: all traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<Protocol>>,
}

/// The other end: exactly one field is set. Sources are only `namespaces` and `pods`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Peer {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
    /// Addresses of nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// Address ranges, whoever has the addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// Names in DNS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_names: Option<Vec<String>>,
}

/// Traffic: exactly one field is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Protocol {
    /// Of TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Destination>,
    /// Of UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<Destination>,
    /// Of SCTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sctp: Option<Destination>,
    /// Name of a container's port at the destination, of whichever protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_named_port: Option<String>,
}

/// Where traffic of a protocol goes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Destination {
    /// Ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<Port>,
}

/// Ports: exactly one field is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Port {
    /// One.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<i32>,
    /// Some in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<PortRange>,
}

/// First and last.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PortRange {
    /// The first port.
    pub start: i32,
    /// The last port.
    pub end: i32,
}
