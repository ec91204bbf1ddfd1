//! The plugin as a runtime sees it.

use cni_spec::Env;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

struct Host {
    dir: TempDir,
    ipam: Value,
    more: Value,
}

impl Host {
    fn new(ipam: Value) -> Self {
        Self { dir: tempfile::tempdir().expect("temporary folder"), ipam, more: json!({}) }
    }

    fn call(&self, command: &str, container: &str, version: &str) -> Result<Option<Value>, Error> {
        let mut conf =
            json!({"cniVersion": version, "name": "net", "type": "bridge", "ipam": self.ipam});
        conf["ipam"]["dataDir"] = json!(self.dir.path());
        for (key, value) in self.more.as_object().expect("object") {
            conf[key] = value.clone();
        }
        let env = Env {
            command: command.to_owned(),
            container_id: container.to_owned(),
            netns: "/nowhere/netns".to_owned(),
            ifname: "eth0".to_owned(),
            path: "/opt/cni/bin".to_owned(),
            ..Env::default()
        };
        cni_skel::call(&HostLocal, &env, conf.to_string().as_bytes())
    }

    fn add(&self, container: &str) -> Result<Value, Error> {
        self.call("ADD", container, "1.1.0").map(|answer| answer.expect("a document"))
    }

    fn leases(&self) -> usize {
        let store = Store::open(&self.dir.path().join("net")).expect("opened");
        store.map_or(0, |store| store.all().expect("listed").len())
    }
}

fn small() -> Host {
    Host::new(json!({"subnet": "10.0.0.0/29", "routes": [{"dst": "0.0.0.0/0"}]}))
}

#[test]
fn add_answers_with_address_gateway_and_routes() {
    let host = small();
    assert_eq!(
        host.add("c1").expect("added"),
        json!({
            "cniVersion": "1.1.0",
            "ips": [{"address": "10.0.0.2/29", "gateway": "10.0.0.1"}],
            "routes": [{"dst": "0.0.0.0/0"}],
        })
    );
    let old = host.call("ADD", "c2", "0.2.0").expect("added").expect("a document");
    assert_eq!(old["ip4"]["ip"], "10.0.0.3/29");
    let v031 = host.call("ADD", "c3", "0.3.1").expect("added").expect("a document");
    assert_eq!(v031["ips"][0]["version"], "4");
}

