//! Address families of a Service: which ones it has, and an address of each. Pure but for the dice.
//!
//! The rules are upstream's (`ipFamilyPolicy`, KEP-563). The cluster's first family is IPv4; IPv6 is there if the server was
//! given a network for it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use orch_api::FieldError;
use rand::Rng as _;
use serde_json::{Value, json};

/// More addresses of a network than these are not looked at: one for every Service that a cluster can hold.
const MOST_ADDRESSES: u64 = 1 << 20;

/// Where addresses come from: one network of each family that the cluster has, the first family first.
pub(crate) type Ranges = [IpNetwork];

pub(crate) fn word(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned).collect()
}

/// The addresses that a spec names; `clusterIP` alone stands for the first.
fn named(spec: &Value) -> Vec<String> {
    let listed = texts(&spec["clusterIPs"]);
    let first = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty()).map(str::to_owned);
    if listed.is_empty() { first.into_iter().collect() } else { listed }
}

/// Fills in `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy`; `old` is the Service's spec before.
pub(crate) fn complete(
    spec: &mut Value,
    old: &Value,
    taken: &BTreeSet<IpAddr>,
    ranges: &Ranges,
    errors: &mut Vec<FieldError>,
) {
    inherit(spec, old);
    let before = errors.len();
    let ips = named(spec);
    let families = families(spec, &ips, ranges, errors);
    if errors.len() > before {
        return;
    }
    spec["ipFamilies"] = json!(families);
    if ips.first().is_some_and(|ip| ip == "None") {
        (spec["clusterIP"], spec["clusterIPs"]) = (json!("None"), json!(["None"]));
        return;
    }
    let had = named(old);
    let mut chosen = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let Some(range) = ranges.iter().find(|range| word(range.ip()) == *family) else { continue };
        let address = match ips.get(index) {
            Some(ip) => {
                errors.extend(check(ip, &had, taken, *range));
                ip.clone()
            }
            None => match free_address(taken, *range) {
                Some(address) => address.to_string(),
                None => {
                    let detail = format!("the range {range} is full");
                    errors.push(FieldError::forbidden("spec.clusterIP", detail));
                    return;
                }
            },
        };
        chosen.push(address);
    }
    spec["clusterIP"] = json!(chosen.first());
    spec["clusterIPs"] = json!(chosen);
}

/// What a client leaves out in a change stays as it was; what it no longer wants by policy goes.
fn inherit(spec: &mut Value, old: &Value) {
    if old["type"] == "ExternalName" {
        return;
    }
    let policy = spec["ipFamilyPolicy"].as_str().or(old["ipFamilyPolicy"].as_str());
    let single = policy == Some("SingleStack");
    if let Some(policy) = policy.map(str::to_owned) {
        spec["ipFamilyPolicy"] = json!(policy);
    }
    if named(spec).is_empty() {
        spec["clusterIPs"] = old["clusterIPs"].clone();
        spec["clusterIP"] = old["clusterIP"].clone();
    } else if texts(&spec["clusterIPs"]).is_empty() && spec["clusterIP"] == old["clusterIP"] {
        spec["clusterIPs"] = old["clusterIPs"].clone();
    }
    if texts(&spec["ipFamilies"]).is_empty() {
        spec["ipFamilies"] = old["ipFamilies"].clone();
    }
    // From two families to one without naming it: the first one stays.
    for field in ["clusterIPs", "ipFamilies"] {
        if single
            && spec[field] == old[field]
            && let Some(list) = spec[field].as_array_mut()
        {
            list.truncate(1);
        }
    }
}

