//! The policy engine on the kernel's maps: what the API server says becomes rows, classes and tables. Needs root; says so
//! without.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use nix::sched::{CloneFlags, unshare};
use orch_config::Paths;
use orch_ebpf_loader::{
    Announcement, ClassMap, Connection, Hook, Kept, Maps, Pins, PodRef, RuleTable, attach, install,
    uninstall,
};
use orch_ebpf_maps::{
    Direction, Endpoint, ISOLATED_EGRESS, ISOLATED_INGRESS, MAX_CLASS_MAPS, MAX_TABLES, Reason,
    state,
};
use orch_netagent::policy::engine::{Engine, Report};
use orch_netagent::policy::explain::explain;
use orch_netagent::policy::world::{Cluster, Local, Reader};
use orch_netagent::policy::{node, state_dir, strays};
use serde_json::{Value, json};

use crate::support::netns::Netns;

const WEB: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 2);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 9);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 9);

/// Time for what passes, also when it is sent again; and for what does not.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(700);

struct World {
    root: PathBuf,
    pins: Pins,
    engine: Engine,
    reader: Reader,
    cluster: Cluster,
    local: Local,
    link: u32,
}

fn pod(name: &str, node: &str, ip: Option<Ipv4Addr>, labels: Value) -> Arc<Pod> {
    let value = json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": labels},
        "spec": {"nodeName": node, "containers": []},
        "status": {"podIP": ip, "podIPs": ip.iter().map(|_| json!({"ip": OTHER6})).collect::<Vec<_>>()},
    });
    Arc::new(serde_json::from_value(value).expect("a pod"))
}

fn policy(name: &str, spec: Value) -> Arc<NetworkPolicy> {
    let value = json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec});
    Arc::new(serde_json::from_value(value).expect("a policy"))
}

fn only_from_front() -> Arc<NetworkPolicy> {
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "front"}}}]}],
    });
    policy("web", spec)
}

impl World {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("ignored: needs root");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of its own");
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("private mounts");
        ip(&["link", "add", "cni0", "type", "bridge"]);
        ip(&["link", "add", "veth1", "type", "veth", "peer", "name", "pod1"]);
        ip(&["link", "set", "veth1", "master", "cni0"]);
        ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "far0"]);
        ip(&["address", "add", "192.0.2.1/24", "dev", "eth0"]);
        let link = nix::net::if_::if_nametoindex("veth1").expect("made");
        let root = tempfile::tempdir().expect("a folder").keep();
        let pins = Pins::below(&root);
        let engine = Engine::new(install(&pins).expect("installed")).expect("taken over");
        let namespace = json!({"metadata": {"name": "shop"}});
        let namespace: Namespace = serde_json::from_value(namespace).expect("a namespace");
        let cluster = Cluster { namespaces: vec![Arc::new(namespace)], ..Cluster::default() };
        let local = Local {
            node: "one".to_owned(),
            pod_network: "10.244.0.0/16".parse().ok(),
            ..Local::default()
        };
        Some(Self { root, pins, engine, reader: Reader::default(), cluster, local, link })
    }

    fn maps(&self) -> Maps {
        Maps::open(&self.pins).expect("pinned")
    }

    /// As the plugin does it.
    fn plug(&mut self, uid: u32) {
        let row = Endpoint {
            uid,
            addr: WEB.to_bits().to_be(),
            state: state::PENDING,
            ..Endpoint::default()
        };
        self.maps().insert_endpoint(self.link, row).expect("inserted");
        let pod = PodRef {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: Some("uid-web".to_owned()),
        };
        self.local.endpoints = vec![Announcement {
            ifindex: self.link,
            uid,
            addr: WEB,
            addr6: Some(WEB6),
            pod: Some(pod),
        }];
    }

    fn look(&mut self) -> Report {
        let changed = self.reader.read(&self.cluster, &self.local);
        self.engine.look(&self.reader, changed, &self.local.endpoints).expect("a look")
    }

    /// Another agent takes over what is in the kernel.
    fn restart(&mut self) {
        self.engine = Engine::new(install(&self.pins).expect("again")).expect("taken over");
        self.reader = Reader::default();
    }

    fn row(&self) -> Endpoint {
        self.maps().endpoint(self.link).expect("read").expect("there")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.root.join("sys/fs/bpf"));
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn ip(words: &[&str]) {
    let done = Command::new("ip").args(words).status();
    assert!(done.expect("ip starts").success(), "ip {words:?}");
}

