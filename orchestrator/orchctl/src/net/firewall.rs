//! Which firewall rules of others stop overlay or pod traffic. Pure, and careful: a rule counts only where everything
//! that it matches on is understood. What this misses, the doctor's real packets find.

use ipnetwork::Ipv4Network;
use serde_json::Value;

/// Tables of ours begin with this.
const OURS: &str = "orch";

/// What traffic is looked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Subject {
    /// UDP port of VXLAN.
    pub(super) port: u16,
    /// The pod network.
    pub(super) network: Option<Ipv4Network>,
    /// The VXLAN device and the pods' bridge.
    pub(super) links: Vec<String>,
}

/// Something that drops it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Drop {
    /// What is dropped.
    pub(super) what: &'static str,
    /// The rule, for people.
    pub(super) place: String,
    /// Command that ends it.
    pub(super) fix: String,
}

/// Overlay packets that come in or go out.
const OVERLAY: &str = "VXLAN packets";
/// Packets between pods and nodes.
const PODS: &str = "forwarded pod traffic";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Drop,
    Accept,
}

/// How far a rule's matches are understood.
#[derive(Debug, Default)]
struct Matches {
    /// It names our port.
    port: bool,
    /// It names one of our links or the pod network.
    pods: bool,
    /// Something that is not understood, or that is narrower than our traffic.
    narrow: bool,
    /// A match of an xtables extension, which may be a mere comment.
    extension: bool,
}

impl Matches {
    /// Whether it takes all of the traffic of a hook.
    fn takes(&self, hook: &str, verdict: Verdict) -> bool {
        // An unknown extension hides a drop, and does not take an acceptance away: neither makes a false alarm.
        if self.narrow || (self.extension && verdict == Verdict::Drop) {
            return false;
        }
        match hook {
            "forward" => !self.port,
            _ => !self.pods,
        }
    }
}

