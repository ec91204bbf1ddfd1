//! Namespaces: what each one has from the start, and their end.
//!
//! A namespace begins with the ServiceAccount `default` and the cluster's certificate in `kube-root-ca.crt`. One that
//! is deleted loses its pods, then everything else, then its finalizer.

mod content;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, NamespaceCondition, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use orch_reconcile::{Action, Queue, Reconciler};
use serde_json::{Value, json};
use tracing::info;

use crate::context::{Context, ROOT_CA, name, namespace};
use crate::error::{Failure, Step as _, is_namespace_ending};
use crate::gc::Kinds;

/// The finalizer of every namespace.
const FINALIZER: &str = "kubernetes";
/// Content of kinds that nobody watches is looked at again this often; changes of all others come as events.
const RECHECK: Duration = Duration::from_secs(2);

pub(crate) struct Namespaces {
    cx: Arc<Context>,
}

impl Namespaces {
    /// `kinds`: whatever may be in a namespace, to see it go.
    pub(crate) fn new(cx: Arc<Context>, kinds: &Kinds) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let changed = queue.clone();
        cx.namespaces.on_change(move |change| {
            if let Some(found) = change.object() {
                changed.add(name(&found.metadata).to_owned());
            }
        });
        let changed = queue.clone();
        cx.accounts.on_change(move |change| {
            // Of an existing one nothing is changed.
            if let (Some(old), None) = (&change.old, &change.new) {
                changed.add(namespace(&old.metadata).to_owned());
            }
        });
        let changed = queue.clone();
        cx.root_cas.on_change(move |change| {
            if let Some(found) = change.object() {
                changed.add(namespace(&found.metadata).to_owned());
            }
        });
        let (changed, namespaces) = (queue.clone(), cx.namespaces.clone());
        kinds.on_deletion(move |gone| {
            let ns = namespace(gone);
            if namespaces.get("", ns).is_some_and(|found| is_terminating(&found)) {
                changed.add(ns.to_owned());
            }
        });
        (Arc::new(Self { cx }), queue)
    }

    async fn ensure_account(&self, ns: &str) -> Result<(), Failure> {
        if self.cx.accounts.get(ns, "default").is_some() {
            return Ok(());
        }
        let account = ServiceAccount { metadata: named(ns, "default"), ..Default::default() };
        match self.cx.api::<ServiceAccount>(ns).create(&account).await {
            // Deleted in this moment: its end is the next thing we hear.
            Err(error) if error.is_already_exists() || is_namespace_ending(&error) => Ok(()),
            outcome => outcome.map(drop).step(|| "create the default ServiceAccount".to_owned()),
        }
    }

    async fn ensure_root_ca(&self, ns: &str) -> Result<(), Failure> {
        let data = [("ca.crt".to_owned(), self.cx.options.cluster_ca.clone())].into();
        let current = self.cx.root_cas.get(ns, ROOT_CA);
        if current.as_ref().is_some_and(|found| found.data.as_ref() == Some(&data)) {
            return Ok(());
        }
        let api = self.cx.api::<ConfigMap>(ns);
        let outcome = match current {
            Some(current) => {
                let changed =
                    ConfigMap { data: Some(data), binary_data: None, ..ConfigMap::clone(&current) };
                api.replace(ROOT_CA, &changed).await
            }
            None => {
                let mut metadata = named(ns, ROOT_CA);
                let text = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";
                metadata.annotations =
                    Some([("kubernetes.io/description".to_owned(), text.to_owned())].into());
                api.create(&ConfigMap { metadata, data: Some(data), ..Default::default() }).await
            }
        };
        match outcome {
            // Deleted in this moment: its end is the next thing we hear.
            Err(error) if error.is_already_exists() || is_namespace_ending(&error) => Ok(()),
            outcome => outcome.map(drop).step(|| "write the cluster's certificate".to_owned()),
        }
    }

    async fn finish(&self, found: &Namespace) -> Result<Action, Failure> {
        let ns = name(&found.metadata);
        let client = &self.cx.client;
        let resources = content::resources(client)
            .await
            .step(|| "find out what may be in the namespace".to_owned())?;
        let (pods, others): (Vec<_>, Vec<_>) =
            resources.into_iter().partition(|resource| resource.plural == "pods");
        // Pods first: what they use stays until they ended (KEP-5080).
        let mut left = content::delete_all(client, &pods, ns)
            .await
            .step(|| "delete the namespace's pods".to_owned())?;
        if left.is_empty() {
            left = content::delete_all(client, &others, ns)
                .await
                .step(|| "delete the namespace's content".to_owned())?;
        }
        if !left.is_empty() {
            self.tell(found, &left).await?;
            return Ok(Action::requeue(RECHECK));
        }
        self.finalize(found).await?;
        Ok(Action::done())
    }

    async fn finalize(&self, found: &Namespace) -> Result<(), Failure> {
        let ns = name(&found.metadata);
        let finalizers = found.spec.as_ref().and_then(|spec| spec.finalizers.clone());
        let others: Vec<String> =
            finalizers.into_iter().flatten().filter(|one| one != FINALIZER).collect();
        let body = json!({ "apiVersion": "v1", "kind": "Namespace",
                           "metadata": { "name": ns, "uid": found.metadata.uid }, "spec": { "finalizers": others } });
        let path = format!("/api/v1/namespaces/{ns}/finalize");
        let outcome: Result<Value, _> =
            self.cx.client.json(http::Method::PUT, &path, "application/json", Some(&body)).await;
        match outcome {
            Ok(_) => {
                info!(namespace = ns, "its content is deleted");
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error).step(|| "finalize the namespace".to_owned()),
        }
    }

    /// Says in the status what the end waits for.
    async fn tell(&self, found: &Namespace, left: &[content::Left]) -> Result<(), Failure> {
        let mut changed = found.clone();
        let status = changed.status.get_or_insert_default();
        let conditions = status.conditions.get_or_insert_default();
        let now = Timestamp::now();
        for (kind, message) in content::conditions(left) {
            let at = conditions.iter().position(|condition| condition.type_ == kind);
            let old = at.map(|at| conditions.remove(at));
            let Some(message) = message else { continue };
            conditions.push(NamespaceCondition {
                type_: kind.to_owned(),
                status: "True".to_owned(),
                reason: Some(
                    if kind == content::REMAINING {
                        "SomeResourcesRemain"
                    } else {
                        "SomeFinalizersRemain"
                    }
                    .to_owned(),
                ),
                message: Some(message),
                last_transition_time: old
                    .and_then(|old| old.last_transition_time)
                    .or(Some(Time(now))),
            });
        }
        if changed.status == found.status {
            return Ok(());
        }
        let outcome =
            self.cx.api::<Namespace>("").replace_status(name(&found.metadata), &changed).await;
        match outcome {
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            outcome => outcome.map(drop).step(|| "write what remains into the status".to_owned()),
        }
    }
}

impl Reconciler for Namespaces {
    type Error = Failure;
    const NAME: &'static str = "namespace";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let Some(found) = self.cx.namespaces.get("", key) else { return Ok(Action::done()) };
        if is_terminating(&found) {
            let finalizers = found.spec.as_ref().and_then(|spec| spec.finalizers.as_ref());
            if !finalizers.is_some_and(|all| all.iter().any(|one| one == FINALIZER)) {
                return Ok(Action::done());
            }
            return self.finish(&found).await;
        }
        self.ensure_account(key).await?;
        self.ensure_root_ca(key).await?;
        Ok(Action::done())
    }
}

fn is_terminating(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_some()
}

fn named(ns: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(ns.to_owned()),
        ..ObjectMeta::default()
    }
}