/// Each test in a thread of its own, because a namespace belongs to a thread.
fn in_world(test: impl FnOnce(&mut World) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Some(mut world) = World::new() {
            test(&mut world);
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn an_endpoint_is_closed_until_its_pod_is_known_and_again_when_it_is_gone() {
    in_world(|w| {
        w.plug(7);
        let report = w.look();
        assert_eq!((report.written, w.row().state), (0, state::PENDING), "no such pod yet");
        w.cluster.pods = vec![pod("web", "one", None, json!({}))];
        assert_eq!(w.look().written, 1);
        let row = w.row();
        assert_eq!((row.state, row.flags, row.uid), (state::READY, 0, 7));
        assert_eq!(w.look().written, 0, "a second look changes nothing");
        w.cluster.pods.clear();
        w.look();
        assert_eq!(w.row().state, state::PENDING, "whose address may be another's next");
    });
}

#[test]
fn a_policy_is_in_force_with_one_write_and_old_maps_go_at_the_look_after() {
    in_world(|w| {
        w.plug(7);
        w.cluster.pods = vec![
            pod("web", "one", None, json!({"app": "web"})),
            pod("front", "two", Some(OTHER), json!({"app": "front"})),
        ];
        w.look();
        let open = w.row();
        w.cluster.policies = vec![only_from_front()];
        assert_eq!(w.look().written, 1);
        let first = w.row();
        assert_eq!(first.flags, ISOLATED_INGRESS);
        assert!(first.generation > open.generation, "flows are judged again");
        assert!(first.revision > open.revision);
        let maps = w.maps();
        let class = |row: &Endpoint, ip| maps.class_of(row.class_map, ip).expect("read");
        assert_ne!(class(&first, OTHER), class(&first, Ipv4Addr::new(10, 244, 2, 8)));
        let class6 = |ip: Ipv6Addr| maps.class_of(first.class_map, ip).expect("read");
        assert_eq!(class6(OTHER6), class(&first, OTHER), "one pod, two families");
        assert_ne!(class6(OTHER6), class6(Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 8)));

        // Both directions now: another table, and for a moment both are there.
        let both = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        w.cluster.policies.push(policy("deny", both));
        w.look();
        let second = w.row();
        assert_eq!(second.flags, ISOLATED_INGRESS | ISOLATED_EGRESS);
        let published = |w: &World| w.maps().published().expect("read");
        assert!(published(w).1.contains(&first.table), "a program may still read it");
        w.look();
        assert_eq!(published(w), (vec![second.class_map], vec![second.table]));

        w.cluster.policies.clear();
        w.look();
        assert_eq!((w.row().state, w.row().flags), (state::READY, 0));
    });
}

#[test]
fn flows_are_judged_again_only_where_a_change_makes_a_difference() {
    in_world(|w| {
        w.plug(7);
        let away = |name: &str, last: u8, label: &str| {
            let status = json!({"podIP": Ipv4Addr::new(10, 244, 2, last)});
            let meta = json!({"namespace": "shop", "name": name, "labels": {"app": label}});
            let value = json!({"metadata": meta, "spec": {"nodeName": "two", "containers": []},
                "status": status});
            Arc::new(serde_json::from_value::<Pod>(value).expect("a pod"))
        };
        let cluster = |label: &str| {
            let web = pod("web", "one", None, json!({"app": "web"}));
            vec![web, away("front", 9, "front"), away("db", 8, label)]
        };
        let from_back = json!({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": "back"}}}], "ports": [{"port": 81}]},
        ]});
        w.cluster.policies = vec![only_from_front(), policy("back", from_back)];
        w.cluster.pods = cluster("db");
        w.look();
        let before = w.row();
        w.cluster.pods = cluster("cache");
        assert_eq!(w.look().judged_again, 0, "nobody asks for this label");
        assert_eq!(w.row().generation, before.generation);
        w.cluster.pods = cluster("back");
        assert_eq!(w.look().judged_again, 1);
        let after = w.row();
        assert_ne!(after.generation, before.generation, "it may come to port 81 now");
        // A pod more: another class map, and no other decision.
        w.cluster.pods.push(away("new", 10, "new"));
        let report = w.look();
        assert_eq!((report.written, report.judged_again), (1, 0));
        assert_eq!(w.row().generation, after.generation);
        w.cluster.pods = cluster("db");
        assert_eq!(w.look().judged_again, 1, "it may no longer");
    });
}

