//! `portmap` behind `bridge`: the real executable, the real kernel, and packets.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use cni_netlink::NetNs;
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed, address, gateway};

type Result<T = ()> = anyhow::Result<T>;

const SUBNET: &str = "10.88.0.0/24";
const SUBNET6: &str = "fd88::/64";
const TIMEOUT: Duration = Duration::from_millis(1500);

fn conf(t: &Testbed) -> Value {
    let mut conf = t.conf(&[SUBNET, SUBNET6]);
    conf["hairpinMode"] = json!(true);
    conf
}

fn portmap(mappings: Value, prev: &Value) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "net", "type": "portmap",
        "runtimeConfig": {"portMappings": mappings}, "prevResult": prev,
    })
}

/// A pod with host ports.
fn mapped(t: &Testbed, mappings: Value) -> Result<(Pod, Value)> {
    let pod = t.pod()?;
    let result = t.add(&pod, &conf(t))?;
    let again = t.add(&pod, &portmap(mappings, &result))?;
    assert_eq!(again, result, "a chained plugin hands on what it got");
    Ok((pod, result))
}

/// Connects from one namespace to `to` and expects to reach a server in another; returns from where it saw the client.
fn reach(from: &NetNs, to: &str, server: &NetNs, port: u16) -> Result<IpAddr> {
    let to: SocketAddr = to.parse()?;
    let any = if to.is_ipv4() { "0.0.0.0" } else { "[::]" };
    let listener = server.run(|| -> Result<TcpListener> {
        TcpListener::bind(format!("{any}:{port}")).context("listen")
    })?;
    let client = thread::scope(|scope| -> Result<IpAddr> {
        let accepted = scope.spawn(|| -> Result<IpAddr> {
            listener.set_nonblocking(true)?;
            let deadline = std::time::Instant::now() + TIMEOUT * 2;
            let (mut stream, peer) = loop {
                match listener.accept() {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        anyhow::ensure!(std::time::Instant::now() < deadline, "nobody came");
                        thread::sleep(Duration::from_millis(5));
                    }
                    accepted => break accepted?,
                }
            };
            stream.write_all(b"hello")?;
            Ok(peer.ip())
        });
        let text = from.run(|| -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)
                .with_context(|| format!("connect to {to}"))?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        anyhow::ensure!(text == "hello", "the answer is {text:?}");
        accepted.join().expect("the server does not panic")
    })?;
    Ok(client)
}

fn elements(t: &Testbed) -> Result<usize> {
    Ok(t.nft("list ruleset")?.matches("comment \"cni").count())
}

#[test]
fn a_host_port_is_reached_from_outside_the_host_its_loopback_and_other_pods() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let (pod, result) =
        mapped(&t, json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]))?;
    let other = t.pod()?;
    let ip_other = address(&t.add(&other, &conf(&t))?, 0)?;

    let from = reach(&outside, "192.0.2.1:8080", &pod.netns, 80)?;
    assert_eq!(from, "192.0.2.2".parse::<IpAddr>()?, "the client's address stays");
    reach(&t.host, "192.0.2.1:8080", &pod.netns, 80)?;
    let from = reach(&t.host, "127.0.0.1:8080", &pod.netns, 80)?;
    assert_eq!(from, gateway(&result)?, "from the loopback it is the host");
    let from = reach(&other.netns, "192.0.2.1:8080", &pod.netns, 80)?;
    assert_ne!(from, ip_other, "the answer has to come back through the host");
    let from = reach(&pod.netns, "192.0.2.1:8080", &pod.netns, 80)?;
    assert_eq!(from, gateway(&result)?, "a pod reaches itself");
    // Other ports are the host's own.
    assert!(reach(&outside, "192.0.2.1:8081", &pod.netns, 80).is_err());
    Ok(())
}

