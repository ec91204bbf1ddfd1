//! A container's environment: service variables, `envFrom`, `env`, in that order, later ones winning.

use std::collections::BTreeMap;

use orch_api::k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVarSource, Pod, Secret, Service,
};

use crate::pod::expand::expand;
use crate::pod::fields::{self, Place};

/// ConfigMaps and Secrets of the pod's namespace, by name, as far as the pod refers to them and they exist.
#[derive(Debug, Clone, Default)]
pub(crate) struct References {
    pub(crate) config_maps: BTreeMap<String, ConfigMap>,
    pub(crate) secrets: BTreeMap<String, Secret>,
}

/// Builds the environment, in the order the variables were first named.
///
/// # Errors
/// Something that is not optional is missing; the text is for the container's waiting message.
pub(crate) fn environment(
    pod: &Pod,
    container: &Container,
    place: &Place,
    references: &References,
    services: &[(String, String)],
) -> Result<Vec<(String, String)>, String> {
    let mut all = Variables::default();
    for (name, value) in services {
        all.set(name, value.clone());
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(wanted) = &source.config_map_ref {
            match references.config_maps.get(&wanted.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        all.set(&format!("{prefix}{key}"), value.clone());
                    }
                }
                None if wanted.optional == Some(true) => {}
                None => return Err(format!("configmap \"{}\" not found", wanted.name)),
            }
        }
        if let Some(wanted) = &source.secret_ref {
            match references.secrets.get(&wanted.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        all.set(
                            &format!("{prefix}{key}"),
                            String::from_utf8_lossy(&value.0).into_owned(),
                        );
                    }
                }
                None if wanted.optional == Some(true) => {}
                None => return Err(format!("secret \"{}\" not found", wanted.name)),
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(source)) => match from_source(pod, container, place, references, source)? {
                Some(value) => value,
                None => continue,
            },
            (Some(text), None) => expand(text, |name| all.get(name)),
            (None, None) => String::new(),
        };
        all.set(&variable.name, value);
    }
    Ok(all.list)
}

fn from_source(
    pod: &Pod,
    container: &Container,
    place: &Place,
    references: &References,
    source: &EnvVarSource,
) -> Result<Option<String>, String> {
    if let Some(wanted) = &source.field_ref {
        let value = fields::field(pod, place, &wanted.field_path);
        return value
            .map(Some)
            .ok_or_else(|| format!("unsupported fieldPath: {}", wanted.field_path));
    }
    if let Some(wanted) = &source.resource_field_ref {
        return fields::resource(pod, container, place, wanted).map(Some);
    }
    if let Some(wanted) = &source.config_map_key_ref {
        let found = references.config_maps.get(&wanted.name);
        let value = found.and_then(|map| map.data.as_ref()?.get(&wanted.key).cloned());
        return required(
            value,
            wanted.optional,
            found.is_some(),
            "configmap",
            "ConfigMap",
            &wanted.name,
            &wanted.key,
        );
    }
    if let Some(wanted) = &source.secret_key_ref {
        let found = references.secrets.get(&wanted.name);
        let value = found.and_then(|secret| secret.data.as_ref()?.get(&wanted.key));
        let value = value.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
        return required(
            value,
            wanted.optional,
            found.is_some(),
            "secret",
            "Secret",
            &wanted.name,
            &wanted.key,
        );
    }
    Ok(None)
}

fn required(
    value: Option<String>,
    optional: Option<bool>,
    exists: bool,
    resource: &str,
    kind: &str,
    name: &str,
    key: &str,
) -> Result<Option<String>, String> {
    match value {
        Some(value) => Ok(Some(value)),
        None if optional == Some(true) => Ok(None),
        None if exists => Err(format!("couldn't find key {key} in {kind} {name}")),
        None => Err(format!("{resource} \"{name}\" not found")),
    }
}

/// Variables in order of first appearance.
#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
}

