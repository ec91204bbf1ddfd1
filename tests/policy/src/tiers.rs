//! The oracle about ClusterNetworkPolicies (policy.networking.k8s.io/v1alpha2), from the API's text and the JSON alone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::oracle::{Cluster, INGRESS, Side, Traffic, in_cidr, is_networked, serves};

impl Cluster {
    /// What a tier decides: policy, place of the rule, and whether it accepts.
    pub(crate) fn tier(
        &self,
        tier: &str,
        subject: &Pod,
        side: Side,
        other: IpAddr,
        traffic: Traffic,
    ) -> Option<(String, usize, bool)> {
        if !is_networked(subject) {
            return None;
        }
        let mut policies: Vec<&Value> = self
            .cluster_policies
            .iter()
            .filter(|policy| policy["spec"]["tier"] == tier)
            .filter(|policy| self.is_one_of(&policy["spec"]["subject"], subject))
            .collect();
        // "Policies with lower priority values have higher precedence." Equal ones: "the implementation can apply any";
        // ours takes the name.
        policies.sort_by_key(|policy| {
            let policy: &Value = policy;
            let name = policy["metadata"]["name"].as_str().unwrap_or_default();
            (policy["spec"]["priority"].as_i64(), name)
        });
        for policy in policies {
            let list = if side == INGRESS { "ingress" } else { "egress" };
            let rules = policy["spec"][list].as_array().map(Vec::as_slice).unwrap_or_default();
            // "A rule that appears at the top would take the highest precedence."
            for (place, rule) in rules.iter().enumerate() {
                let Some(action) = self.matched(rule, subject, side, other, traffic) else {
                    continue;
                };
                let name = policy["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                return match action.as_str() {
                    "Accept" => Some((name, place, true)),
                    "Deny" => Some((name, place, false)),
                    // "Skips all further ClusterNetworkPolicy rules in the current tier."
                    _ => None,
                };
            }
        }
        None
    }

    /// What the rule does with the traffic, if it matches.
    fn matched(
        &self,
        rule: &Value,
        subject: &Pod,
        side: Side,
        other: IpAddr,
        traffic: Traffic,
    ) -> Option<String> {
        let action = rule["action"].as_str()?.to_owned();
        let peers = rule[if side == INGRESS { "from" } else { "to" }].as_array()?;
        let mut peer_fits = false;
        for peer in peers {
            match self.is_peer_of_tier(peer, side, other) {
                Some(fits) => peer_fits |= fits,
                // "For Accept rules, fail closed means: treat the rule as matching no traffic. For Deny and Pass rules:
                // treat the rule as a Deny all rule."
                None if action == "Accept" => return None,
                None => return Some("Deny".to_owned()),
            }
        }
        let receiver = if side == INGRESS { Some(subject) } else { self.pod_at(other) };
        let port_fits = rule["protocols"].as_array().is_none_or(|list| {
            list.iter().any(|protocol| is_protocol(protocol, receiver, traffic))
        });
        (peer_fits && port_fits).then_some(action)
    }

    /// `None`: a peer that cannot be understood.
    fn is_peer_of_tier(&self, peer: &Value, side: Side, other: IpAddr) -> Option<bool> {
        let mut fields = peer.as_object()?.keys();
        let field = fields.next()?.as_str();
        if fields.next().is_some() {
            return None;
        }
        match (field, side == INGRESS) {
            ("namespaces" | "pods", _) => {
                Some(self.pod_at(other).is_some_and(|pod| self.is_one_of(peer, pod)))
            }
            // "matching on the IPs present in the node.Status.Addresses field of the node"
            ("nodes", false) => Some(self.nodes.iter().any(|(name, ips)| {
                ips.contains(&other) && has(&peer["nodes"], self.node_labels.get(name))
            })),
            // "cluster-internal traffic will be checked against the rule as well"
            ("networks", false) => {
                let networks = peer["networks"].as_array()?;
                Some(
                    networks
                        .iter()
                        .any(|cidr| cidr.as_str().is_some_and(|cidr| in_cidr(cidr, other))),
                )
            }
            _ => None,
        }
    }

    /// Subjects, and peers that are pods.
    fn is_one_of(&self, value: &Value, pod: &Pod) -> bool {
        let pods = &value["pods"];
        let (namespaces, pods) = match &value["namespaces"] {
            Value::Null => (&pods["namespaceSelector"], &pods["podSelector"]),
            namespaces => (namespaces, &Value::Null),
        };
        let namespace =
            self.namespaces.iter().find(|one| one.metadata.name == pod.metadata.namespace);
        namespace.is_some_and(|one| has(namespaces, one.metadata.labels.as_ref()))
            && has(pods, pod.metadata.labels.as_ref())
    }
}

/// matchLabels and matchExpressions are ANDed; an empty selector matches all objects.
fn has(selector: &Value, labels: Option<&BTreeMap<String, String>>) -> bool {
    let label = |key: &str| labels.and_then(|all| all.get(key)).map(String::as_str);
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let expressions = selector["matchExpressions"].as_array().into_iter().flatten();
    equal.into_iter().all(|(key, value)| label(key) == value.as_str())
        && expressions.into_iter().all(|one| {
            let found = label(one["key"].as_str().unwrap_or_default());
            let listed = one["values"].as_array().into_iter().flatten();
            let is_listed =
                listed.into_iter().any(|value| found.is_some() && value.as_str() == found);
            match one["operator"].as_str() {
                Some("Exists") => found.is_some(),
                Some("DoesNotExist") => found.is_none(),
                Some("In") => is_listed,
                Some("NotIn") => !is_listed,
                other => panic!("worlds have no operator {other:?}"),
            }
        })
}

fn is_protocol(protocol: &Value, receiver: Option<&Pod>, traffic: Traffic) -> bool {
    if let Some(name) = protocol["destinationNamedPort"].as_str() {
        return receiver.is_some_and(|pod| serves(pod, name, traffic));
    }
    let key = match traffic.protocol {
        "TCP" => "tcp",
        "UDP" => "udp",
        "SCTP" => "sctp",
        _ => return false,
    };
    let port = &protocol[key]["destinationPort"];
    if let Some(number) = port["number"].as_u64() {
        return number == u64::from(traffic.port);
    }
    match (port["range"]["start"].as_u64(), port["range"]["end"].as_u64()) {
        (Some(start), Some(end)) => (start..=end).contains(&traffic.port.into()),
        _ => false,
    }
}