#[test]
fn ipv6_is_forwarded_too() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("2001:db8::1/64", "2001:db8::2/64")?;
    let (pod, _) = mapped(&t, json!([{"hostPort": 8080, "containerPort": 80}]))?;
    // The uplink's addresses first pass duplicate address detection.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let from = loop {
        match reach(&outside, "[2001:db8::1]:8080", &pod.netns, 80) {
            Err(_) if std::time::Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(100));
            }
            reached => break reached?,
        }
    };
    assert_eq!(from, "2001:db8::2".parse::<IpAddr>()?);
    reach(&pod.netns, "[2001:db8::1]:8080", &pod.netns, 80)?;
    Ok(())
}

#[test]
fn a_host_ip_limits_a_mapping_to_that_address() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let uplink = t.netlink.link("uplink")?.context("no uplink")?;
    t.netlink.add_address(
        uplink.index,
        "192.0.2.9/24".parse()?,
        &cni_netlink::AddressOptions::default(),
    )?;
    let one =
        json!([{"hostPort": 80, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"}]);
    let nine =
        json!([{"hostPort": 80, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.9"}]);
    let (a, _) = mapped(&t, one)?;
    assert!(reach(&outside, "192.0.2.9:80", &a.netns, 80).is_err());
    let (b, _) = mapped(&t, nine)?;
    reach(&outside, "192.0.2.1:80", &a.netns, 80)?;
    reach(&outside, "192.0.2.9:80", &b.netns, 80)?;
    Ok(())
}

#[test]
fn everything_is_masqueraded_on_request_and_nothing_without_snat() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let (a, b) = (t.pod()?, t.pod()?);
    let (ra, rb) = (t.add(&a, &conf(&t))?, t.add(&b, &conf(&t))?);
    let mut all = portmap(json!([{"hostPort": 81, "containerPort": 80}]), &ra);
    all["masqAll"] = json!(true);
    t.add(&a, &all)?;
    let mut none = portmap(json!([{"hostPort": 82, "containerPort": 80}]), &rb);
    none["snat"] = json!(false);
    t.add(&b, &none)?;
    assert_eq!(reach(&outside, "192.0.2.1:81", &a.netns, 80)?, gateway(&ra)?);
    assert_eq!(reach(&outside, "192.0.2.1:82", &b.netns, 80)?, "192.0.2.2".parse::<IpAddr>()?);
    assert!(reach(&t.host, "127.0.0.1:82", &b.netns, 80).is_err(), "no way back");
    all["prevResult"] = ra;
    t.attachment("CHECK", &a, &all)?.success()?;
    Ok(())
}

#[test]
fn conditions_decide_which_packets_count_and_a_wrong_one_is_named() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let pod = t.pod()?;
    let result = t.add(&pod, &conf(&t))?;
    let mut limited = portmap(json!([{"hostPort": 80, "containerPort": 80}]), &result);
    limited["conditionsV4"] = json!(["ip", "saddr", "198.51.100.0/24"]);
    t.add(&pod, &limited)?;
    t.attachment("CHECK", &pod, &limited)?.success()?;
    assert!(reach(&outside, "192.0.2.1:80", &pod.netns, 80).is_err());
    t.del(&pod, &limited)?;
    limited["conditionsV4"] = json!(["ip saddr 192.0.2.0/24"]);
    t.add(&pod, &limited)?;
    reach(&outside, "192.0.2.1:80", &pod.netns, 80)?;
    t.del(&pod, &limited)?;
    // As in the reference's manual, for its usual backend.
    limited["backend"] = json!("iptables");
    limited["conditionsV4"] = json!(["!", "-s", "192.0.2.0/24"]);
    t.add(&pod, &limited)?;
    assert!(reach(&outside, "192.0.2.1:80", &pod.netns, 80).is_err());
    t.del(&pod, &limited)?;
    limited["conditionsV4"] = json!(["!", "-s", "198.51.100.0/24"]);
    t.add(&pod, &limited)?;
    t.attachment("CHECK", &pod, &limited)?.success()?;
    reach(&outside, "192.0.2.1:80", &pod.netns, 80)?;
    t.del(&pod, &limited)?;
    for (words, code) in [(json!(["-m", "owner"]), 2), (json!(["ip", "sources", "192.0.2.1"]), 7)] {
        limited["conditionsV4"] = words;
        let (found, msg) = t.attachment("ADD", &pod, &limited)?.failure()?;
        assert_eq!(found, code, "{msg}");
        assert!(msg.contains("conditionsV4"), "{msg}");
    }
    assert_eq!(elements(&t)?, 0);
    Ok(())
}

#[test]
fn a_port_that_another_container_has_is_refused_by_name_and_stays_where_it_is() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
    let (a, _) = mapped(&t, ports.clone())?;
    let b = t.pod()?;
    let rb = t.add(&b, &conf(&t))?;
    let both = json!([
        {"hostPort": 9000, "containerPort": 80},
        {"hostPort": 8080, "containerPort": 80, "hostIP": "192.0.2.1"},
    ]);
    let (code, msg) = t.attachment("ADD", &b, &portmap(both, &rb))?.failure()?;
    assert_eq!(code, 103, "{msg}");
    assert!(msg.contains("8080/tcp") && msg.contains(&format!("net/{}/eth0", a.id)), "{msg}");
    reach(&outside, "192.0.2.1:8080", &a.netns, 80)?;
    assert!(reach(&outside, "192.0.2.1:9000", &b.netns, 80).is_err(), "all of it or nothing");
    // The same number of another protocol is another port.
    let udp = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]);
    t.add(&b, &portmap(udp, &rb))?;
    // After DEL the port is free.
    t.del(&a, &portmap(ports.clone(), &Value::Null))?;
    t.add(&b, &portmap(ports, &rb))?;
    reach(&outside, "192.0.2.1:8080", &b.netns, 80)?;
    Ok(())
}

