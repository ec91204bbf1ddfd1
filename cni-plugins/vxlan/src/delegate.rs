//! From configuration and lease to what the delegate is told. Pure.

use cni_spec::{Error, GC_KEY, GC_KEY_OLD, code};
use serde_json::{Map, Value, json};

use crate::{Conf, SubnetEnv};

/// The delegate, unless `delegate.type` names another.
const DELEGATE: &str = "bridge";
/// The IPAM plugin, unless `ipam.type` names another.
const IPAM: &str = "host-local";

/// Keys of one call, which are handed on with it and never kept.
const CALL_KEYS: [&str; 5] = ["prevResult", "runtimeConfig", "args", GC_KEY, GC_KEY_OLD];

/// Who is told what.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delegation {
    /// The delegate.
    pub(crate) plugin: String,
    /// Its configuration, without what belongs to one call.
    pub(crate) conf: Map<String, Value>,
}

impl Delegation {
    /// The configuration for one call: with what the runtime said in it.
    pub(crate) fn with_call(&self, raw: &Map<String, Value>) -> Map<String, Value> {
        let mut conf = self.conf.clone();
        // The version is that of the call: results are read and written in it.
        for key in CALL_KEYS.into_iter().chain(["cniVersion"]) {
            match raw.get(key) {
                Some(value) => conf.insert(key.to_owned(), value.clone()),
                None => conf.shift_remove(key),
            };
        }
        conf
    }

    /// Reads what was kept; `None` if it is not usable.
    pub(crate) fn from_kept(text: &[u8]) -> Option<Self> {
        let conf: Map<String, Value> = serde_json::from_slice(text).ok()?;
        let plugin = conf.get("type")?.as_str()?.to_owned();
        Some(Self { plugin, conf })
    }
}

fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

/// What the user wrote counts; the rest follows from the lease as in flannel's plugin. Without a lease, ranges,
/// routes and MTU are missing: enough for DEL and GC, not for ADD.
pub(crate) fn delegate_conf(
    conf: &Conf,
    raw: &Map<String, Value>,
    subnet: Option<&SubnetEnv>,
) -> Result<Delegation, Error> {
    let mut to = conf.delegate.clone().unwrap_or_default();
    for key in ["name", "ipam"] {
        if to.contains_key(key) {
            return Err(invalid(format!(
                "\"delegate\" has \"{key}\", which follows from the network and cannot be set there"
            )));
        }
    }
    let plugin = match to.entry("type").or_insert_with(|| json!(DELEGATE)) {
        Value::String(plugin) => plugin.clone(),
        other => {
            return Err(invalid(format!("\"delegate.type\" is {other} and has to be a string")));
        }
    };
    // A plugin that delegates to itself would do so for ever.
    if raw.get("type").and_then(Value::as_str) == Some(plugin.as_str()) {
        return Err(invalid(format!("\"delegate.type\" is \"{plugin}\", this plugin itself")));
    }
    let mut set = |key: &str, value: Value| {
        to.entry(key).or_insert(value);
    };
    if let Some(subnet) = subnet {
        set("mtu", json!(subnet.mtu));
        set("ipMasq", json!(!subnet.masquerades));
    }
    if plugin == DELEGATE {
        set("isGateway", json!(true));
    }
    for key in ["name", "cniVersion", "dns"] {
        if let Some(value) = raw.get(key) {
            to.insert(key.to_owned(), value.clone());
        }
    }
    to.insert("ipam".to_owned(), Value::Object(ipam_conf(conf, subnet)?));
    Ok(Delegation { plugin, conf: to })
}

fn ipam_conf(conf: &Conf, subnet: Option<&SubnetEnv>) -> Result<Map<String, Value>, Error> {
    let mut ipam = conf.ipam.clone().unwrap_or_default();
    ipam.entry("type").or_insert_with(|| json!(IPAM));
    ipam.entry("dataDir").or_insert_with(|| json!(conf.data_dir));
    let Some(subnet) = subnet else { return Ok(ipam) };
    // One set per family, so that a pod gets an address of each. Ranges of the user would not be this node's.
    let ranges = subnet.subnets.iter().map(|net| json!([{"subnet": net.to_string()}]));
    ipam.insert("ranges".to_owned(), ranges.collect());
    let routes = ipam.entry("routes").or_insert_with(|| json!([]));
    let Value::Array(routes) = routes else {
        return Err(invalid(format!("\"ipam.routes\" is {routes} and has to be a list")));
    };
    // The whole pod network is behind the bridge, even where the default route is another.
    routes.extend(subnet.networks.iter().map(|net| json!({"dst": net.to_string()})));
    Ok(ipam)
}

#[cfg(test)]
#[path = "../../corpus/mutate.rs"]
mod mutate;
#[cfg(test)]
mod tests {
    use super::*;

