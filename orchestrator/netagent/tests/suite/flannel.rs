//! Two nodes of ours and one that follows flannel's protocol on its own: its keys are written by hand with etcdctl, its
//! VXLAN device and entries are made by hand with `ip`, in the order and shape of flanneld.

use std::net::Ipv4Addr;

use crate::support::netns::Netns;
use crate::support::overlay::{Node, PREFIX, Pod, World, eventually};
use ipnetwork::Ipv4Network;

/// A node as flanneld leaves it.
struct Flannel {
    netns: Netns,
    subnet: Ipv4Addr,
    public_ip: Ipv4Addr,
    mac: String,
    etcd_lease: String,
}

impl Flannel {
    fn new(world: &World, last: u8, subnet: [u8; 4], mac: &str) -> Self {
        let netns = world.host(last);
        netns.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("sysctl"));
        let granted = world.etcdctl(&["lease", "grant", "86400"]);
        let node = Self {
            netns,
            subnet: subnet.into(),
            public_ip: Ipv4Addr::new(192, 0, 2, last),
            mac: mac.to_owned(),
            etcd_lease: granted.split_whitespace().nth(1).expect("an identifier").to_owned(),
        };
        node.make_device();
        node.publish(world);
        node
    }

    fn make_device(&self) {
        let Self { netns, subnet, public_ip, mac, .. } = self;
        netns.ip(&format!(
            "link add flannel.1 address {mac} mtu 1450 type vxlan id 1 dstport 8472 local {public_ip} dev eth0 nolearning"
        ));
        netns.ip(&format!("address add {subnet}/32 dev flannel.1"));
        netns.ip("link set flannel.1 up");
    }

    fn key(&self) -> String {
        format!("{PREFIX}/subnets/{}-24", self.subnet)
    }

    fn publish(&self, world: &World) {
        let value = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            self.public_ip, self.mac
        );
        world.etcdctl(&["put", "--lease", &self.etcd_lease, &self.key(), &value]);
    }

    /// Adds a peer from what its lease says: neighbour, FDB entry, route.
    fn add_peer(&self, world: &World, node: &Node) {
        let subnet = node.subnet();
        let lease = world.lease(&node.key());
        assert_eq!(lease["BackendType"], "vxlan");
        assert_eq!(lease["BackendData"]["VNI"], 1);
        let mac = lease["BackendData"]["VtepMAC"].as_str().expect("a MAC");
        let public_ip = lease["PublicIP"].as_str().expect("an address");
        let base = subnet.network();
        self.netns
            .ip(&format!("neighbour replace {base} lladdr {mac} dev flannel.1 nud permanent"));
        self.netns
            .bridge(&format!("fdb replace {mac} dev flannel.1 dst {public_ip} self permanent"));
        self.netns.ip(&format!("route replace {subnet} via {base} dev flannel.1 onlink"));
    }
}

fn both_ways(pods: &[&Pod]) {
    for from in pods {
        for to in pods {
            eventually(&format!("{} to {}", from.ip, to.ip), || from.reaches(to).then_some(()));
        }
    }
}

#[test]
fn a_node_that_speaks_flannels_protocol_by_hand_is_one_of_ours_and_its_changes_are_followed() {
    let world = World::new();
    // As an operator of flannel writes it.
    world.configure(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut flannel = Flannel::new(&world, 13, [10, 244, 30, 0], "5e:11:22:33:44:55");
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    let theirs =
        Pod::attach(&flannel.netns, Ipv4Network::new(flannel.subnet, 24).expect("CIDR"), 1450, 2);
    for node in &nodes {
        flannel.add_peer(&world, node);
    }
    both_ways(&[&pods[0], &pods[1], &theirs]);

    // flanneld started again: with etcd it keeps no MAC, so its new device has another one.
    flannel.netns.ip("link delete flannel.1");
    flannel.mac = "5e:aa:bb:cc:dd:ee".to_owned();
    flannel.make_device();
    for node in &nodes {
        flannel.add_peer(&world, node);
    }
    flannel.publish(&world);
    both_ways(&[&pods[0], &theirs, &pods[1]]);
    let entries = nodes[0].netns.bridge("fdb show dev vxlan-orch");
    assert!(!entries.contains("5e:11:22:33:44:55"), "the old MAC is forgotten: {entries}");

    // It moves on the underlay.
    flannel.netns.ip("link delete flannel.1");
    flannel.netns.ip("address flush dev eth0");
    flannel.netns.ip("address add 192.0.2.77/24 dev eth0");
    flannel.public_ip = Ipv4Addr::new(192, 0, 2, 77);
    flannel.make_device();
    for node in &nodes {
        flannel.add_peer(&world, node);
    }
    flannel.publish(&world);
    both_ways(&[&pods[0], &theirs, &pods[1]]);

    // It loses its subnet and gets another one.
    world.etcdctl(&["del", &flannel.key()]);
    flannel.subnet = Ipv4Addr::new(10, 244, 40, 0);
    drop(theirs);
    for words in ["link delete flannel.1", "link delete cni0"] {
        flannel.netns.ip(words);
    }
    flannel.make_device();
    for node in &nodes {
        flannel.add_peer(&world, node);
    }
    flannel.publish(&world);
    let theirs =
        Pod::attach(&flannel.netns, Ipv4Network::new(flannel.subnet, 24).expect("CIDR"), 1450, 3);
    both_ways(&[&pods[0], &theirs, &pods[1]]);
    for node in &nodes {
        let left = node.netns.ip("route show") + &node.netns.ip("neighbour show dev vxlan-orch");
        assert!(!left.contains("10.244.30."), "the old subnet is forgotten: {left}");
        assert!(node.status().problems.is_empty(), "{:?}", node.status().problems);
    }
}
