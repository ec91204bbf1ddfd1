//! Bootstrap tokens: those that have ended are removed, and one that was made for one host is used up by the first.
//!
//! A token is reusable until it ends, as upstream's: whoever adds ten hosts makes one. `orchctl token create` can narrow
//! it to one host (`--single-use`) or one node (`--node`); that stands in annotations of its Secret.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use orch_api::bootstrap_token::{NAMESPACE, NODE, SINGLE_USE, TYPE, USED_BY, secret_name};
use orch_api::meta;
use orch_client::{DeleteParams, ListParams, Patch};
use orch_reconcile::{Action, Informer, Queue, Reconciler};
use serde_json::json;
use tracing::info;

use crate::context::{Context, name};
use crate::error::{Failure, Step as _, gone_is_fine};

/// How long a host may still look after its request with a token that it has used up.
const LAST_USE: SignedDuration = SignedDuration::from_secs(60);

/// What the certificates have to know of a token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Token {
    name: String,
    resource_version: Option<String>,
    ends: Option<Timestamp>,
    /// The only node that it is good for.
    pub(crate) node: Option<String>,
    /// Good for one host.
    pub(crate) single_use: bool,
    /// The request that has used it up.
    pub(crate) used_by: Option<String>,
}

/// The token with this id; `None` when there is none any more.
pub(crate) async fn find(cx: &Context, id: &str) -> Result<Option<Token>, Failure> {
    let found = cx.api::<Secret>(NAMESPACE).get_opt(&secret_name(id)).await;
    Ok(found.step(|| format!("look for the token {id}"))?.map(|secret| Token::read(&secret)))
}

impl Token {
    fn read(secret: &Secret) -> Self {
        let note = |key: &str| secret.metadata.annotations.as_ref()?.get(key).cloned();
        Self {
            name: name(&secret.metadata).to_owned(),
            resource_version: secret.metadata.resource_version.clone(),
            ends: ends(secret),
            node: note(NODE),
            single_use: note(SINGLE_USE).as_deref() == Some("true"),
            used_by: note(USED_BY),
        }
    }

    /// Good for one host, and none has come yet.
    pub(crate) fn is_unused(&self) -> bool {
        self.single_use && self.used_by.is_none()
    }

    /// Makes it worthless to all but the request `by`, and end soon. Somebody else's change since it was read is an
    /// error: then it is looked at again.
    pub(crate) async fn use_up(&self, cx: &Context, by: &str) -> Result<(), Failure> {
        let soon = Timestamp::now() + LAST_USE;
        let ends = self.ends.map_or(soon, |ends| ends.min(soon));
        let ends = ends.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let patch = json!({
            "metadata": { "resourceVersion": self.resource_version, "annotations": { (USED_BY): by } },
            "data": { "expiration": ByteString(ends.into_bytes()) },
        });
        let used = cx.api::<Secret>(NAMESPACE).patch(&self.name, &Patch::Merge(patch)).await;
        used.map(drop).step(|| format!("use up {}", self.name))
    }
}

/// When it ends; `None` = never. What cannot be read opens nothing, and stays for people to see.
fn ends(secret: &Secret) -> Option<Timestamp> {
    let text = secret.data.as_ref()?.get("expiration")?;
    std::str::from_utf8(&text.0).ok()?.parse().ok()
}

/// Removes tokens that have ended; what was handed over with one goes with it, as what it owns.
pub(crate) struct Tokens {
    cx: Arc<Context>,
    tokens: Informer<Secret>,
}

impl Tokens {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let tokens: Informer<Secret> = cx.informers.selected(&ListParams {
            field_selector: Some(format!("metadata.namespace={NAMESPACE},type={TYPE}")),
            ..ListParams::default()
        });
        let changed = queue.clone();
        tokens.on_change(move |change| {
            if let Some(found) = change.object() {
                changed.add(name(&found.metadata).to_owned());
            }
        });
        (Arc::new(Self { cx, tokens }), queue)
    }

    pub(crate) async fn synced(&self) {
        self.tokens.synced().await;
    }
}

impl Reconciler for Tokens {
    type Error = Failure;
    const NAME: &'static str = "bootstrap-tokens";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let Some(found) = self.tokens.get(NAMESPACE, key) else { return Ok(Action::done()) };
        let Some(ends) = ends(&found) else { return Ok(Action::done()) };
        let left = ends.duration_since(Timestamp::now());
        if left.is_positive() {
            let left = Duration::try_from(left).unwrap_or_default();
            return Ok(Action::requeue(left + Duration::from_millis(10)));
        }
        let params = DeleteParams {
            precondition_uid: found.metadata.uid.clone(),
            ..DeleteParams::default()
        };
        let api = self.cx.api::<Secret>(NAMESPACE);
        gone_is_fine(api.delete(key, &params))
            .await
            .step(|| format!("delete the token {}", meta::key(&found.metadata)))?;
        info!(token = key, "a bootstrap token has ended");
        Ok(Action::done())
    }
}
