//! The node's Lease in `kube-node-lease`: cheap proof of life (KEP-589).

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use orch_api::k8s_openapi::api::core::v1::Node;
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    MicroTime, ObjectMeta, OwnerReference,
};
use orch_client::{Api, Error};
use tracing::{debug, warn};

use crate::context::Context;

const NAMESPACE: &str = "kube-node-lease";
/// Wait after a renewal that failed: missing one must not mean missing two.
const RETRY: Duration = Duration::from_secs(1);

/// Renews for ever. The Lease is not given up at the end: the pods go on running.
///
/// # Cancel safety
/// A renewal that is dropped is renewed by the next run.
pub(crate) async fn run(cx: Arc<Context>) {
    let mut held: Option<Lease> = None;
    let mut failing = false;
    loop {
        // Half the life of the Lease: after an answer that never came there is time for another try.
        let limit = cx.options.lease_duration / 2;
        let renewed = match tokio::time::timeout(limit, renew(&cx, held.take())).await {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {limit:?}")),
        };
        let wait = match renewed {
            Ok(lease) => {
                held = Some(lease);
                failing = false;
                cx.options.lease_renew
            }
            Err(error) => {
                if failing {
                    debug!(error, "lease not renewed");
                } else {
                    warn!(error, "lease not renewed");
                }
                failing = true;
                RETRY.min(cx.options.lease_renew)
            }
        };
        tokio::time::sleep(wait).await;
    }
}

async fn renew(cx: &Context, held: Option<Lease>) -> Result<Lease, Error> {
    let leases = Api::<Lease>::namespaced(cx.client(), NAMESPACE);
    let name = &cx.options.node_name;
    if let Some(mut lease) = held {
        lease.spec = Some(spec(cx));
        match leases.replace(name, &lease).await {
            // Somebody changed or removed it: look again.
            Err(error) if error.is_conflict() || error.is_not_found() => {}
            outcome => return outcome,
        }
    }
    match leases.get_opt(name).await? {
        Some(mut lease) => {
            lease.spec = Some(spec(cx));
            leases.replace(name, &lease).await
        }
        None => {
            let owner = Api::<Node>::all(cx.client()).get_opt(name).await?;
            let owner_references = owner.map(|node| {
                vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Node".to_owned(),
                    name: name.clone(),
                    uid: node.metadata.uid.unwrap_or_default(),
                    ..OwnerReference::default()
                }]
            });
            let metadata = ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(NAMESPACE.to_owned()),
                owner_references,
                ..ObjectMeta::default()
            };
            leases.create(&Lease { metadata, spec: Some(spec(cx)) }).await
        }
    }
}

fn spec(cx: &Context) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(cx.options.node_name.clone()),
        lease_duration_seconds: i32::try_from(cx.options.lease_duration.as_secs()).ok(),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    }
}
