//! The executable as it is installed: called by name, with variables and stdin, judged by stdout and exit code.

use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

const NAMES: [&str; 10] = [
    "bandwidth",
    "bridge",
    "firewall",
    "host-local",
    "loopback",
    "policy",
    "portmap",
    "static",
    "tuning",
    "vxlan",
];

fn installed() -> TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    for name in NAMES.into_iter().chain(["cni-plugins"]) {
        symlink(env!("CARGO_BIN_EXE_cni-plugins"), dir.path().join(name)).expect("link");
    }
    dir
}

fn run(dir: &Path, name: &str, env: &[(&str, &str)], stdin: &[u8]) -> Output {
    let mut command = Command::new(dir.join(name));
    for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("CNI_")) {
        command.env_remove(key);
    }
    let mut child = command
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    // A plugin that fails before it reads closes the pipe.
    let _ = child.stdin.take().expect("piped").write_all(stdin);
    child.wait_with_output().expect("ended")
}

/// The one document of stdout.
fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("exactly one JSON document")
}

#[test]
fn every_name_is_its_plugin_and_speaks_every_version() {
    let dir = installed();
    for name in NAMES {
        let version = [("CNI_COMMAND", "VERSION")];
        let output = run(dir.path(), name, &version, br#"{"cniVersion":"0.3.1"}"#);
        assert!(output.status.success(), "{name}: {output:?}");
        let answer = document(&output);
        assert_eq!(answer["cniVersion"], "0.3.1");
        let spoken = answer["supportedVersions"].as_array().expect("list");
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            assert!(spoken.contains(&json!(version)), "{name} speaks {version}");
        }
        assert!(output.stderr.is_empty());

        let by_hand = run(dir.path(), name, &[], b"");
        assert_eq!(by_hand.status.code(), Some(1));
        assert_eq!(document(&by_hand)["code"], 4);
        assert!(String::from_utf8_lossy(&by_hand.stderr).starts_with(name));
    }
}

#[test]
fn host_local_leases_and_releases() {
    let dir = installed();
    let conf = json!({
        "cniVersion": "1.0.0", "name": "net", "type": "bridge",
        "ipam": {"type": "host-local", "subnet": "10.9.0.0/24", "dataDir": dir.path().join("data")},
    });
    let call = |command: &str| {
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/nowhere/netns"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        run(dir.path(), "host-local", &env, conf.to_string().as_bytes())
    };
    let added = call("ADD");
    assert!(added.status.success(), "{added:?}");
    let expected =
        json!({"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24", "gateway": "10.9.0.1"}]});
    assert_eq!(document(&added), expected);
    assert!(added.stderr.is_empty(), "nothing is said at first use");
    let again = call("ADD");
    assert_eq!((again.status.code(), &document(&again)["cniVersion"]), (Some(1), &json!("1.0.0")));
    for _ in 0..2 {
        let deleted = call("DEL");
        assert!(deleted.status.success() && deleted.stdout.is_empty(), "{deleted:?}");
    }
}

#[test]
fn vxlan_tells_the_bridge_inside_itself() {
    let dir = installed();
    let lease = dir.path().join("subnet.env");
    let conf = json!({
        "cniVersion": "1.1.0", "name": "orch", "type": "vxlan", "subnetFile": lease,
        "dataDir": dir.path().join("data"), "delegate": {"bridge": "no-such-br"},
    });
    let path = dir.path().display().to_string();
    let status = || {
        let env = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", &*path)];
        run(dir.path(), "vxlan", &env, conf.to_string().as_bytes())
    };
    assert_eq!(document(&status())["code"], 50);
    let text = "FLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_SUBNET=10.9.3.1/30\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    std::fs::write(&lease, text).expect("written");
    let ready = status();
    assert!(ready.status.success(), "{ready:?}");
    // One of one address leased: host-local, two delegations further, says so.
    std::fs::write(dir.path().join("data/orch/10.9.3.2"), "other\r\neth0").expect("written");
    let full = document(&status());
    assert_eq!(full["code"], 50);
    assert!(full["msg"].as_str().is_some_and(|msg| msg.contains("1 of 1")), "{full}");
}

#[test]
fn too_much_input_and_a_wrong_name_end_with_a_message() {
    let dir = installed();
    let env = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", "/opt/cni/bin")];
    let flood = run(dir.path(), "bridge", &env, &vec![b' '; 10 << 20]);
    assert_eq!(flood.status.code(), Some(1));
    assert_eq!(document(&flood)["code"], 6);
    let own = run(dir.path(), "cni-plugins", &env, b"{}");
    assert_eq!((own.status.code(), own.stdout.len()), (Some(2), 0));
    let said = String::from_utf8_lossy(&own.stderr).into_owned();
    assert!(NAMES.iter().all(|name| said.contains(name)), "{said}");
}
