//! How many pods are too few or too many, which go first, and what the status says. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use orch_api::{meta, pod};

use crate::context::{name, namespace};

const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Whether the pod counts as a replica: it runs or will.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !pod::is_terminal(pod) && !pod::is_terminating(pod)
}

pub(super) fn min_ready(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

fn replicas(set: &ReplicaSet) -> usize {
    let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    usize::try_from(wanted).unwrap_or(0)
}

fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let ready = pod::condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    Some(ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0))
}

/// When the pod counts as available: ready for `min_ready` seconds. None if it is not ready.
pub(crate) fn available_at(pod: &Pod, min_ready: i32) -> Option<Timestamp> {
    ready_since(pod).map(|since| {
        since.checked_add(SignedDuration::from_secs(min_ready.into())).unwrap_or(Timestamp::MAX)
    })
}

#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Nothing,
    Create(usize),
    Delete(Vec<Arc<Pod>>),
}

/// `related`: active pods of the same Deployment, which count for "many on one node".
pub(super) fn plan(
    set: &ReplicaSet,
    active: &[Arc<Pod>],
    related: &[Arc<Pod>],
    now: Timestamp,
) -> Step {
    let wanted = replicas(set);
    match active.len() {
        have if have < wanted => Step::Create(wanted - have),
        have if have > wanted => {
            let mut pods = active.to_vec();
            let mut on_node: HashMap<&str, usize> = HashMap::new();
            for pod in related {
                *on_node.entry(pod::node_name(pod)).or_default() += 1;
            }
            pods.sort_by_cached_key(|pod| rank(pod, &on_node, now));
            pods.truncate(have - wanted);
            Step::Delete(pods)
        }
        _ => Step::Nothing,
    }
}

/// Smaller goes first: not yet assigned, not yet running, not ready, cheap by annotation, crowded, ready for a short
/// time (by powers of two), restarted often, young.
type Rank = (
    bool,
    u8,
    bool,
    i64,
    std::cmp::Reverse<usize>,
    u32,
    std::cmp::Reverse<i32>,
    std::cmp::Reverse<Timestamp>,
    String,
);

fn rank(pod: &Pod, on_node: &HashMap<&str, usize>, now: Timestamp) -> Rank {
    use std::cmp::Reverse;
    let node = pod::node_name(pod);
    let phase = match pod::phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let annotations = pod.metadata.annotations.as_ref();
    let cost = annotations.and_then(|all| all.get(DELETION_COST)?.parse().ok()).unwrap_or(0);
    let ready = ready_since(pod);
    let ready_log = ready.map_or(0, |since| {
        let seconds = now.duration_since(since).as_secs();
        u64::try_from(seconds).map_or(0, |seconds| 64 - seconds.leading_zeros())
    });
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let restarts = statuses.into_iter().flatten().map(|status| status.restart_count).max();
    let created = pod.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0);
    (
        !node.is_empty(),
        phase,
        ready.is_some(),
        cost,
        Reverse(on_node.get(node).copied().unwrap_or(0)),
        ready_log,
        Reverse(restarts.unwrap_or(0)),
        Reverse(created),
        name(&pod.metadata).to_owned(),
    )
}

