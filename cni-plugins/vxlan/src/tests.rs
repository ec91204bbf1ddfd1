//! The plugin with a delegate that writes down what it was told.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use cni_spec::Env;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

struct Node {
    dir: TempDir,
    more: Value,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::create_dir(dir.path().join("bin")).expect("folder");
        let node = Self { dir, more: json!({}) };
        node.lease("10.244.3");
        node.delegate("none");
        node
    }

    fn lease(&self, subnet: &str) {
        let text = format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={subnet}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        fs::write(self.dir.path().join("subnet.env"), text).expect("written");
    }

    fn lose_lease(&self) {
        fs::remove_file(self.dir.path().join("subnet.env")).expect("removed");
    }

    /// A `bridge` that appends each call to `log` and fails on one verb.
    fn delegate(&self, fails_on: &str) {
        let text = format!(
            r#"#!/bin/sh
log={dir}/log
printf '%s %s\n' $CNI_COMMAND "$CNI_CONTAINERID" >> $log
tr -d '\n' >> $log
echo >> $log
if [ $CNI_COMMAND = "{fails_on}" ]; then echo '{{"code":100,"msg":"no"}}'; exit 1; fi
[ $CNI_COMMAND != ADD ] || echo '{{"cniVersion":"1.1.0","ips":[{{"address":"10.244.3.2/24"}}]}}'
"#,
            dir = self.dir.path().display()
        );
        let path = self.dir.path().join("bin/bridge");
        // Renamed into its place: a file that is open for writing cannot be executed.
        let aside = self.dir.path().join("bin/.bridge");
        fs::write(&aside, text).expect("written");
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).expect("executable");
        fs::rename(aside, path).expect("renamed");
    }

    fn call(&self, command: &str) -> Result<Option<Value>, Error> {
        let mut conf = json!({
            "cniVersion": "1.1.0", "name": "orch", "type": "vxlan",
            "subnetFile": self.dir.path().join("subnet.env"), "dataDir": self.dir.path().join("data"),
            "delegate": {"bridge": "cni0"},
        });
        for (key, value) in self.more.as_object().expect("object") {
            conf[key] = value.clone();
        }
        let about_one = !matches!(command, "GC" | "STATUS");
        let env = Env {
            command: command.to_owned(),
            container_id: if about_one { "c1".to_owned() } else { String::new() },
            netns: "/nowhere/netns".to_owned(),
            ifname: "eth0".to_owned(),
            path: self.dir.path().join("bin").display().to_string(),
            ..Env::default()
        };
        cni_skel::call(&Vxlan, &env, conf.to_string().as_bytes())
    }

    /// Calls of the delegate so far, and forgets them: verb and container, configuration.
    fn told(&self) -> Vec<(String, Value)> {
        let path = self.dir.path().join("log");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        let lines: Vec<&str> = text.lines().collect();
        lines
            .chunks_exact(2)
            .map(|pair| (pair[0].to_owned(), serde_json::from_str(pair[1]).expect("JSON")))
            .collect()
    }

    fn kept(&self) -> usize {
        fs::read_dir(self.dir.path().join("data/.vxlan/orch")).map_or(0, Iterator::count)
    }
}

#[test]
fn add_delegates_and_del_says_the_same_after_the_lease_has_changed() {
    let node = Node::new();
    let answer = node.call("ADD").expect("added").expect("a document");
    assert_eq!(answer["ips"][0]["address"], "10.244.3.2/24");
    let told = node.told();
    assert_eq!(told[0].0, "ADD c1");
    assert_eq!(told[0].1["ipam"]["ranges"], json!([[{"subnet": "10.244.3.0/24"}]]));
    assert_eq!((node.kept(), &told[0].1["mtu"]), (1, &json!(1450)));

    node.lease("10.244.9");
    node.call("DEL").expect("deleted");
    assert_eq!(node.told()[0].1["ipam"]["ranges"], json!([[{"subnet": "10.244.3.0/24"}]]));
    assert_eq!(node.kept(), 0);

    node.call("DEL").expect("deleted again");
    assert_eq!(node.told()[0].1["ipam"]["ranges"], json!([[{"subnet": "10.244.9.0/24"}]]));
    node.lose_lease();
    node.call("DEL").expect("and without a lease");
    assert_eq!(node.told()[0].1["ipam"]["type"], "host-local");
}