#[test]
fn add_again_replaces_what_it_made_and_check_sees_what_is_missing() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = mapped(&t, json!([{"hostPort": 8080, "containerPort": 80}]))?;
    let moved =
        portmap(json!([{"hostPort": 8081, "containerPort": 80, "protocol": "sctp"}]), &result);
    t.add(&pod, &moved)?;
    assert!(!t.nft("list ruleset")?.contains("tcp . 8080"));
    t.attachment("CHECK", &pod, &moved)?.success()?;
    t.nft("flush map inet cni_portmap any4")?;
    t.nft("flush chain inet cni_portmap postrouting")?;
    let (code, msg) = t.attachment("CHECK", &pod, &moved)?.failure()?;
    assert_eq!(code, 101);
    assert!(msg.contains("8081/sctp") && msg.contains("postrouting"), "{msg}");
    t.nft("delete table inet cni_portmap")?;
    t.attachment("CHECK", &pod, &moved)?.failure()?;
    // ADD makes everything again.
    t.add(&pod, &moved)?;
    t.attachment("CHECK", &pod, &moved)?.success()?;
    Ok(())
}

#[test]
fn del_needs_neither_namespace_nor_result_and_is_repeatable() -> Result {
    let t = Testbed::new()?;
    let (pod, _) = mapped(&t, json!([{"hostPort": 8080, "containerPort": 80}]))?;
    let (other, _) = mapped(&t, json!([{"hostPort": 8081, "containerPort": 80}]))?;
    let bare = json!({"cniVersion": "1.1.0", "name": "net", "type": "portmap"});
    let id = pod.id.clone();
    drop(pod);
    for netns in ["", "/nowhere"] {
        let variables =
            [("CNI_CONTAINERID", id.as_str()), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns)];
        t.call("portmap", "DEL", &variables, &bare)?.success()?;
    }
    let rules = t.nft("list ruleset")?;
    assert!(!rules.contains("8080") && rules.contains("8081"), "{rules}");
    let fresh = Testbed::new()?;
    fresh.del(&other, &bare)?;
    assert_eq!(fresh.nft("list ruleset")?, "", "DEL makes nothing");
    Ok(())
}

