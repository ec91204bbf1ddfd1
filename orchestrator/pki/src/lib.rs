//! The cluster's certificates: own authorities, leaf certificates for daemons and people, kubeconfig files.
//!
//! A cluster has two authorities, as kubeadm's does: `ca` signs what speaks the Kubernetes API, `etcd-ca` what
//! speaks to etcd, so that a certificate of one world opens nothing in the other. Names in certificates follow
//! Kubernetes: the common name is the user, the organisation the group.
//! Start with [`Authority`]; [`ClusterPki`] is the set of files of one control plane.

mod authority;
mod certificate;
mod cluster;
mod kubeconfig;
mod request;

pub use authority::{Authority, Error, Identity, Usage, public_key_pem};
pub use certificate::{Certificate, Unreadable};
pub use cluster::{
    AgentCredentials, ClusterPki, ETCD_NETWORK_USER, ETCD_ROOT_USER, KUBELET_CLIENT_USER,
    SHARED_FILES, ServerNames,
};
pub use kubeconfig::kubeconfig;
pub use request::{Asked, Request, read_request};
