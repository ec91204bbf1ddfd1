//! The `static` IPAM plugin: the addresses that the configuration, or the runtime, names.
//!
//! Drop-in for the reference plugin of the same name. It keeps nothing, so DEL and GC have nothing to do, and nobody but
//! the author of the configuration takes care that no two containers get one address.

use std::net::IpAddr;

use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{
    AddResult, CniArgs, Dns, Error, IpConfig, Route, Version, code, or_default, parse_cidr,
};
use serde::Deserialize;

/// Keys of `CNI_ARGS` that may come without `IgnoreUnknown=1`: ours, and that of bridge.
const KNOWN_ARGS: &[&str] = &["IP", "GATEWAY", "MAC"];

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Static;

/// What this plugin reads of a network configuration.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct StaticConf {
    ipam: Option<IpamConf>,
    #[serde(default, rename = "runtimeConfig", deserialize_with = "or_default")]
    runtime: Ips,
    #[serde(default, deserialize_with = "or_default")]
    args: ArgsConf,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct IpamConf {
    #[serde(default, deserialize_with = "or_default")]
    addresses: Vec<AddressConf>,
    #[serde(default, deserialize_with = "or_default")]
    routes: Vec<Route>,
    #[serde(default, deserialize_with = "or_default")]
    dns: Dns,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct AddressConf {
    #[serde(default, deserialize_with = "or_default")]
    address: String,
    #[serde(default, deserialize_with = "or_default")]
    gateway: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Ips {
    #[serde(default, deserialize_with = "or_default")]
    ips: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct ArgsConf {
    #[serde(default, deserialize_with = "or_default")]
    cni: Ips,
}

impl Plugin for Static {
    type Conf = StaticConf;

    fn name(&self) -> &'static str {
        "static"
    }

    fn about(&self) -> &'static str {
        "gives containers the addresses that their configuration names"
    }

    fn add(&self, req: AddRequest<StaticConf>) -> Result<AddResult, Error> {
        req.args.only(KNOWN_ARGS)?;
        req.conf.result(&req.args, req.version)
    }

    fn del(&self, _req: DelRequest<StaticConf>) -> Result<(), Error> {
        Ok(())
    }

    /// What the configuration names is in the previous result.
    fn check(&self, req: CheckRequest<StaticConf>) -> Result<(), Error> {
        let want = req.conf.result(&req.args, req.version)?;
        let has = |want: &IpConfig| {
            req.prev_result.ips.iter().any(|ip| {
                ip.address == want.address && (want.gateway.is_none() || ip.gateway == want.gateway)
            })
        };
        let missing = want.ips.iter().filter(|ip| !has(ip)).map(|ip| {
            let by = ip.gateway.map(|gateway| format!(" with the gateway {gateway}"));
            let msg = format!("\"prevResult\" lacks {}{}", ip.address, by.unwrap_or_default());
            Error::new(code::CHECK_FAILED, msg)
        });
        Error::join(missing.collect()).map_or(Ok(()), Err)
    }

    fn gc(&self, _req: GcRequest<StaticConf>) -> Result<(), Error> {
        Ok(())
    }

    fn status(&self, req: StatusRequest<StaticConf>) -> Result<(), Error> {
        req.conf.result(&CniArgs::default(), req.version).map(drop)
    }
}

fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

impl StaticConf {
    /// `runtimeConfig.ips` counts before `args.cni.ips`, and that before the configuration's own addresses together with
    /// the `IP` of `CNI_ARGS`: the reference's order.
    fn result(&self, args: &CniArgs, version: Version) -> Result<AddResult, Error> {
        let ipam = self
            .ipam
            .as_ref()
            .ok_or_else(|| invalid("the network configuration has no \"ipam\""))?;
        let (runtime, own) = (&self.runtime.ips, &self.args.cni.ips);
        let mut ips = match (runtime.as_slice(), own.as_slice()) {
            ([], []) => configured(&ipam.addresses, args)?,
            ([], own) => all("\"args.cni.ips\"", own, code::INVALID_CONFIG)?,
            (runtime, _) => all("\"runtimeConfig.ips\"", runtime, code::INVALID_CONFIG)?,
        };
        for text in listed(args, "GATEWAY") {
            let gateway = gateway("CNI_ARGS: GATEWAY", text, code::INVALID_ENVIRONMENT)?;
            // What the configuration says of its own addresses counts.
            let lacking = |ip: &&mut IpConfig| ip.gateway.is_none() && ip.address.contains(gateway);
            ips.iter_mut().filter(lacking).for_each(|ip| ip.gateway = Some(gateway));
        }
        for (at, ip) in ips.iter().enumerate() {
            if ips[..at].iter().any(|other| other.address.ip() == ip.address.ip()) {
                return Err(invalid(format!("the address {} is there twice", ip.address.ip())));
            }
        }
        let v4 = ips.iter().filter(|ip| ip.address.is_ipv4()).count();
        if version < Version::V0_3_0 && (v4 > 1 || ips.len() - v4 > 1) {
            let msg = format!("version {version} of a result has one address per family, but");
            return Err(invalid(format!("{msg} there are {}", ips.len())));
        }
        let (routes, dns) = (ipam.routes.clone(), ipam.dns.clone());
        Ok(AddResult { ips, routes, dns, ..AddResult::default() })
    }
}

fn configured(addresses: &[AddressConf], args: &CniArgs) -> Result<Vec<IpConfig>, Error> {
    let mut ips = Vec::new();
    for conf in addresses {
        let mut ip = one("\"address\"", &conf.address, code::INVALID_CONFIG)?;
        if !conf.gateway.is_empty() {
            let gateway = gateway("\"gateway\"", &conf.gateway, code::INVALID_CONFIG)?;
            if gateway.is_ipv4() != ip.address.is_ipv4() {
                let msg = format!("\"gateway\" is {gateway}, and \"address\" {}", ip.address);
                return Err(invalid(format!("{msg}: they are of two families")));
            }
            ip.gateway = Some(gateway);
        }
        ips.push(ip);
    }
    for text in listed(args, "IP") {
        ips.push(one("CNI_ARGS: IP", text, code::INVALID_ENVIRONMENT)?);
    }
    Ok(ips)
}

/// The values of a key of `CNI_ARGS`, which stand between commas.
fn listed<'a>(args: &'a CniArgs, key: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    let texts = args.get(key).unwrap_or_default().split(',').map(str::trim);
    texts.filter(|text| !text.is_empty())
}

