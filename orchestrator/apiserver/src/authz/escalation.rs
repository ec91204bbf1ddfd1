//! Nobody gives others more than they have themselves (Kubernetes, "Privilege escalation prevention and
//! bootstrapping"): pure comparison of rules.

use std::collections::{BTreeMap, BTreeSet};

use super::rbac::{Rule, resource_covers, url_covers};
use crate::auth::User;

/// One right: nothing in it can be split further.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Right<'a> {
    Resource { verb: &'a str, group: &'a str, resource: &'a str, name: Option<&'a str> },
    Url { verb: &'a str, url: &'a str },
}

fn rights(rule: &Rule) -> Vec<Right<'_>> {
    let mut all = Vec::new();
    for verb in &rule.verbs {
        all.extend(rule.urls.iter().map(|url| Right::Url { verb, url }));
        for group in &rule.api_groups {
            for resource in &rule.resources {
                let mut add = |name| all.push(Right::Resource { verb, group, resource, name });
                if rule.resource_names.is_empty() {
                    add(None);
                }
                rule.resource_names.iter().for_each(|name| add(Some(name.as_str())));
            }
        }
    }
    all
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|one| one == "*" || one == wanted)
}

fn covers(rule: &Rule, right: &Right<'_>) -> bool {
    match right {
        Right::Url { verb, url } => {
            has(&rule.verbs, verb) && rule.urls.iter().any(|pattern| url_covers(pattern, url))
        }
        Right::Resource { verb, group, resource, name } => {
            has(&rule.verbs, verb)
                && has(&rule.api_groups, group)
                && rule.resources.iter().any(|entry| resource_covers(entry, resource))
                && (rule.resource_names.is_empty()
                    || name.is_some_and(|name| rule.resource_names.iter().any(|one| one == name)))
        }
    }
}

/// What `wanted` gives and `held` does not have, one line each as upstream writes it; empty = all is held.
pub(super) fn missing(held: &[&Rule], wanted: &[Rule]) -> Vec<String> {
    // Verbs of the same thing stand together.
    let mut lacking: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for right in wanted.iter().flat_map(rights) {
        if held.iter().any(|rule| covers(rule, &right)) {
            continue;
        }
        let (what, verb) = match right {
            Right::Url { verb, url } => (format!("NonResourceURLs:[{url:?}]"), verb),
            Right::Resource { verb, group, resource, name } => {
                let names = name.map(|name| format!(", ResourceNames:[{name:?}]"));
                let names = names.unwrap_or_default();
                (format!("APIGroups:[{group:?}], Resources:[{resource:?}]{names}"), verb)
            }
        };
        let verbs = lacking.entry(what).or_default();
        if !verbs.contains(&verb) {
            verbs.push(verb);
        }
    }
    lacking.into_iter().map(|(what, verbs)| format!("{{{what}, Verbs:{}}}", list(&verbs))).collect()
}

/// Rules of `wanted` of which something is missing in `held`.
pub(super) fn uncovered(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    let lacks = |rule: &&Rule| {
        rights(rule).iter().any(|right| !held.iter().any(|held| covers(held, right)))
    };
    wanted.iter().filter(lacks).cloned().collect()
}

/// The reason that upstream gives.
pub(super) fn refusal(user: &User, missing: &[String]) -> String {
    let groups: Vec<&str> = user.groups.iter().map(String::as_str).collect();
    format!(
        "user {:?} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        list(&groups),
        missing.join("\n")
    )
}

/// As Go writes a list of texts.
fn list(texts: &[&str]) -> String {
    let quoted: Vec<String> = texts.iter().map(|text| format!("{text:?}")).collect();
    format!("[{}]", quoted.join(" "))
}

