//! The words of bootstrap tokens (Kubernetes, "Authenticating with Bootstrap Tokens"), with which a new host introduces
//! itself. They are Secrets, so that kubeadm's and ours know each other; what upstream has no word for is an annotation.

/// Type of the Secrets.
pub const TYPE: &str = "bootstrap.kubernetes.io/token";
/// Their namespace.
pub const NAMESPACE: &str = "kube-system";
/// Who comes with a token: this and the token's id.
pub const USER_PREFIX: &str = "system:bootstrap:";
/// `"true"`: good for one host. The first request for a node's certificate that is granted uses it up.
pub const SINGLE_USE: &str = "orch.dev/single-use";
/// Name of the only node that the token is good for; it may exist, as long as it is not Ready.
pub const NODE: &str = "orch.dev/node";
/// UID of the certificate signing request that used up a token that is good for one host.
pub const USED_BY: &str = "orch.dev/used-by";

/// Name of the Secret of a token.
#[must_use]
pub fn secret_name(id: &str) -> String {
    format!("bootstrap-token-{id}")
}

/// Name of what is handed over to the bearer of a token that makes control planes: a Secret with the authorities' keys,
/// encrypted, and the role to read it.
#[must_use]
pub fn handover_name(id: &str) -> String {
    format!("orch-certs-{id}")
}
