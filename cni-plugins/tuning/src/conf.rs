//! The configuration: as it is written, and as it is meant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cni_netlink::{MacBytes, parse_unicast_mac};
use cni_spec::{CniArgs, Error, code, first_said, or_default};
use serde::Deserialize;

use crate::link::Attributes;
use crate::sysctl::{self, Sysctl};

const DATA_DIR: &str = "/run/cni/tuning";
/// Smallest MTU of IPv4 (RFC 791) and largest of a veth.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

/// Network configuration of `type: tuning`, with the keys of the reference plugin.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    /// Folder of what interfaces had before; empty is the default one.
    #[serde(deserialize_with = "or_default")]
    pub data_dir: PathBuf,
    /// What can also be said for one container.
    #[serde(flatten)]
    pub values: Overrides,
    /// Capability arguments.
    #[serde(deserialize_with = "or_default")]
    pub runtime_config: RuntimeConfig,
    /// `args` of the runtime.
    #[serde(deserialize_with = "or_default")]
    pub args: Args,
}

/// What is to be set, in the configuration and in `args.cni`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Overrides {
    /// Values by their names below `/proc/sys`, with dots; `IFNAME` stands for the interface.
    #[serde(deserialize_with = "or_default")]
    pub sysctl: BTreeMap<String, String>,
    /// MAC.
    pub mac: Option<String>,
    /// MTU; 0 leaves it.
    pub mtu: Option<u32>,
    /// Whether it is to take all frames; false leaves it.
    pub promisc: Option<bool>,
    /// Whether it takes all multicast frames.
    pub allmulti: Option<bool>,
    /// Packets that may wait at its way out.
    #[serde(rename = "txQLen")]
    pub tx_queue_length: Option<u32>,
}

/// `runtimeConfig`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// The MAC, or empty.
    #[serde(deserialize_with = "or_default")]
    pub mac: String,
}

/// `args`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Args {
    /// `args.cni`.
    #[serde(deserialize_with = "or_default")]
    pub cni: Overrides,
}

/// What the configuration means for one interface.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) data_dir: PathBuf,
    pub(crate) sysctls: Vec<Sysctl>,
    pub(crate) link: Attributes,
}

impl NetConf {
    pub(crate) fn data_dir(&self) -> &Path {
        if self.data_dir.as_os_str().is_empty() { Path::new(DATA_DIR) } else { &self.data_dir }
    }

