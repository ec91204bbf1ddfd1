//! The loaded eBPF programs against the oracle: random clusters are compiled, put into the kernel's maps, and asked with
//! made packets by test runs; then something changes, and the same flows are asked again. Needs root; says so without.

#[path = "loaded/frames.rs"]
mod frames;
#[path = "loaded/packets.rs"]
mod packets;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use k8s_openapi::api::core::v1::Pod;
use nix::sched::{CloneFlags, unshare};
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_ebpf_loader::{ClassMap, Hook, Maps, Pins, RuleTable, install};
use orch_ebpf_maps::{
    ADDRESS_NODE, ADDRESS_REMOTE_NODE, ClassKey, Config, Endpoint, in_key, state,
};
use orch_netagent::policy::rows::{classes, isolation, rules};
use orch_policy::{
    ClusterPolicy, Compiled, Direction, Name, PodFacts, Policy, Prefix, World, compile,
};
use proptest::collection::vec;
use proptest::test_runner::{Config as RunnerConfig, TestRunner};
use tests_policy::oracle::{Cluster, EGRESS, INGRESS, Side, Traffic, addresses, is_networked};
use tests_policy::worlds::{
    change, cluster, interesting_addresses, interesting_traffic, namespace_labels,
};

const NODE: &str = "one";
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const VXLAN_PORT: u16 = 8472;
/// Source ports that no policy names; different, so that no probe is the answer to another.
const INGRESS_SOURCE: u16 = 61_001;
const EGRESS_SOURCE: u16 = 61_002;
/// Pods of a cluster, and links for them.
const PODS: usize = 6;
/// Worlds of one run; `PROPTEST_CASES` is for cheaper things and counts for a tenth.
const CASES: u32 = 100;

/// What a test run reads of `struct __sk_buff`, up to `ifindex`.
#[repr(C)]
struct Context {
    words: [u32; 48],
}

