//! From a pod's container to what the engine makes of it. Pure.

use std::path::Path;

use orch_api::Quantity;
use orch_api::k8s_openapi::api::core::v1::{Container, Pod};
use orch_cri::{ContainerSpec, Mount, NetworkMode, Propagation};
use sha2::{Digest as _, Sha256};

use crate::api::{self, PodRef};
use crate::labels;
use crate::pod::expand::expand;
use crate::pod::hosts;
use crate::volume::Volumes;

/// Smallest CPU weight that the kernel takes.
const MIN_SHARES: i64 = 2;
/// Smallest quota that the kernel takes: 1 ms per period.
const MIN_QUOTA_MICROS: i64 = 1000;
/// OOM preference of a BestEffort pod; others count down from it (kubelet's `qos` policy).
const OOM_BEST_EFFORT: i64 = 1000;
/// Sandboxes go late, as far as a process without CAP_SYS_RESOURCE may ask for.
const OOM_SANDBOX: i64 = 0;

/// Hash of the parts of a container whose change needs a new one. Upstream lets only the image change in place.
pub(crate) fn spec_hash(container: &Container) -> String {
    let mut hash = Sha256::new();
    hash.update(container.name.as_bytes());
    hash.update([0]);
    hash.update(container.image.as_deref().unwrap_or_default().as_bytes());
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Which namespaces the pod's containers share.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    /// The node's network, for pods that ask for it.
    pub(crate) host_network: NetworkMode,
}

/// The sandbox of a pod.
pub(crate) fn sandbox_spec(
    pod: &Pod,
    attempt: u32,
    image: &str,
    host_network: &NetworkMode,
) -> ContainerSpec {
    let spec = api::spec(pod);
    let host = api::is_host_network(pod);
    let sysctls = spec.security_context.and_then(|context| context.sysctls).unwrap_or_default();
    let pod_ref = PodRef::of(pod);
    ContainerSpec {
        name: labels::container_name(&pod_ref, labels::SANDBOX, attempt),
        image: image.to_owned(),
        labels: labels::labels(&pod_ref, labels::SANDBOX, attempt),
        hostname: (!host).then(|| hosts::hostname(pod)),
        network: if host { host_network.clone() } else { NetworkMode::None },
        host_ipc: spec.host_ipc.unwrap_or(false),
        host_pid: spec.host_pid.unwrap_or(false),
        cpu_shares: Some(MIN_SHARES),
        oom_score_adj: Some(OOM_SANDBOX),
        no_new_privileges: true,
        sysctls: sysctls.into_iter().map(|sysctl| (sysctl.name, sysctl.value)).collect(),
        ..ContainerSpec::default()
    }
}

/// What goes into a container besides the pod's own words.
pub(crate) struct Parts<'a> {
    pub(crate) sandbox: &'a Sandbox,
    pub(crate) attempt: u32,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) volumes: &'a Volumes,
    /// Files of the agent: hosts, resolv.conf.
    pub(crate) hosts: &'a Path,
    pub(crate) resolv_conf: &'a Path,
    pub(crate) termination_log: &'a Path,
    /// User of the image, to judge `runAsNonRoot`.
    pub(crate) image_user: &'a str,
    pub(crate) node_memory_bytes: i64,
}

