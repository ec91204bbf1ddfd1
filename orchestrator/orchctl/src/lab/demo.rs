//! `orchctl lab demo`: the example, deployed and answering from different nodes. Everything is idempotent, so a
//! second run finds it there.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bollard::Docker;
use bollard::query_parameters::TagImageOptionsBuilder;
use orch_api::k8s_openapi::api::core::v1::{Node, Pod, Service};
use orch_client::{Api, Client, ListParams};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::layout::Lab;
use super::programs::Programs;
use super::{engine_of, fleet};
use crate::{image, kube, output, progress};

/// The manifest that is also in the tree.
const MANIFEST: &str = include_str!("../../../../examples/nodeinfo.yaml");
const NAMESPACE: &str = "default";
const NAME: &str = "nodeinfo";
const SELECTOR: &str = "app=nodeinfo";
/// Path of the program in its image; also the tool that calls from pod to pod.
const PROGRAM: &str = "/nodeinfo";
pub(super) const IMAGE: &str = "nodeinfo:v1";
/// A second name of the same image, for trying a rolling update.
const NEXT_IMAGE: &str = "nodeinfo:v2";

const ROLLOUT_LIMIT: Duration = Duration::from_secs(180);
/// A Service reaches the nodes' kernels a moment after the pods are ready.
const SERVICE_LIMIT: Duration = Duration::from_secs(30);
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Calls through each node's NodePort.
const CALLS_PER_NODE: usize = 2;
/// Balancing is random; so many calls that all go to one of three pods happen once in 10^14 times.
const MOST_CALLS: usize = 30;

pub(super) async fn run(lab: &Lab) -> anyhow::Result<()> {
    let client = fleet::client(lab)?;
    let docker = engine_of(lab).await?;
    progress::step("example image", async {
        ensure_image(&docker, &Programs::find()?).await?;
        Ok(IMAGE.to_owned())
    })
    .await?;
    progress::step("apply examples/nodeinfo.yaml", async {
        Ok(kube::apply_text(&client, MANIFEST, NAMESPACE).await?.join(", "))
    })
    .await?;
    kube::wait_rollout(&client, NAMESPACE, NAME, ROLLOUT_LIMIT).await?;

    let nodes = nodes(&client).await?;
    let pods = pods(&client).await?;
    let port = node_port(&client).await?;
    wait_node_ports(&nodes, port).await?;
    through_node_port(&nodes, port, &pods).await?;
    let staying: Vec<PodAt> = pods.into_iter().filter(|pod| !pod.leaving).collect();
    from_pod_to_pod(&client, &staying).await?;
    go_on(lab, &nodes, port)
}

/// Brings the example's image into the engine.
pub(super) async fn ensure_image(docker: &Docker, programs: &Programs) -> anyhow::Result<()> {
    // The engine's build cache makes this cheap when the program has not changed.
    image::build_from_program(docker, &programs.beside(NAME)?, IMAGE).await?;
    let (repo, tag) = NEXT_IMAGE.split_once(':').context("an image name with a tag")?;
    let options = TagImageOptionsBuilder::default().repo(repo).tag(tag).build();
    docker.tag_image(IMAGE, Some(options)).await.with_context(|| format!("tag {NEXT_IMAGE}"))
}

struct NodeAt {
    name: String,
    address: IpAddr,
}

/// A running pod of the example.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PodAt {
    name: String,
    node: String,
    ip: IpAddr,
    /// Being deleted: it still answers for a moment.
    leaving: bool,
}

async fn nodes(client: &Client) -> anyhow::Result<Vec<NodeAt>> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?.items;
    let found = nodes.into_iter().filter_map(|node| {
        let status = node.status?;
        let ready =
            status.conditions?.iter().any(|found| found.type_ == "Ready" && found.status == "True");
        let address =
            status.addresses?.into_iter().find(|address| address.type_ == "InternalIP")?.address;
        ready.then_some(NodeAt { name: node.metadata.name?, address: address.parse().ok()? })
    });
    Ok(found.collect())
}