impl Context {
    fn new(ifindex: u32, ingress_ifindex: u32) -> Self {
        let mut words = [0; 48];
        words[9] = ingress_ifindex;
        words[10] = ifindex;
        Self { words }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `repr(C)` of integers, read for its whole size while it is borrowed.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

/// Programs and maps in namespaces of the thread.
struct Kernel {
    root: PathBuf,
    maps: Maps,
    from_pod: SchedClassifier,
    to_pod: SchedClassifier,
    /// Links that stand for pods, and one that is nobody's.
    links: Vec<u32>,
    wire: u32,
    /// Last number given to endpoints and generations.
    number: u32,
    /// Maps have one half of the keys and the other by turns.
    half: u32,
}

impl Kernel {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of its own");
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("private mounts");
        let link = |name: &str| nix::net::if_::if_nametoindex(name).expect("made");
        let mut links = Vec::new();
        for place in 0..=PODS / 2 {
            let (one, other) = (format!("a{place}"), format!("b{place}"));
            let made = Command::new("ip")
                .args(["link", "add", &one, "type", "veth", "peer", "name", &other])
                .status();
            assert!(made.expect("ip starts").success());
            links.extend([link(&one), link(&other)]);
        }
        let wire = links.pop().expect("made");
        let root = tempfile::tempdir().expect("a folder").keep();
        let pins = Pins::below(&root);
        let mut maps = install(&pins).expect("installed");
        maps.set_settings(Config::new(VXLAN_PORT, false)).expect("set");
        let program = |hook: Hook| {
            SchedClassifier::from_pin(pins.folder().join("programs").join(hook.program()))
                .expect("pinned")
        };
        let (from_pod, to_pod) = (program(Hook::FromPod), program(Hook::ToPod));
        Self { root, maps, from_pod, to_pod, links, wire, number: 0, half: 0 }
    }

    fn next(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    /// Makes the endpoints of a new cluster; their flows are new, too.
    fn plug(&mut self, cluster: &Cluster) {
        for link in self.links.clone() {
            self.maps.remove_endpoint(link).expect("removed");
        }
        for (node, ips) in &cluster.nodes {
            let flags = if node == NODE { ADDRESS_NODE } else { ADDRESS_REMOTE_NODE };
            for ip in ips {
                self.maps.put_address(ClassKey::host(*ip), flags).expect("put");
            }
        }
        for (place, pod) in local_pods(cluster) {
            let uid = self.next();
            let endpoint = Endpoint {
                uid,
                generation: uid,
                addr: own(pod, true).map_or(0, |ip| {
                    u32::from_ne_bytes(in_key(ip).1[..4].try_into().expect("four"))
                }),
                addr6: own(pod, false).map_or([0; 16], |ip| in_key(ip).1),
                mac: mac(place),
                state: state::PENDING,
                ..Endpoint::default()
            };
            self.maps.insert_endpoint(self.links[place], endpoint).expect("inserted");
        }
    }

    /// Brings an output into force, as the agent does: maps aside, then one write for each endpoint.
    fn apply(&mut self, cluster: &Cluster, compiled: &Compiled) {
        let classes = ClassMap::build(classes(&compiled.peers).into_iter()).expect("built");
        let former = self.half;
        self.half = 1 - former;
        let count = u32::try_from(self.links.len()).expect("few");
        let tables_of = |half: u32| 1 + half * count..1 + (half + 1) * count;
        let class_map = 1 + self.half;
        self.maps.put_class_map(class_map, &classes).expect("put");
        let keys = tables_of(self.half);
        for (place, pod) in local_pods(cluster) {
            let table = &compiled.endpoints[&name_of(pod)];
            let built = RuleTable::build(rules(table).into_iter()).expect("built");
            let key = keys.clone().nth(place).expect("one for each link");
            self.maps.put_table(key, &built).expect("put");
            let link = self.links[place];
            let before = self.maps.endpoint(link).expect("read").expect("plugged");
            let flags = isolation(table);
            let now = Endpoint {
                state: state::READY,
                generation: self.next(),
                table: key,
                class_map,
                flags,
                ..before
            };
            self.maps.update_endpoint(link, now).expect("written");
        }
        let tables: Vec<u32> = tables_of(former).collect();
        self.maps.withdraw(&[1 + former], &tables).expect("swept");
    }

    fn run(&self, direction: Direction, link: u32, frame: &[u8]) -> u32 {
        let (program, ingress) = match direction {
            Direction::Egress => (&self.from_pod, 0),
            Direction::Ingress => (&self.to_pod, self.wire),
        };
        let context = Context::new(link, ingress);
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(context.bytes()),
            ..TestRunOptions::default()
        };
        program.test_run(options).expect("run").return_value
    }

    /// All questions about all local pods; the number of answers by verdict. What `begun` lacks in the middle of TCP may be
    /// the answer to a connection of the other side, too, so both sides have to be allowed to open one.
    fn assert_equal(
        &self,
        cluster: &Cluster,
        others: &[IpAddr],
        traffic: &[Traffic],
        syn: bool,
        begun: &mut BTreeSet<(usize, Side, IpAddr, u16)>,
    ) -> [usize; 2] {
        let node = cluster.nodes.iter().find(|(name, _)| name == NODE).expect("there");
        let mut counts = [0; 2];
        for (place, pod) in local_pods(cluster) {
            for (side, direction) in SIDES {
                for (other, traffic) in
                    others.iter().flat_map(|other| traffic.iter().map(move |one| (*other, one)))
                {
                    let Some(own) = own(pod, other.is_ipv4()) else { continue };
                    let to_node = direction == Direction::Egress && node.1.contains(&other);
                    // A pod's packets to itself stay in it; VXLAN is not policy's.
                    if other == own || (traffic.protocol == "UDP" && traffic.port == VXLAN_PORT) {
                        continue;
                    }
                    let frame = match direction {
                        Direction::Ingress => {
                            frame([2; 6], other, own, INGRESS_SOURCE, *traffic, syn)
                        }
                        Direction::Egress => {
                            frame(mac(place), own, other, EGRESS_SOURCE, *traffic, syn)
                        }
                    };
                    let verdict = self.run(direction, self.links[place], &frame);
                    let answer = cluster.end(pod, side, other, *traffic);
                    let flow = (place, side, other, traffic.port);
                    let turned = || {
                        let (side, port) = match direction {
                            Direction::Ingress => (EGRESS, INGRESS_SOURCE),
                            Direction::Egress => (INGRESS, EGRESS_SOURCE),
                        };
                        cluster.end(pod, side, other, Traffic { port, ..*traffic }).allowed
                    };
                    let allowed = if traffic.protocol != "TCP" || begun.contains(&flow) {
                        answer.allowed
                    } else if syn {
                        begun.extend(answer.allowed.then_some(flow));
                        answer.allowed
                    } else {
                        answer.allowed && turned()
                    };
                    let expected = if allowed || to_node { NEXT } else { DROP };
                    assert_eq!(
                        verdict,
                        expected,
                        "{} {direction} {other} {traffic:?}, oracle: {answer:?}",
                        name_of(pod)
                    );
                    counts[usize::from(verdict == NEXT)] += 1;
                }
            }
        }
        counts
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.root.join("sys/fs/bpf"));
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

const SIDES: [(Side, Direction); 2] = [(INGRESS, Direction::Ingress), (EGRESS, Direction::Egress)];

/// The pod's address of a family.
fn own(pod: &Pod, is_ipv4: bool) -> Option<IpAddr> {
    addresses(pod).into_iter().find(|ip| ip.is_ipv4() == is_ipv4)
}

fn mac(place: usize) -> [u8; 6] {
    [2, 0, 0, 0, 1, u8::try_from(place).expect("few")]
}

/// Pods of the node with an address, with their places in the list: these stay when labels change.
fn local_pods(cluster: &Cluster) -> Vec<(usize, &Pod)> {
    let is_local = |pod: &Pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        node == Some(NODE) && is_networked(pod) && !addresses(pod).is_empty()
    };
    // Names are p1, p2, …, and stay when pods before them go.
    let place = |pod: &Pod| {
        let name = pod.metadata.name.as_deref()?;
        name.strip_prefix('p')?.parse::<usize>().ok()?.checked_sub(1)
    };
    let pods = cluster.pods.iter().filter(|pod| is_local(pod));
    pods.map(|pod| (place(pod).expect("named by its place"), pod)).collect()
}

fn name_of(pod: &Pod) -> Name {
    Name::new(
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        pod.metadata.name.as_deref().unwrap_or_default(),
    )
}

fn world(cluster: &Cluster) -> World {
    World {
        node: NODE.to_owned(),
        pods: cluster.pods.iter().map(|pod| (name_of(pod), PodFacts::from_api(pod))).collect(),
        namespaces: namespace_labels(cluster),
        policies: cluster
            .policies
            .iter()
            .map(|policy| {
                let meta = &policy.metadata;
                let name = Name::new(
                    meta.namespace.as_deref().unwrap_or_default(),
                    meta.name.as_deref().unwrap_or_default(),
                );
                (name, Policy::from_api(policy))
            })
            .collect(),
        nodes: cluster.nodes.iter().cloned().collect::<BTreeMap<_, _>>(),
        cluster_policies: cluster
            .cluster_policies
            .iter()
            .map(|value| {
                let policy: ClusterNetworkPolicy =
                    serde_json::from_value(value.clone()).expect("a policy");
                let name = policy.metadata.name.clone().unwrap_or_default();
                (name, ClusterPolicy::from_api(&policy))
            })
            .collect(),
        node_labels: cluster.node_labels.clone(),
        pod_ranges: ["10.244.0.0/16", "fd00:10:244::/48"]
            .into_iter()
            .filter_map(Prefix::parse)
            .collect(),
    }
}

/// The first packet of a flow, or with `syn` false one of its middle.
fn frame(
    from: [u8; 6],
    src: IpAddr,
    dst: IpAddr,
    sport: u16,
    traffic: Traffic,
    syn: bool,
) -> Vec<u8> {
    let protocol = match traffic.protocol {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        _ => {
            if src.is_ipv4() {
                1
            } else {
                58
            }
        }
    };
    let mut frame = vec![2, 0, 0, 0, 0, 1];
    frame.extend(from);
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 1, 0, 0, 64, protocol, 0, 0]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame.extend(ipv6_header(src, dst, protocol, traffic.port))
        }
        _ => panic!("one family"),
    }
    if protocol == 1 || protocol == 58 {
        // An echo request with its id.
        frame.extend([if protocol == 1 { 8 } else { 128 }, 0, 0, 0]);
        frame.extend(sport.to_be_bytes());
        frame.extend([0; 34]);
    } else {
        frame.extend(sport.to_be_bytes());
        frame.extend(traffic.port.to_be_bytes());
        // SCTP: verification tag, then an INIT chunk where TCP has its acknowledgement.
        frame.extend([0; 8]);
        frame.extend([0x50, if syn { 0x02 } else { 0x10 }]);
        frame.extend([0; 26]);
    }
    frame
}

