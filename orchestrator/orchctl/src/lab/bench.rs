//! `orchctl lab bench`: how long a pod takes from `apply` to Ready, against plain Docker making the same two
//! containers, alternating in one run; and what the daemons need in memory when idle.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig};
use bollard::query_parameters::CreateContainerOptionsBuilder;
use futures::StreamExt as _;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_client::{Api, Client, DeleteParams, ListParams, WatchEvent};
use serde_json::json;

use super::layout::Lab;
use super::programs::Programs;
use super::{demo, engine, engine_of, fleet};
use crate::cluster::Format;
use crate::output;

const NAMESPACE: &str = "default";
const POD: &str = "orch-bench";
const READY_LIMIT: Duration = Duration::from_secs(60);
const GONE_LIMIT: Duration = Duration::from_secs(60);
/// The aim of issue 2 for the ratio of medians.
const AIM: f64 = 1.5;

pub(super) async fn run(lab: &Lab, rounds: usize, format: Format) -> anyhow::Result<()> {
    let client = fleet::client(lab)?;
    let docker = engine_of(lab).await?;
    demo::ensure_image(&docker, &Programs::find()?).await?;
    let names = [format!("{}-bench-sandbox", lab.id()), format!("{}-bench-app", lab.id())];
    // What a run that was broken off left.
    clean(&client, &docker, &names).await?;

    // Before the rounds: they warm the daemons up.
    let idle: Vec<_> =
        super::daemons(lab).into_iter().map(|one| (one.name, super::resident(one.pid))).collect();
    let outcome = measure(&client, &docker, &names, rounds).await;
    clean(&client, &docker, &names).await?;
    let (pods, plain) = outcome?;
    let ratio = median(&pods).as_secs_f64() / median(&plain).as_secs_f64();
    let in_millis = |times: &[Duration]| -> Vec<f64> {
        times.iter().map(|time| time.as_secs_f64() * 1000.0).collect()
    };
    let data = json!({
        "residentBytes": idle.iter().cloned().collect::<BTreeMap<String, Option<u64>>>(),
        "podStartMillis": in_millis(&pods), "plainStartMillis": in_millis(&plain), "ratioOfMedians": ratio,
    });
    format.print(&data, || tell(&idle, &pods, &plain, ratio))
}

fn tell(
    idle: &[(String, Option<u64>)],
    pods: &[Duration],
    plain: &[Duration],
    ratio: f64,
) -> anyhow::Result<()> {
    output::line("memory of the idle daemons (resident):")?;
    let rows = idle.iter().map(|(name, bytes)| vec![name.clone(), super::mebibytes(*bytes)]);
    output::table(&["PROCESS", "MEMORY"], rows)?;
    let rounds = pods.len();
    output::line(&format!("\npod start, {rounds} rounds, alternating (ms):"))?;
    let row = |name: &str, times: &[Duration]| {
        let mut times = times.to_vec();
        times.sort_unstable();
        let at = |part: f64| millis(times[((times.len() - 1) as f64 * part).round() as usize]);
        vec![name.to_owned(), at(0.0), millis(median(&times)), at(0.9), at(1.0)]
    };
    output::table(
        &["WHAT", "MIN", "MEDIAN", "P90", "MAX"],
        [
            row("apply to Ready of one pod", pods),
            row("docker create + start of the same two containers", plain),
        ],
    )?;
    output::line(&format!("ratio of medians: {ratio:.2} (aim: at most {AIM})"))
}

fn millis(time: Duration) -> String {
    format!("{:.0}", time.as_secs_f64() * 1000.0)
}

/// The middle of the times, or the mean of the two in the middle.
fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    match times.len() {
        0 => Duration::ZERO,
        count if count % 2 == 1 => times[count / 2],
        count => (times[count / 2 - 1] + times[count / 2]) / 2,
    }
}

