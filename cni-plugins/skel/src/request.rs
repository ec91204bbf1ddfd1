//! What a handler gets.

use std::path::PathBuf;

use cni_spec::{AddResult, AttachmentId, CniArgs, ContainerId, Env, IfName, NetworkName, Version};
use serde_json::{Map, Value};

/// A call about one attachment. `N` is its network namespace, `P` the previous result, as far as the verb
/// promises them: see [`AddRequest`], [`DelRequest`], [`CheckRequest`].
#[derive(Debug, Clone)]
pub struct Request<C, N, P> {
    /// The plugin's configuration.
    pub conf: C,
    /// The whole request configuration as it came, for delegates.
    pub raw: Map<String, Value>,
    /// Version of the configuration and of the answer.
    pub version: Version,
    /// The network.
    pub name: NetworkName,
    /// The container.
    pub container_id: ContainerId,
    /// The interface in the container.
    pub ifname: IfName,
    /// Path of the container's network namespace.
    pub netns: N,
    /// `CNI_ARGS`.
    pub args: CniArgs,
    /// What the chain has made so far, or made at ADD.
    pub prev_result: P,
    /// The variables as they came, for delegates.
    pub env: Env,
}

/// ADD: a namespace for sure, a previous result if the plugin is chained.
pub type AddRequest<C> = Request<C, PathBuf, Option<AddResult>>;
/// DEL: neither for sure.
pub type DelRequest<C> = Request<C, Option<PathBuf>, Option<AddResult>>;
/// CHECK: both for sure.
pub type CheckRequest<C> = Request<C, PathBuf, AddResult>;

impl<C, N, P> Request<C, N, P> {
    /// The attachment this is about.
    #[must_use]
    pub fn attachment(&self) -> AttachmentId {
        AttachmentId { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }
}

/// GC: about a network as a whole.
#[derive(Debug, Clone)]
pub struct GcRequest<C> {
    /// The plugin's configuration.
    pub conf: C,
    /// The whole request configuration as it came, for delegates.
    pub raw: Map<String, Value>,
    /// Version of the configuration.
    pub version: Version,
    /// The network.
    pub name: NetworkName,
    /// Attachments that are alive; everything else of this network is to go.
    pub valid: Vec<AttachmentId>,
    /// The variables as they came, for delegates.
    pub env: Env,
}

/// STATUS: about a network as a whole.
#[derive(Debug, Clone)]
pub struct StatusRequest<C> {
    /// The plugin's configuration.
    pub conf: C,
    /// The whole request configuration as it came, for delegates.
    pub raw: Map<String, Value>,
    /// Version of the configuration.
    pub version: Version,
    /// The network.
    pub name: NetworkName,
    /// The variables as they came, for delegates.
    pub env: Env,
}