/// A new pod of the set.
pub(super) fn desired_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    let from = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", name(&set.metadata))),
            namespace: Some(namespace(&set.metadata).to_owned()),
            labels: from.labels,
            annotations: from.annotations,
            finalizers: from.finalizers,
            owner_references: Some(vec![meta::controller_reference(set)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// What is true now; `failure` says why pods could not be created or deleted.
pub(super) fn desired_status(
    set: &ReplicaSet,
    active: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&str>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let old = set.status.clone().unwrap_or_default();
    let count = |test: &dyn Fn(&Pod) -> bool| {
        i32::try_from(active.iter().filter(|pod| test(pod)).count()).unwrap_or(i32::MAX)
    };
    let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
    let wanted = template
        .and_then(|template| template.metadata.as_ref()?.labels.clone())
        .unwrap_or_default();
    let labelled = |pod: &Pod| {
        let labels = pod.metadata.labels.as_ref();
        wanted.iter().all(|(key, value)| labels.and_then(|all| all.get(key)) == Some(value))
    };
    let zero_is_absent = |count: i32| (count > 0).then_some(count);
    let min_ready = min_ready(set);
    let too_few = active.len() < replicas(set);
    ReplicaSetStatus {
        replicas: count(&|_| true),
        fully_labeled_replicas: zero_is_absent(count(&labelled)),
        ready_replicas: zero_is_absent(count(&pod::is_ready)),
        available_replicas: zero_is_absent(count(&|pod| {
            available_at(pod, min_ready).is_some_and(|at| at <= now)
        })),
        terminating_replicas: zero_is_absent(i32::try_from(terminating).unwrap_or(i32::MAX)),
        observed_generation: set.metadata.generation,
        conditions: conditions(&old, failure, too_few, now),
    }
}

fn conditions(
    old: &ReplicaSetStatus,
    failure: Option<&str>,
    too_few: bool,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let mut all = old.conditions.clone().unwrap_or_default();
    let before = all.iter().position(|condition| condition.type_ == "ReplicaFailure");
    match (failure, before) {
        (None, Some(at)) => drop(all.remove(at)),
        (Some(why), None) => all.push(ReplicaSetCondition {
            type_: "ReplicaFailure".to_owned(),
            status: "True".to_owned(),
            reason: Some(if too_few { "FailedCreate" } else { "FailedDelete" }.to_owned()),
            message: Some(why.to_owned()),
            last_transition_time: Some(Time(now)),
        }),
        // The first reason stays: a status that changes with each try would be written with each try.
        (Some(_), Some(_)) | (None, None) => {}
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(replicas: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": "u", "generation": 3 },
            "spec": { "replicas": replicas, "minReadySeconds": 10, "selector": { "matchLabels": { "app": "web" } },
                      "template": { "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [] } } },
        }))
        .expect("a ReplicaSet")
    }

    fn pod(name: &str, changes: Value) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": { "name": name, "labels": { "app": "web" }, "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "nodeName": format!("node-{name}"), "containers": [] },
            "status": { "phase": "Running", "conditions": [
                { "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" } ] },
        });
        merge(&mut pod, changes);
        Arc::new(serde_json::from_value(pod).expect("a Pod"))
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    fn now() -> Timestamp {
        "2026-01-02T00:00:00Z".parse().expect("a time")
    }

    #[test]
    fn pods_go_in_the_order_that_hurts_least() {
        let order = [
            pod(
                "unassigned",
                json!({ "spec": { "nodeName": "" }, "status": { "phase": "Pending", "conditions": [] } }),
            ),
            pod("pending", json!({ "status": { "phase": "Pending", "conditions": [] } })),
            pod("unready", json!({ "status": { "conditions": [] } })),
            pod("cheap", json!({ "metadata": { "annotations": { (DELETION_COST): "-5" } } })),
            pod("crowded", json!({ "spec": { "nodeName": "full" } })),
            pod(
                "fresh",
                json!({ "status": { "conditions": [
                { "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T23:59:00Z" } ] } }),
            ),
            pod(
                "restarted",
                json!({ "status": { "containerStatuses": [
                { "name": "a", "image": "", "imageID": "", "ready": true, "restartCount": 4 } ] } }),
            ),
            pod("young", json!({ "metadata": { "creationTimestamp": "2026-01-01T10:00:00Z" } })),
            pod("old", json!({})),
        ];
        let related =
            [order.to_vec(), vec![pod("another", json!({ "spec": { "nodeName": "full" } }))]]
                .concat();
        let mut shuffled = order.to_vec();
        shuffled.reverse();
        let Step::Delete(gone) = plan(&set(0), &shuffled, &related, now()) else {
            panic!("a deletion")
        };
        let names: Vec<_> = gone.iter().map(|pod| name(&pod.metadata).to_owned()).collect();
        let expected: Vec<_> = order.iter().map(|pod| name(&pod.metadata).to_owned()).collect();
        assert_eq!(names, expected);
        let Step::Delete(gone) = plan(&set(8), &shuffled, &related, now()) else {
            panic!("a deletion")
        };
        assert_eq!(name(&gone[0].metadata), "unassigned");
    }

    #[test]
    fn what_is_missing_is_created_and_enough_is_enough() {
        let pods = [pod("a", json!({})), pod("b", json!({}))];
        assert_eq!(plan(&set(5), &pods, &pods, now()), Step::Create(3));
        assert_eq!(plan(&set(2), &pods, &pods, now()), Step::Nothing);
    }

    #[test]
    fn a_pod_is_available_after_its_minimum_time() {
        let fresh = pod(
            "a",
            json!({ "status": { "conditions": [
            { "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T23:59:55Z" } ] } }),
        );
        let status = desired_status(&set(1), std::slice::from_ref(&fresh), 0, None, now());
        assert_eq!((status.ready_replicas, status.available_replicas), (Some(1), None));
        let later = now() + SignedDuration::from_secs(5);
        let status = desired_status(&set(1), &[fresh], 0, None, later);
        assert_eq!((status.available_replicas, status.observed_generation), (Some(1), Some(3)));
    }

    #[test]
    fn a_failure_is_told_once_and_taken_back() {
        let mut set = set(1);
        set.status = Some(desired_status(&set, &[], 0, Some("quota"), now()));
        let again =
            desired_status(&set, &[], 0, Some("quota still"), now() + SignedDuration::from_secs(9));
        assert_eq!(Some(&again), set.status.as_ref(), "the second try changes nothing");
        assert_eq!(
            again.conditions.as_ref().map(|all| all[0].reason.clone()),
            Some(Some("FailedCreate".to_owned()))
        );
        assert_eq!(desired_status(&set, &[], 0, None, now()).conditions, None);
    }

    #[test]
    fn a_new_pod_is_its_template_with_an_owner() {
        let pod = desired_pod(&set(1));
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("web-"));
        let owner = meta::controller_of(&pod.metadata).expect("an owner");
        assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("ReplicaSet", "u"));
    }
}