/// With extension headers before what they carry for half of the ports.
fn ipv6_header(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, port: u16) -> Vec<u8> {
    let extended = port % 2 == 1;
    let mut header = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, if extended { 64 } else { 40 }];
    header.extend([if extended { 0 } else { protocol }, 64]);
    header.extend(src.octets());
    header.extend(dst.octets());
    if extended {
        // Hop-by-hop options of 8 bytes, destination options of 16; both only padding (PadN).
        header.extend([60, 0, 1, 4, 0, 0, 0, 0]);
        header.extend([protocol, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    header
}

#[test]
fn loaded_programs_say_what_the_oracle_says_before_and_after_each_change() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("ignored: needs root");
        return;
    }
    // Namespaces belong to a thread.
    let thread = std::thread::spawn(|| {
        let kernel = RefCell::new(Kernel::new());
        let totals = RefCell::new([0_usize; 2]);
        let default = RunnerConfig::default();
        let config = RunnerConfig {
            cases: (default.cases / 10).max(CASES),
            failure_persistence: None,
            // Each attempt to shrink writes maps, which waits for the kernel.
            max_shrink_iters: 200,
            ..default
        };
        let worlds = (cluster(PODS, 5), vec(change(), 0..3));
        TestRunner::new(config)
            .run(&worlds, |(mut cluster, changes)| {
                let mut kernel = kernel.borrow_mut();
                kernel.plug(&cluster);
                let mut compiled = compile(&world(&cluster), &Compiled::default());
                kernel.apply(&cluster, &compiled);
                let others: Vec<IpAddr> = interesting_addresses(&cluster).into_iter().collect();
                let traffic: Vec<Traffic> = interesting_traffic(&cluster)
                    .into_iter()
                    .filter(|one| ![INGRESS_SOURCE, EGRESS_SOURCE].contains(&one.port))
                    .collect();
                let add = |[denied, allowed]: [usize; 2]| {
                    let mut totals = totals.borrow_mut();
                    *totals = [totals[0] + denied, totals[1] + allowed];
                };
                let mut begun = BTreeSet::new();
                add(kernel.assert_equal(&cluster, &others, &traffic, true, &mut begun));
                for change in changes {
                    let next = change.apply(&cluster);
                    // New pods need a link first; a run has those it began with.
                    let places = |cluster: &Cluster| -> Vec<usize> {
                        local_pods(cluster).iter().map(|(place, _)| *place).collect()
                    };
                    if places(&next).iter().any(|place| !places(&cluster).contains(place)) {
                        continue;
                    }
                    cluster = next;
                    compiled = compile(&world(&cluster), &compiled);
                    kernel.apply(&cluster, &compiled);
                    // Flows that were allowed go on or are cut, those that were not may begin.
                    add(kernel.assert_equal(&cluster, &others, &traffic, false, &mut begun));
                }
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{error}"));
        totals.into_inner()
    });
    let [denied, allowed] = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    eprintln!(
        "{} packets: {allowed} passed, {denied} dropped, all as the oracle says",
        allowed + denied
    );
    assert!(denied > 1000 && allowed > 1000, "worlds that say nothing: {denied} and {allowed}");
}
