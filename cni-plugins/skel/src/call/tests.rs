//! Conformance of what happens before a handler: reference networking §1.7, points 1 to 5 and 9.

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::{AddRequest, CheckRequest, DelRequest};

/// Answers with what it was asked.
pub(crate) struct Echo;

#[derive(Debug, Deserialize)]
pub(crate) struct EchoConf {
    #[serde(default)]
    panic: bool,
    #[serde(default)]
    mtu: Option<u32>,
}

impl Plugin for Echo {
    type Conf = EchoConf;

    fn name(&self) -> &'static str {
        "echo"
    }

    fn about(&self) -> &'static str {
        "answers with what it was asked"
    }

    fn add(&self, req: AddRequest<EchoConf>) -> Result<AddResult, Error> {
        assert!(!req.conf.panic, "panics as asked");
        let mut result = req.prev_result.unwrap_or_default();
        result.ips.push(cni_spec::IpConfig::new(
            cni_spec::parse_cidr("10.0.0.1/8").expect("a good CIDR"),
        ));
        let seen = json!([req.container_id, req.ifname, req.netns, req.conf.mtu]);
        result.extra.insert("seen".to_owned(), seen);
        Ok(result)
    }

    fn del(&self, req: DelRequest<EchoConf>) -> Result<(), Error> {
        match req.netns {
            Some(_) if req.prev_result.is_none() => Err(Error::new(200, "netns, but no result")),
            _ => Ok(()),
        }
    }

    fn check(&self, req: CheckRequest<EchoConf>) -> Result<(), Error> {
        if req.prev_result.ips.is_empty() { Err(Error::new(200, "no address")) } else { Ok(()) }
    }

    fn gc(&self, req: GcRequest<EchoConf>) -> Result<(), Error> {
        Err(Error::new(200, format!("{} valid", req.valid.len())))
    }

    fn status(&self, _: StatusRequest<EchoConf>) -> Result<(), Error> {
        Err(Error::new(code::NOT_AVAILABLE, "asked"))
    }
}

pub(crate) fn env(command: &str) -> Env {
    Env {
        command: command.to_owned(),
        container_id: "c1".to_owned(),
        netns: "/nowhere/netns".to_owned(),
        ifname: "eth0".to_owned(),
        path: "/opt/cni/bin".to_owned(),
        ..Env::default()
    }
}

