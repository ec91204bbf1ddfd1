use serde_json::{Value, json};

use super::*;
use crate::filter::Plugin;
use crate::testing::pod;

fn second(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn next(queue: &mut Queue, now: Instant) -> Option<String> {
    queue.pop(now).map(|pod| pod.name().to_owned())
}

fn fit() -> Plugins {
    let mut plugins = Plugins::default();
    plugins.insert(Plugin::NodeResourcesFit);
    plugins
}

fn priority(name: &str, priority: i32) -> Arc<PodInfo> {
    pod(name, json!({ "spec": { "priority": priority } }))
}

#[tokio::test(start_paused = true)]
async fn pods_come_by_priority_then_by_age() {
    let mut queue = Queue::default();
    let now = Instant::now();
    for pod in [priority("a", 0), priority("b", 5), priority("c", 0), priority("d", 5)] {
        queue.set(pod);
    }
    let order: Vec<_> = std::iter::from_fn(|| next(&mut queue, now)).collect();
    assert_eq!(order, ["b", "d", "a", "c"]);
    assert_eq!(queue.len(), 4, "pods in hand are still waiting");
}

#[tokio::test(start_paused = true)]
async fn an_unschedulable_pod_sleeps_until_it_is_woken_and_then_does_not_wait_for_nothing() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.set(priority("a", 0));
    assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
    queue.unschedulable("a", fit(), now);
    assert_eq!(next(&mut queue, now + second(60)), None);

    queue.wake(|_, rejected_by| rejected_by.contains(Plugin::NodePorts));
    assert_eq!(next(&mut queue, now + second(60)), None, "not what it waits for");
    queue.wake(|_, rejected_by| rejected_by.contains(Plugin::NodeResourcesFit));
    assert_eq!(next(&mut queue, now).as_deref(), Some("a"), "nothing else is to do");
}

#[tokio::test(start_paused = true)]
async fn fresh_pods_go_before_those_that_back_off() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.set(priority("a", 0));
    queue.pop(now);
    queue.unschedulable("a", fit(), now);
    queue.wake(|_, _| true);
    queue.set(priority("b", 0));
    assert_eq!(next(&mut queue, now).as_deref(), Some("b"));
    assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn a_failed_binding_waits_one_second_then_twice_as_long_up_to_ten() {
    let mut queue = Queue::default();
    let mut now = Instant::now();
    queue.set(priority("a", 0));
    for seconds in [1, 2, 4, 8, 10, 10] {
        queue.pop(now).expect("it is due");
        queue.retry("a", now);
        assert_eq!(queue.next_deadline(), Some(now + second(seconds)));
        assert!(queue.pop(now + second(seconds) - Duration::from_millis(1)).is_none());
        now += second(seconds);
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_change_wakes_nobody_but_a_changed_spec_does() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.set(priority("a", 0));
    queue.pop(now);
    queue.unschedulable("a", fit(), now);
    queue.set(pod("a", json!({ "spec": { "priority": 0 }, "status": { "phase": "Pending" } })));
    assert_eq!(next(&mut queue, now), None);
    queue.set(pod(
        "a",
        json!({ "spec": { "priority": 0, "tolerations": [{ "operator": "Exists" }] } }),
    ));
    assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn gated_pods_wait_for_their_gates() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.set(pod("a", json!({ "spec": { "schedulingGates": [{ "name": "quota" }] } })));
    assert_eq!(next(&mut queue, now), None);
    queue.wake(|_, _| true);
    assert_eq!(next(&mut queue, now), None);
    queue.set(pod("a", json!({ "spec": { "schedulingGates": Value::Null } })));
    assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_every_hint_missed_is_tried_again_after_five_minutes() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.set(priority("a", 0));
    queue.pop(now);
    queue.unschedulable("a", fit(), now);
    assert_eq!(queue.next_deadline(), Some(now + second(300)));
    assert_eq!(next(&mut queue, now + second(300)).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn a_removed_pod_is_nowhere() {
    let now = Instant::now();
    let mut queue = Queue::default();
    for place in 0..4 {
        queue.set(priority("a", 0));
        if place > 0 {
            queue.pop(now);
        }
        match place {
            2 => queue.unschedulable("a", fit(), now),
            3 => queue.retry("a", now),
            _ => {}
        }
        queue.remove("a");
        assert!(queue.is_empty() && queue.next_deadline().is_none());
        assert_eq!(next(&mut queue, now + second(600)), None);
    }
}
