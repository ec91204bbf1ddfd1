//! The worker's part that starts what the plan names.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_cri::Image;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::api;
use crate::image::{self, Outcome};
use crate::pod::container::Sandbox;
use crate::pod::env;
use crate::pod::network_state::Connected;
use crate::pod::observe::Observed;
use crate::pod::plan::{Plan, Start, Waiting};
use crate::pod::start::{self, Failure, Materials};
use crate::pod::worker::{Error, Worker};
use crate::probe::handler::{self, Target};
use crate::references;
use crate::volume::{self, Sources};

/// Wait after a container could not be made; the cause is usually an object that does not exist yet.
const CONFIG_RETRY: Duration = Duration::from_secs(3);
/// First and longest wait after a sandbox could not be made.
const SANDBOX_RETRY: Duration = Duration::from_secs(1);
const SANDBOX_LONGEST: Duration = Duration::from_secs(30);

impl Worker {
    /// Makes the sandbox and containers of the plan. `None`: something was done, look again; else when the next try
    /// is due.
    pub(super) async fn start(
        &mut self,
        pod: &Arc<Pod>,
        observed: &Observed,
        plan: &Plan,
    ) -> Result<Option<Duration>, Error> {
        if plan.sandbox.is_some()
            && let Some((after, _)) = self.sandbox_after
            && after > Instant::now()
        {
            return Ok(Some(after - Instant::now()));
        }
        let now = Instant::now();
        if let Some(after) = self.mounts_after.filter(|after| *after > now) {
            return Ok(Some(after - now));
        }
        self.refused.retain(|name, (_, until)| {
            *until > now || !plan.start.iter().any(|start| start.name == *name)
        });
        let due: Vec<Start> = plan
            .start
            .iter()
            .filter(|start| !self.refused.contains_key(&start.name))
            .cloned()
            .collect();
        if due.is_empty() && plan.sandbox.is_none() {
            let first = self.refused.values().map(|(_, until)| *until - now).min();
            return Ok(Some(first.unwrap_or(CONFIG_RETRY)));
        }
        let folder = self.cx.pod_folder(&self.pod_ref.uid);
        let cx = self.cx.clone();
        if plan.sandbox.is_some()
            && !api::is_host_network(pod)
            && let Err(missing) = cx.network.ready().await
        {
            // Not a failure of the pod: the network agent is at it, and no sandbox is made in vain.
            let message = format!("network is not ready: {missing}");
            cx.events.pod(pod, "Warning", "NetworkNotReady", &message);
            return Ok(Some(SANDBOX_RETRY));
        }
        let _permit = cx.starts.acquire().await.map_err(|error| Error::Other(error.to_string()))?;
        let (images, pulls_due) = self.images(pod, &due).await?;
        if images.is_empty() && plan.sandbox.is_none() {
            return Ok(Some(pulls_due.unwrap_or(CONFIG_RETRY)));
        }
        // Sandbox and volumes are made side by side, unless that was in vain the last time.
        if self.mounts_after.is_some()
            && let Err(error) = self.materials(pod, &folder).await
        {
            return self.not_mounted(pod, error);
        }
        self.mounts_after = None;
        match plan.sandbox {
            Some(attempt) => {
                start::write_files(&cx, pod, &folder, &[])
                    .map_err(|error| Error::Other(error.to_string()))?;
                let (sandbox, materials) = tokio::join!(
                    start::create_sandbox(&cx, pod, attempt),
                    self.materials(pod, &folder)
                );
                let (sandbox, materials) = match (sandbox, materials) {
                    (Ok(sandbox), Ok(materials)) => (sandbox, materials),
                    (Ok(sandbox), Err(error)) => {
                        cx.runtime().remove(&sandbox.id).await?;
                        return self.not_mounted(pod, error);
                    }
                    (Err(error), _) if error.is_unavailable() => return Err(error.into()),
                    (Err(error), _) => {
                        return Ok(Some(self.sandbox_failed(pod, &error.to_string())));
                    }
                };
                let early: Vec<_> = images
                    .iter()
                    .filter(|(start, _)| !waits_for_address(pod, start))
                    .cloned()
                    .collect();
                let (connected, created) = tokio::join!(
                    start::start_sandbox(&cx, pod, &sandbox, &folder),
                    create_all(&cx, pod, &early, &sandbox, &materials, &[])
                );
                let ips = match connected {
                    Ok(ips) => ips,
                    Err(error) => {
                        for (_, created) in created {
                            if let Ok(id) = created {
                                cx.runtime().remove(&id).await?;
                            }
                        }
                        self.disconnect(&sandbox.id).await?;
                        return Ok(Some(self.sandbox_failed(pod, &error)));
                    }
                };
                self.sandbox_after = None;
                info!(pod = %self.pod_ref, sandbox = sandbox.id, ?ips, "sandbox is up");
                self.connected = Some(Connected { sandbox: sandbox.id.clone(), ips: ips.clone() });
                start::write_files(&cx, pod, &folder, &ips)
                    .map_err(|error| Error::Other(error.to_string()))?;
                let late: Vec<_> =
                    images.into_iter().filter(|(start, _)| waits_for_address(pod, start)).collect();
                let mut all = created;
                if !late.is_empty() {
                    // Their volumes may show the address as well.
                    let materials = self.materials(pod, &folder).await;
                    match materials {
                        Ok(materials) => all
                            .extend(create_all(&cx, pod, &late, &sandbox, &materials, &ips).await),
                        Err(error) => return self.not_mounted(pod, error),
                    }
                }
                self.run_all(pod, all, ips.first().copied()).await?;
            }
            None => {
                let Some(sandbox) = observed.running_sandbox() else { return Ok(None) };
                let sandbox =
                    Sandbox { id: sandbox.id().to_owned(), host_network: cx.host_network() };
                let ips = self.ips(observed);
                start::write_files(&cx, pod, &folder, &ips)
                    .map_err(|error| Error::Other(error.to_string()))?;
                let materials = match self.materials(pod, &folder).await {
                    Ok(materials) => materials,
                    Err(error) => return self.not_mounted(pod, error),
                };
                let all = create_all(&cx, pod, &images, &sandbox, &materials, &ips).await;
                self.run_all(pod, all, ips.first().copied()).await?;
            }
        }
        Ok(None)
    }

