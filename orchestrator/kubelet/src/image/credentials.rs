//! Registry credentials from `imagePullSecrets`.

use base64::Engine as _;
use orch_api::k8s_openapi::api::core::v1::{Pod, Secret};
use orch_client::{Api, Client};
use orch_cri::Credentials;
use serde_json::Value;

/// Registry of names that carry none.
const DEFAULT_SERVER: &str = "docker.io";

/// Reads the pod's pull secrets; one that is missing or unreadable is skipped, as upstream does.
pub(crate) async fn fetch(client: &Client, pod: &Pod) -> Vec<Credentials> {
    let names = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
    let secrets = Api::<Secret>::namespaced(
        client.clone(),
        pod.metadata.namespace.as_deref().unwrap_or_default(),
    );
    let mut all = Vec::new();
    for reference in names {
        match secrets.get_opt(&reference.name).await {
            Ok(Some(secret)) => all.extend(parse(&secret)),
            Ok(None) => {}
            Err(error) => tracing::warn!(secret = reference.name, %error, "pull secret not read"),
        }
    }
    all
}

fn parse(secret: &Secret) -> Vec<Credentials> {
    let data = secret.data.iter().flatten();
    let mut all = Vec::new();
    for (key, value) in data {
        let Ok(config) = serde_json::from_slice::<Value>(&value.0) else { continue };
        let auths = match key.as_str() {
            ".dockerconfigjson" => config["auths"].clone(),
            ".dockercfg" => config,
            _ => continue,
        };
        for (server, entry) in auths.as_object().into_iter().flatten() {
            let text = |key: &str| entry[key].as_str().map(str::to_owned);
            let pair = text("auth").and_then(|auth| {
                let bytes = base64::engine::general_purpose::STANDARD.decode(auth).ok()?;
                let (user, password) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
                Some((user.to_owned(), password.to_owned()))
            });
            if let Some((username, password)) =
                pair.or_else(|| Some((text("username")?, text("password")?)))
            {
                all.push(Credentials { server: server.clone(), username, password });
            }
        }
    }
    all
}

/// The credentials for an image's registry.
pub(crate) fn for_image<'a>(all: &'a [Credentials], reference: &str) -> Option<&'a Credentials> {
    let server = match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => DEFAULT_SERVER,
    };
    all.iter().find(|known| {
        let host = known.server.trim_start_matches("https://").trim_start_matches("http://");
        let host = host.split('/').next().unwrap_or(host);
        host == server || (server == DEFAULT_SERVER && host.ends_with(".docker.io"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_docker_configuration_is_understood() {
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let config =
            json!({ "auths": { "reg.example:5000": { "auth": encode("me:secret") } } }).to_string();
        let secret =
            serde_json::from_value(json!({ "data": { ".dockerconfigjson": encode(&config) } }));
        let all = parse(&secret.expect("a secret"));
        let found = for_image(&all, "reg.example:5000/web:1").expect("credentials");
        assert_eq!((found.username.as_str(), found.password.as_str()), ("me", "secret"));
        assert_eq!(for_image(&all, "web:1"), None);
    }
}