/// The whole container.
///
/// # Errors
/// The pod asks for something that cannot be; the text is for the container's waiting message.
pub(crate) fn container_spec(
    pod: &Pod,
    container: &Container,
    parts: Parts<'_>,
) -> Result<ContainerSpec, String> {
    let pod_spec = api::spec(pod);
    let pod_ref = PodRef::of(pod);
    let context = container.security_context.clone().unwrap_or_default();
    let pod_context = pod_spec.security_context.clone().unwrap_or_default();
    let non_root = context.run_as_non_root.or(pod_context.run_as_non_root).unwrap_or(false);
    let uid = context.run_as_user.or(pod_context.run_as_user);
    let gid = context.run_as_group.or(pod_context.run_as_group);
    if non_root {
        check_non_root(uid, parts.image_user)?;
    }
    let lookup = |name: &str| {
        parts.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    };
    let expand_all = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|word| expand(word, lookup)).collect()
    };
    let mut labels = labels::labels(&pod_ref, &container.name, parts.attempt);
    labels.insert(labels::SPEC_HASH.to_owned(), spec_hash(container));
    labels.insert(labels::SANDBOX_ID.to_owned(), parts.sandbox.id.clone());
    let capabilities = context.capabilities.clone().unwrap_or_default();
    let seccomp = context.seccomp_profile.or(pod_context.seccomp_profile);
    let groups = pod_context.supplemental_groups.unwrap_or_default();
    Ok(ContainerSpec {
        name: labels::container_name(&pod_ref, &container.name, parts.attempt),
        image: container.image.clone().unwrap_or_default(),
        labels,
        entrypoint: expand_all(&container.command),
        args: expand_all(&container.args),
        mounts: mounts(container, &parts, lookup)?,
        env: parts.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        working_dir: container.working_dir.clone().filter(|path| !path.is_empty()),
        user: user(uid, gid, parts.image_user),
        extra_groups: groups
            .into_iter()
            .chain(pod_context.fs_group)
            .map(|group| group.to_string())
            .collect(),
        network: if api::is_host_network(pod) {
            parts.sandbox.host_network.clone()
        } else {
            NetworkMode::Container(parts.sandbox.id.clone())
        },
        ipc_of: Some(parts.sandbox.id.clone()),
        host_ipc: pod_spec.host_ipc.unwrap_or(false),
        pid_of: pod_spec.share_process_namespace.unwrap_or(false).then(|| parts.sandbox.id.clone()),
        host_pid: pod_spec.host_pid.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        privileged: context.privileged.unwrap_or(false),
        cap_add: capabilities.add.unwrap_or_default(),
        cap_drop: capabilities.drop.unwrap_or_default(),
        read_only_root: context.read_only_root_filesystem.unwrap_or(false),
        no_new_privileges: context.allow_privilege_escalation == Some(false),
        default_seccomp: seccomp.is_some_and(|profile| profile.type_ == "RuntimeDefault"),
        oom_score_adj: Some(oom_score_adj(pod, container, parts.node_memory_bytes)),
        cpu_shares: Some(cpu_shares(container)),
        cpu_quota: amount(container, "cpu", true).filter(|cpu| cpu.milli() > 0).map(|cpu| {
            // 100 ms period: 100 µs per thousandth of a CPU.
            (cpu.milli() * 100).max(MIN_QUOTA_MICROS)
        }),
        memory_bytes: amount(container, "memory", true)
            .map(|memory| memory.value())
            .filter(|bytes| *bytes > 0),
        ..ContainerSpec::default()
    })
}

/// Whom the container runs as: `UID`, `UID:GID`, or the image's user (`None`). A group alone leaves the image's user as it
/// is.
fn user(uid: Option<i64>, gid: Option<i64>, image_user: &str) -> Option<String> {
    match (uid, gid) {
        (Some(uid), Some(gid)) => Some(format!("{uid}:{gid}")),
        (Some(uid), None) => Some(uid.to_string()),
        (None, Some(gid)) => {
            let name = image_user.split(':').next().filter(|name| !name.is_empty());
            Some(format!("{}:{gid}", name.unwrap_or("0")))
        }
        (None, None) => None,
    }
}

fn check_non_root(uid: Option<i64>, image_user: &str) -> Result<(), String> {
    let image_user = image_user.split(':').next().unwrap_or_default();
    match (uid, image_user.parse::<i64>()) {
        (Some(0), _) => Err("container's runAsUser breaks non-root policy".to_owned()),
        (Some(_), _) => Ok(()),
        (None, Ok(0)) => Err("container has runAsNonRoot and image will run as root".to_owned()),
        (None, Ok(_)) => Ok(()),
        (None, Err(_)) if image_user.is_empty() => {
            Err("container has runAsNonRoot and image will run as root".to_owned())
        }
        (None, Err(_)) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({image_user}), cannot verify user is non-root"
        )),
    }
}

fn mounts(
    container: &Container,
    parts: &Parts<'_>,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    for wanted in container.volume_mounts.iter().flatten() {
        let volume = parts.volumes.source(&wanted.name).ok_or_else(|| {
            format!("volume \"{}\" of the container is not among the pod's volumes", wanted.name)
        })?;
        let sub_path = match (&wanted.sub_path_expr, &wanted.sub_path) {
            (Some(text), _) if !text.is_empty() => Some(expand(text, &lookup)),
            (_, Some(text)) if !text.is_empty() => Some(text.clone()),
            _ => None,
        };
        let source = match sub_path {
            Some(path) => crate::volume::subpath::resolve(volume, &path)?,
            None => volume.to_owned(),
        };
        mounts.push(Mount {
            source: source.to_string_lossy().into_owned(),
            target: wanted.mount_path.clone(),
            read_only: wanted.read_only.unwrap_or(false)
                || parts.volumes.is_read_only(&wanted.name),
            propagation: match wanted.mount_propagation.as_deref() {
                Some("HostToContainer") => Propagation::HostToContainer,
                Some("Bidirectional") => Propagation::Bidirectional,
                _ => Propagation::Private,
            },
        });
    }
    let is_mounted =
        |path: &str| container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == path);
    let read_only =
        container.security_context.as_ref().and_then(|context| context.read_only_root_filesystem);
    let mut file = |source: &Path, target: &str| {
        if !is_mounted(target) {
            mounts.push(Mount {
                source: source.to_string_lossy().into_owned(),
                target: target.to_owned(),
                read_only: read_only.unwrap_or(false) && target.starts_with("/etc/"),
                ..Mount::default()
            });
        }
    };
    file(parts.hosts, "/etc/hosts");
    file(parts.resolv_conf, "/etc/resolv.conf");
    let log = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
    file(parts.termination_log, log);
    Ok(mounts)
}