async fn pods(client: &Client) -> anyhow::Result<Vec<PodAt>> {
    let params = ListParams { label_selector: Some(SELECTOR.to_owned()), ..ListParams::default() };
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE).list(&params).await?.items;
    let found = pods.into_iter().filter_map(|pod| {
        let status = pod.status?;
        let ready =
            status.conditions?.iter().any(|found| found.type_ == "Ready" && found.status == "True");
        let leaving = pod.metadata.deletion_timestamp.is_some();
        let ip = status.pod_ip?.parse().ok()?;
        let node = pod.spec?.node_name?;
        (ready || leaving).then_some(PodAt { name: pod.metadata.name?, node, ip, leaving })
    });
    Ok(found.collect())
}

async fn node_port(client: &Client) -> anyhow::Result<u16> {
    let service = Api::<Service>::namespaced(client.clone(), NAMESPACE).get(NAME).await?;
    let port = service
        .spec
        .and_then(|spec| spec.ports?.first()?.node_port)
        .context("the Service has no NodePort")?;
    u16::try_from(port).context("NodePort")
}

async fn wait_node_ports(nodes: &[NodeAt], port: u16) -> anyhow::Result<()> {
    progress::wait("the Service on every node", SERVICE_LIMIT, || async {
        for node in nodes {
            if let Err(error) = get(SocketAddr::new(node.address, port)).await {
                return Ok(Err(format!("{}:{port} ({error:#})", node.address)));
            }
        }
        Ok(Ok(format!("NodePort {port}")))
    })
    .await
}

/// Calls from this machine through the NodePort of each node, until two nodes have answered.
async fn through_node_port(nodes: &[NodeAt], port: u16, pods: &[PodAt]) -> anyhow::Result<()> {
    output::line("\nfrom this machine through the NodePort of each node:")?;
    let mut answered = BTreeSet::new();
    let mut calls = 0;
    // With one node, or all pods on one, two cannot answer; that is for `wanted` to know and not a failure.
    let wanted = nodes.len().min(2);
    while calls < nodes.len() * CALLS_PER_NODE || (answered.len() < wanted && calls < MOST_CALLS) {
        let Some(node) = nodes.get(calls % nodes.len().max(1)) else { bail!("no node is Ready") };
        calls += 1;
        let to = SocketAddr::new(node.address, port);
        let answer = get(to).await.with_context(|| format!("call http://{to}/"))?;
        let from = pods.iter().find(|pod| answer.contains(&pod.name));
        output::line(&format!(
            "  http://{to}/ ({})  ->  {}  (pod on {})",
            node.name,
            answer.trim(),
            from.map_or("an unknown node", |pod| &pod.node)
        ))?;
        answered.extend(from.map(|pod| pod.node.clone()));
    }
    if answered.len() < wanted {
        bail!(
            "only {} answered {calls} calls through the NodePort; `orchctl get pods -o wide` shows where the pods are",
            answered.into_iter().collect::<Vec<_>>().join(", ")
        );
    }
    Ok(())
}

