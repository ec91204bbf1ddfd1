//! Chains of plugins that write down how they were called.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::exec::tests::script;

struct Host {
    dir: TempDir,
    cni: Cni,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary folder");
        let at = |name: &str| dir.path().join(name);
        for name in ["bin", "conf", "log"] {
            fs::create_dir(at(name)).expect("folder");
        }
        let cni = Cni { conf_dir: at("conf"), bin_dirs: vec![at("bin")], cache_dir: at("cache") };
        Self { dir, cni }
    }

    /// A plugin that logs each call as `log/NN` (arguments, then configuration) and answers ADD with an address.
    fn plugin(&self, name: &str, fails_on: &str) {
        let log = self.dir.path().join("log");
        let body = format!(
            r#"n=$(ls {log} | wc -l); f={log}/$(printf %02d $n)
printf '%s %s %s\n' {name} $CNI_COMMAND "$CNI_CONTAINERID/$CNI_IFNAME/$CNI_NETNS/$CNI_ARGS" > $f
cat >> $f
if [ "$CNI_COMMAND" = "{fails_on}" ]; then echo '{{"code":100,"msg":"{name} fails"}}'; exit 1; fi
case $CNI_COMMAND in
ADD) echo '{{"cniVersion":"0.4.0","ips":[{{"version":"4","address":"10.0.0.5/24"}}],"by":"{name}"}}';;
VERSION) echo '{{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}}';;
esac"#,
            log = log.display()
        );
        script(&self.dir.path().join("bin"), name, &body);
    }

    fn list(&self, version: &str, more: &str) -> ConfList {
        let text = format!(
            r#"{{"cniVersion":"{version}","name":"net"{more},"plugins":[
                {{"type":"one","mine":1,"capabilities":{{"ips":true,"portMappings":false}}}},
                {{"type":"two"}}]}}"#
        );
        fs::write(self.cni.conf_dir.join("10-net.conflist"), text).expect("written");
        self.cni.load().expect("loaded")
    }

    /// Calls so far, and forgets them: first line, configuration.
    fn calls(&self) -> Vec<(String, Value)> {
        let log = self.dir.path().join("log");
        let mut files: Vec<_> =
            fs::read_dir(&log).expect("log").map(|entry| entry.expect("entry").path()).collect();
        files.sort();
        files
            .iter()
            .map(|file| {
                let text = fs::read_to_string(file).expect("read");
                fs::remove_file(file).expect("removed");
                let (line, conf) = text.split_once('\n').expect("two parts");
                (line.to_owned(), serde_json::from_str(conf).expect("JSON"))
            })
            .collect()
    }

    fn order(&self) -> Vec<String> {
        let words = |line: String| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
        self.calls().into_iter().map(|(line, _)| words(line)).collect()
    }
}

fn attachment(container: &str) -> Attachment {
    let capabilities = json!({"ips": ["10.0.0.5"], "portMappings": [{"hostPort": 1}]});
    Attachment {
        container_id: container.to_owned(),
        netns: "/run/netns/x".to_owned(),
        ifname: "eth0".to_owned(),
        args: vec![("K".to_owned(), "v".to_owned()), ("L".to_owned(), "w".to_owned())],
        capabilities: capabilities.as_object().expect("object").clone(),
    }
}

fn both() -> Host {
    let host = Host::new();
    host.plugin("one", "none");
    host.plugin("two", "none");
    host
}

#[test]
fn add_chains_and_del_goes_back_with_the_cached_result() {
    let host = both();
    let list = host.list("1.0.0", "");
    let result = host.cni.add(&list, &attachment("c1")).expect("added");
    assert_eq!(result.ips[0].address.ip().to_string(), "10.0.0.5");
    let calls = host.calls();
    assert_eq!(calls[0].0, "one ADD c1/eth0//run/netns/x/K=v;L=w");
    assert_eq!(calls[0].1["name"], "net");
    assert_eq!(calls[0].1["cniVersion"], "1.0.0");
    assert_eq!(calls[0].1["mine"], 1);
    assert_eq!(calls[0].1["runtimeConfig"], json!({"ips": ["10.0.0.5"]}), "only what it asks for");
    assert!(calls[0].1.get("capabilities").is_none() && calls[0].1.get("prevResult").is_none());
    let prev = &calls[1].1["prevResult"];
    assert_eq!(prev["by"], "one", "foreign keys survive");
    assert_eq!(prev["ips"][0], json!({"address": "10.0.0.5/24"}), "in the version of the list");
    assert!(calls[1].1.get("runtimeConfig").is_none());

    // A runtime that was restarted has forgotten the capabilities.
    let forgot = Attachment { capabilities: Map::new(), ..attachment("c1") };
    host.cni.del(&list, &forgot).expect("deleted");
    let calls = host.calls();
    assert!(calls[0].0.starts_with("two DEL") && calls[1].0.starts_with("one DEL"));
    assert!(calls.iter().all(|(_, conf)| conf["prevResult"]["by"] == "two"));
    assert_eq!(calls[1].1["runtimeConfig"], json!({"ips": ["10.0.0.5"]}));
    assert!(host.cni.cached().expect("listed").is_empty());

    host.cni.del(&list, &forgot).expect("deleted again");
    assert!(host.calls().iter().all(|(_, conf)| conf.get("prevResult").is_none()));
}

