//! The configuration: as it is written, and as it is meant.

use cni_spec::{Error, code, or_default};
use serde::Deserialize;

use crate::pods::Policy;

/// The administrator's own chain, as the reference calls it.
const ADMIN_CHAIN: &str = "CNI-ADMIN";
/// What iptables takes for a chain's name, so that it can be listed there.
const CHAIN_MAX: usize = 28;

/// Network configuration of `type: firewall`, with the keys of the reference plugin.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    /// How. `iptables`, which is what was written for the reference, counts as `nftables`: the packets fare the same.
    #[serde(deserialize_with = "or_default")]
    pub backend: String,
    /// Chain of the table `filter` that is asked before anything is let through.
    #[serde(deserialize_with = "or_default")]
    pub iptables_admin_chain_name: String,
    /// Who may open connections to containers.
    #[serde(deserialize_with = "or_default")]
    pub ingress_policy: String,
}

/// What the configuration means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) admin_chain: String,
    /// `None` is open.
    pub(crate) policy: Option<Policy>,
}

impl NetConf {
    pub(crate) fn settings(&self) -> Result<Settings, Error> {
        let unsupported = |msg: String| Err(Error::new(code::UNSUPPORTED_FIELD, msg));
        match self.backend.as_str() {
            "" | "nftables" | "iptables" => {}
            "firewalld" => {
                return unsupported(
                    "\"backend\" is \"firewalld\", and this plugin does not talk to firewalld: have the \
                     network trusted there (firewall-cmd --permanent --zone=trusted --add-source=SUBNET) \
                     and leave \"backend\" out"
                        .to_owned(),
                );
            }
            other => {
                return unsupported(format!(
                    "\"backend\" is \"{other}\" and has to be \"nftables\" or \"iptables\""
                ));
            }
        }
        let policy = match self.ingress_policy.as_str() {
            "" | "open" => None,
            name => match [Policy::SameBridge, Policy::Isolated]
                .into_iter()
                .find(|policy| policy.name() == name)
            {
                Some(policy) => Some(policy),
                None => {
                    return unsupported(format!(
                        "\"ingressPolicy\" is \"{name}\" and has to be \"open\", \"same-bridge\" or \"isolated\""
                    ));
                }
            },
        };
        let admin_chain = match self.iptables_admin_chain_name.as_str() {
            "" => ADMIN_CHAIN,
            name => name,
        };
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let begins = admin_chain.starts_with(|first: char| first.is_ascii_alphabetic());
        if !begins || admin_chain.len() > CHAIN_MAX || !admin_chain.bytes().all(is_letter) {
            let msg = format!(
                "\"iptablesAdminChainName\" is \"{admin_chain}\", and a chain's name is up to {CHAIN_MAX} letters, \
                 digits, dashes and underscores, the first one a letter"
            );
            return Err(Error::new(code::INVALID_CONFIG, msg));
        }
        Ok(Settings { admin_chain: admin_chain.to_owned(), policy })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn settings(value: Value) -> Result<Settings, Error> {
        serde_json::from_value::<NetConf>(value).expect("of the right types").settings()
    }

    #[test]
    fn what_is_written_for_the_reference_is_taken_and_what_cannot_be_done_is_said() {
        let plain = settings(json!({"backend": "iptables", "firewalldZone": "trusted"}));
        let plain = plain.expect("good");
        assert_eq!((plain.admin_chain.as_str(), plain.policy), (ADMIN_CHAIN, None));
        assert_eq!(
            settings(json!({"backend": null, "ingressPolicy": "open"})).expect("good"),
            plain
        );
        for (name, policy) in [("same-bridge", Policy::SameBridge), ("isolated", Policy::Isolated)]
        {
            let found = settings(json!({"ingressPolicy": name})).expect("good");
            assert_eq!(found.policy, Some(policy));
        }
        for (conf, code) in [
            (json!({"backend": "firewalld"}), 2),
            (json!({"backend": "pf"}), 2),
            (json!({"ingressPolicy": "closed"}), 2),
            (json!({"iptablesAdminChainName": "a chain; flush ruleset"}), 7),
            (json!({"iptablesAdminChainName": "c".repeat(29)}), 7),
        ] {
            let error = settings(conf.clone()).expect_err("refused");
            let value = conf.as_object().expect("object").values().next().expect("one");
            assert!(
                error.code == code && error.msg.contains(value.as_str().expect("text")),
                "{error}"
            );
        }
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
        fn fuzz_the_corpus_of_configurations_is_taken_or_refused(value in mutate::values("stdin")) {
            if let Ok(conf) = serde_json::from_value::<NetConf>(value)
                && let Ok(settings) = conf.settings()
            {
                let odd = |c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_';
                prop_assert!(!settings.admin_chain.contains(odd));
            }
        }
    }
}
