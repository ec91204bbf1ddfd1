//! Reading kubeconfig files: the current context's server and credentials.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use crate::{ClientConfig, Error};

/// Extension of a cluster entry in which further servers stand, as `orch-pki` writes it.
const SERVERS: &str = "orch.dev/servers";

/// Reads the current context of a kubeconfig file (YAML or JSON).
pub(crate) fn read(path: &Path) -> Result<ClientConfig, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::Config(format!("read kubeconfig {}: {error}", path.display())))?;
    let folder = path.parent().map(Path::to_owned).unwrap_or_default();
    parse(&text, &folder)
        .map_err(|why| Error::Config(format!("kubeconfig {}: {why}", path.display())))
}

fn parse(text: &str, folder: &Path) -> Result<ClientConfig, String> {
    let config: Value =
        serde_saphyr::from_str(text).map_err(|error| format!("is no YAML: {error}"))?;
    let current = config["current-context"]
        .as_str()
        .filter(|name| !name.is_empty())
        .ok_or("has no current-context")?;
    let named = |list: &str, key: &str, name: &str| -> Result<Value, String> {
        config[list]
            .as_array()
            .into_iter()
            .flatten()
            .find(|entry| entry["name"] == name)
            .map(|entry| entry[key].clone())
            .ok_or_else(|| format!("{list} has no entry {name:?}"))
    };
    let context = named("contexts", "context", current)?;
    let cluster = named("clusters", "cluster", context["cluster"].as_str().unwrap_or_default())?;
    let user = named("users", "user", context["user"].as_str().unwrap_or_default())?;
    let server = cluster["server"].as_str().ok_or("the cluster has no server")?.to_owned();
    let further = cluster["extensions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|extension| extension["name"] == SERVERS)
        .map(|extension| extension["extension"]["servers"].clone());
    let mut servers = vec![server];
    for url in further.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str) {
        if !servers.iter().any(|known| known == url) {
            servers.push(url.to_owned());
        }
    }
    Ok(ClientConfig {
        servers,
        ca_pem: pem(&cluster, "certificate-authority", folder)?,
        cert_pem: pem(&user, "client-certificate", folder)?,
        key_pem: pem(&user, "client-key", folder)?,
        token: match user["tokenFile"].as_str() {
            Some(file) => Some(read_file(&folder.join(file))?.trim().to_owned()),
            None => user["token"].as_str().map(str::to_owned),
        },
    })
}

/// `<key>-data` inline, or the file that `<key>` names.
fn pem(entry: &Value, key: &str, folder: &Path) -> Result<Option<String>, String> {
    if let Some(data) = entry[format!("{key}-data")].as_str() {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(data)
            .map_err(|error| format!("{key}-data is no base64: {error}"))?;
        return String::from_utf8(bytes).map(Some).map_err(|_| format!("{key}-data is no PEM"));
    }
    entry[key].as_str().map(|file| read_file(&folder.join(PathBuf::from(file)))).transpose()
}

fn read_file(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_context_is_followed() {
        let text = "
current-context: b
contexts:
- {name: a, context: {cluster: x, user: x}}
- {name: b, context: {cluster: cy, user: u}}
clusters:
- {name: cy, cluster: {server: 'https://10.0.0.1:6443', certificate-authority-data: QUJD}}
users:
- {name: u, user: {token: secret}}
";
        let config = parse(text, Path::new("/")).expect("kubeconfig");
        assert_eq!(config.servers, ["https://10.0.0.1:6443"]);
        assert_eq!(config.ca_pem.as_deref(), Some("ABC"));
        assert_eq!(config.token.as_deref(), Some("secret"));
    }

    #[test]
    fn further_servers_stand_in_an_extension() {
        let text = "
current-context: a
contexts: [{name: a, context: {cluster: c, user: u}}]
clusters:
- name: c
  cluster:
    server: https://10.0.0.1:6443
    extensions:
    - {name: other, extension: {}}
    - {name: orch.dev/servers, extension: {servers: ['https://10.0.0.1:6443', 'https://10.0.0.2:6443']}}
users: [{name: u, user: {}}]
";
        let config = parse(text, Path::new("/")).expect("kubeconfig");
        assert_eq!(config.servers, ["https://10.0.0.1:6443", "https://10.0.0.2:6443"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(parse("{}", Path::new("/")).expect_err("empty"), "has no current-context");
        let error =
            parse("{current-context: a, contexts: []}", Path::new("/")).expect_err("no context");
        assert_eq!(error, "contexts has no entry \"a\"");
    }
}
