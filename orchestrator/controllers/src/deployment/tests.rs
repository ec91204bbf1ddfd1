use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::plan::{Plan, Step, plan};
use super::rolling::{replicas, scale, surge_and_unavailable};
use super::*;

fn deployment(changes: Value) -> Deployment {
    let mut value = json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "d", "generation": 1 },
        "spec": { "replicas": 4, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 2,
                  "selector": { "matchLabels": { "app": "web" } },
                  "template": { "metadata": { "labels": { "app": "web" } },
                                "spec": { "containers": [{ "name": "a", "image": "one" }] } } },
    });
    merge(&mut value, changes);
    serde_json::from_value(value).expect("a Deployment")
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

fn image(image: &str) -> Value {
    json!({ "spec": { "template": { "spec": { "containers": [{ "name": "a", "image": image }] } } } })
}

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().expect("a time")
}

/// Steps without the bookkeeping, as words.
fn words(plan: &Plan) -> Vec<String> {
    plan.steps
        .iter()
        .filter_map(|step| match step {
            Step::Create(set) => Some(format!("create {}", replicas(set))),
            Step::Update { set, scaled_from: Some(from) } => {
                Some(format!("{} {from}>{}", name(&set.metadata), replicas(set)))
            }
            Step::Delete(set) => Some(format!("delete {}", name(&set.metadata))),
            Step::Update { .. } | Step::SetRevision(_) => None,
        })
        .collect()
}

/// A cluster of one Deployment: steps are carried out on ReplicaSets whose pods all become available at once, or never.
struct World {
    deployment: Deployment,
    sets: Vec<ReplicaSet>,
    created: i64,
}

impl World {
    fn new(deployment: Deployment) -> Self {
        Self { deployment, sets: Vec::new(), created: 0 }
    }

    fn plan(&self) -> Plan {
        let old_pods = self
            .sets
            .iter()
            .filter(|set| !revision::has_template(set, &self.deployment))
            .any(|set| set.status.as_ref().is_some_and(|status| status.replicas > 0));
        plan(&self.deployment, self.sets.clone(), old_pods, now())
    }

    fn step(&mut self) -> Plan {
        let plan = self.plan();
        for step in &plan.steps {
            match step {
                Step::Create(set) => {
                    self.created += 1;
                    let mut set = set.clone();
                    set.metadata.uid = Some(format!("rs-{}", self.created));
                    let at = now() + SignedDuration::from_secs(self.created);
                    set.metadata.creation_timestamp = Some(Time(at));
                    self.sets.push(set);
                }
                Step::Update { set, .. } => {
                    for found in &mut self.sets {
                        if found.metadata.name == set.metadata.name {
                            *found = set.clone();
                        }
                    }
                }
                Step::Delete(set) => {
                    self.sets.retain(|found| found.metadata.name != set.metadata.name);
                }
                Step::SetRevision(revision) => {
                    let annotations = self.deployment.metadata.annotations.get_or_insert_default();
                    annotations.insert(revision::REVISION.to_owned(), revision.clone());
                }
            }
        }
        self.deployment.status = Some(plan.status.clone());
        plan
    }

    /// All pods run, those of ReplicaSets chosen by `works` are available.
    fn settle_pods(&mut self, works: impl Fn(&ReplicaSet) -> bool) {
        for set in &mut self.sets {
            let size = replicas(set);
            let available = if works(set) { size } else { 0 };
            let status = json!({ "replicas": size, "readyReplicas": available, "availableReplicas": available });
            set.status = serde_json::from_value(status).ok();
        }
    }

    fn run(&mut self, works: impl Fn(&ReplicaSet) -> bool) {
        for _ in 0..100 {
            let before = (self.sets.clone(), self.deployment.clone());
            self.step();
            self.settle_pods(&works);
            if before == (self.sets.clone(), self.deployment.clone()) {
                return;
            }
        }
        panic!("the rollout does not come to rest");
    }

    fn change(&mut self, changes: Value) {
        let mut value = serde_json::to_value(&self.deployment).expect("JSON");
        merge(&mut value, changes);
        self.deployment = serde_json::from_value(value).expect("a Deployment");
        self.deployment.metadata.generation = self.deployment.metadata.generation.map(|n| n + 1);
    }

    fn sizes(&self) -> Vec<i32> {
        self.sets.iter().map(replicas).collect()
    }

    fn condition(&self, kind: &str) -> (String, String) {
        let status = self.deployment.status.as_ref();
        let all = status.and_then(|status| status.conditions.as_ref());
        let found = all.into_iter().flatten().find(|found| found.type_ == kind);
        found
            .map(|found| (found.status.clone(), found.reason.clone().unwrap_or_default()))
            .unwrap_or_default()
    }
}