async fn measure(
    client: &Client,
    docker: &Docker,
    names: &[String; 2],
    rounds: usize,
) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut pods, mut plain) = (Vec::new(), Vec::new());
    let mut step = crate::progress::Step::new("pod start");
    // One round more than counts: the first one warms caches of both.
    for round in 0..=rounds {
        step.waiting(&format!("round {round} of {rounds}"));
        let (pod, docker) = (pod_start(client).await?, plain_start(docker, names).await?);
        if round > 0 {
            pods.push(pod);
            plain.push(docker);
        }
    }
    step.done(&format!("{rounds} rounds"));
    Ok((pods, plain))
}

/// From the request to the event that says Ready, as a client sees it; the pod is removed afterwards.
async fn pod_start(client: &Client) -> anyhow::Result<Duration> {
    let api = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": POD },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "main", "image": demo::IMAGE, "imagePullPolicy": "Never" }],
        },
    }))?;
    let params = ListParams {
        field_selector: Some(format!("metadata.name={POD}")),
        ..ListParams::default()
    };
    let from = api.list(&params).await?.resource_version;
    let mut events = Box::pin(api.watch(&params, &from, 120).await?);
    let started = Instant::now();
    api.create(&pod).await.context("create the pod")?;
    let ready = async {
        while let Some(event) = events.next().await {
            if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event?
                && is_ready(&pod)
            {
                return Ok(started.elapsed());
            }
        }
        bail!("the watch ended")
    };
    let took = match tokio::time::timeout(READY_LIMIT, ready).await {
        Ok(took) => took?,
        Err(_) => bail!(
            "pod {POD} is not Ready after {} s; `orchctl describe pod {POD}` says why",
            READY_LIMIT.as_secs()
        ),
    };
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    api.delete(POD, &now).await.context("delete the pod")?;
    wait_gone(&api).await?;
    Ok(took)
}

fn is_ready(pod: &Pod) -> bool {
    let conditions =
        pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

async fn wait_gone(api: &Api<Pod>) -> anyhow::Result<()> {
    let deadline = Instant::now() + GONE_LIMIT;
    while api.get_opt(POD).await?.is_some() {
        if Instant::now() > deadline {
            bail!("pod {POD} is still there {} s after its deletion", GONE_LIMIT.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The same by hand: a sandbox without network, and the program joined to it.
async fn plain_start(docker: &Docker, [sandbox, app]: &[String; 2]) -> anyhow::Result<Duration> {
    let started = Instant::now();
    start(docker, sandbox, &engine::pause_image(), "none").await?;
    start(docker, app, demo::IMAGE, &format!("container:{sandbox}")).await?;
    let took = started.elapsed();
    for name in [app, sandbox] {
        engine::remove_container(docker, name).await?;
    }
    Ok(took)
}

async fn start(docker: &Docker, name: &str, image: &str, network: &str) -> anyhow::Result<()> {
    let options = CreateContainerOptionsBuilder::default().name(name).build();
    let body = ContainerCreateBody {
        image: Some(image.to_owned()),
        host_config: Some(HostConfig {
            network_mode: Some(network.to_owned()),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    docker.create_container(Some(options), body).await.with_context(|| format!("create {name}"))?;
    docker.start_container(name, None).await.with_context(|| format!("start {name}"))
}

async fn clean(client: &Client, docker: &Docker, names: &[String; 2]) -> anyhow::Result<()> {
    for name in names {
        engine::remove_container(docker, name).await?;
    }
    let api = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    if api.get_opt(POD).await?.is_some() {
        api.delete(POD, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() })
            .await?;
        wait_gone(&api).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let times = |list: &[u64]| -> Vec<Duration> {
            list.iter().copied().map(Duration::from_millis).collect()
        };
        assert_eq!(median(&times(&[9, 1, 5])), Duration::from_millis(5));
        assert_eq!(median(&times(&[1, 9, 5, 7])), Duration::from_millis(6));
        assert_eq!(median(&[]), Duration::ZERO);
    }
}
