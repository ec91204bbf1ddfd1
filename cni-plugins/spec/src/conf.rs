//! Network configuration lists, and the runtime's keys in a plugin's configuration.

use serde_json::{Map, Value, json};

use crate::{AttachmentId, Error, NetworkName, Version, code};

/// Key of the valid attachments in the configuration of a GC call.
pub const GC_KEY: &str = "cni.dev/valid-attachments";
/// The same under its first name, which the reference runtime still sends (cni #1101).
pub const GC_KEY_OLD: &str = "cni.dev/attachments";

/// A network configuration list: the plugins of one network, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfList {
    /// The newest of the versions it offers that is known here.
    pub version: Version,
    /// Name of the network, unique on the host.
    pub name: NetworkName,
    /// CHECK is not to be called.
    pub disable_check: bool,
    /// GC is not to be called.
    pub disable_gc: bool,
    /// Plugins stand in the list alone; none are in a folder beside it.
    pub only_inlined: bool,
    /// The plugins. May be empty until those of the folder are added.
    pub plugins: Vec<PluginConf>,
}

/// One plugin's configuration as it stands in the list; unknown keys travel through unchanged.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginConf {
    /// Name of the executable.
    pub plugin: String,
    /// All keys.
    pub raw: Map<String, Value>,
}

fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

/// A flag that the reference also takes as text.
fn flag(map: &Map<String, Value>, key: &str) -> Result<bool, Error> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(set)) => Ok(*set),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(invalid(format!("\"{key}\" is {other} and has to be true or false"))),
    }
}

impl PluginConf {
    /// Checks one plugin's configuration.
    ///
    /// # Errors
    /// Code 7 if there is no usable `type`.
    pub fn from_value(value: Value) -> Result<Self, Error> {
        let Value::Object(raw) = value else {
            return Err(invalid("a plugin's configuration has to be an object"));
        };
        let plugin = match raw.get("type") {
            Some(Value::String(name)) => name.clone(),
            None => return Err(invalid("a plugin's configuration has no \"type\"")),
            Some(other) => {
                return Err(invalid(format!("\"type\" is {other} and has to be a string")));
            }
        };
        // It becomes the name of a file in CNI_PATH.
        if plugin.is_empty()
            || matches!(plugin.as_str(), "." | "..")
            || plugin.contains(['/', '\\', '\0'])
        {
            return Err(invalid(format!(
                "\"type\" is {plugin:?}, which is not the name of a plugin"
            )));
        }
        Ok(Self { plugin, raw })
    }

    /// Whether the configuration asks for a capability.
    #[must_use]
    pub fn wants(&self, capability: &str) -> bool {
        let asked = self.raw.get("capabilities").and_then(|all| all.get(capability));
        asked.and_then(Value::as_bool).unwrap_or(false)
    }
}

impl ConfList {
    /// Reads a list, or a single plugin's configuration as a list of one (before 1.0.0 both were files).
    ///
    /// # Errors
    /// Code 6 if it is not JSON, 7 if it is no list, 1 if it offers no known version.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(text).map_err(|error| {
            Error::new(code::DECODE, format!("decode network configuration: {error}"))
        })?;
        let Value::Object(map) = value else {
            return Err(invalid("a network configuration has to be an object"));
        };
        let name = match map.get("name") {
            Some(Value::String(name)) => {
                NetworkName::new(name.as_str()).map_err(|error| invalid(error.to_string()))?
            }
            None => return Err(invalid("the network configuration has no \"name\"")),
            Some(other) => {
                return Err(invalid(format!("\"name\" is {other} and has to be a string")));
            }
        };
        let version = offered_version(&map)?;
        let only_inlined = flag(&map, "loadOnlyInlinedPlugins")?;
        let plugins = match map.get("plugins") {
            Some(Value::Array(plugins)) => {
                plugins.iter().cloned().map(PluginConf::from_value).collect::<Result<_, _>>()?
            }
            Some(other) => {
                return Err(invalid(format!("\"plugins\" is {other} and has to be a list")));
            }
            None if map.contains_key("type") => {
                vec![PluginConf::from_value(Value::Object(map.clone()))?]
            }
            None => Vec::new(),
        };
        if only_inlined && plugins.is_empty() {
            return Err(invalid("\"loadOnlyInlinedPlugins\" is true, but \"plugins\" has none"));
        }
        let (disable_check, disable_gc) = (flag(&map, "disableCheck")?, flag(&map, "disableGC")?);
        Ok(Self { version, name, disable_check, disable_gc, only_inlined, plugins })
    }

    /// The list as JSON, for the result cache.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut list = json!({"cniVersion": self.version.as_str(), "name": self.name.as_str()});
        for (key, set) in [
            ("disableCheck", self.disable_check),
            ("disableGC", self.disable_gc),
            ("loadOnlyInlinedPlugins", self.only_inlined),
        ] {
            if set {
                list[key] = json!(true);
            }
        }
        list["plugins"] =
            self.plugins.iter().map(|plugin| Value::Object(plugin.raw.clone())).collect();
        list
    }
}

/// The newest known of `cniVersion` and `cniVersions`.
fn offered_version(map: &Map<String, Value>) -> Result<Version, Error> {
    let listed = match map.get("cniVersions") {
        None | Some(Value::Null) => return Version::of_conf(map),
        Some(Value::Array(listed)) => listed,
        Some(other) => {
            return Err(invalid(format!("\"cniVersions\" is {other} and has to be a list")));
        }
    };
    let texts = map.get("cniVersion").into_iter().chain(listed).filter_map(Value::as_str);
    match Version::negotiate(texts) {
        Some(version) => Ok(version),
        None if listed.is_empty() => Version::of_conf(map),
        None => Err(Error::new(
            code::INCOMPATIBLE_VERSION,
            format!("\"cniVersions\" is {}, none of which is supported", json!(listed)),
        )),
    }
}