fn said(status: &str, reason: &str) -> (String, String) {
    (status.to_owned(), reason.to_owned())
}

#[test]
fn a_new_deployment_gets_a_replica_set_and_says_so() {
    let mut world = World::new(deployment(json!({})));
    assert_eq!(words(&world.step()), ["create 4"]);
    assert_eq!(world.condition("Progressing"), said("True", "NewReplicaSetCreated"));
    assert_eq!(world.condition("Available"), said("False", "MinimumReplicasUnavailable"));
    world.run(|_| true);
    assert_eq!(world.condition("Progressing"), said("True", "NewReplicaSetAvailable"));
    assert_eq!(world.condition("Available"), said("True", "MinimumReplicasAvailable"));
    let set = &world.sets[0];
    let hash = set.metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
    assert_eq!(set.metadata.name, hash.map(|hash| format!("web-{hash}")));
    assert_eq!(revision::annotation(&world.deployment.metadata, revision::REVISION), Some("1"));
    assert_eq!(world.plan().steps, [], "a second look changes nothing");
    assert_eq!(Some(world.plan().status), world.deployment.status);
}

#[test]
fn a_new_template_rolls_out_within_its_bounds() {
    let mut world = World::new(deployment(json!({})));
    world.run(|_| true);
    world.change(image("two"));
    // 25 % of 4: one more, and one less than four.
    assert_eq!(words(&world.step()), ["create 1"]);
    let old = name(&world.sets[0].metadata).to_owned();
    world.settle_pods(|set| name(&set.metadata) == old);
    assert_eq!(words(&world.step()), [format!("{old} 4>3")], "while the new pod is not available");
    world.settle_pods(|_| true);
    world.run(|_| true);
    assert_eq!(world.sizes(), [0, 4]);
    assert_eq!(revision::annotation(&world.deployment.metadata, revision::REVISION), Some("2"));
}

#[test]
fn a_template_that_never_works_stops_and_is_told_after_the_deadline() {
    let mut world = World::new(deployment(json!({})));
    world.run(|_| true);
    let good = world.sets[0].metadata.name.clone();
    world.change(image("broken"));
    world.run(|set| set.metadata.name == good);
    assert_eq!(world.sizes(), [3, 2], "three work, five exist");
    assert_eq!(world.condition("Progressing"), said("True", "ReplicaSetUpdated"));
    let waits = world.plan().check_after.expect("a deadline");
    assert!(waits.as_secs() >= 600 && waits.as_secs() < 602, "{waits:?}");
    let late = now() + SignedDuration::from_secs(601);
    let plan = plan(&world.deployment, world.sets.clone(), false, late);
    world.deployment.status = Some(plan.status);
    assert_eq!(world.condition("Progressing"), said("False", "ProgressDeadlineExceeded"));
    // Back to the old template: the same ReplicaSet, under a new number.
    world.change(image("one"));
    world.run(|set| set.metadata.name == good);
    assert_eq!(world.sizes(), [4, 0]);
    assert_eq!(world.condition("Progressing"), said("True", "NewReplicaSetAvailable"));
    assert_eq!(revision::annotation(&world.sets[0].metadata, revision::REVISION), Some("3"));
    assert_eq!(
        revision::annotation(&world.sets[0].metadata, "deployment.kubernetes.io/revision-history"),
        Some("1")
    );
}

#[test]
fn recreate_waits_for_the_last_old_pod() {
    let mut world =
        World::new(deployment(json!({ "spec": { "strategy": { "type": "Recreate" } } })));
    world.run(|_| true);
    world.change(image("two"));
    let old = name(&world.sets[0].metadata).to_owned();
    assert_eq!(words(&world.step()), [format!("{old} 4>0")]);
    assert_eq!(words(&world.step()), Vec::<String>::new(), "they are still ending");
    world.settle_pods(|_| true);
    assert_eq!(words(&world.step()), ["create 4"]);
}

#[test]
fn a_paused_deployment_scales_and_does_not_roll() {
    let mut world = World::new(deployment(json!({})));
    world.run(|_| true);
    world.change(json!({ "spec": { "paused": true, "replicas": 6 } }));
    world.change(image("two"));
    world.run(|_| true);
    assert_eq!(world.sizes(), [6]);
    assert_eq!(world.condition("Progressing"), said("Unknown", "DeploymentPaused"));
    world.change(json!({ "spec": { "paused": false } }));
    world.run(|_| true);
    assert_eq!(world.sizes(), [0, 6]);
}

