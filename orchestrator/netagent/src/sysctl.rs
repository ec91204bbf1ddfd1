//! Kernel settings without which packets die silently. They are per network namespace, and `/proc/sys/net` shows the
//! namespace of the thread that reads it (`lab-baselines.md` §1, traps 2, 4, 5, 7, 8).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

const ROOT: &str = "/proc/sys/net";
/// Loose: the source must be reachable, but over any link. Strict drops a node that talks to a remote pod from its
/// underlay address.
const RP_FILTER_LOOSE: &str = "2";
const RP_FILTER_STRICT: &str = "1";
const IPV6_FORWARDING: &str = "ipv6/conf/all/forwarding";
const BRIDGE_NF: &str = "bridge/bridge-nf-call-iptables";
const BRIDGE_NF_IPV6: &str = "bridge/bridge-nf-call-ip6tables";

/// A setting that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("set {} to {value}: {source}; the pod network needs it ({why})", path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: &'static str,
    why: &'static str,
    source: io::Error,
}

/// One setting to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Path below `/proc/sys/net`.
    pub key: String,
    /// The value.
    pub value: &'static str,
    /// What breaks without it.
    pub why: &'static str,
}

/// What a look at the settings found.
#[derive(Debug, Default)]
pub struct Report {
    /// Settings that were made.
    pub changed: Vec<Setting>,
    /// Settings that could not be made.
    pub errors: Vec<SysctlError>,
    /// `br_netfilter` is not there.
    pub bridge_netfilter_missing: bool,
}

/// Settings to make, given those that are there. Pure.
#[must_use]
pub fn plan(seen: &BTreeMap<String, String>, links: &[&str]) -> Vec<Setting> {
    let differs = |key: &str, value: &str| seen.get(key).is_some_and(|seen| seen != value);
    let mut settings = Vec::new();
    let mut need = |key: &str, value: &'static str, why: &'static str| {
        settings.push(Setting { key: key.to_owned(), value, why });
    };
    if differs("ipv4/ip_forward", "1") {
        need("ipv4/ip_forward", "1", "nodes forward between pods and other nodes");
    }
    // The kernel takes the larger of `all` and the link's own value, so loose in `all` makes every link loose.
    let strict =
        |link: &str| seen.get(&rp_filter(link)).is_some_and(|value| value == RP_FILTER_STRICT);
    if strict("all")
        || (links.iter().any(|link| strict(link)) && differs(&rp_filter("all"), RP_FILTER_LOOSE))
    {
        need(
            &rp_filter("all"),
            RP_FILTER_LOOSE,
            "answers may come over another link than the way there",
        );
    }
    if differs("ipv4/conf/all/route_localnet", "1") {
        need("ipv4/conf/all/route_localnet", "1", "NodePorts answer at 127.0.0.1");
    }
    if differs(BRIDGE_NF, "1") {
        need(BRIDGE_NF, "1", "Services between pods of one node");
    }
    settings
}

/// Settings of a dual-stack node, given those that are there. Pure.
#[must_use]
pub fn plan_ipv6(seen: &BTreeMap<String, String>, underlay: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    // First: a host that forwards hears router advertisements only if told so, and its default route may come from one.
    if seen.get(&accept_ra(underlay)).is_some_and(|value| value == "1") {
        settings.push(Setting {
            key: accept_ra(underlay),
            value: "2",
            why: "a node that forwards keeps the default route that a router told it",
        });
    }
    if seen.get(IPV6_FORWARDING).is_some_and(|value| value != "1") {
        settings.push(Setting {
            key: IPV6_FORWARDING.to_owned(),
            value: "1",
            why: "nodes forward between pods and other nodes",
        });
    }
    if seen.get(BRIDGE_NF_IPV6).is_some_and(|value| value != "1") {
        settings.push(Setting {
            key: BRIDGE_NF_IPV6.to_owned(),
            value: "1",
            why: "IPv6 Services between pods of one node",
        });
    }
    settings
}

fn accept_ra(link: &str) -> String {
    format!("ipv6/conf/{link}/accept_ra")
}

fn rp_filter(link: &str) -> String {
    format!("ipv4/conf/{link}/rp_filter")
}

/// Reads, plans and makes the settings. `links` are those that overlay traffic uses; `ipv6_underlay` is given in dual stack.
#[must_use]
pub fn ensure(links: &[&str], ipv6_underlay: Option<&str>) -> Report {
    let mut keys: Vec<String> =
        ["ipv4/ip_forward", "ipv4/conf/all/route_localnet", BRIDGE_NF].map(str::to_owned).into();
    keys.extend(links.iter().chain(&["all"]).map(|link| rp_filter(link)));
    keys.extend(ipv6_underlay.map(accept_ra));
    keys.extend(ipv6_underlay.map(|_| IPV6_FORWARDING.to_owned()));
    keys.extend(ipv6_underlay.map(|_| BRIDGE_NF_IPV6.to_owned()));
    let seen: BTreeMap<String, String> = keys
        .into_iter()
        .filter_map(|key| {
            let value = fs::read_to_string(Path::new(ROOT).join(&key)).ok()?;
            Some((key, value.trim().to_owned()))
        })
        .collect();
    let mut report =
        Report { bridge_netfilter_missing: !seen.contains_key(BRIDGE_NF), ..Report::default() };
    let mut settings = plan(&seen, links);
    settings.extend(ipv6_underlay.into_iter().flat_map(|underlay| plan_ipv6(&seen, underlay)));
    for setting in settings {
        let path = Path::new(ROOT).join(&setting.key);
        match fs::write(&path, setting.value) {
            Ok(()) => report.changed.push(setting),
            Err(source) => {
                report.errors.push(SysctlError {
                    path,
                    value: setting.value,
                    why: setting.why,
                    source,
                });
            }
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn right_settings_are_left_alone() {
        let right = seen(&[
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/eth0/rp_filter", "2"),
            ("ipv4/conf/all/route_localnet", "1"),
            (BRIDGE_NF, "1"),
        ]);
        assert_eq!(plan(&right, &["eth0"]), []);
    }

    #[test]
    fn a_strict_link_is_loosened_through_all() {
        let keys = |pairs: &[(&str, &str)]| {
            plan(&seen(pairs), &["eth0"]).into_iter().map(|setting| setting.key).collect::<Vec<_>>()
        };
        let strict_link = [("ipv4/conf/all/rp_filter", "0"), ("ipv4/conf/eth0/rp_filter", "1")];
        assert_eq!(keys(&strict_link), ["ipv4/conf/all/rp_filter"]);
        assert_eq!(
            keys(&[("ipv4/conf/all/rp_filter", "2"), ("ipv4/conf/eth0/rp_filter", "1")]),
            [""; 0]
        );
        assert_eq!(keys(&[("ipv4/ip_forward", "0")]), ["ipv4/ip_forward"]);
    }

    #[test]
    fn a_dual_stack_node_forwards_and_still_hears_its_router() {
        let settings = plan_ipv6(
            &seen(&[("ipv6/conf/eth0/accept_ra", "1"), ("ipv6/conf/all/forwarding", "0")]),
            "eth0",
        );
        let keys: Vec<&str> = settings.iter().map(|setting| setting.key.as_str()).collect();
        assert_eq!(keys, ["ipv6/conf/eth0/accept_ra", "ipv6/conf/all/forwarding"]);
        assert_eq!(plan_ipv6(&seen(&[("ipv6/conf/eth0/accept_ra", "0")]), "eth0"), []);
    }
}