#[test]
fn an_engine_that_starts_leaves_rows_alone_until_it_knows_and_uses_no_key_that_is_in_use() {
    in_world(|w| {
        w.plug(7);
        w.cluster.pods = vec![pod("web", "one", None, json!({"app": "web"}))];
        w.cluster.policies = vec![only_from_front()];
        w.look();
        let before = w.row();
        w.restart();
        assert_eq!(w.row(), before, "enforced as before");
        w.look();
        let after = w.row();
        assert_eq!((after.state, after.flags), (before.state, before.flags));
        assert!(after.table != before.table && after.class_map != before.class_map);
        assert!(after.generation > before.generation && after.revision > before.revision);
    });
}

/// Each agent that is killed before its first look ends may leave a class map.
#[test]
fn class_maps_that_nobody_names_make_room_when_there_is_none() {
    in_world(|w| {
        w.plug(7);
        w.cluster.pods = vec![
            pod("web", "one", None, json!({"app": "web"})),
            pod("front", "two", Some(OTHER), json!({"app": "front"})),
        ];
        w.look();
        let none = ClassMap::build([].into_iter()).expect("built");
        for key in 1..MAX_CLASS_MAPS {
            w.maps().put_class_map(key, &none).expect("there is room");
        }
        w.restart();
        w.cluster.policies = vec![only_from_front()];
        w.look();
        let row = w.row();
        assert_eq!((row.state, row.flags), (state::READY, ISOLATED_INGRESS));
        assert!(w.maps().class_of(row.class_map, OTHER).expect("there").is_some());
    });
}

/// No room for one more table: the pod is closed, its name is said, and it opens when there is room.
#[test]
fn a_table_too_many_closes_its_pod_and_no_other_until_there_is_room() {
    in_world(|w| {
        w.plug(7);
        w.cluster.pods = vec![pod("web", "one", None, json!({"app": "web"}))];
        w.look();
        let rules = || RuleTable::build([].into_iter()).expect("built");
        let keys: Vec<u32> = (1..MAX_TABLES).collect();
        for part in keys.chunks(64) {
            let part: Vec<_> = part.iter().map(|key| (*key, rules())).collect();
            let (_, outcomes) = w.maps().publish(None, &part);
            assert!(outcomes.iter().all(Result::is_ok), "there is room");
        }
        w.restart();
        w.cluster.policies = vec![only_from_front()];
        let report = w.look();
        assert_eq!(w.row().state, state::LOCKED);
        assert!(
            matches!(&report.locked[..], [one] if one.starts_with("shop/web: ")),
            "{:?}",
            report.locked
        );
        // What no row names goes at the end of a look.
        let report = w.look();
        assert_eq!((w.row().state, w.row().flags), (state::READY, ISOLATED_INGRESS));
        assert!(report.locked.is_empty(), "{:?}", report.locked);
    });
}

