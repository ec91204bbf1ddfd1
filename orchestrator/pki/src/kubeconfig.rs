//! kubeconfig files (Kubernetes, "Organizing Cluster Access Using kubeconfig Files").

use serde_json::json;

/// Name of the extension of a cluster entry in which further servers stand: kubeconfig itself has room for one.
const SERVERS: &str = "orch.dev/servers";

/// A kubeconfig with one cluster, one user and one context, as JSON text (every YAML reader takes it).
///
/// `servers` are the URLs of the API servers, the first of which every client uses; ours go on to the others when it
/// cannot be reached. `ca`, `certificate` and `key` are PEM texts; they are embedded, so the file can be copied elsewhere.
#[must_use]
pub fn kubeconfig(
    servers: &[String],
    user: &str,
    ca: &str,
    certificate: &str,
    key: &str,
) -> String {
    let mut cluster = json!({
        "server": servers.first().map_or("", String::as_str),
        "certificate-authority-data": base64(ca.as_bytes()),
    });
    if servers.len() > 1 {
        cluster["extensions"] = json!([{ "name": SERVERS, "extension": { "servers": servers } }]);
    }
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "orch", "cluster": cluster }],
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
