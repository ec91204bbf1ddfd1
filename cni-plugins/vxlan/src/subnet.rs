//! `subnet.env`: the node's lease in flannel's form.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cni_spec::{Error, code, parse_cidr};
use ipnetwork::IpNetwork;

/// Why there is no lease to work with.
#[derive(Debug, thiserror::Error)]
pub enum SubnetError {
    /// The file is missing: the agent has no lease yet.
    #[error("this node has no subnet lease yet: {} is missing", .0.display())]
    Missing(PathBuf),
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A line is missing.
    #[error("{} has no {key}", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// The variable.
        key: &'static str,
    },
    /// A value makes no sense.
    #[error("{}: {key} is \"{value}\", which is not {wanted}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The variable.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

impl From<SubnetError> for Error {
    fn from(error: SubnetError) -> Self {
        match &error {
            SubnetError::Missing(_) => Self::from_chain(code::TRY_AGAIN, &error).with_details(
                "the network agent writes it once it has leased a subnet; see its log, and whether etcd answers",
            ),
            SubnetError::Read { .. } => Self::from_chain(code::IO, &error),
            SubnetError::NoKey { .. } | SubnetError::BadValue { .. } => {
                Self::from_chain(code::DECODE, &error)
            }
        }
    }
}

/// The lease: per family the pod network and this node's part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// Whole pod networks: IPv4, then IPv6, as far as there are.
    pub networks: Vec<IpNetwork>,
    /// The node's subnets, likewise, as network addresses.
    pub subnets: Vec<IpNetwork>,
    /// MTU of pods.
    pub mtu: u32,
    /// The agent masquerades, so that plugins do not.
    pub masquerades: bool,
}

impl SubnetEnv {
    /// Reads the file.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, SubnetError> {
        match fs::read(path) {
            Ok(text) => Self::parse(path, &String::from_utf8_lossy(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(SubnetError::Missing(path.to_owned()))
            }
            Err(source) => Err(SubnetError::Read { path: path.to_owned(), source }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, SubnetError> {
        let get = |key: &'static str| {
            let mut values =
                text.lines().filter_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
            values
                .next_back()
                .map(|value| value.trim().trim_matches('"'))
                .filter(|value| !value.is_empty())
        };
        let bad = |key, value: &str, wanted| SubnetError::BadValue {
            path: path.to_owned(),
            key,
            value: value.to_owned(),
            wanted,
        };
        let net = |key, v4: bool| match get(key) {
            None => Ok(None),
            Some(value) => match parse_cidr(value) {
                Ok(net) if net.is_ipv4() == v4 => {
                    Ok(IpNetwork::new(net.network(), net.prefix()).ok())
                }
                _ => Err(bad(key, value, "a CIDR of its family")),
            },
        };
        let missing = |key| SubnetError::NoKey { path: path.to_owned(), key };
        let (subnet4, subnet6) = (net("FLANNEL_SUBNET", true)?, net("FLANNEL_IPV6_SUBNET", false)?);
        let (network4, network6) =
            (net("FLANNEL_NETWORK", true)?, net("FLANNEL_IPV6_NETWORK", false)?);
        if subnet4.is_none() && subnet6.is_none() {
            return Err(missing("FLANNEL_SUBNET"));
        }
        if subnet4.is_some() && network4.is_none() {
            return Err(missing("FLANNEL_NETWORK"));
        }
        if subnet6.is_some() && network6.is_none() {
            return Err(missing("FLANNEL_IPV6_NETWORK"));
        }
        let mtu = get("FLANNEL_MTU").ok_or_else(|| missing("FLANNEL_MTU"))?;
        let mtu = mtu.parse().map_err(|_| bad("FLANNEL_MTU", mtu, "a number of bytes"))?;
        let masquerades = match get("FLANNEL_IPMASQ") {
            // Who says nothing does nothing.
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(bad("FLANNEL_IPMASQ", other, "true or false")),
        };
        Ok(Self {
            // A network without a subnet of it is none of ours.
            networks: network4
                .filter(|_| subnet4.is_some())
                .into_iter()
                .chain(network6.filter(|_| subnet6.is_some()))
                .collect(),
            subnets: subnet4.into_iter().chain(subnet6).collect(),
            mtu,
            masquerades,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<SubnetEnv, SubnetError> {
        SubnetEnv::parse(Path::new("/run/orch/subnet.env"), text)
    }

    fn net(text: &str) -> IpNetwork {
        text.parse().expect("CIDR")
    }

    #[test]
    fn what_the_agent_writes_is_read() {
        let text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        let expected = SubnetEnv {
            networks: vec![net("10.244.0.0/16")],
            subnets: vec![net("10.244.3.0/24")],
            mtu: 1450,
            masquerades: true,
        };
        assert_eq!(parse(text).expect("good"), expected);
        let dual =
            format!("{text}FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:3::1/64\n");
        let dual = parse(&dual).expect("good");
        assert_eq!(dual.subnets, [net("10.244.3.0/24"), net("fd00:0:0:3::/64")]);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (text, word) in [
            ("", "FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450", "FLANNEL_NETWORK"),
            ("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24", "FLANNEL_MTU"),
            ("FLANNEL_NETWORK=fd00::/48\nFLANNEL_SUBNET=10.244.3.1/24", "fd00::/48"),
            ("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=big", "big"),
        ] {
            let error = Error::from(parse(text).expect_err(text));
            assert_eq!(error.code, code::DECODE);
            assert!(error.msg.contains(word), "{error}");
        }
    }

    #[test]
    fn no_file_means_try_again() {
        let error =
            Error::from(SubnetEnv::read(Path::new("/nowhere/subnet.env")).expect_err("absent"));
        assert_eq!(error.code, code::TRY_AGAIN);
        assert!(error.msg.contains("/nowhere/subnet.env"), "{error}");
    }

    proptest! {
        #[test]
        fn fuzz_a_file_of_any_text_is_read_or_refused(
            text in "(?s).{0,100}",
            lines in proptest::collection::vec(
                ("FLANNEL_(NETWORK|SUBNET|IPV6_NETWORK|IPV6_SUBNET|MTU|IPMASQ)", "[0-9a-ft.:/]{0,20}"), 0..8),
        ) {
            let _ = parse(&text);
            let lines: Vec<String> = lines.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
            if let Ok(env) = parse(&lines.join("\n")) {
                prop_assert_eq!(env.networks.len(), env.subnets.len());
            }
        }
    }
}
