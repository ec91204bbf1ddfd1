//! From variables and configuration to a handler's answer.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use cni_spec::{
    AddResult, CniArgs, Command, ContainerId, Env, Error, IfName, NetworkName, Version, code,
    parse_valid_attachments,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{GcRequest, Plugin, Request, StatusRequest};

/// Answers one call. `Ok(None)` is success without a document.
///
/// # Errors
/// What the error document is to say; its version is that of the input, as far as that can be read.
pub fn call<P: Plugin>(plugin: &P, env: &Env, stdin: &[u8]) -> Result<Option<Value>, Error> {
    let command = check_env(env)?;
    if command == Command::Version {
        let supported = Version::supported();
        let version = answer_version(stdin);
        return Ok(Some(json!({"cniVersion": version.as_str(), "supportedVersions": supported})));
    }
    let mut raw = decode(stdin)?;
    spell_capabilities(&mut raw);
    let version = Version::of_conf(&raw)?;
    check_verb(command, version)?;
    let name = network_name(&raw)?;
    match command {
        Command::Add => {
            let prev_result = prev_result(&raw, version)?;
            let req = attachment(env, raw, version, name, PathBuf::from(&env.netns), prev_result)?;
            refuse_own_netns(env)?;
            plugin.add(req)?.to_value(version).map(Some)
        }
        Command::Del => {
            // DEL works with what it gets: a previous result that cannot be read is none.
            let prev_result = prev_result(&raw, version).unwrap_or_else(|error| {
                eprintln!("{}: DEL goes on without prevResult: {error}", plugin.name());
                None
            });
            let netns = (!env.netns.is_empty()).then(|| PathBuf::from(&env.netns));
            let req = attachment(env, raw, version, name, netns, prev_result)?;
            refuse_own_netns(env)?;
            plugin.del(req).map(|()| None)
        }
        Command::Check => {
            let prev_result = prev_result(&raw, version)?.ok_or_else(|| {
                Error::new(code::INVALID_CONFIG, "\"prevResult\" is missing, and CHECK needs it")
            })?;
            let req = attachment(env, raw, version, name, PathBuf::from(&env.netns), prev_result)?;
            refuse_own_netns(env)?;
            plugin.check(req).map(|()| None)
        }
        Command::Gc => {
            let valid = parse_valid_attachments(&raw)?;
            let conf = decode_conf(&raw)?;
            plugin.gc(GcRequest { conf, raw, version, name, valid, env: env.clone() })?;
            Ok(None)
        }
        Command::Status => {
            let conf = decode_conf(&raw)?;
            plugin.status(StatusRequest { conf, raw, version, name, env: env.clone() })?;
            Ok(None)
        }
        Command::Version => Ok(None),
    }
}

/// Version for an answer about this input: its own if that is known, else the newest.
pub(crate) fn answer_version(stdin: &[u8]) -> Version {
    let Ok(conf) = serde_json::from_slice::<Map<String, Value>>(stdin) else {
        return Version::LATEST;
    };
    if conf.contains_key("cniVersion") {
        Version::of_conf(&conf).unwrap_or(Version::LATEST)
    } else {
        Version::V0_1_0
    }
}

/// Variables each verb cannot do without (CNI spec §2; `CNI_PATH` by the reference library).
fn required(command: Command) -> &'static [&'static str] {
    match command {
        Command::Add | Command::Check => {
            &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]
        }
        Command::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
        Command::Gc | Command::Status => &["CNI_PATH"],
        Command::Version => &[],
    }
}

/// Names every missing variable at once.
fn check_env(env: &Env) -> Result<Command, Error> {
    if env.command.is_empty() {
        return Err(Error::new(
            code::INVALID_ENVIRONMENT,
            "required environment variables are missing: CNI_COMMAND",
        ));
    }
    let command: Command = env.command.parse()?;
    let variables = env.variables();
    let missing: Vec<&str> = required(command)
        .iter()
        .copied()
        .filter(|name| variables.iter().any(|(key, value)| key == name && value.is_empty()))
        .collect();
    if missing.is_empty() {
        return Ok(command);
    }
    Err(Error::new(
        code::INVALID_ENVIRONMENT,
        format!("required environment variables are missing: {}", missing.join(", ")),
    )
    .with_details(format!("CNI_COMMAND is {command}")))
}

fn check_verb(command: Command, version: Version) -> Result<(), Error> {
    let (known, since) = match command {
        Command::Check => (version.has_check(), Version::V0_4_0),
        Command::Gc | Command::Status => (version.has_gc_and_status(), Version::V1_1_0),
        Command::Add | Command::Del | Command::Version => (true, Version::V0_1_0),
    };
    if known {
        return Ok(());
    }
    Err(Error::new(
        code::INCOMPATIBLE_VERSION,
        format!("\"cniVersion\" is \"{version}\", but {command} exists from {since} on"),
    ))
}

fn decode(stdin: &[u8]) -> Result<Map<String, Value>, Error> {
    serde_json::from_slice(stdin)
        .map_err(|error| Error::new(code::DECODE, format!("decode network configuration: {error}")))
}

