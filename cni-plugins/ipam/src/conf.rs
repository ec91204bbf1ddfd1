//! Configuration: the reference's `ipam` object and the places an address can be requested from.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cni_spec::{CniArgs, Dns, Error, NetworkName, Route, Version, code, parse_cidr};
use serde::Deserialize;

use crate::range::{Range, RangeSet};

/// Folder of the folders of networks, where nothing else is said.
const DATA_DIR: &str = "/var/lib/cni/networks";

/// What this plugin reads of a network configuration.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Conf {
    #[serde(default)]
    ipam: Option<IpamConf>,
    #[serde(default, rename = "runtimeConfig")]
    runtime: Option<RuntimeConf>,
    #[serde(default)]
    args: Option<ArgsConf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IpamConf {
    /// A single range from before `ranges` existed.
    #[serde(flatten)]
    single: RangeConf,
    #[serde(default)]
    ranges: Option<Vec<Vec<RangeConf>>>,
    #[serde(default)]
    routes: Option<Vec<Route>>,
    #[serde(default)]
    data_dir: Option<PathBuf>,
    #[serde(default)]
    resolv_conf: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RangeConf {
    #[serde(default)]
    subnet: Option<String>,
    #[serde(default)]
    range_start: Option<String>,
    #[serde(default)]
    range_end: Option<String>,
    #[serde(default)]
    gateway: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConf {
    #[serde(default)]
    ip_ranges: Option<Vec<Vec<RangeConf>>>,
    #[serde(default)]
    ips: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct ArgsConf {
    #[serde(default)]
    cni: Option<CniArgsConf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct CniArgsConf {
    #[serde(default)]
    ips: Option<Vec<String>>,
}

fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

fn address(key: &str, text: &str) -> Result<IpAddr, Error> {
    let parsed: Result<IpAddr, _> = text.parse();
    parsed
        .map(|address| address.to_canonical())
        .map_err(|_| invalid(format!("\"{key}\" is \"{text}\", which is not an IP address")))
}

/// A requested address may come with a prefix length; the range knows it better.
fn requested(key: &str, text: &str) -> Result<IpAddr, Error> {
    match text.split_once('/') {
        Some(_) => parse_cidr(text)
            .map(|net| net.ip().to_canonical())
            .map_err(|error| invalid(format!("\"{key}\": {error}"))),
        None => address(key, text),
    }
}

impl RangeConf {
    fn is_none(&self) -> bool {
        self.subnet.as_deref().is_none_or(str::is_empty)
    }

    fn parse(&self) -> Result<Range, Error> {
        let Some(subnet) = self.subnet.as_deref().filter(|text| !text.is_empty()) else {
            return Err(invalid("a range has no \"subnet\""));
        };
        let net = parse_cidr(subnet).map_err(|error| invalid(format!("\"subnet\": {error}")))?;
        let one = |key, text: &Option<String>| {
            let text = text.as_deref().filter(|text| !text.is_empty());
            text.map(|text| address(key, text)).transpose()
        };
        let start = one("rangeStart", &self.range_start)?;
        let end = one("rangeEnd", &self.range_end)?;
        let gateway = one("gateway", &self.gateway)?;
        Range::new(net, start, end, gateway).map_err(|error| invalid(error.to_string()))
    }
}

impl Conf {
    /// Folder of the leases of a network.
    pub(crate) fn folder(&self, network: &NetworkName) -> Result<PathBuf, Error> {
        let ipam = self.ipam()?;
        let data = ipam.data_dir.as_deref().filter(|dir| !dir.as_os_str().is_empty());
        Ok(data.unwrap_or(Path::new(DATA_DIR)).join(network.as_str()))
    }

    fn ipam(&self) -> Result<&IpamConf, Error> {
        self.ipam.as_ref().ok_or_else(|| invalid("the network configuration has no \"ipam\""))
    }
}

/// A configuration that has been checked as a whole.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) sets: Vec<RangeSet>,
    pub(crate) requested: Vec<IpAddr>,
    pub(crate) routes: Vec<Route>,
    resolv_conf: Option<PathBuf>,
}

impl Pool {
    /// Ranges of the runtime come first, then the single one, then the list.
    pub(crate) fn parse(conf: &Conf, args: &CniArgs, version: Version) -> Result<Self, Error> {
        let ipam = conf.ipam()?;
        let runtime = conf.runtime.clone().unwrap_or_default();
        let mut sets: Vec<Vec<RangeConf>> = runtime.ip_ranges.unwrap_or_default();
        if !ipam.single.is_none() {
            sets.push(vec![ipam.single.clone()]);
        }
        sets.extend(ipam.ranges.clone().unwrap_or_default());
        if sets.is_empty() {
            return Err(invalid("\"ipam\" has neither \"ranges\" nor \"subnet\""));
        }
        let sets = sets
            .iter()
            .enumerate()
            .map(|(index, set)| {
                let ranges = set.iter().map(RangeConf::parse).collect::<Result<_, _>>()?;
                RangeSet::new(index, ranges).map_err(|error| invalid(error.to_string()))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for (at, set) in sets.iter().enumerate() {
            for other in &sets[at + 1..] {
                set.check_apart(other).map_err(|error| invalid(error.to_string()))?;
            }
        }
        let v4 = sets.iter().filter(|set| set.is_ipv4()).count();
        if version < Version::V0_3_0 && (v4 > 1 || sets.len() - v4 > 1) {
            let msg = format!("version {version} of a result has one address per family, but");
            return Err(invalid(format!("{msg} there are {} range sets", sets.len())));
        }
        let cni_ips = conf.args.clone().and_then(|args| args.cni).and_then(|cni| cni.ips);
        let mut ips = Vec::new();
        if let Some(text) = args.get("IP").filter(|text| !text.is_empty()) {
            ips.push(requested("CNI_ARGS IP", text)?);
        }
        for text in cni_ips.unwrap_or_default() {
            ips.push(requested("args.cni.ips", &text)?);
        }
        for text in runtime.ips.unwrap_or_default() {
            ips.push(requested("runtimeConfig.ips", &text)?);
        }
        ips.sort();
        ips.dedup();
        let routes = ipam.routes.clone().unwrap_or_default();
        let resolv_conf = ipam.resolv_conf.clone().filter(|path| !path.as_os_str().is_empty());
        Ok(Self { sets, requested: ips, routes, resolv_conf })
    }

    /// Name service from the file that is configured for it.
    pub(crate) fn dns(&self) -> Result<Dns, Error> {
        let Some(path) = &self.resolv_conf else { return Ok(Dns::default()) };
        let text = fs::read(path).map_err(|error| {
            Error::from_chain(code::IO, &error)
                .context(format!("read \"resolvConf\" {}", path.display()))
        })?;
        Ok(parse_resolv_conf(&String::from_utf8_lossy(&text)))
    }
}

/// `resolv.conf(5)`, as far as CNI has words for it.
fn parse_resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        let words = words.map(ToOwned::to_owned);
        match key {
            "nameserver" => dns.nameservers.extend(words.take(1)),
            "domain" => dns.domain = words.take(1).collect(),
            "search" => dns.search.extend(words),
            "options" => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests;
