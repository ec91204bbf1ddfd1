//! Images: pull policy, pulls beside the pods' workers, and back-off after a failure.

pub(crate) mod credentials;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::{Container, Pod};
use orch_cri::{Credentials, Error, Image, Runtime};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::api::PodRef;
use crate::events::Events;
use crate::pod::plan::Waiting;

/// First and longest wait after a failed pull (kubelet's).
const FIRST_DELAY: Duration = Duration::from_secs(10);
const LONGEST_DELAY: Duration = Duration::from_secs(300);

/// What there is to say about a container's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Present(Image),
    /// Being pulled; the pod is woken when that ends.
    Pulling,
    /// Cannot be had now; look again after the time, if any.
    Missing(Waiting, Option<Duration>),
}

enum Pull {
    Running(Vec<Arc<Notify>>),
    Done,
    Failed { message: String, until: Instant, delay: Duration, told: bool },
}

/// All pulls of the node.
#[derive(Clone)]
pub(crate) struct Images {
    runtime: Arc<dyn Runtime>,
    events: Events,
    pulls: Arc<Mutex<BTreeMap<String, Pull>>>,
}

impl Images {
    pub(crate) fn new(runtime: Arc<dyn Runtime>, events: Events) -> Self {
        Self { runtime, events, pulls: Arc::default() }
    }

    /// The image for an attempt at a container; starts a pull where the policy asks for one.
    ///
    /// # Errors
    /// The engine does not answer.
    pub(crate) async fn ensure(
        &self,
        pod: &Pod,
        container: &Container,
        attempt: u32,
        credentials: &[Credentials],
        wake: &Arc<Notify>,
    ) -> Result<Outcome, Error> {
        let reference = container.image.clone().unwrap_or_default();
        if !is_valid_reference(&reference) {
            let message = format!(
                "Failed to apply default image tag \"{reference}\": couldn't parse image name: invalid reference format"
            );
            self.events.container(pod, &container.name, "Warning", "InspectFailed", &message);
            return Ok(Outcome::Missing(waiting("InvalidImageName", message), None));
        }
        let policy = policy(container, &reference);
        let present = self.runtime.image(&reference).await?;
        // `Always` asks the registry once per attempt; the other pulls are shared by all pods.
        let key = match policy {
            "Always" => format!("{reference} {} {} {attempt}", PodRef::of(pod).uid, container.name),
            _ => reference.clone(),
        };
        match (policy, present) {
            ("Never", None) => {
                let message = format!(
                    "Container image \"{reference}\" is not present with pull policy of Never; load it with `orchctl image load`"
                );
                self.events.container(
                    pod,
                    &container.name,
                    "Warning",
                    "ErrImageNeverPull",
                    &message,
                );
                Ok(Outcome::Missing(waiting("ErrImageNeverPull", message), Some(FIRST_DELAY)))
            }
            ("Never" | "IfNotPresent", Some(image)) => {
                let message = format!("Container image \"{reference}\" already present on machine");
                self.events.container(pod, &container.name, "Normal", "Pulled", &message);
                self.pulls.lock().remove(&key);
                Ok(Outcome::Present(image))
            }
            (_, present) => {
                Ok(self.pull(pod, container, &key, &reference, present, credentials, wake))
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one call site; a struct would only repeat the names"
    )]
    fn pull(
        &self,
        pod: &Pod,
        container: &Container,
        key: &str,
        reference: &str,
        present: Option<Image>,
        credentials: &[Credentials],
        wake: &Arc<Notify>,
    ) -> Outcome {
        let mut pulls = self.pulls.lock();
        let mut delay = FIRST_DELAY;
        match pulls.get_mut(key) {
            Some(Pull::Running(waiters)) => {
                waiters.push(wake.clone());
                return Outcome::Pulling;
            }
            Some(Pull::Done) => {
                if let Some(image) = present {
                    pulls.remove(key);
                    return Outcome::Present(image);
                }
            }
            Some(Pull::Failed { message, until, delay: last, told }) => {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    if !*told {
                        *told = true;
                        return Outcome::Missing(
                            waiting("ErrImagePull", message.clone()),
                            Some(Duration::from_secs(1)),
                        );
                    }
                    let message = format!("Back-off pulling image \"{reference}\": {message}");
                    self.events.container(pod, &container.name, "Normal", "BackOff", &message);
                    return Outcome::Missing(waiting("ImagePullBackOff", message), Some(left));
                }
                delay = (*last * 2).min(LONGEST_DELAY);
            }
            None => {}
        }
        pulls.insert(key.to_owned(), Pull::Running(vec![wake.clone()]));
        drop(pulls);
        self.events.container(
            pod,
            &container.name,
            "Normal",
            "Pulling",
            &format!("Pulling image \"{reference}\""),
        );
        self.spawn_pull(
            pod.clone(),
            container.name.clone(),
            key.to_owned(),
            reference.to_owned(),
            delay,
            credentials,
        );
        Outcome::Pulling
    }