/// containerd hands on capability arguments as Go structs without JSON names: `HostPort` for `hostPort`. Go's reader does not
/// mind, so no plugin of the reference does. Only what is known to come so is spelt anew: other capabilities have keys
/// that people chose.
fn spell_capabilities(raw: &mut Map<String, Value>) {
    let Some(Value::Object(runtime)) = raw.get_mut("runtimeConfig") else { return };
    for capability in ["portMappings", "bandwidth", "ipRanges", "dns"] {
        if let Some(value) = runtime.get_mut(capability) {
            spell(value);
        }
    }
}

fn spell(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(spell),
        Value::Object(object) => {
            let (old, mut new) = (std::mem::take(object), Map::new());
            for (key, value) in old {
                let mut letters = key.chars();
                let first = letters.next().map(|first| first.to_ascii_lowercase());
                let spelt: String = first.into_iter().chain(letters).collect();
                // What is spelt right counts, wherever it stands.
                if spelt == key || !new.contains_key(&spelt) {
                    new.insert(spelt, value);
                }
            }
            *object = new;
        }
        _ => {}
    }
}

fn network_name(raw: &Map<String, Value>) -> Result<NetworkName, Error> {
    match raw.get("name") {
        Some(Value::String(name)) => NetworkName::new(name.as_str())
            .map_err(|error| Error::new(code::INVALID_CONFIG, format!("\"name\": {error}"))),
        None | Some(Value::Null) => {
            Err(Error::new(code::INVALID_CONFIG, "the network configuration has no \"name\""))
        }
        Some(other) => Err(Error::new(
            code::INVALID_CONFIG,
            format!("\"name\" is {other} and has to be a string"),
        )),
    }
}

fn prev_result(raw: &Map<String, Value>, version: Version) -> Result<Option<AddResult>, Error> {
    match raw.get("prevResult") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => AddResult::from_value(value, version)
            .map(Some)
            .map_err(|error| error.context("\"prevResult\"")),
    }
}

fn attachment<C: DeserializeOwned, N, R>(
    env: &Env,
    raw: Map<String, Value>,
    version: Version,
    name: NetworkName,
    netns: N,
    prev_result: R,
) -> Result<Request<C, N, R>, Error> {
    let container_id = ContainerId::new(env.container_id.as_str())
        .map_err(|error| error.into_env_error("CNI_CONTAINERID"))?;
    let ifname =
        IfName::new(env.ifname.as_str()).map_err(|error| error.into_env_error("CNI_IFNAME"))?;
    let args = CniArgs::parse(&env.args)?;
    let conf = decode_conf(&raw)?;
    let env = env.clone();
    Ok(Request { conf, raw, version, name, container_id, ifname, netns, args, prev_result, env })
}

/// Decodes the plugin's own view of the configuration; a value that does not fit is named with its key.
fn decode_conf<C: DeserializeOwned>(raw: &Map<String, Value>) -> Result<C, Error> {
    let value = Value::Object(raw.clone());
    C::deserialize(&value).map_err(|first| {
        // serde names no key. The same text with one key per line makes the line number of its error a name.
        let text = serde_json::to_string_pretty(&value).unwrap_or_default();
        let error = serde_json::from_str::<C>(&text).err().unwrap_or(first);
        let line = keyed_line(&text, error.line());
        let mut msg = format!("network configuration: {error}");
        if let Some(position) = msg.find(" at line ") {
            msg.truncate(position);
        }
        if let Some(line) = line.map(|line| line.trim().trim_end_matches(',')) {
            msg.push_str(", found in ");
            msg.extend(line.chars().take(200));
        }
        Error::new(code::INVALID_CONFIG, msg)
    })
}

/// The line of this number in pretty-printed JSON if it has a key, else the one of the list or object it is part of.
fn keyed_line(text: &str, number: usize) -> Option<&str> {
    const KEY_END: &str = "\": ";
    let lines: Vec<&str> = text.lines().collect();
    let depth = |line: &str| line.len() - line.trim_start().len();
    let mut line = *lines.get(number.checked_sub(1)?)?;
    for before in lines[..number - 1].iter().rev() {
        if line.contains(KEY_END) {
            break;
        }
        if depth(before) < depth(line) {
            line = before;
        }
    }
    line.contains(KEY_END).then_some(line)
}

/// A container that has our own network namespace is a mistake of the caller: the plugin would take apart the
/// host's network. The reference library finds out after the handler, we before.
fn refuse_own_netns(env: &Env) -> Result<(), Error> {
    if env.netns.is_empty() || env.allows_own_netns() {
        return Ok(());
    }
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let own = identity(Path::new("/proc/thread-self/ns/net"));
    if own.is_some() && own == identity(Path::new(&env.netns)) {
        return Err(Error::new(
            code::INVALID_NETNS,
            format!("CNI_NETNS: {} is the network namespace of the plugin itself", env.netns),
        ));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
