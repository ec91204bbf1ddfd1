//! Which ReplicaSet is which revision of the pod template, and how a new one is made. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::meta;

use crate::context::{name, namespace};

/// Number of a revision, on ReplicaSets and on the Deployment that runs it.
pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Earlier numbers of a ReplicaSet that was rolled back to.
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// What the Deployment wanted when the ReplicaSet was scaled last.
pub(super) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
/// The same with the surge.
pub(super) const MAX: &str = "deployment.kubernetes.io/max-replicas";
const HASH: &str = "pod-template-hash";
/// Annotations of a Deployment that are not its ReplicaSets' too.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];
/// Letters that make no words (apimachinery, `rand.SafeEncodeString`).
const SAFE_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

pub(super) fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

pub(super) fn number(set: &ReplicaSet) -> i64 {
    annotation(&set.metadata, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.remove(HASH);
    }
    template
}

/// Whether the ReplicaSet runs the Deployment's template.
pub(super) fn has_template(set: &ReplicaSet, deployment: &Deployment) -> bool {
    let (Some(set), Some(deployment)) = (&set.spec, &deployment.spec) else { return false };
    let Some(template) = &set.template else { return false };
    without_hash(template) == without_hash(&deployment.template)
}

/// The ReplicaSet of the Deployment's template; the oldest, should there be several.
pub(super) fn newest<'a>(
    deployment: &Deployment,
    sets: &'a [ReplicaSet],
) -> Option<&'a ReplicaSet> {
    let same = sets.iter().filter(|set| has_template(set, deployment));
    same.min_by_key(|set| age(set))
}

/// Sorts by creation, then by name.
pub(super) fn age(set: &ReplicaSet) -> (Option<jiff::Timestamp>, String) {
    let created = set.metadata.creation_timestamp.as_ref().map(|time| time.0);
    (created, name(&set.metadata).to_owned())
}

/// FNV-1a of the template with the number of collisions, in letters that need no quoting.
fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut hash: u32 = 0x811c_9dc5;
    let mut feed = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    // Maps are sorted, absent fields are not written: equal templates give equal bytes.
    feed(serde_json::to_string(template).unwrap_or_default().as_bytes());
    if let Some(collisions) = collisions {
        feed(&collisions.to_le_bytes());
    }
    let letter = |byte: u8| char::from(SAFE_LETTERS[usize::from(byte) % SAFE_LETTERS.len()]);
    hash.to_string().bytes().map(letter).collect()
}

/// Puts the Deployment's annotations and the revision onto a ReplicaSet; true if that changed it.
pub(super) fn annotate(set: &mut ReplicaSet, deployment: &Deployment, revision: i64) -> bool {
    let before = set.metadata.annotations.clone();
    let annotations = set.metadata.annotations.get_or_insert_default();
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    let old = annotations.get(REVISION).and_then(|text| text.parse::<i64>().ok());
    if old.is_none_or(|old| old < revision) {
        let replaced = annotations.insert(REVISION.to_owned(), revision.to_string());
        if let Some(replaced) = replaced {
            let history = annotations.entry(REVISION_HISTORY.to_owned()).or_default();
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&replaced);
        }
    }
    set.metadata.annotations != before
}

/// Notes on a ReplicaSet what the Deployment wants, for proportional scaling; true if that changed it.
pub(super) fn annotate_scale(set: &mut ReplicaSet, desired: i32, max: i32) -> bool {
    let annotations = set.metadata.annotations.get_or_insert_default();
    let mut put = |key: &str, value: i32| {
        let value = value.to_string();
        annotations.insert(key.to_owned(), value.clone()).as_ref() != Some(&value)
    };
    let (a, b) = (put(DESIRED, desired), put(MAX, max));
    a || b
}

/// A ReplicaSet for the Deployment's template, without replicas yet.
pub(super) fn new_set(deployment: &Deployment, spec: &DeploymentSpec) -> ReplicaSet {
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count);
    let hash = template_hash(&spec.template, collisions);
    let with_hash = |labels: &Option<BTreeMap<String, String>>| {
        let mut labels = labels.clone().unwrap_or_default();
        labels.insert(HASH.to_owned(), hash.clone());
        Some(labels)
    };
    let mut template = spec.template.clone();
    let template_meta = template.metadata.get_or_insert_default();
    template_meta.labels = with_hash(&template_meta.labels);
    let mut selector = spec.selector.clone();
    selector.match_labels = with_hash(&selector.match_labels);
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", name(&deployment.metadata))),
            namespace: Some(namespace(&deployment.metadata).to_owned()),
            labels: template_meta.labels.clone(),
            owner_references: Some(vec![meta::controller_reference(deployment)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}
