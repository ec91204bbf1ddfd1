//! Tests that docs/reference is what the code says, and with `ORCH_WRITE_DOCS` what writes it (`make docs`).

#[path = "../../../docs/reference/render.rs"]
mod render;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use orch_config::network::{ConfigError, NetworkConfig};
use serde_json::{Value, json};

/// A key of the configuration, for the reference.
#[derive(Debug, Clone, Copy)]
struct Key {
    /// Where it is, `Backend.VNI`.
    path: &'static str,
    /// What holds without it; empty where that depends.
    default: &'static str,
    /// What it says.
    meaning: &'static str,
}

const fn key(path: &'static str, default: &'static str, meaning: &'static str) -> Key {
    Key { path, default, meaning }
}

/// All keys that are read.
const KEYS: &[Key] = &[
    key("Network", "", "network that the nodes' IPv4 subnets are cut from"),
    key("EnableIPv4", "true", "false: a network of IPv6 alone"),
    key(
        "SubnetLen",
        "24",
        "prefix length of a node's subnet; two longer than the network's where that is longer than /22",
    ),
    key("SubnetMin", "", "first subnet that nodes may have; the network's second"),
    key("SubnetMax", "", "last subnet that nodes may have; the network's last"),
    key("EnableIPv6", "false", "true: dual stack, or IPv6 alone"),
    key("IPv6Network", "", "network that the nodes' IPv6 subnets are cut from"),
    key("IPv6SubnetLen", "64", "prefix length of a node's IPv6 subnet"),
    key("IPv6SubnetMin", "", "first IPv6 subnet that nodes may have"),
    key("IPv6SubnetMax", "", "last IPv6 subnet that nodes may have"),
    key(
        "Backend.Type",
        "",
        "`vxlan`, or `host-gw`: packets travel as they are, and all nodes share a link",
    ),
    key("Backend.VNI", "1", "VXLAN network identifier"),
    key("Backend.Port", "8472", "UDP port of VXLAN"),
    key(
        "Backend.DirectRouting",
        "false",
        "packets travel as they are to nodes on the same link, in VXLAN to others",
    ),
    key(
        "Backend.FastPath",
        "false",
        "the short way through a node for packets of known flows; ours, which flannel does not read",
    ),
    key(
        "Backend.BigTCP",
        "",
        "`true` or `false`: IPv4 packets of pods larger than 64 KiB before they are cut into frames; else where a node can; ours, too",
    ),
];

/// Variables that no flag of `orchctl` names.
const OTHER_VARIABLES: [(&str, &str); 4] = [
    ("KUBECONFIG", "`orchctl`: credentials of the cluster, where `--kubeconfig` names none"),
    ("ORCH_LOG", "the daemons: what is logged, `info` or `orch_kubelet=debug,info`"),
    ("ORCH_POLICY", "`orchestrator agent`, `--policy`: enforce NetworkPolicies"),
    ("ORCH_SERVICES", "`orchestrator agent`, `--services`: how pods reach Services"),
];

#[test]
fn the_reference_of_commands_is_what_the_code_says() {
    render::ensure("orchctl.md", &render::program(crate::command()));
}

#[test]
fn the_reference_of_settings_is_what_the_code_says() {
    let mut text = String::from(
        "# Settings\n\n<!-- Written by `make docs` from the code; changes here are lost. -->\n\n\
         Flags are in [orchctl.md](orchctl.md) and [orchestrator.md](orchestrator.md).\n\n\
         ## A host: `/etc/orch/config.yaml`\n\n```yaml\n",
    );
    text += crate::cluster::DOCUMENTED;
    text += "```\n\n## The pod network: the key `/coreos.com/network/config` in etcd\n\n\
             JSON, flannel's; `orchctl net config` shows and changes it, and agents follow at once. Names may be \
             written in upper or lower case.\n\n| Key | Default | Meaning |\n| --- | --- | --- |\n";
    for key in KEYS {
        let default =
            if key.default.is_empty() { String::new() } else { format!("`{}`", key.default) };
        let _ = writeln!(text, "| `{}` | {default} | {} |", key.path, key.meaning);
    }
    text += "\n## Environment\n\n| Variable | Meaning |\n| --- | --- |\n";
    let mut all = variables(&crate::command());
    all.extend(OTHER_VARIABLES.map(|(name, meaning)| (name.to_owned(), meaning.to_owned())));
    for (variable, meaning) in all {
        let _ = writeln!(text, "| `{variable}` | {meaning} |");
    }
    render::ensure("settings.md", &text);
}

fn variables(command: &clap::Command) -> BTreeMap<String, String> {
    let of_flag = |arg: &clap::Arg| {
        let variable = arg.get_env()?.to_string_lossy().into_owned();
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        Some((variable, format!("`orchctl`, `--{}`: {help}", arg.get_long()?)))
    };
    let mut found: BTreeMap<String, String> = command.get_arguments().filter_map(of_flag).collect();
    for sub in command.get_subcommands() {
        found.extend(variables(sub));
    }
    found
}

#[test]
fn every_documented_key_is_read() {
    for key in KEYS {
        let mut config = json!({ "Network": "10.5.0.0/16", "EnableIPv6": true,
            "IPv6Network": "fd00::/48", "Backend": { "Type": "vxlan" } });
        assert!(NetworkConfig::parse(config.to_string().as_bytes()).is_ok());
        // Of no key's type.
        let pointer = format!("/{}", key.path.replace('.', "/"));
        match config.pointer_mut(&pointer) {
            Some(place) => *place = json!([]),
            None => match key.path.split_once('.') {
                Some((outer, inner)) => config[outer][inner] = json!([]),
                None => config[key.path] = json!([]),
            },
        }
        let outcome = NetworkConfig::parse(config.to_string().as_bytes());
        assert!(matches!(outcome, Err(ConfigError::Decode(_))), "{}: {outcome:?}", key.path);
    }
}

#[test]
fn every_key_that_is_written_is_documented() {
    fn paths(value: &Value, above: &str, found: &mut Vec<String>) {
        for (name, value) in value.as_object().into_iter().flatten() {
            match value {
                Value::Object(_) => paths(value, &format!("{above}{name}."), found),
                _ => found.push(format!("{above}{name}")),
            }
        }
    }
    let text = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
    let config = NetworkConfig::parse(text.as_bytes()).expect("valid");
    let mut found = Vec::new();
    paths(&serde_json::from_slice(&config.to_json()).expect("JSON"), "", &mut found);
    assert!(found.len() > 8, "{found:?}");
    found.retain(|path| !KEYS.iter().any(|key| key.path == path));
    assert!(found.is_empty(), "{found:?} are not documented");
}