fn all(place: &str, texts: &[String], code: u32) -> Result<Vec<IpConfig>, Error> {
    texts.iter().map(|text| one(place, text, code)).collect()
}

fn one(place: &str, text: &str, code: u32) -> Result<IpConfig, Error> {
    let wrong = |_| {
        let want = "an address with the length of its prefix, like 10.1.0.5/24";
        Error::new(code, format!("{place} is \"{text}\" and has to be {want}"))
    };
    parse_cidr(text).map(IpConfig::new).map_err(wrong)
}

fn gateway(place: &str, text: &str, code: u32) -> Result<IpAddr, Error> {
    let wrong = || Error::new(code, format!("{place} is \"{text}\" and has to be an IP address"));
    text.parse().map(|ip: IpAddr| ip.to_canonical()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn result(conf: Value, args: &str) -> Result<AddResult, Error> {
        let conf: StaticConf = serde_json::from_value(conf).expect("of the right types");
        conf.result(&CniArgs::parse(args).expect("good"), Version::LATEST)
    }

    fn ips(conf: Value, args: &str) -> Vec<String> {
        let text = |ip: &IpConfig| match ip.gateway {
            Some(gateway) => format!("{} via {gateway}", ip.address),
            None => ip.address.to_string(),
        };
        result(conf, args).expect("good").ips.iter().map(text).collect()
    }

    #[test]
    fn addresses_come_from_the_place_that_counts_first() {
        let mut conf = json!({"ipam": {"addresses": [
            {"address": "10.1.0.5/24", "gateway": "10.1.0.254"}, {"address": "fd01::5/64", "gateway": null},
        ]}});
        let own = ["10.1.0.5/24 via 10.1.0.254", "fd01::5/64"];
        assert_eq!(ips(conf.clone(), ""), own);
        let args = "IP=10.2.0.5/24, fd02::5/64;GATEWAY=10.2.0.1,fd02::1,10.1.0.1";
        assert_eq!(
            ips(conf.clone(), args),
            [own[0], own[1], "10.2.0.5/24 via 10.2.0.1", "fd02::5/64 via fd02::1"]
        );
        conf["args"] = json!({"cni": {"ips": ["10.3.0.5/24"]}});
        assert_eq!(ips(conf.clone(), args), ["10.3.0.5/24"]);
        conf["runtimeConfig"] = json!({"ips": ["10.4.0.5/24", "fd04::5/64"]});
        assert_eq!(ips(conf.clone(), args), ["10.4.0.5/24", "fd04::5/64"]);
        conf["runtimeConfig"] = json!({"ips": null});
        conf["args"] = Value::Null;
        assert_eq!(ips(conf, ""), own);
        assert!(ips(json!({"ipam": {"addresses": null}}), "").is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let addresses = |list: Value| json!({"ipam": {"addresses": list}});
        for (conf, args, word) in [
            (json!({}), "", "no \"ipam\""),
            (addresses(json!([{"address": "10.1.0.5"}])), "", "\"10.1.0.5\""),
            (addresses(json!([{}])), "", "\"address\""),
            (addresses(json!([{"address": "10.1.0.5/24", "gateway": "x"}])), "", "\"x\""),
            (addresses(json!([{"address": "10.1.0.5/24", "gateway": "fd01::1"}])), "", "fd01::1"),
            (
                addresses(json!([{"address": "10.1.0.5/24"}, {"address": "10.1.0.5/16"}])),
                "",
                "twice",
            ),
            (addresses(json!([])), "IP=10.1.0.5", "CNI_ARGS: IP"),
            (addresses(json!([])), "GATEWAY=x", "CNI_ARGS: GATEWAY"),
            (json!({"ipam": {}, "runtimeConfig": {"ips": ["x"]}}), "", "runtimeConfig.ips"),
            (json!({"ipam": {}, "args": {"cni": {"ips": ["x"]}}}), "", "args.cni.ips"),
        ] {
            let error = result(conf, args).expect_err(word);
            let want =
                if args.is_empty() { code::INVALID_CONFIG } else { code::INVALID_ENVIRONMENT };
            assert!(error.code == want && error.msg.contains(word), "{word}: {error}");
        }
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::mutate;

    proptest! {
        #[test]
        fn fuzz_the_corpus_of_static_configurations_is_taken_or_refused(
            value in mutate::values("stdin"), args in "((IP|GATEWAY)=[0-9a-f.:/, ]{0,20};?){0,2}",
        ) {
            let args = CniArgs::parse(&args).unwrap_or_default();
            if let Ok(conf) = serde_json::from_value::<StaticConf>(value)
                && let Ok(result) = conf.result(&args, Version::V0_2_0)
            {
                let v4 = result.ips.iter().filter(|ip| ip.address.is_ipv4()).count();
                prop_assert!(v4 <= 1 && result.ips.len() - v4 <= 1);
                let families = |ip: &IpConfig| ip.gateway.is_none_or(|gateway| {
                    gateway.is_ipv4() == ip.address.is_ipv4()
                });
                prop_assert!(result.ips.iter().all(families), "{result:?}");
            }
        }
    }
}