#[test]
fn every_set_gives_one_address_or_none_gives_any() {
    let host =
        Host::new(json!({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/126"}]]}));
    let first = host.add("c1").expect("added");
    assert_eq!(first["ips"][0]["address"], "10.0.0.2/24");
    assert_eq!(first["ips"][1], json!({"address": "fd00::2/126", "gateway": "fd00::1"}));
    host.add("c2").expect("added");
    let error = host.add("c3").expect_err("the second set is full");
    assert_eq!(error.code, code::NO_FREE_ADDRESS);
    assert!(error.msg.contains("range set 1 (fd00::1-fd00::3)"), "{error}");
    assert!(error.msg.contains("2 of 2"), "{error}");
    assert_eq!(host.leases(), 4, "what the first set gave went back");
}

#[test]
fn a_second_add_is_refused_and_leaves_the_lease() {
    let host = small();
    host.add("c1").expect("added");
    let error = host.add("c1").expect_err("again");
    assert_eq!(error.code, code::ALREADY_ATTACHED);
    assert_eq!(host.leases(), 1);
}

#[test]
fn a_freed_address_comes_back_last() {
    let host = small();
    for container in ["a", "b", "c", "d", "e"] {
        host.add(container).expect("added");
    }
    let error = host.add("f").expect_err("full");
    assert!(error.msg.contains("10.0.0.1-10.0.0.6") && error.msg.contains("5 of 5"), "{error}");
    assert_eq!(host.call("STATUS", "", "1.1.0").expect_err("full").code, code::NOT_AVAILABLE);
    host.call("DEL", "b", "1.1.0").expect("deleted");
    host.call("DEL", "b", "1.1.0").expect("deleted again");
    host.call("DEL", "never", "1.1.0").expect("never added");
    host.call("STATUS", "", "1.1.0").expect("free again");
    assert_eq!(host.add("f").expect("added")["ips"][0]["address"], "10.0.0.3/29");
}

#[test]
fn requested_addresses_are_given_or_the_reason_is() {
    let mut host = small();
    host.more = json!({"runtimeConfig": {"ips": ["10.0.0.5/29"]}});
    assert_eq!(host.add("c1").expect("added")["ips"][0]["address"], "10.0.0.5/29");
    let error = host.add("c2").expect_err("taken");
    assert!(error.msg.contains("10.0.0.5") && error.msg.contains("c1/eth0"), "{error}");
    host.more = json!({"args": {"cni": {"ips": ["10.0.0.1"]}}});
    assert!(host.add("c2").expect_err("gateway").msg.contains("gateway"));
    host.more = json!({"args": {"cni": {"ips": ["10.9.0.1"]}}});
    assert!(host.add("c2").expect_err("in no range").msg.contains("10.9.0.1"));
    assert_eq!(host.leases(), 1);
}

#[test]
fn check_compares_with_the_result_and_lets_foreign_addresses_be() {
    let mut host = small();
    let mut result = host.add("c1").expect("added");
    result["ips"].as_array_mut().expect("list").push(json!({"address": "192.0.2.1/32"}));
    host.more = json!({"prevResult": result});
    host.call("CHECK", "c1", "1.1.0").expect("as it was");
    assert_eq!(host.call("CHECK", "c2", "1.1.0").expect_err("no lease").code, code::CHECK_FAILED);
    std::fs::write(host.dir.path().join("net/10.0.0.2"), "other\r\neth0").expect("written");
    assert_eq!(host.call("CHECK", "c1", "1.1.0").expect_err("stolen").code, code::CHECK_FAILED);
}

#[test]
fn gc_keeps_the_valid_and_frees_the_rest() {
    let mut host = small();
    for container in ["a", "b", "c"] {
        host.add(container).expect("added");
    }
    std::fs::write(host.dir.path().join("net/10.0.0.6"), "").expect("an empty file of a crash");
    host.call("GC", "", "1.1.0").expect_err("no list is not an empty list");
    assert_eq!(host.leases(), 4);
    host.more = json!({"cni.dev/valid-attachments": [{"containerID": "b", "ifname": "eth0"}]});
    host.call("GC", "", "1.1.0").expect("collected");
    host.call("GC", "", "1.1.0").expect("collected again");
    assert_eq!(host.leases(), 1);
    assert_eq!(host.add("b").expect_err("b is alive").code, code::ALREADY_ATTACHED);
    host.more = json!({"cni.dev/valid-attachments": []});
    host.call("GC", "", "1.1.0").expect("collected");
    assert_eq!(host.leases(), 0);
}

#[test]
fn del_and_gc_work_under_a_broken_configuration() {
    let mut host = small();
    host.add("c1").expect("added");
    host.ipam = json!({"subnet": "10.0.0.5/33"});
    assert_eq!(host.add("c2").expect_err("broken").code, code::INVALID_CONFIG);
    host.call("DEL", "c1", "1.1.0").expect("deleted");
    assert_eq!(host.leases(), 0);
}

#[test]
fn del_makes_no_folder() {
    let host = small();
    host.call("DEL", "c1", "1.1.0").expect("nothing to do");
    assert!(!host.dir.path().join("net").exists());
}

#[test]
fn a_data_folder_that_cannot_be_used_is_named() {
    let host = small();
    std::fs::write(host.dir.path().join("net"), "a file").expect("written");
    let error = host.add("c1").expect_err("not a folder");
    assert_eq!(error.code, code::IO);
    assert!(error.msg.contains("net"), "{error}");
    assert_eq!(host.call("STATUS", "", "1.1.0").expect_err("50").code, code::NOT_AVAILABLE);
}
