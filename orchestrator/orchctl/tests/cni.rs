//! `orchctl cni` with a plugin that is a shell script: no root, no kernel.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// Answers every verb, writes down what it was asked, and fails at the verb that `fails` names.
const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0")
conf=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS $conf" >> "$dir/log"
if [ "$CNI_COMMAND" = "$(cat "$dir/fails")" ]; then
  echo '{"cniVersion":"1.1.0","code":50,"msg":"the pool is empty"}'
  exit 1
fi
case "$CNI_COMMAND" in
  ADD) echo '{"cniVersion":"1.1.0","interfaces":[],"ips":[{"address":"10.1.0.2/24"}]}' ;;
  VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
esac
"#;

fn node(fails: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    for folder in ["net.d", "bin"] {
        fs::create_dir(dir.path().join(folder)).expect("folder");
    }
    let list = r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"fake","capabilities":{"portMappings":true}}]}"#;
    fs::write(dir.path().join("net.d/10-net.conflist"), list).expect("written");
    let plugin = dir.path().join("bin/fake");
    fs::write(&plugin, PLUGIN).expect("written");
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).expect("executable");
    fs::write(dir.path().join("bin/fails"), fails).expect("written");
    dir
}

fn cni(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_orchctl"))
        .arg("cni")
        .args(args)
        .args(["--cache-dir", &dir.join("cache").to_string_lossy()])
        .env("NETCONFPATH", dir.join("net.d"))
        .env("CNI_PATH", dir.join("bin"))
        .env_remove("CNI_ARGS")
        .env_remove("CNI_IFNAME")
        .output()
        .expect("started")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_attachment_lives_from_add_to_del_and_the_plugin_gets_what_was_said() {
    let dir = node("");
    let target = ["net", "/proc/self/ns/net", "--container-id", "c1", "--args", "A=b"];
    let mut add = vec!["add"];
    add.extend(target);
    add.extend(["--capability", r#"portMappings=[{"hostPort":80}]"#]);
    let result: Value =
        serde_json::from_str(&stdout(&cni(dir.path(), &add))).expect("the result is JSON");
    assert_eq!(result["ips"][0]["address"], "10.1.0.2/24");
    let listed = stdout(&cni(dir.path(), &["list", "--attachments"]));
    for word in ["net", "c1", "eth0", "10.1.0.2/24", "live"] {
        assert!(listed.contains(word), "{word} in {listed}");
    }
    for verb in ["check", "del", "del"] {
        let mut args = vec![verb];
        args.extend(target);
        stdout(&cni(dir.path(), &args));
    }
    assert!(!stdout(&cni(dir.path(), &["list", "--attachments"])).contains("c1"));
    let log = fs::read_to_string(dir.path().join("bin/log")).expect("the plugin ran");
    let first = log.lines().next().expect("ADD");
    assert!(first.starts_with("ADD c1 eth0 A=b ") && first.contains(r#""hostPort":80"#), "{log}");
    let verbs: Vec<&str> = log.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(verbs, ["ADD", "CHECK", "DEL", "DEL"]);
    assert!(log.contains(r#""prevResult""#), "CHECK gets the result of ADD");
}

#[test]
fn gc_has_to_be_told_what_is_valid_and_live_is_what_has_a_namespace() {
    let dir = node("");
    for (id, netns) in [("here", "/proc/self/ns/net"), ("gone", "/nowhere")] {
        stdout(&cni(dir.path(), &["add", "net", netns, "--container-id", id]));
    }
    assert_eq!(cni(dir.path(), &["gc", "net"]).status.code(), Some(2));
    stdout(&cni(dir.path(), &["gc", "net", "--live"]));
    let listed = stdout(&cni(dir.path(), &["list", "-a", "-o", "json"]));
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    assert_eq!(listed[0]["containerID"], "here");
    let log = fs::read_to_string(dir.path().join("bin/log")).expect("the plugin ran");
    let gc = log.lines().rfind(|line| line.starts_with("GC ")).expect("GC was called");
    assert!(gc.contains(r#""containerID":"here""#) && !gc.contains("gone"), "{gc}");
    stdout(&cni(dir.path(), &["gc", "net", "--none"]));
    assert_eq!(stdout(&cni(dir.path(), &["list", "-a", "-o", "json"])).trim(), "[]");
}

#[test]
fn a_network_that_is_not_ready_says_why_and_shows_in_the_exit_code() {
    let dir = node("STATUS");
    let output = cni(dir.path(), &["status"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("not ready (50)") && text.contains("the pool is empty"), "{text}");
    let dir = node("");
    assert!(stdout(&cni(dir.path(), &["status", "net"])).contains("ready"));
    fs::remove_file(dir.path().join("bin/fake")).expect("removed");
    assert_eq!(cni(dir.path(), &["status", "net"]).status.code(), Some(1), "a missing plugin");
}

#[test]
fn a_failed_add_is_followed_by_del_and_keeps_nothing() {
    let dir = node("ADD");
    let output = cni(dir.path(), &["add", "net", "/proc/self/ns/net", "--container-id", "c1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the pool is empty"));
    let log = fs::read_to_string(dir.path().join("bin/log")).expect("the plugin ran");
    assert!(log.lines().last().is_some_and(|line| line.starts_with("DEL c1")), "{log}");
    assert_eq!(stdout(&cni(dir.path(), &["list", "-a", "-o", "json"])).trim(), "[]");
}