#[test]
fn what_nobody_announced_and_what_lost_its_link_is_swept() {
    in_world(|w| {
        w.plug(7);
        let rows = w.maps().endpoints().expect("read");
        let announced = w.local.endpoints.clone();
        assert_eq!(w.engine.sweep(&rows, &announced, |_| false).expect("swept"), 0);
        let other = vec![Announcement { uid: 8, ..announced[0].clone() }];
        assert_eq!(w.engine.sweep(&rows, &other, |_| false).expect("swept"), 1);
        assert!(w.maps().endpoints().expect("read").is_empty());
        w.plug(9);
        let rows = w.maps().endpoints().expect("read");
        let link = w.link;
        let gone = w.engine.sweep(&rows, &w.local.endpoints, |index| index == link);
        assert_eq!(gone.expect("swept"), 1);
    });
}

#[test]
fn ways_out_are_judged_and_ports_of_the_bridge_are_none() {
    in_world(|w| {
        let look = || {
            let netlink = cni_netlink::Netlink::open().expect("a socket");
            node::observe(&netlink).expect("observed")
        };
        let seen = look();
        assert!(seen.addresses.contains(&Ipv4Addr::new(192, 0, 2, 1).into()), "{seen:?}");
        let new = node::ensure_wires(&w.pins, &seen).expect("attached");
        assert!(new.contains(&"eth0".to_owned()), "{new:?}");
        assert!(!new.contains(&"veth1".to_owned()) && !new.contains(&"cni0".to_owned()));
        assert!(node::ensure_wires(&w.pins, &seen).expect("again").is_empty());
        ip(&["link", "add", "eth1", "type", "bridge"]);
        assert_eq!(node::ensure_wires(&w.pins, &look()).expect("attached"), ["eth1"]);
        assert!(uninstall(&w.pins).expect("removed"));
        assert!(!uninstall(&w.pins).expect("nothing is left"));
    });
}

#[test]
fn the_loaded_programs_say_what_they_would_do_and_nothing_is_left_of_it() {
    in_world(|w| {
        w.plug(7);
        w.cluster.pods = vec![
            pod("web", "one", None, json!({"app": "web"})),
            pod("front", "two", Some(OTHER), json!({"app": "front"})),
        ];
        w.cluster.policies = vec![only_from_front()];
        w.look();
        let paths = Paths::new(&w.root);
        let kept = Kept::of(&state_dir(&paths), "orch");
        kept.write("c1", "eth0", &w.local.endpoints[0]).expect("written");
        let ask = |name: &str, peer: Ipv4Addr| {
            let about = Connection {
                namespace: "shop".to_owned(),
                name: name.to_owned(),
                incoming: true,
                peer: peer.into(),
                protocol: 6,
                port: 80,
                from_node: false,
            };
            explain(&paths, &about).map(|said| (said.passed, said.reason))
        };
        assert_eq!(ask("web", OTHER), Ok((true, "allowed".to_owned())));
        let stranger = Ipv4Addr::new(10, 244, 2, 8);
        assert_eq!(ask("web", stranger), Ok((false, "policy".to_owned())));
        let absent = ask("db", OTHER).expect_err("no such pod");
        assert_eq!(absent, "the node has no endpoint of pod shop/db");
        assert_eq!(w.maps().flows().expect("read"), []);
        assert_eq!(w.maps().counters().expect("read"), []);
    });
}

/// A pod with an address, whose link has the programs, and a neighbour on the bridge that has none.
fn wire(w: &World) -> (Netns, Netns) {
    let (pod, far) = (Netns::new("pod"), Netns::new("far"));
    ip(&["link", "set", "cni0", "up"]);
    ip(&["link", "set", "veth1", "up"]);
    ip(&["link", "add", "veth2", "master", "cni0", "up", "type", "veth", "peer", "name", "far1"]);
    for (link, netns, address) in [("pod1", &pod, WEB), ("far1", &far, NEIGHBOUR)] {
        ip(&["link", "set", link, "netns", &netns.name]);
        netns.ip(&format!("link set {link} name eth0"));
        netns.ip(&format!("address add {address}/24 dev eth0"));
    }
    pod.ip("link set eth0 address 02:00:00:00:00:07");
    pod.ip("link set eth0 up");
    far.ip("link set eth0 up");
    for hook in [Hook::FromPod, Hook::ToPod] {
        attach(&w.pins, "veth1", w.link, hook).expect("attached");
    }
    (pod, far)
}