#[test]
fn gc_keeps_valid_and_foreign_attachments_and_the_last_one_takes_the_table() -> Result {
    let t = Testbed::new()?;
    let (a, _) = mapped(&t, json!([{"hostPort": 8080, "containerPort": 80}]))?;
    let (b, rb) = mapped(&t, json!([{"hostPort": 8081, "containerPort": 80}]))?;
    let c = t.pod()?;
    let rc = t.add(&c, &conf(&t))?;
    let mut foreign = portmap(json!([{"hostPort": 8082, "containerPort": 80}]), &rc);
    foreign["name"] = json!("net2");
    t.add(&c, &foreign)?;
    let bare = json!({"cniVersion": "1.1.0", "name": "net", "type": "portmap"});
    t.gc(&[&b], &bare)?.success()?;
    let rules = t.nft("list ruleset")?;
    assert!(!rules.contains("8080") && rules.contains("8081") && rules.contains("8082"), "{rules}");
    t.attachment("CHECK", &b, &portmap(json!([{"hostPort": 8081, "containerPort": 80}]), &rb))?
        .success()?;
    let before = t.nft("-s list ruleset")?;
    t.gc(&[&b], &bare)?.success()?;
    assert_eq!(t.nft("-s list ruleset")?, before, "a second GC changes nothing");
    t.gc(&[], &bare)?.success()?;
    let mut other = bare.clone();
    other["name"] = json!("net2");
    assert!(t.nft("list ruleset")?.contains("8082"));
    t.gc(&[], &other)?.success()?;
    assert!(!t.nft("list ruleset")?.contains("cni_portmap"));
    // Without the list of valid ones nothing is removed.
    let (code, _) = t.call("portmap", "GC", &[], &bare)?.failure()?;
    assert_eq!(code, 7);
    drop((a, c));
    Ok(())
}

/// A client that keeps its socket goes on as one flow of conntrack.
fn ask(client: &UdpSocket, to: &str) -> Result<String> {
    client.send_to(b"who", to)?;
    let mut buffer = [0; 16];
    let (length, _) = client.recv_from(&mut buffer).context("no answer")?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Answers every datagram to the port with a name, until the value is dropped.
struct Named(std::sync::Arc<std::sync::atomic::AtomicBool>, Option<thread::JoinHandle<()>>);

impl Named {
    fn new(netns: &NetNs, name: &'static str) -> Result<Self> {
        let socket = netns.run(|| -> Result<UdpSocket> { Ok(UdpSocket::bind("0.0.0.0:53")?) })?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let asked = stop.clone();
        let task = thread::spawn(move || {
            let mut buffer = [0; 16];
            while !asked.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(name.as_bytes(), from);
                }
            }
        });
        Ok(Self(stop, Some(task)))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(task) = self.1.take() {
            let _ = task.join();
        }
    }
}

#[test]
fn a_busy_udp_client_follows_the_port_to_its_next_container() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let client = outside.run(|| -> Result<UdpSocket> { Ok(UdpSocket::bind("192.0.2.2:4000")?) })?;
    client.set_read_timeout(Some(TIMEOUT))?;
    let to = "192.0.2.1:5353";
    let ports = json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]);
    // A flow that nobody answers, from before there is a container: conntrack has it untranslated.
    t.host.run(|| -> Result {
        Ok(std::fs::write("/proc/sys/net/netfilter/nf_conntrack_udp_timeout", "600")?)
    })?;
    let _host = Named::new(&t.host, "host53")?;
    let (a, _) = mapped(&t, ports.clone())?;
    let first = Named::new(&a.netns, "first")?;
    assert_eq!(ask(&client, to)?, "first");
    t.del(&a, &portmap(ports.clone(), &Value::Null))?;
    let own = t.host.run(|| -> Result<UdpSocket> { Ok(UdpSocket::bind(to)?) })?;
    own.set_read_timeout(Some(TIMEOUT))?;
    client.send_to(b"who", to)?;
    let mut buffer = [0; 16];
    own.recv_from(&mut buffer).context("after DEL the port is the host's own")?;
    let (b, _) = mapped(&t, ports)?;
    let _second = Named::new(&b.netns, "second")?;
    assert_eq!(ask(&client, to)?, "second", "and after ADD it is the container's");
    drop(first);
    Ok(())
}

