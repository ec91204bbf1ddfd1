//! What the engine has of a pod, sorted by what it is for.

use std::collections::BTreeMap;

use orch_cri::{Container, Result, Runtime};

use crate::labels;

/// One container of the engine, as an attempt at a container of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) attempt: u32,
    pub(crate) container: Container,
}

impl Instance {
    pub(crate) fn id(&self) -> &str {
        &self.container.id
    }

    pub(crate) fn is_in(&self, sandbox: &str) -> bool {
        self.container.label(labels::SANDBOX_ID) == sandbox
    }
}

/// All that exists of one pod; newest attempts first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) sandboxes: Vec<Instance>,
    pub(crate) containers: BTreeMap<String, Vec<Instance>>,
}

impl Observed {
    pub(crate) fn from_containers(found: Vec<Container>) -> Self {
        let mut all = Self::default();
        for container in found {
            let instance = Instance {
                attempt: container.label(labels::ATTEMPT).parse().unwrap_or_default(),
                container,
            };
            let name = instance.container.label(labels::CONTAINER).to_owned();
            if name == labels::SANDBOX {
                all.sandboxes.push(instance);
            } else {
                all.containers.entry(name).or_default().push(instance);
            }
        }
        for list in all.containers.values_mut().chain([&mut all.sandboxes]) {
            list.sort_by_key(|instance| {
                std::cmp::Reverse((instance.attempt, instance.container.created_nanos))
            });
        }
        all
    }

    /// The newest sandbox, running or not.
    pub(crate) fn sandbox(&self) -> Option<&Instance> {
        self.sandboxes.first()
    }

    pub(crate) fn running_sandbox(&self) -> Option<&Instance> {
        self.sandbox().filter(|sandbox| sandbox.container.is_running())
    }

    pub(crate) fn latest(&self, name: &str) -> Option<&Instance> {
        self.containers.get(name)?.first()
    }

    pub(crate) fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.containers.values().flatten()
    }
}

pub(crate) async fn observe(runtime: &dyn Runtime, uid: &str) -> Result<Observed> {
    Ok(Observed::from_containers(runtime.list(&[(labels::POD_UID, uid)]).await?))
}