    /// The pull ends by itself when the engine answers; nobody has to join it, as its outcome is kept in `pulls`.
    fn spawn_pull(
        &self,
        pod: Pod,
        container: String,
        key: String,
        reference: String,
        delay: Duration,
        credentials: &[Credentials],
    ) {
        let images = self.clone();
        let credentials = credentials::for_image(credentials, &reference).cloned();
        tokio::spawn(async move {
            let begun = Instant::now();
            let outcome = images.runtime.pull(&reference, credentials.as_ref()).await;
            let pull = match outcome {
                Ok(()) => {
                    let took = begun.elapsed().as_millis();
                    let message = format!("Successfully pulled image \"{reference}\" in {took}ms");
                    images.events.container(&pod, &container, "Normal", "Pulled", &message);
                    Pull::Done
                }
                Err(error) => {
                    let message = format!("failed to pull image \"{reference}\": {error}");
                    let told = format!(
                        "Failed to pull image \"{reference}\": {error}; without a registry, load it with `orchctl image load` and use imagePullPolicy IfNotPresent"
                    );
                    images.events.container(&pod, &container, "Warning", "Failed", &told);
                    images.events.container(
                        &pod,
                        &container,
                        "Warning",
                        "Failed",
                        "Error: ErrImagePull",
                    );
                    Pull::Failed { message, until: Instant::now() + delay, delay, told: false }
                }
            };
            if let Some(Pull::Running(waiters)) = images.pulls.lock().insert(key, pull) {
                waiters.iter().for_each(|waiter| waiter.notify_one());
            }
        });
    }
}

fn waiting(reason: &str, message: String) -> Waiting {
    Waiting { reason: reason.to_owned(), message }
}

/// The API server stores a policy; this is for pods that came another way.
fn policy<'a>(container: &'a Container, reference: &str) -> &'a str {
    match container.image_pull_policy.as_deref() {
        Some(policy) if !policy.is_empty() => policy,
        _ => {
            let last = reference.rsplit('/').next().unwrap_or(reference);
            if reference.contains('@') || (last.contains(':') && !last.ends_with(":latest")) {
                "IfNotPresent"
            } else {
                "Always"
            }
        }
    }
}

/// The form `[host[:port]/]path[:tag][@digest]` (OCI distribution specification, "Pulling manifests").
pub(crate) fn is_valid_reference(reference: &str) -> bool {
    let (name, digest) = match reference.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (reference, None),
    };
    if let Some(digest) = digest
        && !digest.split_once(':').is_some_and(|(kind, hex)| {
            !kind.is_empty() && hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    {
        return false;
    }
    let last_slash = name.rfind('/').map_or(0, |at| at + 1);
    let (path, tag) = match name[last_slash..].find(':') {
        Some(at) => (&name[..last_slash + at], Some(&name[last_slash + at + 1..])),
        None => (name, None),
    };
    let tag_fits = |tag: &str| {
        (1..=128).contains(&tag.len())
            && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
            && !tag.starts_with(['.', '-'])
    };
    if !tag.is_none_or(tag_fits) {
        return false;
    }
    let mut parts = path.split('/').peekable();
    let mut first = true;
    while let Some(part) = parts.next() {
        let is_host =
            first && parts.peek().is_some() && (part.contains(['.', ':']) || part == "localhost");
        first = false;
        let fits = if is_host {
            part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:".contains(&byte))
        } else {
            part.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte)
            }) && part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.ends_with(|c: char| c.is_ascii_alphanumeric())
        };
        if part.is_empty() || !fits {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_by_table() {
        for good in [
            "web",
            "web:1",
            "shop/web:v1.2-x",
            "host.example:5000/shop/web",
            "localhost/web:x",
            "a__b",
        ] {
            assert!(is_valid_reference(good), "{good}");
        }
        let digest = format!("web@sha256:{}", "a".repeat(64));
        assert!(is_valid_reference(&digest));
        for bad in [
            "",
            "Web",
            "web:",
            "web::1",
            "/web",
            "web/",
            "we b",
            "web@sha256:x",
            "-web",
            "web:.x",
            ":1",
        ] {
            assert!(!is_valid_reference(bad), "{bad}");
        }
    }

    #[test]
    fn the_policy_follows_the_tag() {
        let none = Container::default();
        assert_eq!(policy(&none, "web"), "Always");
        assert_eq!(policy(&none, "web:latest"), "Always");
        assert_eq!(policy(&none, "host:5000/web:1"), "IfNotPresent");
    }
}