pub(crate) fn conf(version: &str, more: &str) -> String {
    format!(r#"{{"cniVersion":"{version}","name":"net","type":"echo"{more}}}"#)
}

fn ask(env: &Env, conf: &str) -> Result<Option<Value>, Error> {
    call(&Echo, env, conf.as_bytes())
}

#[test]
fn add_answers_in_every_version() {
    for version in Version::ALL {
        let answer = ask(&env("ADD"), &conf(version.as_str(), r#","mtu":9"#)).expect("added");
        let answer = answer.expect("a document");
        assert_eq!(answer["cniVersion"], version.as_str());
        assert_eq!(answer["seen"], json!(["c1", "eth0", "/nowhere/netns", 9]));
        assert_eq!(answer.get("ip4").is_some(), version < Version::V0_3_0);
    }
    let none = ask(&env("ADD"), r#"{"name":"net"}"#).expect("added").expect("a document");
    assert_eq!(none["cniVersion"], "0.1.0");
}

#[test]
fn every_missing_variable_is_named_at_once() {
    for (command, names) in [
        ("ADD", vec!["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("CHECK", vec!["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("DEL", vec!["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
        ("GC", vec!["CNI_PATH"]),
        ("STATUS", vec!["CNI_PATH"]),
    ] {
        let empty = Env { command: command.to_owned(), ..Env::default() };
        let error = ask(&empty, &conf("1.1.0", "")).expect_err(command);
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
        for name in names {
            assert!(error.msg.contains(name), "{command}: {error}");
        }
    }
    for command in ["", "HELLO"] {
        let error = ask(&env(command), &conf("1.1.0", "")).expect_err("no such verb");
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
    }
}

#[test]
fn version_needs_nothing_and_names_all() {
    let version = Env { command: "VERSION".to_owned(), ..Env::default() };
    let answer = ask(&version, r#"{"cniVersion":"0.4.0"}"#).expect("answered").expect("document");
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"], json!(Version::supported()));
    ask(&version, "").expect("answered without input");
}

#[test]
fn verbs_exist_from_their_version_on() {
    let prev = r#","prevResult":{"ips":[{"address":"10.0.0.1/8"}]}"#;
    for version in Version::ALL {
        let check = ask(&env("CHECK"), &conf(version.as_str(), prev));
        assert_eq!(check.is_ok(), version >= Version::V0_4_0, "{version}: {check:?}");
        let status = ask(&env("STATUS"), &conf(version.as_str(), "")).expect_err("never ready");
        let gated = version < Version::V1_1_0;
        assert_eq!(status.code == code::INCOMPATIBLE_VERSION, gated, "{version}");
    }
    let error = ask(&env("ADD"), &conf("4.0.0", "")).expect_err("unknown version");
    assert_eq!(error.code, code::INCOMPATIBLE_VERSION);
}

#[test]
fn broken_input_has_the_right_code() {
    let code_of = |conf: &str| ask(&env("ADD"), conf).expect_err(conf).code;
    assert_eq!(code_of(""), code::DECODE);
    assert_eq!(code_of("[]"), code::DECODE);
    assert_eq!(code_of(r#"{"cniVersion":"1.0.0"}"#), code::INVALID_CONFIG);
    assert_eq!(code_of(r#"{"cniVersion":"1.0.0","name":"a/b"}"#), code::INVALID_CONFIG);
    assert_eq!(code_of(r#"{"cniVersion":1,"name":"a"}"#), code::INVALID_CONFIG);
    assert_eq!(code_of(&conf("1.0.0", r#","prevResult":{"ips":7}"#)), code::DECODE);
    let with = |change: fn(&mut Env)| {
        let mut env = env("ADD");
        change(&mut env);
        ask(&env, &conf("1.0.0", "")).expect_err("refused").code
    };
    assert_eq!(with(|env| env.container_id = "../up".into()), code::INVALID_ENVIRONMENT);
    assert_eq!(with(|env| env.ifname = "a/b".into()), code::INVALID_ENVIRONMENT);
    assert_eq!(with(|env| env.args = "nonsense".into()), code::INVALID_ENVIRONMENT);
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_key() {
    let error = ask(&env("ADD"), &conf("1.0.0", r#","mtu":"big""#)).expect_err("refused");
    assert_eq!(error.code, code::INVALID_CONFIG);
    assert!(error.msg.contains(r#""mtu": "big""#), "{error}");
}

#[test]
fn del_works_with_what_it_gets() {
    let nothing = Env { netns: String::new(), ..env("DEL") };
    ask(&nothing, &conf("1.0.0", "")).expect("neither netns nor result");
    let with_result = r#","prevResult":{"ips":[]}"#;
    ask(&env("DEL"), &conf("1.0.0", with_result)).expect("both");
    ask(&nothing, &conf("1.0.0", r#","prevResult":{"ips":7}"#))
        .expect("an unreadable result is none");
}

#[test]
fn check_needs_the_previous_result() {
    let error = ask(&env("CHECK"), &conf("1.0.0", "")).expect_err("no result");
    assert_eq!(error.code, code::INVALID_CONFIG);
    assert!(error.msg.contains("prevResult"));
}

#[test]
fn gc_without_a_list_removes_nothing() {
    let error = ask(&env("GC"), &conf("1.1.0", "")).expect_err("absent");
    assert_eq!(error.code, code::INVALID_CONFIG);
    let error = ask(&env("GC"), &conf("1.1.0", r#","cni.dev/valid-attachments":[]"#));
    assert_eq!(error.expect_err("handler was called").msg, "0 valid");
}

#[test]
fn the_plugins_own_namespace_is_refused() {
    let own = Env { netns: "/proc/self/ns/net".to_owned(), ..env("ADD") };
    assert_eq!(ask(&own, &conf("1.0.0", "")).expect_err("own").code, code::INVALID_NETNS);
    let allowed = Env { netns_override: "true".to_owned(), ..own };
    ask(&allowed, &conf("1.0.0", "")).expect("allowed");
}

#[test]
fn capabilities_that_containerd_spells_in_its_own_way_are_understood() {
    let conf = json!({"runtimeConfig": {
        "portMappings": [{"HostPort": 80, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": ""}],
        "bandwidth": {"IngressRate": 1, "ingressRate": 2, "EgressBurst": 3},
        "ipRanges": [[{"Subnet": "10.1.0.0/24", "RangeStart": "10.1.0.2"}]],
        "io.kubernetes.cri.pod-annotations": {"Team": "a"},
    }});
    let mut raw = conf.as_object().expect("object").clone();
    spell_capabilities(&mut raw);
    let want = json!({
        "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": ""}],
        "bandwidth": {"ingressRate": 2, "egressBurst": 3},
        "ipRanges": [[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.2"}]],
        "io.kubernetes.cri.pod-annotations": {"Team": "a"},
    });
    assert_eq!(raw["runtimeConfig"], want);
}

proptest! {
    #[test]
    fn fuzz_any_stdin_gets_an_answer(text in ".{0,200}", command in "(ADD|DEL|CHECK|GC|STATUS|VERSION)") {
        if let Err(error) = ask(&env(&command), &text) {
            prop_assert!(error.code > 0);
        }
        let _ = answer_version(text.as_bytes());
    }

    #[test]
    fn fuzz_any_variable_gets_an_answer(
        id in ".{0,30}", ifname in ".{0,20}", args in ".{0,60}", netns in "[a-z/.]{0,20}",
    ) {
        let env = Env { container_id: id, ifname, args, netns, ..env("ADD") };
        if let Err(error) = ask(&env, &conf("1.1.0", "")) {
            prop_assert!(error.code < 100);
        }
    }
}

#[path = "../../../corpus/mutate.rs"]
mod mutate;

proptest! {
    #[test]
    fn fuzz_the_corpus_gets_an_answer(
        text in mutate::bytes("stdin"),
        value in mutate::values("stdin"),
        command in "(ADD|DEL|CHECK|GC|STATUS|VERSION)",
    ) {
        for text in [String::from_utf8_lossy(&text).into_owned(), value.to_string()] {
            if let Err(error) = ask(&env(&command), &text) {
                prop_assert!(error.code > 0, "{error}");
                prop_assert!(error.msg.len() < 6000, "a message of {} bytes", error.msg.len());
            }
        }
    }
}
