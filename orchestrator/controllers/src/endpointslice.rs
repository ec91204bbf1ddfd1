//! Services to endpoints: the pods that a Service selects, as EndpointSlices (discovery.k8s.io/v1) and, for older
//! clients, as one Endpoints object of the Service's name. Where a Service selects nothing and somebody writes its
//! Endpoints by hand, those become slices ([`mirror`]).

mod endpoints;
mod mirror;
mod plan;
mod slices;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_api::{Selector, meta};
use orch_client::DeleteParams;
use orch_reconcile::{Action, Queue, Reconciler};

use crate::context::{Context, name, namespace, uid};
use crate::error::{Failure, Step as _, gone_is_fine, is_namespace_ending};

/// Which Service a slice belongs to.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";

pub(crate) struct EndpointSlices {
    cx: Arc<Context>,
}

impl EndpointSlices {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let changed = queue.clone();
        cx.services.on_change(move |change| {
            if let Some(service) = change.object() {
                changed.add(meta::key(&service.metadata));
            }
        });
        let (changed, services) = (queue.clone(), cx.services.clone());
        cx.pods.on_change(move |change| {
            let Some(pod) = change.object() else { return };
            if let (Some(old), Some(new)) = (&change.old, &change.new)
                && plan::looks_same(old, new)
            {
                return;
            }
            for service in services.list_in(namespace(&pod.metadata)) {
                let both = [&change.old, &change.new].into_iter().flatten();
                if both.into_iter().any(|pod| selects(&service, pod)) {
                    changed.add(meta::key(&service.metadata));
                }
            }
        });
        let changed = queue.clone();
        cx.slices.on_change(move |change| {
            for slice in [&change.old, &change.new]
                .into_iter()
                .flatten()
                .filter(|s| is_ours(s) || mirror::is_mirror(s))
            {
                if let Some(service) = label(slice, SERVICE_NAME) {
                    changed.add(format!("{}/{service}", namespace(&slice.metadata)));
                }
            }
        });
        let changed = queue.clone();
        cx.endpoints.on_change(move |change| {
            if let Some(endpoints) = change.object() {
                changed.add(meta::key(&endpoints.metadata));
            }
        });
        (Arc::new(Self { cx }), queue)
    }

    fn own_slices(&self, ns: &str, service: &str) -> Vec<Arc<EndpointSlice>> {
        let all = self.cx.slices.list_in(ns).into_iter();
        all.filter(|slice| is_ours(slice) && label(slice, SERVICE_NAME) == Some(service)).collect()
    }

    /// Slices of Endpoints that somebody else wrote; `wanted`: the Service has no selector.
    async fn write_mirrors(&self, ns: &str, service: &str, wanted: bool) -> Result<(), Failure> {
        let all = self.cx.slices.list_in(ns).into_iter();
        let current: Vec<_> = all
            .filter(|slice| mirror::is_mirror(slice) && label(slice, SERVICE_NAME) == Some(service))
            .collect();
        let endpoints = self.cx.endpoints.get(ns, service).filter(|_| wanted);
        self.carry_out(ns, mirror::plan(endpoints.as_deref(), &current)).await
    }

    /// The Service is gone, or selects nothing any more.
    async fn remove(&self, ns: &str, service: &str, with_endpoints: bool) -> Result<(), Failure> {
        for slice in self.own_slices(ns, service) {
            self.delete_slice(&slice).await?;
        }
        let endpoints = self.cx.endpoints.get(ns, service).filter(|_| with_endpoints);
        if let Some(endpoints) = endpoints.filter(|found| endpoints::is_ours(found)) {
            let params = DeleteParams {
                precondition_uid: endpoints.metadata.uid.clone(),
                ..DeleteParams::default()
            };
            let api = self.cx.api::<Endpoints>(ns);
            gone_is_fine(api.delete(service, &params))
                .await
                .step(|| "delete the endpoints".to_owned())?;
        }
        Ok(())
    }

    async fn delete_slice(&self, slice: &EndpointSlice) -> Result<(), Failure> {
        let params = DeleteParams {
            precondition_uid: slice.metadata.uid.clone(),
            ..DeleteParams::default()
        };
        let api = self.cx.api::<EndpointSlice>(namespace(&slice.metadata));
        gone_is_fine(api.delete(name(&slice.metadata), &params))
            .await
            .step(|| format!("delete slice {}", name(&slice.metadata)))
    }

    async fn write_slices(&self, service: &Service, pods: &[plan::Backend]) -> Result<(), Failure> {
        let (ns, service_name) = (namespace(&service.metadata), name(&service.metadata));
        let steps = slices::plan(service, pods, &self.own_slices(ns, service_name));
        self.carry_out(ns, steps).await
    }

    async fn carry_out(&self, ns: &str, steps: Vec<slices::Step>) -> Result<(), Failure> {
        let api = self.cx.api::<EndpointSlice>(ns);
        for step in steps {
            match step {
                slices::Step::Create(slice) => {
                    match api.create(&slice).await {
                        Err(error) if is_namespace_ending(&error) => return Ok(()),
                        outcome => outcome,
                    }
                    .step(|| format!("create slice {}", name(&slice.metadata)))?;
                }
                slices::Step::Update(slice) => {
                    api.replace(name(&slice.metadata), &slice)
                        .await
                        .step(|| format!("update slice {}", name(&slice.metadata)))?;
                }
                slices::Step::Delete(slice) => self.delete_slice(&slice).await?,
            }
        }
        Ok(())
    }

    async fn write_endpoints(
        &self,
        service: &Service,
        pods: &[plan::Backend],
    ) -> Result<(), Failure> {
        let (ns, service_name) = (namespace(&service.metadata), name(&service.metadata));
        let api = self.cx.api::<Endpoints>(ns);
        let current = self.cx.endpoints.get(ns, service_name);
        let wanted = endpoints::desired(service, pods, current.as_deref());
        match current {
            None => match api.create(&wanted).await {
                Err(error) if is_namespace_ending(&error) => Ok(()),
                outcome => outcome.map(drop),
            },
            Some(current) if endpoints::is_same(&current, &wanted) => Ok(()),
            Some(_) => api.replace(service_name, &wanted).await.map(drop),
        }
        .step(|| "write the endpoints".to_owned())
    }
}