impl Variables {
    fn get(&self, name: &str) -> Option<String> {
        self.list.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn set(&mut self, name: &str, value: String) {
        match self.list.iter_mut().find(|(known, _)| known == name) {
            Some(entry) => entry.1 = value,
            None => self.list.push((name.to_owned(), value)),
        }
    }
}

/// Variables for Services, as Docker links had them (Kubernetes, "Discovering services"). `all` are those of the
/// pod's namespace and `default/kubernetes`; without service links only the latter counts.
pub(crate) fn service_variables(
    namespace: &str,
    links: bool,
    all: &[Service],
) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for service in all {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let home = service.metadata.namespace.as_deref().unwrap_or_default();
        let is_master = home == "default" && name == "kubernetes";
        if !is_master && (!links || home != namespace) {
            continue;
        }
        let Some(spec) = &service.spec else { continue };
        let ip = spec.cluster_ip.as_deref().unwrap_or_default();
        if ip.is_empty() || ip == "None" {
            continue;
        }
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let prefix = name.to_uppercase().replace('-', "_");
        let mut add =
            |suffix: String, value: String| variables.push((format!("{prefix}_{suffix}"), value));
        add("SERVICE_HOST".to_owned(), ip.to_owned());
        add("SERVICE_PORT".to_owned(), first.port.to_string());
        for port in ports {
            if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                add(
                    format!("SERVICE_PORT_{}", name.to_uppercase().replace('-', "_")),
                    port.port.to_string(),
                );
            }
        }
        for (index, port) in ports.iter().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
            if index == 0 {
                add("PORT".to_owned(), url.clone());
            }
            let one = format!("PORT_{}_{protocol}", port.port);
            add(one.clone(), url);
            add(format!("{one}_PROTO"), protocol.to_lowercase());
            add(format!("{one}_PORT"), port.port.to_string());
            add(format!("{one}_ADDR"), ip.to_owned());
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn build(container: Value, references: &References) -> Result<Vec<(String, String)>, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "shop" }, "spec": { "containers": [container] },
        }))
        .expect("a pod");
        let container = pod.spec.as_ref().expect("a spec").containers[0].clone();
        environment(
            &pod,
            &container,
            &Place::default(),
            references,
            &[("SVC".to_owned(), "s".to_owned())],
        )
    }

    fn references() -> References {
        let map = json!({ "metadata": { "name": "cm" }, "data": { "A": "from-cm", "B": "b" } });
        let secret = json!({ "metadata": { "name": "s" }, "data": { "K": "a2V5" } });
        References {
            config_maps: [("cm".to_owned(), serde_json::from_value(map).expect("a map"))].into(),
            secrets: [("s".to_owned(), serde_json::from_value(secret).expect("a secret"))].into(),
        }
    }

    #[test]
    fn later_sources_win_and_values_see_earlier_ones() {
        let container = json!({
            "name": "c",
            "envFrom": [{ "prefix": "P_", "configMapRef": { "name": "cm" } }],
            "env": [
                { "name": "P_A", "value": "own" },
                { "name": "X", "value": "$(P_A)-$(SVC)-$(LATER)" },
                { "name": "K", "valueFrom": { "secretKeyRef": { "name": "s", "key": "K" } } },
                { "name": "N", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
                { "name": "NO", "valueFrom": { "secretKeyRef": { "name": "none", "key": "K", "optional": true } } },
            ],
        });
        let all = build(container, &references()).expect("an environment");
        let text: Vec<_> = all.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(text, ["SVC=s", "P_A=own", "P_B=b", "X=own-s-$(LATER)", "K=key", "N=web"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let key = |name: &str, key: &str| {
            json!({ "name": "c", "env": [
                { "name": "V", "valueFrom": { "configMapKeyRef": { "name": name, "key": key } } },
            ] })
        };
        assert_eq!(
            build(key("no", "A"), &references()),
            Err("configmap \"no\" not found".to_owned())
        );
        assert_eq!(
            build(key("cm", "no"), &references()),
            Err("couldn't find key no in ConfigMap cm".to_owned())
        );
    }

    #[test]
    fn services_of_the_namespace_and_the_api_server_have_variables() {
        let service = |namespace: &str, name: &str| -> Service {
            serde_json::from_value(json!({
                "metadata": { "namespace": namespace, "name": name },
                "spec": { "clusterIP": "10.96.0.1", "ports": [{ "name": "https", "port": 443 }] },
            }))
            .expect("a service")
        };
        let all =
            [service("default", "kubernetes"), service("shop", "my-db"), service("other", "x")];
        let names = |links| -> Vec<String> {
            service_variables("shop", links, &all).into_iter().map(|(name, _)| name).collect()
        };
        assert!(names(false).iter().all(|name| name.starts_with("KUBERNETES_")));
        let linked = names(true);
        assert!(linked.contains(&"MY_DB_SERVICE_PORT_HTTPS".to_owned()));
        assert!(linked.contains(&"MY_DB_PORT_443_TCP_ADDR".to_owned()));
        assert!(!linked.iter().any(|name| name.starts_with("X_")));
    }
}
