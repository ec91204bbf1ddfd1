//! What all parts of the kubelet share.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use orch_client::{Body, Client, Error, Transport};
use orch_cri::{NetworkMode, Runtime};
use tokio::sync::Semaphore;

use crate::Options;
use crate::events::Events;
use crate::image::Images;
use crate::network::PodNetwork;
use crate::node::machine::Machine;
use crate::pod::fields;
use crate::pod::hosts::ClusterDns;
use crate::references::Services;
use crate::volume;

/// Shared by the workers, the node's status and the server.
pub(crate) struct Context {
    pub(crate) options: Options,
    pub(crate) network: Arc<dyn PodNetwork>,
    pub(crate) events: Events,
    pub(crate) images: Images,
    pub(crate) services: Services,
    pub(crate) machine: Machine,
    pub(crate) dns: ClusterDns,
    /// Name of the engine, the scheme of container IDs.
    pub(crate) engine: &'static str,
    /// One permit per pod that starts; the engine gets slower, not faster, with more.
    pub(crate) starts: Semaphore,
}

/// How long the API server may take to begin an answer. After a cut in the network a request would otherwise hang
/// for as long as TCP repeats itself, and a pod's worker with it.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// A way to the API server that gives up; the next request takes another connection.
struct Impatient(Client);

#[async_trait]
impl Transport for Impatient {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        match tokio::time::timeout(ANSWER_LIMIT, self.0.stream(request)).await {
            Ok(answer) => answer,
            Err(passed) => Err(Error::Transport {
                context: format!("the API server gave no answer within {ANSWER_LIMIT:?}"),
                source: Box::new(passed),
            }),
        }
    }
}

impl Context {
    pub(crate) fn new(
        mut options: Options,
        network: Arc<dyn PodNetwork>,
        machine: Machine,
    ) -> Self {
        options.client = Client::new(Impatient(options.client));
        let events = Events::new(options.client.clone(), &options.node_name);
        Self {
            network,
            images: Images::new(options.runtime.clone(), events.clone()),
            services: Services::new(options.client.clone()),
            events,
            machine,
            dns: ClusterDns {
                ip: options.dns_ip,
                ip_v6: options.dns_ip_v6,
                domain: options.cluster_domain.clone(),
            },
            engine: "docker",
            starts: Semaphore::new(options.parallel_starts.max(1)),
            options,
        }
    }

    /// All permits of `starts`.
    pub(crate) fn all_starts(&self) -> u32 {
        u32::try_from(self.options.parallel_starts.max(1)).unwrap_or(u32::MAX)
    }

    pub(crate) fn runtime(&self) -> &dyn Runtime {
        &*self.options.runtime
    }

    pub(crate) fn client(&self) -> Client {
        self.options.client.clone()
    }

    /// Network of pods that ask for the node's.
    pub(crate) fn host_network(&self) -> NetworkMode {
        match &self.options.anchor_container {
            Some(anchor) => NetworkMode::Container(anchor.clone()),
            None => NetworkMode::Host,
        }
    }

    pub(crate) fn pod_folder(&self, uid: &str) -> PathBuf {
        volume::pod_folder(&self.options.paths.pods_dir(), uid)
    }

    /// Where a pod runs, for the downward API.
    pub(crate) fn place(&self, pod_ips: &[IpAddr]) -> fields::Place {
        fields::Place {
            node_name: self.options.node_name.clone(),
            host_ips: vec![self.options.node_ip],
            pod_ips: pod_ips.to_vec(),
            allocatable_cpu_milli: self.machine.cpu_milli,
            allocatable_memory_bytes: self.machine.memory_bytes,
        }
    }
}
