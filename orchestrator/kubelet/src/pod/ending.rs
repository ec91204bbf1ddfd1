//! The worker's part that ends a pod: containers, sidecars last, sandbox, network, volumes, and then the API object.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_client::{Api, DeleteParams};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::info;

use crate::api;
use crate::labels;
use crate::pod::observe::{Instance, Observed, observe};
use crate::pod::stop;
use crate::pod::worker::{Error, Next, Wanted, Worker};
use crate::volume;

/// Patience with containers whose pod is unknown: nobody waits for them.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);

impl Worker {
    /// Ends everything of the pod and then, if the API server still has it, the pod itself.
    pub(super) async fn end(&mut self, pod: Option<Arc<Pod>>) -> Result<Next, Error> {
        self.prober.stop();
        self.kills.abort_all();
        self.hooks.abort_all();
        if self.ending_since.is_none() {
            self.ending_since = Some(Instant::now());
            info!(pod = %self.pod_ref, "pod ends");
        }
        let observed = observe(self.cx.runtime(), &self.pod_ref.uid).await?;
        let known = pod.clone().or_else(|| self.latest.as_ref().map(|latest| latest.pod.clone()));
        self.end_containers(known.as_ref(), &observed).await?;
        let observed = observe(self.cx.runtime(), &self.pod_ref.uid).await?;
        if let Some(pod) = &pod {
            self.last_words(pod, &observed).await;
            let status = self.status_with(pod, &observed, &BTreeMap::new(), true, None);
            self.send(&status).await?;
        }
        self.clear(&observed).await?;
        let Some(pod) = pod else { return Ok(Next::Done) };
        let pods = Api::<Pod>::namespaced(self.cx.client(), &self.pod_ref.namespace);
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            precondition_uid: pod.metadata.uid.clone(),
            ..DeleteParams::default()
        };
        match pods.delete(&self.pod_ref.name, &params).await {
            Ok(()) => {}
            // Somebody else was faster.
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
        info!(pod = %self.pod_ref, "pod has ended");
        Ok(Next::Done)
    }

    pub(super) async fn last_words(&mut self, pod: &Pod, observed: &Observed) {
        let folder = self.cx.pod_folder(&self.pod_ref.uid);
        for container in api::all_containers(pod).cloned().chain(api::ephemeral_containers(pod)) {
            if let Some(instance) = observed.latest(&container.name)
                && !self.messages.contains_key(instance.id())
            {
                let text =
                    super::message::read(self.cx.runtime(), &folder, &container, instance).await;
                self.messages.insert(instance.id().to_owned(), text);
            }
        }
    }

    /// Removes all that is left: containers, sandboxes with their network, the folder.
    async fn clear(&mut self, observed: &Observed) -> Result<(), Error> {
        for instance in observed.instances() {
            self.cx.runtime().remove(instance.id()).await?;
        }
        for sandbox in &observed.sandboxes {
            self.disconnect(sandbox.id()).await?;
        }
        let folder = self.cx.pod_folder(&self.pod_ref.uid);
        tokio::task::spawn_blocking(move || volume::remove(&folder))
            .await
            .map_err(|error| Error::Other(error.to_string()))?
            .map_err(Error::Other)
    }

    fn grace(&self, pod: Option<&Arc<Pod>>) -> Duration {
        match (&*self.wanted.borrow(), pod) {
            (Wanted::Exists(pod), _) => {
                Duration::from_secs(u64::try_from(api::grace_seconds(pod)).unwrap_or(0))
            }
            // Deleted by force: whoever did it does not wait for the containers.
            (Wanted::Gone, _) => ORPHAN_GRACE,
        }
    }

    /// Ends all running containers, within the pod's grace period; sidecars after the others, last one first.
    pub(super) async fn end_containers(
        &mut self,
        pod: Option<&Arc<Pod>>,
        observed: &Observed,
    ) -> Result<(), Error> {
        let begun = self.ending_since.unwrap_or_else(Instant::now);
        let (deadline, listener) = watch::channel(begun + self.grace(pod));
        let sidecars: Vec<&str> = pod
            .into_iter()
            .flat_map(|pod| api::init_containers(pod))
            .filter(|container| api::is_sidecar(container))
            .map(|container| container.name.as_str())
            .collect();
        let running: Vec<Instance> = observed
            .instances()
            .filter(|instance| instance.container.is_running())
            .cloned()
            .collect();
        let name = |instance: &Instance| instance.container.label(labels::CONTAINER).to_owned();
        let (last, first): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|instance| sidecars.contains(&name(instance).as_str()));
        let ip = self.ips(observed).first().copied();
        let mut groups = vec![first];
        for sidecar in sidecars.iter().rev() {
            groups
                .push(last.iter().filter(|instance| name(instance) == *sidecar).cloned().collect());
        }
        let unknown = Arc::new(Pod::default());
        let pod = pod.unwrap_or(&unknown);
        for group in groups {
            let mut stops = JoinSet::new();
            for instance in group {
                let name = name(&instance);
                if pod.metadata.uid.is_some() {
                    let message = format!("Stopping container {name}");
                    self.cx.events.container(pod, &name, "Normal", "Killing", &message);
                }
                let (cx, pod, listener) = (self.cx.clone(), pod.clone(), listener.clone());
                stops.spawn(async move { stop::stop(&cx, &pod, &instance, ip, listener).await });
            }
            while !stops.is_empty() {
                tokio::select! {
                    Some(ended) = stops.join_next() => {
                        ended.map_err(|error| Error::Other(error.to_string()))??;
                    }
                    // A shorter grace period, or deletion by force, comes into force at once.
                    Ok(()) = self.wanted.changed() => {
                        let until = begun + self.grace(Some(pod));
                        deadline.send_if_modified(|old| {
                            let sooner = until < *old;
                            if sooner {
                                *old = until;
                            }
                            sooner
                        });
                    }
                }
            }
        }
        Ok(())
    }
}
