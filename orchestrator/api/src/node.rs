//! Helpers over nodes.

use k8s_openapi::api::core::v1::{Node, NodeCondition};

use crate::pod::Resources;

/// A condition of the node by type.
#[must_use]
pub fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == kind)
}

#[must_use]
pub fn is_ready(node: &Node) -> bool {
    condition(node, "Ready").is_some_and(|condition| condition.status == "True")
}

/// What pods may use of the node.
#[must_use]
pub fn allocatable(node: &Node) -> Resources {
    let status = node.status.as_ref();
    let map = status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref()));
    map.map(Resources::from_map).unwrap_or_default()
}

/// The address under which other nodes reach it.
#[must_use]
pub fn internal_ip(node: &Node) -> Option<&str> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses
        .iter()
        .find(|address| address.type_ == "InternalIP")
        .map(|address| address.address.as_str())
}
