//! kubeconfig files (Kubernetes, "Organizing Cluster Access Using kubeconfig Files").

use serde_json::json;

/// A kubeconfig with one cluster, one user and one context, as JSON text (every YAML reader takes it).
///
/// `ca`, `certificate` and `key` are PEM texts; they are embedded, so the file can be copied elsewhere.
#[must_use]
pub fn kubeconfig(server: &str, user: &str, ca: &str, certificate: &str, key: &str) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "orch",
            "cluster": { "server": server, "certificate-authority-data": base64(ca.as_bytes()) },
        }],
        "users": [{
            "name": user,
            "user": {
                "client-certificate-data": base64(certificate.as_bytes()),
                "client-key-data": base64(key.as_bytes()),
            },
        }],
        "contexts": [{ "name": "orch", "context": { "cluster": "orch", "user": user } }],
        "current-context": "orch",
    });
    format!("{config:#}\n")
}

fn base64(bytes: &[u8]) -> String {
    use ::base64::Engine as _;
    ::base64::engine::general_purpose::STANDARD.encode(bytes)
}
