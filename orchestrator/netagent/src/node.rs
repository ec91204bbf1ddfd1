//! The node's subnet, mirrored into its Node object for whoever reads `podCIDR` there.

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use orch_client::{Api, Client, Error, Patch};
use orch_reconcile::Informer;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Duration, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::lease::Network;

/// Wait after a failed patch.
const RETRY: Duration = Duration::from_secs(2);

/// What to do about the Node object.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It says the same, or there is none yet.
    Nothing,
    /// It says nothing.
    Set,
    /// It says something else. The field is immutable once set, so a person has to delete the object.
    Differs(String),
}

fn plan(node: Option<&Node>, own: IpNetwork) -> Step {
    let Some(node) = node else { return Step::Nothing };
    match node
        .spec
        .as_ref()
        .and_then(|spec| spec.pod_cidr.as_deref())
        .filter(|cidr| !cidr.is_empty())
    {
        None => Step::Set,
        Some(cidr) if cidr.parse() == Ok(own) => Step::Nothing,
        Some(cidr) => Step::Differs(cidr.to_owned()),
    }
}

/// Follows the Node object and the lease until cancelled.
pub(crate) async fn mirror(
    client: Client,
    nodes: Informer<Node>,
    name: String,
    mut network: watch::Receiver<Option<Network>>,
    cancel: CancellationToken,
) {
    let mut changed = nodes.changed();
    let api = Api::<Node>::all(client);
    let mut warned = None;
    tokio::select! {
        () = cancel.cancelled() => return,
        () = nodes.synced() => {}
    }
    loop {
        changed.borrow_and_update();
        // IPv4 first, where there is both.
        let subnets: Vec<IpNetwork> =
            network.borrow_and_update().as_ref().map_or(Vec::new(), |network| {
                let v4 = network.own.v4.map(IpNetwork::V4);
                v4.into_iter().chain(network.own.v6.map(IpNetwork::V6)).collect()
            });
        let own = subnets.first().copied();
        let step = own.map_or(Step::Nothing, |own| plan(nodes.get("", &name).as_deref(), own));
        let mut retry = false;
        match (step, own) {
            (Step::Set, Some(own)) => match set(&api, &name, own, &subnets).await {
                Ok(()) => info!(pod_cidr = %own, "subnet written to the Node object"),
                Err(error) => {
                    retry = true;
                    debug!(error = %crate::chain(&error), "podCIDR is not written yet");
                }
            },
            (Step::Differs(theirs), Some(own)) if warned.as_ref() != Some(&theirs) => {
                warn!(
                    etcd = %own,
                    node = theirs,
                    "Node.spec.podCIDR differs from the subnet in etcd, which counts; `kubectl delete node {name}` lets it be written anew"
                );
                warned = Some(theirs);
            }
            _ => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
            changed = network.changed() => if changed.is_err() { return },
            () = sleep(RETRY), if retry => {}
        }
    }
}

async fn set(
    api: &Api<Node>,
    name: &str,
    own: IpNetwork,
    subnets: &[IpNetwork],
) -> Result<(), Error> {
    let all: Vec<String> = subnets.iter().map(ToString::to_string).collect();
    let patch = json!({"spec": {"podCIDR": own.to_string(), "podCIDRs": all}});
    api.patch(name, &Patch::Merge(patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_field_is_written() {
        let own: IpNetwork = "10.244.1.0/24".parse().expect("CIDR");
        let node = |spec: serde_json::Value| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec}))
                .expect("a Node")
        };
        assert_eq!(plan(None, own), Step::Nothing);
        assert_eq!(plan(Some(&node(json!({}))), own), Step::Set);
        assert_eq!(plan(Some(&node(json!({"podCIDR": "10.244.1.0/24"}))), own), Step::Nothing);
        let differs = Step::Differs("10.244.9.0/24".to_owned());
        assert_eq!(plan(Some(&node(json!({"podCIDR": "10.244.9.0/24"}))), own), differs);
    }
}