#[test]
fn thirty_adds_at_once_lose_no_port_and_race_for_one_with_one_winner() -> Result {
    let t = Testbed::new()?;
    let pods: Vec<(Pod, Value)> = (0..30)
        .map(|_| {
            let pod = t.pod()?;
            let result = t.add(&pod, &conf(&t))?;
            Ok((pod, result))
        })
        .collect::<Result<_>>()?;
    let children = pods.iter().enumerate().map(|(index, (pod, result))| {
        let conf = portmap(
            json!([
                {"hostPort": 8000 + index, "containerPort": 80},
                // Every third wants the same one.
                {"hostPort": if index % 3 == 0 { 7000 } else { 9000 + index }, "containerPort": 81},
            ]),
            result,
        );
        let path = pod.path();
        let variables = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", pod.id.as_str()),
            ("CNI_NETNS", &path),
            ("CNI_IFNAME", "eth0"),
        ];
        t.start("portmap", &variables, &conf)
    });
    let children: Vec<_> = children.collect::<Result<_>>()?;
    let mut done = Vec::new();
    for (index, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            done.push(index);
        } else {
            assert!(index % 3 == 0 && text.contains("taken"), "{index}: {text}");
        }
    }
    assert_eq!(done.iter().filter(|index| *index % 3 == 0).count(), 1, "{done:?}");
    assert_eq!(done.len(), 21);
    let rules = t.nft("list map inet cni_portmap any4")?;
    for index in done {
        assert!(rules.contains(&format!("tcp . {} comment", 8000 + index)), "{index}: {rules}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_and_status_says_ready() -> Result {
    let t = Testbed::new()?;
    let pod = t.pod()?;
    let alone = json!({"cniVersion": "1.1.0", "name": "net", "type": "portmap"});
    let (code, msg) = t.attachment("ADD", &pod, &alone)?.failure()?;
    assert_eq!(code, 7);
    assert!(msg.contains("prevResult"), "{msg}");
    let result = t.add(&pod, &conf(&t))?;
    let wrong = portmap(json!([{"hostPort": 70000, "containerPort": 80}]), &result);
    let (code, msg) = t.attachment("ADD", &pod, &wrong)?.failure()?;
    assert_eq!(code, 7);
    assert!(msg.contains("hostPort") && msg.contains("70000"), "{msg}");
    t.add(&pod, &portmap(json!([]), &result))?;
    assert_eq!(t.nft("list ruleset")?, "", "without mappings nothing is made");
    t.call("portmap", "STATUS", &[], &alone)?.success()?;
    Ok(())
}

#[test]
fn the_loopback_is_closed_to_pods_although_it_is_open_to_forwarding() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = mapped(&t, json!([{"hostPort": 8080, "containerPort": 80}]))?;
    let switch = t.host.run(|| -> Result<String> {
        Ok(std::fs::read_to_string("/proc/sys/net/ipv4/conf/cni0/route_localnet")?)
    })?;
    assert_eq!(switch.trim(), "1");
    // A service of the host that listens on its loopback only, and a pod that sends there through the gateway.
    let secret = t.host.run(|| -> Result<UdpSocket> { Ok(UdpSocket::bind("127.0.0.1:999")?) })?;
    secret.set_read_timeout(Some(Duration::from_millis(500)))?;
    let gateway = gateway(&result)?;
    let sent = pod.netns.run(|| -> Result<bool> {
        let status = std::process::Command::new("ip")
            .args(["route", "replace", "table", "local", "127.0.0.1/32", "via"])
            .arg(gateway.to_string())
            .args(["dev", "eth0"])
            .status()?;
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1")?;
        let socket = UdpSocket::bind((address(&result, 0)?, 0))?;
        Ok(status.success() && socket.send_to(b"x", "127.0.0.1:999").is_ok())
    })?;
    assert!(sent, "the pod could send");
    let mut buffer = [0; 4];
    assert!(secret.recv_from(&mut buffer).is_err(), "and nothing arrived");
    Ok(())
}