/// Each pod calls one on another node, by address, and one of them the Service by its name.
async fn from_pod_to_pod(client: &Client, pods: &[PodAt]) -> anyhow::Result<()> {
    let pairs = across(pods);
    if pairs.is_empty() {
        output::line("\nall pods are on one node: nothing to show between nodes")?;
        return Ok(());
    }
    output::line("\nfrom pod to pod across nodes, through the VXLAN network:")?;
    for (from, to) in pairs {
        let url = format!("http://{}/", SocketAddr::new(to.ip, 8080));
        let answer = fetch(client, from, &url).await?;
        if !answer.contains(&to.name) {
            bail!("{url} is {} and answered {answer:?}", to.name);
        }
        output::line(&format!(
            "  {} ({})  {url} ({})  ->  {}",
            from.name,
            from.node,
            to.node,
            answer.trim()
        ))?;
    }
    let Some(from) = pods.first() else { return Ok(()) };
    output::line("\nfrom a pod to the Service, by name:")?;
    let url = format!("http://{NAME}.{NAMESPACE}.svc.{}/", orch_config::CLUSTER_DOMAIN);
    let deadline = Instant::now() + SERVICE_LIMIT;
    let answer = loop {
        match fetch(client, from, &url).await {
            Ok(answer) => break answer,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    };
    output::line(&format!("  {} ({})  {url}  ->  {}", from.name, from.node, answer.trim()))
}

/// For each pod the next one that is on another node.
fn across(pods: &[PodAt]) -> Vec<(&PodAt, &PodAt)> {
    (0..pods.len())
        .filter_map(|at| {
            let others = (1..pods.len()).map(|step| &pods[(at + step) % pods.len()]);
            let to = others.into_iter().find(|other| other.node != pods[at].node)?;
            Some((&pods[at], to))
        })
        .collect()
}

async fn fetch(client: &Client, from: &PodAt, url: &str) -> anyhow::Result<String> {
    let command = [PROGRAM.to_owned(), "fetch".to_owned(), url.to_owned()];
    let remote = kube::Remote {
        namespace: NAMESPACE,
        pod: &from.name,
        container: None,
        command: &command,
        tty: false,
    };
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let code = remote
        .run(client, None::<tokio::io::Empty>, &mut stdout, &mut stderr)
        .await
        .with_context(|| format!("run {} in pod {}", command.join(" "), from.name))?;
    if code != 0 {
        bail!(
            "{} in pod {}: {}",
            command.join(" "),
            from.name,
            String::from_utf8_lossy(&stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Body of a plain GET of `/`.
async fn get(to: SocketAddr) -> anyhow::Result<String> {
    let work = async {
        let mut stream = TcpStream::connect(to).await.context("connect")?;
        stream
            .write_all(
                format!("GET / HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").as_bytes(),
            )
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.context("read the answer")?;
        body(&answer).map(str::to_owned)
    };
    tokio::time::timeout(CALL_LIMIT, work)
        .await
        .unwrap_or_else(|_| bail!("no answer for {} s", CALL_LIMIT.as_secs()))
}

fn body(answer: &str) -> anyhow::Result<&str> {
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is no HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("the answer is {status}");
    }
    Ok(body)
}

fn go_on(lab: &Lab, nodes: &[NodeAt], port: u16) -> anyhow::Result<()> {
    let own = std::env::current_exe().unwrap_or_else(|_| "orchctl".into());
    let own =
        std::env::current_dir().ok().and_then(|here| own.strip_prefix(here).ok()).unwrap_or(&own);
    let own = shown(own);
    let default = lab.dir == Path::new(super::DEFAULT_DIR);
    let orchctl = if default { own } else { format!("{own} --lab-dir {}", lab.dir.display()) };
    let curl = nodes.first().map_or_else(String::new, |node| {
        format!("  curl http://{}/\n", SocketAddr::new(node.address, port))
    });
    let last = nodes.last().map_or("node-1", |node| node.name.as_str());
    let end = if default { "make down".to_owned() } else { format!("{orchctl} lab down") };
    output::line(&format!(
        "
go on with:
  export KUBECONFIG={}
  kubectl get nodes,pods -o wide
  kubectl scale deployment/{NAME} --replicas=6
  kubectl set image deployment/{NAME} {NAME}={NEXT_IMAGE}
{curl}  {orchctl} status
  {orchctl} lab exec node-1 -- ip route
  {orchctl} lab kill {last}; {orchctl} lab restart {last}
and end it all with:
  {end}",
        lab.kubeconfig().display()
    ))
}

/// A program as it can be typed: with `./` where it would be looked for on the PATH.
fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    if text.contains('/') { text } else { format!("./{text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, node: &str) -> PodAt {
        PodAt {
            name: name.to_owned(),
            node: node.to_owned(),
            ip: IpAddr::from([10, 244, 1, 2]),
            leaving: false,
        }
    }

    #[test]
    fn calls_go_across_nodes_only() {
        let pods = [pod("a", "node-1"), pod("b", "node-1"), pod("c", "node-2")];
        let names: Vec<(&str, &str)> =
            across(&pods).iter().map(|(from, to)| (from.name.as_str(), to.name.as_str())).collect();
        assert_eq!(names, [("a", "c"), ("b", "c"), ("c", "a")]);
        assert!(across(&pods[..2]).is_empty());
    }

    #[test]
    fn only_a_good_answer_has_a_body() {
        assert_eq!(body("HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello\n").expect("a body"), "hello\n");
        assert!(body("HTTP/1.1 404 Not Found\r\n\r\n").is_err());
        assert!(body("SSH-2.0").is_err());
    }

    #[test]
    fn the_example_in_the_tree_can_be_read() {
        assert!(MANIFEST.contains(IMAGE) && MANIFEST.contains("nodePort"));
    }
}