#[test]
fn scaling_amid_a_rollout_keeps_the_proportions() {
    let rolling = json!({ "spec": { "replicas": 10, "strategy": { "type": "RollingUpdate",
                          "rollingUpdate": { "maxSurge": 3, "maxUnavailable": 2 } } } });
    let mut world = World::new(deployment(rolling));
    world.run(|_| true);
    let good = world.sets[0].metadata.name.clone();
    world.change(image("broken"));
    world.run(|set| set.metadata.name == good);
    assert_eq!(world.sizes(), [8, 5]);
    // Kubernetes, "Proportional scaling": of the five more, three go to the old and two to the new one.
    world.change(json!({ "spec": { "replicas": 15 } }));
    let plan = world.step();
    assert_eq!(words(&plan).len(), 2, "{:?}", words(&plan));
    assert_eq!(world.sizes(), [11, 7]);
}

#[test]
fn history_beyond_the_limit_is_deleted_oldest_first() {
    let mut world = World::new(deployment(json!({})));
    for version in ["one", "two", "three", "four", "five"] {
        world.change(image(version));
        world.run(|_| true);
    }
    let numbers: Vec<i64> = world.sets.iter().map(revision::number).collect();
    assert_eq!(numbers, [3, 4, 5]);
}

#[test]
fn surge_and_unavailability_are_never_both_zero() {
    for (surge, missing, expected) in [
        (json!("25%"), json!("25%"), (1, 1)),
        (json!("30%"), json!("30%"), (2, 1)),
        (json!(0), json!(0), (0, 1)),
        (json!(0), json!("10%"), (0, 1)),
        (json!(2), json!(9), (2, 4)),
    ] {
        let rolling = json!({ "spec": { "strategy": { "rollingUpdate": { "maxSurge": surge, "maxUnavailable": missing } } } });
        assert_eq!(surge_and_unavailable(&deployment(rolling)), expected, "{surge} {missing}");
    }
}

proptest! {
    #[test]
    fn a_rollout_ends_and_never_leaves_its_bounds(
        wanted in 0_i32..12, surge in 0_i32..4, missing in 0_i32..4, later in 0_i32..12,
    ) {
        let changes = json!({ "spec": { "replicas": wanted, "strategy": { "type": "RollingUpdate",
            "rollingUpdate": { "maxSurge": surge, "maxUnavailable": missing } } } });
        let mut world = World::new(deployment(changes));
        world.run(|_| true);
        world.change(image("two"));
        let (surge, missing) = surge_and_unavailable(&world.deployment);
        for _ in 0..50 {
            world.step();
            let all: i32 = world.sizes().iter().sum();
            prop_assert!(all <= wanted + surge, "{all} pods of {wanted} + {surge}");
            let running: i32 = world.sets.iter().map(|set| rolling::available(set).min(replicas(set))).sum();
            prop_assert!(running >= wanted - missing, "{running} available of {wanted} - {missing}");
            world.settle_pods(|_| true);
        }
        prop_assert_eq!(world.sizes().last().copied(), Some(wanted));
        // Scaled in the middle of the next rollout, it comes to rest too.
        world.change(image("three"));
        world.step();
        world.change(json!({ "spec": { "replicas": later } }));
        world.run(|_| true);
        prop_assert_eq!(world.sizes().iter().sum::<i32>(), later);
    }

    #[test]
    fn proportional_scaling_gives_out_exactly_what_is_allowed(
        sizes in proptest::collection::vec(1_i32..20, 2..5), wanted in 1_i32..60,
    ) {
        let deployment = deployment(json!({ "spec": { "replicas": wanted } }));
        let before: i32 = sizes.iter().sum();
        let sets: Vec<ReplicaSet> = sizes.iter().enumerate().map(|(n, size)| {
            let at = now() + SignedDuration::from_secs(i64::try_from(n).unwrap_or(0));
            serde_json::from_value(json!({
                "metadata": { "name": format!("rs-{n}"), "uid": n.to_string(), "creationTimestamp": at.to_string(),
                              "annotations": { (revision::DESIRED): before.to_string(), (revision::MAX): before.to_string() } },
                "spec": { "replicas": size, "selector": {} },
            })).expect("a ReplicaSet")
        }).collect();
        let all: Vec<&ReplicaSet> = sets.iter().collect();
        let scaled = scale(&deployment, None, &all);
        let surge = surge_and_unavailable(&deployment).0;
        prop_assert_eq!(scaled.iter().sum::<i32>(), wanted + surge);
        prop_assert!(scaled.iter().all(|size| *size >= 0));
    }
}