#[test]
fn a_failure_stops_the_chain_and_names_the_plugin() {
    let host = both();
    let list = host.list("1.0.0", "");
    host.plugin("one", "ADD");
    let error = host.cni.add(&list, &attachment("c1")).expect_err("fails");
    assert_eq!(error.cni_error().map(|error| error.code), Some(100));
    let text = error.to_string();
    assert!(text.contains("ADD") && text.contains("one") && text.contains("net"), "{text}");
    assert_eq!(host.order(), ["one ADD"]);
    assert!(host.cni.cached().expect("listed").is_empty());

    host.plugin("one", "none");
    host.cni.add(&list, &attachment("c1")).expect("added");
    host.plugin("one", "DEL");
    host.cni.del(&list, &attachment("c1")).expect_err("fails");
    assert_eq!(host.cni.cached().expect("listed").len(), 1, "the result stays for the next try");
}

#[test]
fn del_before_0_4_0_gets_no_result() {
    let host = both();
    let list = host.list("0.3.1", "");
    host.cni.add(&list, &attachment("c1")).expect("added");
    host.cni.del(&list, &attachment("c1")).expect("deleted");
    let dels = host.calls().split_off(2);
    assert!(dels.iter().all(|(_, conf)| conf.get("prevResult").is_none()));
}

#[test]
fn check_needs_a_known_attachment_and_gets_the_final_result() {
    let host = both();
    let list = host.list("1.0.0", "");
    let error = host.cni.check(&list, &attachment("c1")).expect_err("never added");
    assert_eq!(error.cni_error().map(|error| error.code), Some(code::UNKNOWN_CONTAINER));
    host.cni.add(&list, &attachment("c1")).expect("added");
    host.calls();
    host.cni.check(&list, &attachment("c1")).expect("checked");
    let calls = host.calls();
    assert!(calls[0].0.starts_with("one CHECK") && calls[1].0.starts_with("two CHECK"));
    assert!(calls.iter().all(|(_, conf)| conf["prevResult"]["by"] == "two"));

    let off = host.list("1.0.0", r#","disableCheck":true"#);
    host.cni.check(&off, &attachment("c1")).expect("not called");
    let old = host.list("0.3.1", "");
    let error = host.cni.check(&old, &attachment("c1")).expect_err("too old");
    assert_eq!(error.cni_error().map(|error| error.code), Some(code::INCOMPATIBLE_VERSION));
    assert!(host.order().is_empty());
}

#[test]
fn gc_deletes_the_stale_and_then_asks_every_plugin_past_failures() {
    let host = both();
    let list = host.list("1.1.0", "");
    for container in ["c1", "c2", "c3"] {
        host.cni.add(&list, &attachment(container)).expect("added");
    }
    host.calls();
    host.plugin("one", "GC");
    let valid = [host.cni.cached().expect("listed")[1].id.clone()];
    let error = host.cni.gc(&list, &valid).expect_err("one fails");
    assert!(error.to_string().contains("one fails"));
    let calls = host.calls();
    let lines: Vec<&str> = calls.iter().map(|(line, _)| line.as_str()).collect();
    assert!(lines[0].starts_with("two DEL c1") && lines[2].starts_with("two DEL c3"), "{lines:?}");
    assert!(lines[4].starts_with("one GC") && lines[5].starts_with("two GC"), "{lines:?}");
    let listed = json!([{"containerID": "c2", "ifname": "eth0"}]);
    assert_eq!(calls[5].1["cni.dev/valid-attachments"], listed);
    assert_eq!(calls[5].1["cni.dev/attachments"], listed);
    assert_eq!(host.cni.cached().expect("listed").len(), 1);

    let off = host.list("1.1.0", r#","disableGC":"true""#);
    host.cni.gc(&off, &[]).expect("not called");
    let old = host.list("1.0.0", "");
    host.cni.gc(&old, &[]).expect("only the cache");
    assert_eq!(host.order(), ["two DEL", "one DEL"]);
}

#[test]
fn status_asks_from_1_1_0_on_and_validate_asks_for_versions() {
    let host = both();
    host.plugin("two", "STATUS");
    let list = host.list("1.1.0", "");
    let error = host.cni.status(&list).expect_err("two is not ready");
    assert_eq!(error.cni_error().map(|error| error.code), Some(100));
    assert_eq!(host.order(), ["one STATUS", "two STATUS"]);
    host.cni.validate(&list).expect_err("they speak 1.0.0 only");
    let old = host.list("1.0.0", "");
    host.cni.status(&old).expect("counts as ready");
    host.cni.validate(&old).expect("spoken");
}

#[test]
fn names_and_arguments_are_checked_before_a_plugin_runs() {
    let host = both();
    let list = host.list("1.0.0", "");
    let code_of = |attachment: Attachment| {
        host.cni.add(&list, &attachment).expect_err("refused").cni_error().map(|error| error.code)
    };
    let bad_id = Attachment { container_id: "../x".into(), ..attachment("c") };
    assert_eq!(code_of(bad_id), Some(code::INVALID_ENVIRONMENT));
    let bad_name = Attachment { ifname: String::new(), ..attachment("c") };
    assert_eq!(code_of(bad_name), Some(code::INVALID_ENVIRONMENT));
    let bad_args =
        Attachment { args: vec![("A".into(), "1;IP=10.0.0.1".into())], ..attachment("c") };
    assert_eq!(code_of(bad_args), Some(code::INVALID_ENVIRONMENT));
    assert!(host.order().is_empty());
    assert!(!Path::new(&host.cni.cache_dir).exists());
}

#[test]
fn containers_are_added_in_parallel() {
    let host = both();
    let list = host.list("1.0.0", "");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (cni, list) = (&host.cni, &list);
            scope.spawn(move || cni.add(list, &attachment(&format!("c{n}"))).expect("added"));
        }
    });
    assert_eq!(host.cni.cached().expect("listed").len(), 8);
}