/// The pod's row anew, as the runtime and the plugin remember it: no flow of a former `uid` is known for it.
fn forget(w: &mut World, uid: u32, pod: &Netns) {
    w.plug(uid);
    let row = Endpoint { mac: [2, 0, 0, 0, 0, 7], ..w.row() };
    w.maps().update_endpoint(w.link, row).expect("written");
    let paths = Paths::new(&w.root);
    let kept = Kept::of(&state_dir(&paths), "orch");
    kept.write("c1", "eth0", &w.local.endpoints[0]).expect("written");
    let cached = json!({
        "kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": "orch",
        "netns": format!("/run/netns/{}", pod.name),
    });
    let results = paths.cni_cache_dir().join("results");
    std::fs::create_dir_all(&results).expect("made");
    std::fs::write(results.join("orch-c1-eth0"), cached.to_string()).expect("written");
    w.look();
    assert_eq!(w.row().state, state::READY);
}

/// A server that may open no connection speaks on one that was forgotten: what it says is dropped until its sockets have
/// told whose connection it is, and then only if that may be.
#[test]
fn a_connection_that_the_programs_forgot_goes_on_once_the_pods_sockets_were_asked() {
    in_world(|w| {
        let (inside, far) = wire(w);
        w.cluster.pods = vec![pod("web", "one", None, json!({"app": "web"}))];
        let from_neighbour = json!({
            "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"ipBlock": {"cidr": format!("{NEIGHBOUR}/32")}}]}],
        });
        w.cluster.policies = vec![policy("web", from_neighbour)];
        forget(w, 7, &inside);
        let listener = inside.within(|| TcpListener::bind((WEB, 80)).expect("bound"));
        let mut client = far.within(|| {
            TcpStream::connect_timeout(&(WEB, 80).into(), Duration::from_secs(3)).expect("allowed")
        });
        let (mut server, _) = listener.accept().expect("a connection");
        // What arrives, until it is so long or nothing comes any more.
        let mut says = |text: &[u8], length: usize, patience: Duration| {
            server.write_all(text).expect("into the socket's buffer");
            client.set_read_timeout(Some(patience)).expect("set");
            let (mut arrived, mut byte) = (Vec::new(), [0]);
            while arrived.len() < length && client.read_exact(&mut byte).is_ok() {
                arrived.extend(byte);
            }
            arrived
        };
        let strays = |w: &World| {
            let all = w.maps().counters().expect("read");
            all.iter()
                .filter(|(way, why, _)| (*way, *why) == (Direction::Egress, Reason::Stray))
                .count()
        };
        assert_eq!(says(b"a", 1, LONG), b"a");
        forget(w, 8, &inside);
        assert_eq!(says(b"b", 1, SHORT), b"", "may it open connections?");
        assert_eq!(strays(w), 1, "counted as what it is");
        let paths = Paths::new(&w.root);
        strays::ask(&mut w.maps(), &paths).expect("asked");
        assert_eq!(says(b"c", 2, LONG), b"bc", "it is sent again");

        // Cut, and then forgotten.
        let nothing = json!({"podSelector": {}, "policyTypes": ["Ingress"]});
        w.cluster.policies = vec![policy("web", nothing)];
        w.look();
        assert_eq!(says(b"d", 1, SHORT), b"", "cut");
        forget(w, 9, &inside);
        assert_eq!(says(b"e", 1, SHORT), b"", "may the other side come?");
        strays::ask(&mut w.maps(), &paths).expect("asked");
        assert_eq!(says(b"f", 1, SHORT), b"", "it may not");
    });
}