fn amount(container: &Container, name: &str, limit: bool) -> Option<Quantity> {
    let resources = container.resources.as_ref()?;
    let map = if limit { resources.limits.as_ref()? } else { resources.requests.as_ref()? };
    Quantity::parse(&map.get(name)?.0).ok()
}

fn cpu_shares(container: &Container) -> i64 {
    let cpu = amount(container, "cpu", false).or_else(|| amount(container, "cpu", true));
    (cpu.map_or(0, |cpu| cpu.milli()) * 1024 / 1000).max(MIN_SHARES)
}

/// The more of its request a container uses, the earlier it goes. Guaranteed pods would get −997, which needs
/// CAP_SYS_RESOURCE; 0 keeps them behind all others without it.
fn oom_score_adj(pod: &Pod, container: &Container, node_memory_bytes: i64) -> i64 {
    match pod.spec.as_ref().map(orch_api::pod::qos_class) {
        Some("Guaranteed") => 0,
        Some("Burstable") => {
            let request = amount(container, "memory", false).map_or(0, |memory| memory.value());
            let share = i128::from(request) * i128::from(OOM_BEST_EFFORT)
                / i128::from(node_memory_bytes.max(1));
            (OOM_BEST_EFFORT - i64::try_from(share).unwrap_or(OOM_BEST_EFFORT))
                .clamp(2, OOM_BEST_EFFORT - 1)
        }
        _ => OOM_BEST_EFFORT,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn build(container: Value, pod_context: Value) -> Result<ContainerSpec, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": "u" },
            "spec": { "containers": [container], "securityContext": pod_context },
        }))
        .expect("a pod");
        let sandbox = Sandbox { id: "sb".to_owned(), host_network: NetworkMode::Host };
        let volumes = Volumes::default();
        let parts = Parts {
            sandbox: &sandbox,
            attempt: 2,
            env: vec![("A".to_owned(), "1".to_owned())],
            volumes: &volumes,
            hosts: Path::new("/h"),
            resolv_conf: Path::new("/r"),
            termination_log: Path::new("/t"),
            image_user: "",
            node_memory_bytes: 1 << 30,
        };
        let container = api::spec(&pod).containers[0].clone();
        container_spec(&pod, &container, parts)
    }

    #[test]
    fn resources_become_cgroup_values() {
        let container = json!({ "name": "a", "resources": {
            "requests": { "cpu": "250m", "memory": "512Mi" }, "limits": { "cpu": "500m", "memory": "1Gi" },
        } });
        let spec = build(container, json!({})).expect("a container");
        assert_eq!((spec.cpu_shares, spec.cpu_quota), (Some(256), Some(50_000)));
        assert_eq!(spec.memory_bytes, Some(1 << 30));
        assert_eq!(spec.oom_score_adj, Some(500));
        assert_eq!(
            build(json!({ "name": "a" }), json!({})).expect("a container").oom_score_adj,
            Some(1000)
        );
    }

    #[test]
    fn names_arguments_and_files_are_those_of_the_pod() {
        let spec =
            build(json!({ "name": "a", "args": ["--x=$(A)"] }), json!({})).expect("a container");
        assert_eq!(spec.name, "k8s_a_web_shop_u_2");
        assert_eq!(spec.args, ["--x=1"]);
        let targets: Vec<_> = spec.mounts.iter().map(|mount| mount.target.as_str()).collect();
        assert_eq!(targets, ["/etc/hosts", "/etc/resolv.conf", "/dev/termination-log"]);
        assert_eq!(spec.network, NetworkMode::Container("sb".to_owned()));
    }

    #[test]
    fn root_is_refused_where_it_is_forbidden() {
        assert!(build(json!({ "name": "a" }), json!({ "runAsNonRoot": true })).is_err());
        let spec = build(
            json!({ "name": "a" }),
            json!({ "runAsNonRoot": true, "runAsUser": 7, "runAsGroup": 8 }),
        );
        assert_eq!(spec.expect("a container").user.as_deref(), Some("7:8"));
    }

    #[test]
    fn a_group_alone_leaves_the_user_of_the_image() {
        for (uid, gid, image, expected) in [
            (None, Some(8), "1000", Some("1000:8")),
            (None, Some(8), "node:staff", Some("node:8")),
            (None, Some(8), "", Some("0:8")),
            (Some(7), None, "1000", Some("7")),
            (None, None, "1000", None),
        ] {
            assert_eq!(user(uid, gid, image).as_deref(), expected, "{uid:?} {gid:?} {image}");
        }
    }

    #[test]
    fn a_mount_without_volume_is_named() {
        let error = build(
            json!({ "name": "a", "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }),
            json!({}),
        );
        assert!(error.expect_err("no volume").contains("volume \"v\""));
    }
}