/// Rules without those that stand there already, in their order.
pub(super) fn distinct(rules: impl IntoIterator<Item = Rule>) -> Vec<Rule> {
    let mut seen = BTreeSet::new();
    rules.into_iter().filter(|rule| seen.insert(format!("{rule:?}"))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::rbac::tests::rule;
    use super::*;

    #[test]
    fn what_is_held_by_several_rules_together_may_be_given() {
        let held = [
            rule(
                json!({ "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "*/status"] }),
            ),
            rule(json!({ "verbs": ["*"], "apiGroups": ["apps"], "resources": ["*"] })),
            rule(
                json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["a", "b"] }),
            ),
            rule(json!({ "verbs": ["get"], "nonResourceURLs": ["/logs/*"] })),
        ];
        let held: Vec<&Rule> = held.iter().collect();
        for (wanted, expected) in [
            (json!({ "verbs": ["get"], "apiGroups": ["", "apps"], "resources": ["pods"] }), vec![]),
            (
                json!({ "verbs": ["list"], "apiGroups": [""], "resources": ["nodes/status"] }),
                vec![],
            ),
            (
                json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["b"] }),
                vec![],
            ),
            (json!({ "verbs": ["get"], "nonResourceURLs": ["/logs/x", "/logs/x/*"] }), vec![]),
            (
                json!({ "verbs": ["get", "delete", "watch"], "apiGroups": [""], "resources": ["pods"] }),
                vec![r#"{APIGroups:[""], Resources:["pods"], Verbs:["delete" "watch"]}"#],
            ),
            (
                json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"] }),
                vec![r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#],
            ),
            (
                json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["c"] }),
                vec![
                    r#"{APIGroups:[""], Resources:["secrets"], ResourceNames:["c"], Verbs:["get"]}"#,
                ],
            ),
            (
                json!({ "verbs": ["*"], "apiGroups": [""], "resources": ["pods"] }),
                vec![r#"{APIGroups:[""], Resources:["pods"], Verbs:["*"]}"#],
            ),
            (
                json!({ "verbs": ["get"], "apiGroups": ["*"], "resources": ["pods"] }),
                vec![r#"{APIGroups:["*"], Resources:["pods"], Verbs:["get"]}"#],
            ),
            (
                json!({ "verbs": ["get"], "nonResourceURLs": ["*"] }),
                vec![r#"{NonResourceURLs:["*"], Verbs:["get"]}"#],
            ),
        ] {
            assert_eq!(missing(&held, &[rule(wanted.clone())]), expected, "{wanted}");
        }
    }

    #[test]
    fn the_refusal_reads_as_upstreams() {
        let jane = User::new("jane", &["dev"]);
        let wanted = rule(json!({ "verbs": ["delete"], "apiGroups": [""], "resources": ["pods"] }));
        assert_eq!(
            refusal(&jane, &missing(&[], &[wanted])),
            "user \"jane\" (groups=[\"dev\" \"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\"]}"
        );
    }

    fn words(choice: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
        prop::sample::subsequence(choice, 1..=choice.len())
            .prop_map(|words| words.into_iter().map(str::to_owned).collect())
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let names = prop::sample::subsequence(&["x", "y"], 0..=2)
            .prop_map(|names| names.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let parts = (
            words(&["get", "list", "*"]),
            words(&["", "apps", "*"]),
            words(&["a", "a/s", "b", "*/s", "*"]),
            names,
        );
        parts.prop_map(|(verbs, api_groups, resources, resource_names)| Rule {
            verbs,
            api_groups,
            resources,
            resource_names,
            ..Rule::default()
        })
    }

    proptest! {
        /// If nothing is missing, whatever the new rules allow was allowed before.
        #[test]
        fn nothing_missing_means_nothing_new(held in prop::collection::vec(any_rule(), 0..4), wanted in prop::collection::vec(any_rule(), 1..3)) {
            let all: Vec<&Rule> = held.iter().collect();
            prop_assume!(missing(&all, &wanted).is_empty());
            let allows = |rules: &[Rule], verb: &str, group: &str, resource: &str, subresource: &str, name: &str| {
                use crate::authz::{Attributes, ResourceTarget};
                let target = ResourceTarget { group, resource, subresource, namespace: "n", name, field_selector: "" };
                rules.iter().any(|rule| rule.allows(&Attributes::resource(verb, target)))
            };
            for verb in ["get", "list", "watch"] {
                for group in ["", "apps", "x"] {
                    for (resource, subresource) in [("a", ""), ("a", "s"), ("b", ""), ("b", "s"), ("c", "t")] {
                        for name in ["", "x", "y", "z"] {
                            let new = allows(&wanted, verb, group, resource, subresource, name);
                            prop_assert!(!new || allows(&held, verb, group, resource, subresource, name));
                        }
                    }
                }
            }
        }
    }
}
