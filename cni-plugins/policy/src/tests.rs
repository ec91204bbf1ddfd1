use serde_json::json;

use super::*;

fn result() -> AddResult {
    let value = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01"},
            {"name": "veth1", "mac": "02:00:00:00:00:02"},
            {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/a"},
        ],
        "ips": [
            {"address": "10.244.1.5/24", "gateway": "10.244.1.1", "interface": 2},
            {"address": "fd00:244:1::5/64", "gateway": "fd00:244:1::1", "interface": 2},
            {"address": "10.244.1.6/24", "gateway": "10.244.1.9", "interface": 2},
        ],
    });
    AddResult::from_value(&value, cni_spec::Version::V1_1_0).expect("a result")
}

#[test]
fn the_subject_is_the_containers_interface() {
    let subject = Subject::of(&result(), &"eth0".parse().expect("a name")).expect("found");
    assert_eq!(subject.addr, Ipv4Addr::new(10, 244, 1, 5));
    assert_eq!(subject.addr6, "fd00:244:1::5".parse().ok());
    let gateways: Vec<IpAddr> = ["10.244.1.1", "fd00:244:1::1"]
        .into_iter()
        .map(|text| text.parse().expect("an address"))
        .collect();
    assert_eq!(subject.gateways, gateways, "of the first address of each family");
    assert_eq!(subject.mac, [2, 0, 0, 0, 0, 3]);
    let other: IfName = "eth1".parse().expect("a name");
    assert_eq!(Subject::of(&result(), &other).err().expect("none").code, code::INVALID_CONFIG);
}

#[test]
fn a_pod_of_an_ipv6_network_has_no_ipv4_address_of_its_own() {
    let mut result = result();
    result.ips.retain(|ip| ip.address.is_ipv6());
    let subject = Subject::of(&result, &"eth0".parse().expect("a name")).expect("found");
    assert_eq!((subject.addr, subject.gateways.len()), (Ipv4Addr::UNSPECIFIED, 1));
    assert_eq!(subject.addr6, "fd00:244:1::5".parse().ok());
}

#[test]
fn the_pod_is_known_only_by_both_names() {
    let args = |text: &str| CniArgs::parse(text).expect("pairs");
    let named = pod(&args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0")).expect("named");
    assert_eq!((named.namespace.as_str(), named.uid), ("shop", None));
    assert_eq!(pod(&args("K8S_POD_NAME=web-0")), None);
}

#[test]
fn without_programs_add_and_status_fail_and_del_succeeds() {
    let folder = tempfile::tempdir().expect("a folder");
    let error = open(&Pins::below(folder.path())).err().expect("no programs");
    assert_eq!(error.code, code::TRY_AGAIN);
    let conf = Conf {
        running: false,
        root: folder.path().to_owned(),
        state_dir: folder.path().join("state"),
        socket: folder.path().join("policy.sock"),
    };
    let kept = kept(&conf, &"orch".parse().expect("a name"));
    let id = AttachmentId {
        container_id: "c1".parse().expect("an ID"),
        ifname: "eth0".parse().expect("a name"),
    };
    remove(&conf, &kept, &id).expect("nothing is there");
    let made = Announcement {
        ifindex: 7,
        uid: 9,
        addr: Ipv4Addr::new(10, 244, 1, 5),
        addr6: None,
        pod: None,
    };
    kept.write("c1", "eth0", &made).expect("written");
    remove(&conf, &kept, &id).expect("removed");
    assert_eq!(kept.read("c1", "eth0"), None);
}
