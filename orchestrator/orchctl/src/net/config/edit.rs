//! The settings' JSON with a change in it. Pure.

use orch_config::network::{ConfigError, Mode, Switch};
use serde_json::{Map, Value};

use super::{Change, Family};

/// The JSON in etcd with the change in it; keys that are not ours stay as they are. Pure.
pub(super) fn edited(json: &[u8], change: &Change) -> Result<Vec<u8>, ConfigError> {
    let mut config: Map<String, Value> = match serde_json::from_slice(json) {
        Ok(config) => config,
        // What is unreadable has nothing to keep.
        Err(_) => Map::new(),
    };
    if let Some(network) = change.network {
        let (network, enable) = match network {
            Family::Network(network) => (Some(network.to_string().into()), None),
            Family::None => (None, Some(false.into())),
        };
        put(&mut config, "Network", network);
        put(&mut config, "EnableIPv4", enable);
        // The limits of another network fit nobody.
        for limit in ["SubnetLen", "SubnetMin", "SubnetMax"] {
            put(&mut config, limit, None);
        }
    }
    if let Some(length) = change.subnet_len {
        put(&mut config, "SubnetLen", Some(length.into()));
        for limit in ["SubnetMin", "SubnetMax"] {
            put(&mut config, limit, None);
        }
    }
    for (name, address) in [("SubnetMin", change.subnet_min), ("SubnetMax", change.subnet_max)] {
        if let Some(address) = address {
            put(&mut config, name, Some(address.to_string().into()));
        }
    }
    match change.ipv6_network {
        Some(Family::Network(network)) => {
            put(&mut config, "EnableIPv6", Some(true.into()));
            put(&mut config, "IPv6Network", Some(network.to_string().into()));
        }
        Some(Family::None) => {
            for name in ["EnableIPv6", "IPv6Network"] {
                put(&mut config, name, None);
            }
        }
        None => {}
    }
    if change.ipv6_network.is_some() || change.ipv6_subnet_len.is_some() {
        for limit in ["IPv6SubnetMin", "IPv6SubnetMax"] {
            put(&mut config, limit, None);
        }
        put(&mut config, "IPv6SubnetLen", change.ipv6_subnet_len.map(Into::into));
    }
    let mut backend = match take(&mut config, "Backend") {
        Some(Value::Object(backend)) => backend,
        _ => Map::new(),
    };
    if let Some(mode) = change.mode.map(Mode::from) {
        put(&mut backend, "Type", Some(mode.backend().into()));
        let direct = (mode == Mode::DirectRouting).then_some(true.into());
        put(&mut backend, "DirectRouting", direct);
    }
    for (name, switch) in [("FastPath", change.fast_path), ("BigTCP", change.big_tcp)] {
        if let Some(switch) = switch.map(Switch::from) {
            put(&mut backend, name, switch.key().map(Into::into));
        }
    }
    if let Some(vni) = change.vni {
        put(&mut backend, "VNI", Some(vni.into()));
    }
    if let Some(port) = change.port {
        put(&mut backend, "Port", Some(port.into()));
    }
    config.insert("Backend".to_owned(), Value::Object(backend));
    serde_json::to_vec(&config).map_err(|error| ConfigError::Decode(error.to_string()))
}

/// Removes a key whatever its case, as flannel's decoder reads it.
fn take(object: &mut Map<String, Value>, name: &str) -> Option<Value> {
    let key = object.keys().find(|key| key.eq_ignore_ascii_case(name))?.clone();
    object.remove(&key)
}

fn put(object: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    take(object, name);
    if let Some(value) = value {
        object.insert(name.to_owned(), value);
    }
}
