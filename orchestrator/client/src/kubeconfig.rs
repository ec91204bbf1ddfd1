//! Reading kubeconfig files: the current context's server and credentials.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::{Value, json};

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

/// The servers of the current context of a kubeconfig file.
///
/// # Errors
/// The file is not there or is no kubeconfig.
pub fn read_servers(path: &Path) -> Result<Vec<String>, Error> {
    read(path).map(|config| config.servers)
}

/// Makes `servers` those of the current context, for the next start; the first one is what every client uses. The file is
/// replaced whole or not at all.
///
/// # Errors
/// The file is not there, is no kubeconfig, or cannot be replaced.
pub fn write_servers(path: &Path, servers: &[String]) -> Result<(), Error> {
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        Error::Config(format!("{what} kubeconfig {}: {why}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed("read", &error))?;
    let text = with_servers(&text, servers).map_err(|why| failed("change", &why))?;
    let replace = || -> std::io::Result<()> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let fresh = path.with_extension("new");
        // It holds a key.
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)
    };
    replace().map_err(|error| failed("write", &error))
}

fn with_servers(text: &str, servers: &[String]) -> Result<String, String> {
    let mut config: Value =
        serde_saphyr::from_str(text).map_err(|error| format!("is no YAML: {error}"))?;
    let text_at = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let current = text_at(&config["current-context"]);
    let context = config["contexts"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["name"] == *current))
        .ok_or("the current context is not there")?;
    let name = text_at(&context["context"]["cluster"]);
    let cluster = config["clusters"]
        .as_array_mut()
        .and_then(|all| all.iter_mut().find(|one| one["name"] == *name))
        .map(|one| &mut one["cluster"])
        .ok_or_else(|| format!("clusters has no entry {name:?}"))?;
    cluster["server"] = json!(servers.first().ok_or("no server is named")?);
    let mut extensions = cluster["extensions"].as_array().cloned().unwrap_or_default();
    extensions.retain(|one| one["name"] != SERVERS);
    extensions.push(json!({ "name": SERVERS, "extension": { "servers": servers } }));
    cluster["extensions"] = json!(extensions);
    Ok(format!("{config:#}\n"))
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
    fn servers_that_are_written_are_read_again_and_the_rest_stays() {
        let text = "
current-context: a
contexts: [{name: a, context: {cluster: c, user: u}}]
clusters:
- {name: other, cluster: {server: 'https://10.9.9.9:6443'}}
- name: c
  cluster: {server: 'https://10.0.0.1:6443', extensions: [{name: mine, extension: {a: 1}}]}
users: [{name: u, user: {token: secret}}]
";
        let servers: Vec<String> =
            ["https://10.0.0.2:6443", "https://10.0.0.1:6443"].map(str::to_owned).into();
        let folder = std::env::temp_dir().join(format!("orch-kubeconfig-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("config");
        std::fs::write(&path, text).expect("write");
        write_servers(&path, &servers).expect("written");
        write_servers(&path, &servers).expect("again");
        let config = read(&path).expect("kubeconfig");
        assert_eq!((config.servers, config.token.as_deref()), (servers, Some("secret")));
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains("10.9.9.9") && text.contains("mine"), "{text}");
        assert_eq!(text.matches(SERVERS).count(), 1);
        std::fs::remove_dir_all(&folder).expect("clean up");
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(parse("{}", Path::new("/")).expect_err("empty"), "has no current-context");
        let error =
            parse("{current-context: a, contexts: []}", Path::new("/")).expect_err("no context");
        assert_eq!(error, "contexts has no entry \"a\"");
    }
}