/// The families that a Service gets, first one first; writes the policy.
fn families(
    spec: &mut Value,
    ips: &[String],
    ranges: &Ranges,
    errors: &mut Vec<FieldError>,
) -> Vec<String> {
    let configured: Vec<&str> = ranges.iter().map(|range| word(range.ip())).collect();
    let mut families = texts(&spec["ipFamilies"]);
    // What is not said follows from the addresses.
    for (index, ip) in ips.iter().enumerate() {
        let Ok(parsed) = ip.parse::<IpAddr>() else { continue };
        match families.get(index) {
            None if families.len() == index => families.push(word(parsed).to_owned()),
            Some(family) if family != word(parsed) => {
                let detail =
                    format!("expected an {family} value as indicated by `ipFamilies[{index}]`");
                errors.push(FieldError::invalid(
                    format!("spec.clusterIPs[{index}]"),
                    &json!(ip),
                    detail,
                ));
            }
            _ => {}
        }
    }
    // A name whose addresses somebody writes by hand: they may be of any family.
    let by_hand = ips.first().is_some_and(|ip| ip == "None")
        && spec["selector"].as_object().is_none_or(serde_json::Map::is_empty);
    let default = if by_hand { "RequireDualStack" } else { "SingleStack" };
    let policy = spec["ipFamilyPolicy"].as_str().unwrap_or(default).to_owned();
    if policy == "SingleStack" {
        for (field, count) in [("clusterIPs", ips.len()), ("ipFamilies", families.len())] {
            if count > 1 {
                errors.push(FieldError::invalid(
                    "spec.ipFamilyPolicy",
                    &json!(policy),
                    format!("must be RequireDualStack or PreferDualStack when multiple '{field}' are specified"),
                ));
                return families;
            }
        }
    }
    if families.is_empty() {
        families.extend(configured.first().map(|first| (*first).to_owned()));
    }
    let both = ["IPv4", "IPv6"];
    let known: &[&str] = if by_hand { &both } else { &configured };
    for (index, family) in families.iter().enumerate() {
        if !known.contains(&family.as_str()) {
            let field = format!("spec.ipFamilies[{index}]");
            errors.push(FieldError::invalid(
                field,
                &json!(family),
                "not configured on this cluster",
            ));
        }
    }
    if policy == "RequireDualStack" && known.len() < 2 {
        let detail = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid("spec.ipFamilyPolicy", &json!(policy), detail));
    } else if policy != "SingleStack" {
        let missing = known.iter().find(|family| families.iter().all(|has| has != *family));
        families.extend(missing.map(|family| (*family).to_owned()));
    }
    spec["ipFamilyPolicy"] = json!(policy);
    families
}

/// Why a Service may not have this address.
fn check(
    ip: &str,
    had: &[String],
    taken: &BTreeSet<IpAddr>,
    range: IpNetwork,
) -> Option<FieldError> {
    let parsed: Option<IpAddr> = ip.parse().ok();
    let why = match parsed {
        Some(address) if taken.contains(&address) => "provided IP is already allocated".to_owned(),
        Some(address) if range.contains(address) => return None,
        // The address it already has stays good when the range was changed.
        _ if had.iter().any(|before| before == ip) => return None,
        _ => {
            format!("the provided IP is not in the valid range. The range of valid IPs is {range}")
        }
    };
    let detail = format!("failed to allocate IP {ip}: {why}");
    Some(FieldError::invalid("spec.clusterIPs", &json!([ip]), detail))
}