    /// Checks values and puts together what is said in several places: the container's own words count.
    pub(crate) fn settings(&self, args: &CniArgs, ifname: &str) -> Result<Settings, Error> {
        let (all, own) = (&self.values, &self.args.cni);
        let parse = |of: &Overrides| sysctl::parse_all(&of.sysctl, ifname);
        let sysctls = sysctl::overridden(parse(all)?, parse(own)?);
        let mtu = own.mtu.or(all.mtu).filter(|mtu| *mtu != 0);
        if let Some(mtu) = mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
            let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
            let msg = format!("\"mtu\" is {mtu} and has to be 0 or from {least} to {most}");
            return Err(Error::new(code::INVALID_CONFIG, msg));
        }
        Ok(Settings {
            data_dir: self.data_dir().to_owned(),
            sysctls,
            link: Attributes {
                mac: self.asked_mac(args)?,
                mtu,
                promiscuous: own.promisc.or(all.promisc).filter(|on| *on),
                all_multicast: own.allmulti.or(all.allmulti),
                queue_length: own.tx_queue_length.or(all.tx_queue_length),
            },
        })
    }

    /// `args.cni.mac`, else `runtimeConfig.mac`, else `MAC` of `CNI_ARGS`, else that of the configuration.
    fn asked_mac(&self, args: &CniArgs) -> Result<Option<MacBytes>, Error> {
        let places = [
            ("\"args.cni.mac\"", self.args.cni.mac.as_deref(), code::INVALID_CONFIG),
            ("\"runtimeConfig.mac\"", Some(&*self.runtime_config.mac), code::INVALID_CONFIG),
            ("CNI_ARGS: MAC", args.get("MAC"), code::INVALID_ENVIRONMENT),
            ("\"mac\"", self.values.mac.as_deref(), code::INVALID_CONFIG),
        ];
        first_said(&places, "the MAC of one interface", parse_unicast_mac)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn settings(value: Value, args: &str) -> Result<Settings, Error> {
        let conf: NetConf = serde_json::from_value(value).expect("of the right types");
        conf.settings(&CniArgs::parse(args).expect("good"), "eth0")
    }

    #[test]
    fn the_containers_own_words_count_before_the_networks() {
        let conf = json!({
            "mac": "02:00:00:00:00:01", "mtu": 1400, "promisc": true, "allmulti": true, "txQLen": 7,
            "sysctl": {"net.core.somaxconn": "1", "net.ipv4.ip_forward": "0"},
            "args": {"cni": {"mtu": 1300, "promisc": false, "sysctl": {"net.core.somaxconn": "2"}}},
        });
        let found = settings(conf.clone(), "").expect("good");
        let link = &found.link;
        assert_eq!(
            (link.mtu, link.promiscuous, link.all_multicast),
            (Some(1300), None, Some(true))
        );
        assert_eq!((link.queue_length, link.mac.map(|mac| mac[5])), (Some(7), Some(1)));
        let values: Vec<&str> = found.sysctls.iter().map(|sysctl| &*sysctl.value).collect();
        assert_eq!(values, ["2", "0"]);

        let spelt = json!({
            "sysctl": {"net.ipv4.conf.IFNAME.forwarding": "1"},
            "args": {"cni": {"sysctl": {"net/ipv4/conf/eth0/forwarding": "0"}}},
        });
        let found = settings(spelt, "").expect("good").sysctls;
        assert!(
            found.len() == 1 && found[0].value == "0",
            "one switch, spelt otherwise: {found:?}"
        );

        let mac = |conf, args| settings(conf, args).expect("good").link.mac.map(|mac| mac[5]);
        assert_eq!(mac(conf.clone(), "MAC=02:00:00:00:00:02"), Some(2));
        let mut conf = conf;
        conf["runtimeConfig"] = json!({"mac": "02:00:00:00:00:03"});
        assert_eq!(mac(conf.clone(), "MAC=02:00:00:00:00:02"), Some(3));
        conf["args"]["cni"]["mac"] = json!("02:00:00:00:00:04");
        assert_eq!(mac(conf, "MAC=02:00:00:00:00:02"), Some(4));
    }

    #[test]
    fn nothing_asked_is_nothing_set_and_wrong_values_are_named() {
        let nothing =
            settings(json!({"sysctl": null, "args": null, "mtu": 0, "promisc": false}), "");
        let nothing = nothing.expect("good");
        assert!(nothing.link.is_empty() && nothing.sysctls.is_empty());
        assert_eq!(nothing.data_dir, Path::new(DATA_DIR));
        for (conf, word) in [
            (json!({"mac": "01:00:5e:00:00:01"}), "\"mac\" is \"01:00:5e:00:00:01\""),
            (json!({"mtu": 67}), "\"mtu\" is 67"),
            (json!({"sysctl": {"kernel.panic": "1"}}), "kernel.panic"),
            (json!({"sysctl": {"net.a.b": "1", "net/a/b": "2"}}), "\"net.a.b\" and \"net/a/b\""),
        ] {
            let error = settings(conf, "").expect_err("wrong");
            assert_eq!(error.code, code::INVALID_CONFIG);
            assert!(error.msg.contains(word), "{error}");
        }
        let error = settings(json!({}), "MAC=nonsense").expect_err("wrong");
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
    }
}

#[cfg(test)]
#[path = "../../corpus/mutate.rs"]
mod mutate;

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_the_corpus_of_configurations_is_taken_or_refused(
            value in mutate::values("stdin"), args in ".{0,30}",
        ) {
            let args = CniArgs::parse(&args).unwrap_or_default();
            if let Ok(conf) = serde_json::from_value::<NetConf>(value)
                && let Ok(settings) = conf.settings(&args, "eth0")
            {
                for sysctl in settings.sysctls {
                    prop_assert!(sysctl.path.starts_with("/proc/sys/net"));
                    let dots = sysctl.path.components().any(|part| part.as_os_str() == "..");
                    prop_assert!(!dots, "{}", sysctl.path.display());
                }
            }
        }

        #[test]
        fn fuzz_a_sysctl_of_any_name_stays_below_net(key in "(net)?[./a-zA-Z]{0,30}") {
            if let Ok(sysctl) = sysctl::parse(&key, String::new(), "eth0.1") {
                prop_assert!(sysctl.path.starts_with("/proc/sys/net"));
                let dots = sysctl.path.components().any(|part| part.as_os_str() == "..");
                prop_assert!(!dots, "{}", sysctl.path.display());
            }
        }
    }
}