/// Everything that drops our traffic, in nft's JSON and in the text of `iptables-save`.
pub(super) fn drops(nft: &str, iptables: &str, subject: &Subject) -> Vec<Drop> {
    let mut found = nft_drops(nft, subject);
    found.extend(iptables_drops(iptables, subject));
    found
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn nft_drops(json: &str, subject: &Subject) -> Vec<Drop> {
    let document: Value = serde_json::from_str(json).unwrap_or_default();
    let all = document["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let foreign = |object: &&Value| !text(object, "table").starts_with(OURS);
    let rules: Vec<&Value> =
        all.iter().filter_map(|object| object.get("rule")).filter(foreign).collect();
    let mut found = Vec::new();
    for chain in all.iter().filter_map(|object| object.get("chain")).filter(foreign) {
        let hook = text(chain, "hook");
        if !matches!(hook, "forward" | "input" | "output" | "prerouting" | "postrouting") {
            continue;
        }
        let (family, table, name) =
            (text(chain, "family"), text(chain, "table"), text(chain, "name"));
        if !matches!(family, "ip" | "inet") {
            continue;
        }
        let place = format!("{family} {table} {name}");
        let mut accepted = false;
        walk(&rules, (family, table, name), hook, subject, 0, &mut |rule, verdict| {
            if verdict == Verdict::Accept {
                accepted = true;
                return false;
            }
            let chain = text(rule, "chain");
            let handle = rule["handle"].as_u64().unwrap_or_default();
            found.push(Drop {
                what: if hook == "forward" { PODS } else { OVERLAY },
                place: format!("rule {handle} of the chain {family} {table} {chain}"),
                fix: format!("nft delete rule {family} {table} {chain} handle {handle}"),
            });
            false
        });
        if text(chain, "policy") == "drop" && !accepted {
            let (what, rules) = match hook {
                "forward" => {
                    let network = subject
                        .network
                        .map_or_else(|| "10.244.0.0/16".to_owned(), |n| n.to_string());
                    (
                        PODS,
                        [
                            format!("ip saddr {network} accept"),
                            format!("ip daddr {network} accept"),
                        ],
                    )
                }
                _ => (OVERLAY, [format!("udp dport {} accept", subject.port), String::new()]),
            };
            let inserts: Vec<String> = rules
                .iter()
                .filter(|rule| !rule.is_empty())
                .map(|rule| format!("nft insert rule {place} {rule}"))
                .collect();
            found.push(Drop {
                what,
                place: format!("policy `drop` of the chain {place}"),
                fix: inserts.join(" && "),
            });
        }
    }
    found
}

/// Rules are followed through jumps this deep; more is a loop or a riddle.
const MAX_DEPTH: usize = 8;

/// Tells every rule of a chain that decides about our traffic, through jumps, until `told` wants no more or one of
/// them decides about all of it. True if it was decided.
fn walk(
    rules: &[&Value],
    (family, table, chain): (&str, &str, &str),
    hook: &str,
    subject: &Subject,
    depth: usize,
    told: &mut impl FnMut(&Value, Verdict) -> bool,
) -> bool {
    let here = rules.iter().filter(|rule| {
        text(rule, "family") == family
            && text(rule, "table") == table
            && text(rule, "chain") == chain
    });
    for rule in here {
        let parts = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
        let mut matches = Matches::default();
        let mut verdict = None;
        let mut target = None;
        for part in parts {
            let Some((kind, value)) = part.as_object().and_then(|part| part.iter().next()) else {
                continue;
            };
            match kind.as_str() {
                "match" => note(value, subject, &mut matches),
                "drop" | "reject" => verdict = Some(Verdict::Drop),
                "accept" => verdict = Some(Verdict::Accept),
                "jump" | "goto" => target = value["target"].as_str(),
                "counter" | "log" | "comment" => {}
                "xt" => matches.extension = true,
                _ => matches.narrow = true,
            }
        }
        if let Some(verdict) = verdict.filter(|verdict| matches.takes(hook, *verdict)) {
            told(rule, verdict);
            return true;
        }
        if let Some(target) = target
            && depth < MAX_DEPTH
            && matches.takes(hook, Verdict::Drop)
            && walk(rules, (family, table, target), hook, subject, depth + 1, told)
        {
            return true;
        }
    }
    false
}

/// Notes one match of a rule.
fn note(found: &Value, subject: &Subject, matches: &mut Matches) {
    let equal = matches!(text(found, "op"), "==" | "in" | "");
    let (left, right) = (&found["left"], &found["right"]);
    let meta = left["meta"]["key"].as_str();
    let (protocol, field) = (text(&left["payload"], "protocol"), text(&left["payload"], "field"));
    let known = match (meta, protocol, field) {
        (Some("l4proto"), ..) | (None, "ip", "protocol") => {
            names(right, "udp") || names(right, "17")
        }
        (None, "udp" | "th", "dport") => {
            matches.port = true;
            has_port(right, subject.port)
        }
        (Some("iifname" | "oifname"), ..) => {
            matches.pods = true;
            subject.links.iter().any(|link| names(right, link))
        }
        (None, "ip", "saddr" | "daddr") => {
            matches.pods = true;
            subject.network.is_some_and(|network| covers(right, network))
        }
        _ => false,
    };
    if !equal || !known {
        matches.narrow = true;
    }
}

fn names(value: &Value, name: &str) -> bool {
    match value {
        Value::String(text) => text == name,
        Value::Number(number) => number.to_string() == name,
        _ => value["set"].as_array().is_some_and(|set| set.iter().any(|one| names(one, name))),
    }
}

fn has_port(value: &Value, port: u16) -> bool {
    let number = u64::from(port);
    if let Some(range) = value["range"].as_array() {
        let bound = |at: usize| range.get(at).and_then(Value::as_u64);
        return bound(0).is_some_and(|low| low <= number)
            && bound(1).is_some_and(|high| number <= high);
    }
    value.as_u64() == Some(number)
        || value["set"].as_array().is_some_and(|set| set.iter().any(|one| has_port(one, port)))
}

fn covers(value: &Value, network: Ipv4Network) -> bool {
    let prefix = &value["prefix"];
    let len = prefix["len"].as_u64().and_then(|len| u8::try_from(len).ok());
    let parsed = prefix["addr"].as_str().and_then(|addr| addr.parse().ok()).zip(len);
    parsed.and_then(|(addr, len)| Ipv4Network::new(addr, len).ok()).is_some_and(|found| {
        found.contains(network.network()) && found.prefix() <= network.prefix()
    })
}

/// The chains that the kernel calls, without following jumps.
fn iptables_drops(save: &str, subject: &Subject) -> Vec<Drop> {
    let mut found = Vec::new();
    for (chain, hook) in [("FORWARD", "forward"), ("INPUT", "input"), ("OUTPUT", "output")] {
        let what = if hook == "forward" { PODS } else { OVERLAY };
        let mut decided = None;
        for line in save.lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("-A") || words.next() != Some(chain) {
                continue;
            }
            let (mut matches, mut verdict) = (Matches::default(), None);
            while let Some(word) = words.next() {
                let value = words.next().unwrap_or_default();
                match word {
                    "-p" => matches.narrow |= value != "udp",
                    "-m" => {}
                    "--dport" => {
                        matches.port = true;
                        matches.narrow |= value != subject.port.to_string();
                    }
                    "-i" | "-o" => {
                        matches.pods = true;
                        matches.narrow |= !subject.links.iter().any(|link| link == value);
                    }
                    "-j" if matches!(value, "DROP" | "REJECT") => verdict = Some(Verdict::Drop),
                    "-j" if value == "ACCEPT" => verdict = Some(Verdict::Accept),
                    _ => matches.narrow = true,
                }
            }
            if let Some(verdict) = verdict.filter(|verdict| matches.takes(hook, *verdict)) {
                decided = Some((verdict, line));
                break;
            }
        }
        match decided {
            Some((Verdict::Drop, line)) => found.push(Drop {
                what,
                place: format!("the rule `{line}` of iptables-legacy"),
                fix: format!("iptables-legacy {}", line.replacen("-A", "-D", 1)),
            }),
            None if save.lines().any(|line| line.starts_with(&format!(":{chain} DROP"))) => {
                let network = subject.network.map(|n| n.to_string()).unwrap_or_default();
                let allow = match hook {
                    "forward" => format!(
                        "iptables-legacy -I FORWARD -s {network} -j ACCEPT && iptables-legacy -I FORWARD -d {network} -j ACCEPT"
                    ),
                    _ => format!(
                        "iptables-legacy -I {chain} -p udp --dport {} -j ACCEPT",
                        subject.port
                    ),
                };
                found.push(Drop {
                    what,
                    place: format!("policy DROP of {chain} in iptables-legacy"),
                    fix: allow,
                });
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn subject() -> Subject {
        Subject {
            port: 8472,
            network: "10.244.0.0/16".parse().ok(),
            links: vec!["vxlan-orch".to_owned(), "cni0".to_owned()],
        }
    }

    fn ruleset(table: &str, hook: &str, policy: &str, rules: &[Value]) -> String {
        let mut objects = vec![json!({"chain": {
            "family": "ip", "table": table, "name": "C", "type": "filter", "hook": hook, "prio": 0, "policy": policy,
        }})];
        objects.extend(rules.iter().enumerate().map(|(at, expr)| {
            json!({"rule": {"family": "ip", "table": table, "chain": "C", "handle": at + 1, "expr": expr}})
        }));
        json!({ "nftables": objects }).to_string()
    }

    fn udp_port(right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": right}})
    }

    #[test]
    fn a_rule_that_drops_the_vxlan_port_is_found_in_all_its_forms() {
        for port in [json!(8472), json!({"set": [1, 8472]}), json!({"range": [8000, 9000]})] {
            let text = ruleset("t", "input", "accept", &[json!([udp_port(port), {"drop": null}])]);
            let found = drops(&text, "", &subject());
            assert_eq!(found.len(), 1, "{text}");
            assert_eq!(found[0].fix, "nft delete rule ip t C handle 1");
        }
        let other =
            ruleset("t", "input", "accept", &[json!([udp_port(json!(53)), {"drop": null}])]);
        assert_eq!(drops(&other, "", &subject()), []);
    }

    #[test]
    fn a_forward_policy_counts_unless_pod_traffic_is_accepted() {
        let found = drops(&ruleset("filter", "forward", "drop", &[]), "", &subject());
        assert_eq!(found[0].place, "policy `drop` of the chain ip filter C");
        assert!(found[0].fix.contains("nft insert rule ip filter C ip saddr 10.244.0.0/16 accept"));

        let accept = json!([
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.244.0.0", "len": 16}}}},
            {"accept": null}
        ]);
        assert_eq!(drops(&ruleset("filter", "forward", "drop", &[accept]), "", &subject()), []);
        let established = json!([
            {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}}, {"accept": null}
        ]);
        assert_eq!(
            drops(&ruleset("filter", "forward", "drop", &[established]), "", &subject()).len(),
            1
        );
    }

    #[test]
    fn what_is_ours_and_what_is_narrower_than_our_traffic_is_no_finding() {
        let drop_all = [json!([{"drop": null}])];
        assert_eq!(
            drops(&ruleset("orch-underlay", "input", "accept", &drop_all), "", &subject()),
            []
        );
        assert_eq!(drops(&ruleset("t", "input", "accept", &drop_all), "", &subject()).len(), 1);
        let one_source = json!([
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "192.0.2.1"}},
            {"drop": null}
        ]);
        assert_eq!(drops(&ruleset("t", "forward", "accept", &[one_source]), "", &subject()), []);
        let accepted_before =
            [json!([udp_port(json!(8472)), {"accept": null}]), drop_all[0].clone()];
        assert_eq!(drops(&ruleset("t", "input", "accept", &accepted_before), "", &subject()), []);
    }

    #[test]
    fn iptables_of_the_old_kind_are_read_too() {
        let save = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n-A INPUT -p udp -m udp --dport 8472 -j DROP\nCOMMIT\n";
        let found = drops("", save, &subject());
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].place, "policy DROP of FORWARD in iptables-legacy");
        assert_eq!(found[1].fix, "iptables-legacy -D INPUT -p udp -m udp --dport 8472 -j DROP");
    }
}