/// The valid attachments of a GC call.
///
/// # Errors
/// Code 7 if the key is absent: *absent is not empty*, and a GC that took it for an empty list would take the
/// network from every container. The same if an entry cannot be read.
pub fn parse_valid_attachments(conf: &Map<String, Value>) -> Result<Vec<AttachmentId>, Error> {
    let key = if conf.contains_key(GC_KEY) { GC_KEY } else { GC_KEY_OLD };
    match conf.get(key) {
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| {
                AttachmentId::deserialize_entry(entry)
                    .map_err(|error| invalid(format!("\"{key}\" has the entry {entry}: {error}")))
            })
            .collect(),
        Some(other) => Err(invalid(format!("\"{key}\" is {other} and has to be a list"))),
        None => Err(invalid(format!(
            "\"{GC_KEY}\" is missing; nothing is removed, since an absent list is not an empty one"
        ))),
    }
}

impl AttachmentId {
    fn deserialize_entry(entry: &Value) -> Result<Self, serde_json::Error> {
        serde::Deserialize::deserialize(entry)
    }
}

/// The valid attachments as both keys of a GC call want them.
#[must_use]
pub fn valid_attachments_value(valid: &[AttachmentId]) -> Value {
    valid.iter().map(|id| json!({"containerID": id.container_id, "ifname": id.ifname})).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().expect("object").clone()
    }

    #[test]
    fn a_list_is_read_with_its_flags_and_unknown_keys() {
        let list = ConfList::parse(
            br#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","1.1.0","7.0.0"],"name":"n","disableCheck":"true",
                 "plugins":[{"type":"bridge","mine":[1]},{"type":"portmap","capabilities":{"portMappings":true}}]}"#,
        )
        .expect("good");
        assert_eq!(list.version, Version::V1_1_0);
        assert!(list.disable_check && !list.disable_gc);
        assert_eq!(list.plugins[0].raw["mine"], json!([1]));
        assert!(list.plugins[1].wants("portMappings") && !list.plugins[0].wants("portMappings"));
        let again = ConfList::parse(list.to_value().to_string().as_bytes()).expect("good");
        assert_eq!(again, list);
    }

    #[test]
    fn a_single_configuration_is_a_list_of_one() {
        let list =
            ConfList::parse(br#"{"cniVersion":"0.3.1","name":"n","type":"bridge"}"#).expect("good");
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.version, Version::V0_3_1);
    }

    #[test]
    fn broken_lists_are_refused_with_the_right_code() {
        let code_of = |text: &str| ConfList::parse(text.as_bytes()).expect_err(text).code;
        assert_eq!(code_of("{"), code::DECODE);
        assert_eq!(code_of("[]"), code::INVALID_CONFIG);
        assert_eq!(code_of(r#"{"plugins":[{"type":"a"}]}"#), code::INVALID_CONFIG);
        assert_eq!(code_of(r#"{"name":"a/b","plugins":[]}"#), code::INVALID_CONFIG);
        assert_eq!(code_of(r#"{"name":"n","plugins":[{"type":"../a"}]}"#), code::INVALID_CONFIG);
        assert_eq!(code_of(r#"{"name":"n","plugins":[{"type":7}]}"#), code::INVALID_CONFIG);
        assert_eq!(
            code_of(r#"{"name":"n","cniVersion":"3.0.0","plugins":[]}"#),
            code::INCOMPATIBLE_VERSION
        );
        assert_eq!(code_of(r#"{"name":"n","loadOnlyInlinedPlugins":true}"#), code::INVALID_CONFIG);
    }

    #[test]
    fn an_absent_list_of_valid_attachments_is_not_an_empty_one() {
        assert_eq!(
            parse_valid_attachments(&Map::new()).expect_err("absent").code,
            code::INVALID_CONFIG
        );
        assert_eq!(parse_valid_attachments(&object(json!({GC_KEY: []}))), Ok(Vec::new()));
        let null = parse_valid_attachments(&object(json!({GC_KEY: null})));
        assert_eq!(null.expect_err("null").code, code::INVALID_CONFIG);
    }

    #[test]
    fn the_old_key_of_gc_counts_where_the_new_one_is_missing() {
        let one = vec![AttachmentId {
            container_id: "c".parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        }];
        let value = valid_attachments_value(&one);
        assert_eq!(parse_valid_attachments(&object(json!({GC_KEY_OLD: value}))), Ok(one.clone()));
        let both = object(json!({GC_KEY: [], GC_KEY_OLD: value}));
        assert_eq!(parse_valid_attachments(&both), Ok(Vec::new()));
        parse_valid_attachments(&object(json!({GC_KEY: [{"containerID": "../x", "ifname": "e"}]})))
            .expect_err("an entry that cannot be read keeps everything");
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_a_list_of_any_text_is_read_or_refused(text in ".{0,300}") {
            let _ = ConfList::parse(text.as_bytes());
        }

        #[test]
        fn fuzz_a_list_with_odd_values_is_read_or_refused(
            key in "(cniVersion|cniVersions|name|plugins|disableCheck|disableGC|loadOnlyInlinedPlugins)",
            text in "[a-z0-9./ ]{0,12}",
            number in any::<i64>(),
        ) {
            for value in [json!(text), json!(number), json!([text]), json!([{"type": text}]), Value::Null] {
                let mut list = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "a"}]});
                list[&key] = value;
                if let Ok(read) = ConfList::parse(list.to_string().as_bytes()) {
                    let again = ConfList::parse(read.to_value().to_string().as_bytes());
                    prop_assert_eq!(again, Ok(read));
                }
            }
        }

    }
}