    /// The images that are there, for the containers that can start now.
    async fn images(
        &mut self,
        pod: &Pod,
        due: &[Start],
    ) -> Result<(Vec<(Start, Image)>, Option<Duration>), Error> {
        if self.credentials.is_empty()
            && pod.spec.as_ref().is_some_and(|spec| spec.image_pull_secrets.is_some())
        {
            self.credentials = image::credentials::fetch(&self.cx.client(), pod).await;
        }
        let mut found = Vec::new();
        let mut again: Option<Duration> = None;
        for start in due {
            let Some(container) = api::find_container(pod, &start.name) else { continue };
            let images = &self.cx.images;
            match images
                .ensure(pod, &container, start.attempt, &self.credentials, &self.wake)
                .await?
            {
                Outcome::Present(image) => found.push((start.clone(), image)),
                Outcome::Pulling => {
                    again = Some(again.map_or(RETRY_AFTER_WAKE, |old| old.min(RETRY_AFTER_WAKE)))
                }
                Outcome::Missing(waiting, retry) => {
                    let retry = retry.unwrap_or(NEVER_BY_ITSELF);
                    self.refused.insert(start.name.clone(), (waiting, Instant::now() + retry));
                    again = Some(again.map_or(retry, |old| old.min(retry)));
                }
            }
        }
        Ok((found, again))
    }

    /// What the pod's containers are made from, freshly read; the last copy serves while the API server is away.
    async fn materials(&mut self, pod: &Pod, folder: &Path) -> Result<Materials, String> {
        let client = self.cx.client();
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let cx = self.cx.clone();
        let (references, services, tokens) = tokio::join!(
            references::fetch(&client, pod),
            cx.services.visible(&namespace),
            self.tokens.ensure(&client, pod)
        );
        tokens?;
        match references {
            Ok(references) => self.references = Some(references),
            Err(error) if self.references.is_none() => {
                return Err(format!("read what the pod refers to: {error}"));
            }
            Err(error) => {
                warn!(pod = %self.pod_ref, %error, "the last copy of ConfigMaps and Secrets is used")
            }
        }
        let services = services
            .map_err(|error| format!("list Services for the pod's environment: {error}"))?;
        let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
        let references = self.references.clone().unwrap_or_default();
        let ips = self.connected.as_ref().map(|known| known.ips.clone()).unwrap_or_default();
        let sources =
            Sources { references: &references, tokens: &self.tokens, place: &cx.place(&ips) };
        let volumes = volume::ensure(folder, pod, &sources)?;
        self.volumes_due = Instant::now() + cx.options.volume_refresh;
        Ok(Materials {
            volumes,
            services: env::service_variables(&namespace, links, &services),
            references,
            folder: folder.to_owned(),
        })
    }

    /// What the worker itself has made and removed wakes it: the next try has a time of its own.
    fn not_mounted(&mut self, pod: &Pod, error: String) -> Result<Option<Duration>, Error> {
        self.mounts_after = Some(Instant::now() + CONFIG_RETRY);
        self.cx.events.pod(pod, "Warning", "FailedMount", &error);
        Ok(Some(CONFIG_RETRY))
    }