/// A free address, from a random place on. The first 256 (or 1/16 of the range) are left to those who name one.
fn free_address(taken: &BTreeSet<IpAddr>, range: IpNetwork) -> Option<IpAddr> {
    let (bits, base) = match range {
        IpNetwork::V4(v4) => (32, u128::from(v4.network().to_bits())),
        IpNetwork::V6(v6) => (128, v6.network().to_bits()),
    };
    let size = 1_u64
        .checked_shl(bits - u32::from(range.prefix()))
        .map_or(MOST_ADDRESSES, |size| size.min(MOST_ADDRESSES));
    let reserved = (size / 16).clamp(0, 256).max(2);
    let usable = size.checked_sub(reserved + 1).filter(|usable| *usable > 0)?;
    let start = rand::rng().random_range(0..usable);
    (0..usable)
        .map(|step| base + u128::from(reserved + (start + step) % usable))
        .filter_map(|bits| match range {
            IpNetwork::V4(_) => Some(IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(bits).ok()?))),
            IpNetwork::V6(_) => Some(IpAddr::V6(Ipv6Addr::from_bits(bits))),
        })
        .find(|address| !taken.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [&str; 2] = ["10.96.0.0/12", "fd00:10:96::/112"];

    fn run(ranges: &[&str], spec: Value, old: &Value) -> Result<Value, Vec<String>> {
        let ranges: Vec<IpNetwork> =
            ranges.iter().map(|range| range.parse().expect("a network")).collect();
        let (mut spec, mut errors) = (spec, Vec::new());
        complete(&mut spec, old, &BTreeSet::new(), &ranges, &mut errors);
        if errors.is_empty() {
            return Ok(spec);
        }
        Err(errors.iter().map(ToString::to_string).collect())
    }

    fn selected(mut spec: Value) -> Value {
        spec["selector"] = json!({ "app": "web" });
        spec
    }

    #[test]
    fn a_service_has_the_families_that_its_policy_says() {
        for (given, families) in [
            (json!({}), json!(["IPv4"])),
            (json!({ "ipFamilies": ["IPv6"] }), json!(["IPv6"])),
            (json!({ "clusterIP": "fd00:10:96::7" }), json!(["IPv6"])),
            (json!({ "ipFamilyPolicy": "PreferDualStack" }), json!(["IPv4", "IPv6"])),
            (json!({ "ipFamilyPolicy": "RequireDualStack" }), json!(["IPv4", "IPv6"])),
            (
                json!({ "ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"] }),
                json!(["IPv6", "IPv4"]),
            ),
            (
                json!({ "ipFamilyPolicy": "RequireDualStack", "clusterIPs": ["fd00:10:96::7", "10.96.0.7"] }),
                json!(["IPv6", "IPv4"]),
            ),
        ] {
            let spec = run(&BOTH, selected(given.clone()), &Value::Null).expect("fine");
            assert_eq!(spec["ipFamilies"], families, "{given}");
            let ips = named(&spec);
            let of: Vec<_> = ips.iter().map(|ip| word(ip.parse().expect("an address"))).collect();
            assert_eq!(json!(of), families, "{given}: {ips:?}");
            assert_eq!(spec["clusterIP"], spec["clusterIPs"][0]);
        }
    }

    #[test]
    fn where_there_is_no_ipv6_it_is_preferred_in_vain_and_refused_if_required() {
        let four = &BOTH[..1];
        let prefers = selected(json!({ "ipFamilyPolicy": "PreferDualStack" }));
        let spec = run(four, prefers, &Value::Null).expect("fine");
        assert_eq!(spec["ipFamilies"], json!(["IPv4"]));
        let requires = selected(json!({ "ipFamilyPolicy": "RequireDualStack" }));
        let errors = run(four, requires, &Value::Null).expect_err("refused");
        assert!(errors[0].contains("not configured for dual-stack"), "{errors:?}");
        let six = selected(json!({ "ipFamilies": ["IPv6"] }));
        let errors = run(four, six, &Value::Null).expect_err("refused");
        assert!(errors[0].contains("not configured on this cluster"), "{errors:?}");
    }

    #[test]
    fn contradictions_are_named() {
        for (given, words) in [
            (
                json!({ "ipFamilies": ["IPv4", "IPv6"] }),
                "must be RequireDualStack or PreferDualStack",
            ),
            (json!({ "ipFamilies": ["IPv6"], "clusterIP": "10.96.0.7" }), "expected an IPv6 value"),
            (json!({ "clusterIP": "fd00:99::7" }), "not in the valid range"),
        ] {
            let errors = run(&BOTH, selected(given.clone()), &Value::Null).expect_err("refused");
            assert!(errors[0].contains(words), "{given}: {errors:?}");
        }
    }

    #[test]
    fn a_second_family_comes_and_goes_with_the_policy_and_the_first_address_stays() {
        let one = run(&BOTH, selected(json!({})), &Value::Null).expect("fine");
        let mut wants_both = one.clone();
        wants_both["ipFamilyPolicy"] = json!("PreferDualStack");
        let both = run(&BOTH, wants_both, &one).expect("fine");
        assert_eq!(both["ipFamilies"], json!(["IPv4", "IPv6"]));
        assert_eq!(both["clusterIP"], one["clusterIP"]);
        let mut wants_one = both.clone();
        wants_one["ipFamilyPolicy"] = json!("SingleStack");
        let again = run(&BOTH, wants_one, &both).expect("fine");
        assert_eq!(again["clusterIPs"], one["clusterIPs"]);
        assert_eq!(again["ipFamilies"], json!(["IPv4"]));
        // A client that knows nothing of families changes something else.
        let silent = run(&BOTH, selected(json!({ "clusterIP": both["clusterIP"] })), &both);
        assert_eq!(silent.expect("fine")["clusterIPs"], both["clusterIPs"]);
    }

    #[test]
    fn a_headless_service_without_selector_has_both_families() {
        let spec = run(&BOTH[..1], json!({ "clusterIP": "None" }), &Value::Null).expect("fine");
        assert_eq!(spec["ipFamilies"], json!(["IPv4", "IPv6"]));
        assert_eq!(spec["ipFamilyPolicy"], "RequireDualStack");
        let chosen = selected(json!({ "clusterIP": "None", "ipFamilies": ["IPv6"] }));
        let spec = run(&BOTH, chosen, &Value::Null).expect("fine");
        assert_eq!(spec["ipFamilies"], json!(["IPv6"]));
    }
}