#[test]
fn without_a_lease_add_says_try_again_and_status_says_not_available() {
    let node = Node::new();
    node.lose_lease();
    let error = node.call("ADD").expect_err("no lease");
    assert_eq!(error.code, code::TRY_AGAIN);
    assert!(error.msg.contains("subnet.env"), "{error}");
    assert_eq!(node.call("STATUS").expect_err("no lease").code, code::NOT_AVAILABLE);
    assert!(node.told().is_empty());
    node.lease("10.244.3");
    node.call("STATUS").expect("ready");
    node.delegate("STATUS");
    assert_eq!(node.call("STATUS").expect_err("delegate").code, 100);
}

#[test]
fn a_missing_overlay_device_is_limited_connectivity() {
    let mut node = Node::new();
    node.more = json!({"device": "no-such-vxlan"});
    let error = node.call("STATUS").expect_err("no device");
    assert_eq!(error.code, code::LIMITED_CONNECTIVITY);
    assert!(error.msg.contains("no-such-vxlan"), "{error}");
    node.more = json!({"device": "a name that is too long"});
    assert_eq!(node.call("STATUS").expect_err("not a name").code, code::INVALID_CONFIG);
}

#[test]
fn a_failed_add_leaves_nothing_and_keeps_what_an_earlier_one_said() {
    let node = Node::new();
    node.delegate("ADD");
    node.call("ADD").expect_err("fails");
    let verbs: Vec<String> = node.told().into_iter().map(|(line, _)| line).collect();
    assert_eq!((verbs.as_slice(), node.kept()), (&["ADD c1".into(), "DEL c1".into()][..], 0));

    node.delegate("none");
    node.call("ADD").expect("added");
    node.lease("10.244.9");
    node.delegate("ADD");
    node.call("ADD").expect_err("fails");
    node.told();
    node.call("DEL").expect("deleted");
    assert_eq!(node.told()[0].1["ipam"]["ranges"], json!([[{"subnet": "10.244.3.0/24"}]]));
}

#[test]
fn a_failed_del_can_be_repeated() {
    let node = Node::new();
    node.call("ADD").expect("added");
    node.delegate("DEL");
    node.call("DEL").expect_err("fails");
    assert_eq!(node.kept(), 1);
    node.delegate("none");
    node.call("DEL").expect("deleted");
    assert_eq!(node.kept(), 0);
}

#[test]
fn check_and_gc_are_handed_on() {
    let mut node = Node::new();
    let result = node.call("ADD").expect("added").expect("a document");
    node.told();
    node.more = json!({"prevResult": result});
    node.call("CHECK").expect("checked");
    let told = node.told();
    assert_eq!((told[0].0.as_str(), &told[0].1["prevResult"]), ("CHECK c1", &result));

    let valid = json!([{"containerID": "c1", "ifname": "eth0"}]);
    node.more = json!({"cni.dev/valid-attachments": valid});
    node.call("GC").expect("collected");
    let told = node.told();
    assert_eq!((told.len(), &told[0].1["cni.dev/valid-attachments"]), (1, &valid));
    assert_eq!(node.kept(), 1);

    // Without a lease as well: pods of a node that lost it are collected all the same.
    node.lose_lease();
    node.delegate("GC");
    node.more = json!({"cni.dev/valid-attachments": []});
    node.call("GC").expect_err("the delegate's GC fails");
    let told = node.told();
    let verbs: Vec<&str> = told.iter().map(|(line, _)| line.trim()).collect();
    assert_eq!(verbs, ["DEL c1", "GC"]);
    assert_eq!(told[0].1["ipam"]["ranges"], json!([[{"subnet": "10.244.3.0/24"}]]));
    assert_eq!(node.kept(), 0);
}