impl Reconciler for EndpointSlices {
    type Error = Failure;
    const NAME: &'static str = "endpointslice";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let (ns, service_name) = meta::split_key(key);
        let Some(service) = self.cx.services.get(ns, service_name) else {
            self.remove(ns, service_name, true).await?;
            self.write_mirrors(ns, service_name, false).await?;
            return Ok(Action::done());
        };
        if selector(&service).is_none() {
            // Its owner writes the endpoints; only slices of an earlier selector are ours.
            self.remove(ns, service_name, false).await?;
            let wanted = service.metadata.deletion_timestamp.is_none();
            self.write_mirrors(ns, service_name, wanted).await?;
            return Ok(Action::done());
        }
        self.write_mirrors(ns, service_name, false).await?;
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Action::done());
        }
        let pods: Vec<plan::Backend> = self
            .cx
            .pods
            .list_in(ns)
            .iter()
            .filter(|pod| selects(&service, pod))
            .filter_map(|pod| {
                let node = self.cx.nodes.get("", orch_api::pod::node_name(pod));
                plan::backend(&service, pod, node.as_deref())
            })
            .collect();
        self.write_slices(&service, &pods).await?;
        self.write_endpoints(&service, &pods).await?;
        Ok(Action::done())
    }
}

fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|selector| !selector.is_empty())
}

fn selects(service: &Service, pod: &Pod) -> bool {
    let Some(selector) = selector(service) else { return false };
    let empty = BTreeMap::new();
    Selector::from_labels(selector).matches(pod.metadata.labels.as_ref().unwrap_or(&empty))
}

fn label<'a>(slice: &'a EndpointSlice, key: &str) -> Option<&'a str> {
    slice.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn is_ours(slice: &EndpointSlice) -> bool {
    label(slice, MANAGED_BY) == Some(MANAGER)
}

fn owned_by(service: &Service, slice: &EndpointSlice) -> bool {
    let owner = meta::controller_of(&slice.metadata);
    owner.is_some_and(|owner| owner.uid == uid(&service.metadata))
}