    fn sandbox_failed(&mut self, pod: &Pod, error: &str) -> Duration {
        let message = format!("Failed to create pod sandbox: {error}");
        self.cx.events.pod(pod, "Warning", "FailedCreatePodSandBox", &message);
        warn!(pod = %self.pod_ref, error, "sandbox not made");
        let delay =
            self.sandbox_after.map_or(SANDBOX_RETRY, |(_, last)| (last * 2).min(SANDBOX_LONGEST));
        self.sandbox_after = Some((Instant::now() + delay, delay));
        delay
    }

    /// Starts what was created, and sees to the postStart hooks.
    async fn run_all(
        &mut self,
        pod: &Arc<Pod>,
        created: Vec<(Start, Result<String, Failure>)>,
        ip: Option<IpAddr>,
    ) -> Result<(), Error> {
        let cx = self.cx.clone();
        let started = futures::future::join_all(created.into_iter().map(|(start, created)| {
            let cx = cx.clone();
            async move {
                let id = match created {
                    Ok(id) => id,
                    Err(failure) => return (start, Err(failure)),
                };
                let outcome = start::start_container(&cx, &id).await;
                (start, outcome.map(|()| id))
            }
        }))
        .await;
        for (start, outcome) in started {
            match outcome {
                Ok(id) => {
                    self.backoff_after(&start);
                    let message = format!("Created container: {}", start.name);
                    cx.events.container(pod, &start.name, "Normal", "Created", &message);
                    let message = format!("Started container {}", start.name);
                    cx.events.container(pod, &start.name, "Normal", "Started", &message);
                    self.post_start(pod, &start, id, ip);
                }
                Err(Failure::Engine(error)) => return Err(error.into()),
                Err(Failure::Waiting(waiting)) => self.refuse(pod, &start, waiting),
            }
        }
        Ok(())
    }

    /// The first attempt costs nothing; each later one makes the next wait longer.
    fn backoff_after(&mut self, start: &Start) {
        if start.attempt > 0 {
            self.backoff.next(&start.name, Timestamp::now());
        } else {
            self.backoff.forget(&start.name);
        }
    }

    fn refuse(&mut self, pod: &Pod, start: &Start, waiting: Waiting) {
        let message = format!("Error: {}", waiting.message);
        self.cx.events.container(pod, &start.name, "Warning", "Failed", &message);
        let delay = if waiting.reason == "RunContainerError" {
            self.backoff.next(&start.name, Timestamp::now());
            let failed = Timestamp::now();
            self.backoff
                .remaining(&start.name, failed, failed)
                .map_or(CONFIG_RETRY, |(left, _)| left)
        } else {
            CONFIG_RETRY
        };
        self.refused.insert(start.name.clone(), (waiting, Instant::now() + delay));
    }

    fn post_start(&mut self, pod: &Arc<Pod>, start: &Start, id: String, ip: Option<IpAddr>) {
        let Some(container) =
            api::all_containers(pod).find(|container| container.name == start.name)
        else {
            return;
        };
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.clone());
        let Some(hook) = hook else { return };
        self.held.insert(id.clone());
        let target = Target { container: container.clone(), container_id: id.clone(), ip };
        let (cx, name) = (self.cx.clone(), start.name.clone());
        self.hooks.spawn(async move {
            let outcome = handler::hook(&cx, &target, &hook).await;
            (id, name, outcome)
        });
    }

    /// Brings volumes from the API up to date when that is due.
    pub(super) async fn refresh_volumes(&mut self, pod: &Pod, observed: &Observed) {
        let due = self.volumes_due <= Instant::now();
        if !due || observed.running_sandbox().is_none() || !volume::has_live_content(pod) {
            return;
        }
        let folder = self.cx.pod_folder(&self.pod_ref.uid);
        if let Err(error) = self.materials(pod, &folder).await {
            warn!(pod = %self.pod_ref, error, "volumes not refreshed");
        }
        self.volumes_due = Instant::now() + self.cx.options.volume_refresh;
    }
}

/// A pull wakes the worker when it ends; this is for the case that the wake is lost.
const RETRY_AFTER_WAKE: Duration = Duration::from_secs(30);
/// Only a change of the pod helps.
const NEVER_BY_ITSELF: Duration = Duration::from_secs(300);

fn waits_for_address(pod: &Pod, start: &Start) -> bool {
    api::all_containers(pod)
        .any(|container| container.name == start.name && start::needs_address(container))
}

async fn create_all(
    cx: &Arc<crate::context::Context>,
    pod: &Pod,
    wanted: &[(Start, Image)],
    sandbox: &Sandbox,
    materials: &Materials,
    ips: &[IpAddr],
) -> Vec<(Start, Result<String, Failure>)> {
    futures::future::join_all(wanted.iter().map(|(start, image)| async move {
        let created = start::create_container(cx, pod, start, image, sandbox, materials, ips).await;
        (start.clone(), created)
    }))
    .await
}