    fn subnet() -> SubnetEnv {
        SubnetEnv {
            networks: vec!["10.244.0.0/16".parse().expect("CIDR")],
            subnets: vec!["10.244.3.0/24".parse().expect("CIDR")],
            mtu: 1450,
            masquerades: true,
        }
    }

    fn build(value: Value, subnet: Option<&SubnetEnv>) -> Result<Delegation, Error> {
        let raw = value.as_object().expect("object").clone();
        let conf: Conf = serde_json::from_value(value).expect("of the right types");
        delegate_conf(&conf, &raw, subnet)
    }

    /// What the network agent writes.
    fn agents() -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "orch", "type": "vxlan",
            "subnetFile": "/run/orch/subnet.env", "dataDir": "/var/lib/cni/networks",
            "delegate": {"bridge": "cni0", "hairpinMode": true, "isDefaultGateway": true},
        })
    }

    #[test]
    fn the_delegate_gets_mtu_addresses_and_the_route_to_all_pods() {
        let to = build(agents(), Some(&subnet())).expect("built");
        assert_eq!(to.plugin, "bridge");
        assert_eq!(
            Value::Object(to.conf),
            json!({
                "bridge": "cni0", "hairpinMode": true, "isDefaultGateway": true,
                "type": "bridge", "mtu": 1450, "ipMasq": false, "isGateway": true,
                "name": "orch", "cniVersion": "1.0.0",
                "ipam": {
                    "type": "host-local", "dataDir": "/var/lib/cni/networks",
                    "ranges": [[{"subnet": "10.244.3.0/24"}]], "routes": [{"dst": "10.244.0.0/16"}],
                },
            })
        );
    }

    #[test]
    fn what_the_user_wrote_counts() {
        let mut value = agents();
        value["delegate"] = json!({"type": "ptp", "mtu": 1400, "ipMasq": true});
        value["ipam"] = json!({"dataDir": "/elsewhere", "routes": [{"dst": "192.0.2.0/24"}]});
        let conf = build(value, Some(&subnet())).expect("built").conf;
        assert_eq!((&conf["mtu"], &conf["ipMasq"]), (&json!(1400), &json!(true)));
        assert!(conf.get("isGateway").is_none(), "only for a bridge");
        assert_eq!(conf["ipam"]["dataDir"], "/elsewhere");
        assert_eq!(
            conf["ipam"]["routes"],
            json!([{"dst": "192.0.2.0/24"}, {"dst": "10.244.0.0/16"}])
        );
    }

    #[test]
    fn without_an_agent_that_masquerades_the_bridge_does() {
        let alone = SubnetEnv { masquerades: false, ..subnet() };
        assert_eq!(build(agents(), Some(&alone)).expect("built").conf["ipMasq"], true);
    }

    #[test]
    fn a_delegate_cannot_be_told_what_follows_from_the_network() {
        for delegate in [
            json!({"name": "x"}),
            json!({"ipam": {}}),
            json!({"type": "vxlan"}),
            json!({"type": 1}),
        ] {
            let mut value = agents();
            value["delegate"] = delegate;
            assert_eq!(build(value, None).expect_err("refused").code, code::INVALID_CONFIG);
        }
    }

    #[test]
    fn keys_of_a_call_go_with_the_call_and_are_not_kept() {
        let mut first = agents();
        first["runtimeConfig"] = json!({"mac": "02:00:00:00:00:01"});
        let to = build(first, Some(&subnet())).expect("built");
        assert!(to.conf.get("runtimeConfig").is_none());
        let mut second = agents();
        second["cniVersion"] = json!("1.1.0");
        second["prevResult"] = json!({"ips": []});
        let call = to.with_call(second.as_object().expect("object"));
        assert_eq!(call["prevResult"], json!({"ips": []}));
        assert_eq!(call["cniVersion"], "1.1.0");
        assert!(call.get("runtimeConfig").is_none() && call.get(GC_KEY).is_none());
        let text = Value::Object(to.conf.clone()).to_string();
        assert_eq!(Delegation::from_kept(text.as_bytes()), Some(to));
        assert_eq!(Delegation::from_kept(b""), None);
    }

    proptest::proptest! {
        #[test]
        fn fuzz_what_is_kept_may_be_any_text(text in ".{0,100}") {
            let _ = Delegation::from_kept(text.as_bytes());
        }

        #[test]
        fn fuzz_the_corpus_of_what_is_kept_is_used_or_counts_as_none(text in mutate::bytes("kept")) {
            if let Some(to) = Delegation::from_kept(&text) {
                let again = Value::Object(to.conf.clone()).to_string();
                proptest::prop_assert_eq!(Delegation::from_kept(again.as_bytes()), Some(to));
            }
        }
    }
}
