//! From rules in order to rows: who speaks first about a port decides it.
//!
//! Each protocol's ports are painted tier by tier. Within a tier a rule paints what no rule before it has; what a rule
//! passes on is free again for the next tier. In the end nothing is left unpainted.

use std::collections::BTreeMap;

use crate::cluster::RuleAction;
use crate::spec::PortSpec;
use crate::table::{Ports, RuleId, Verdict, port_prefixes};
use crate::world::{PortName, Protocol};

/// When a rule is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    Admin,
    /// NetworkPolicies: the last word about what they isolate.
    Namespaced,
    Baseline,
}

/// One rule of a policy that selects an endpoint.
pub(crate) struct Rule<'a> {
    pub(crate) id: RuleId,
    pub(crate) stage: Stage,
    pub(crate) action: RuleAction,
    /// Its peer list in `compile`; `None`: everyone.
    pub(crate) list: Option<usize>,
    pub(crate) ports: Option<&'a [PortSpec]>,
}

/// Port names with what they mean at one pod.
pub(crate) type Named<'a> = (&'a PortName, &'a [u16]);

/// Rows of rules that all apply to a peer, in the order in which they are asked; `isolates` if a NetworkPolicy selects the
/// endpoint.
pub(crate) fn rows<'a>(
    rules: impl Iterator<Item = &'a Rule<'a>> + Clone,
    isolates: Option<RuleId>,
    names: &[Named<'_>],
) -> Vec<(Ports, Verdict)> {
    let of = |stage: Stage| rules.clone().filter(move |rule| rule.stage == stage);
    let mut canvas = Canvas::default();
    canvas.tier(of(Stage::Admin), names);
    let rest = if let Some(rule) = isolates {
        // All of them allow. One for every port is named before one for some.
        let namespaced = || of(Stage::Namespaced);
        canvas.tier(namespaced().filter(|rule| rule.ports.is_none()), names);
        canvas.tier(namespaced().filter(|rule| rule.ports.is_some()), names);
        Verdict { allow: false, rule }
    } else {
        canvas.tier(of(Stage::Baseline), names);
        Verdict { allow: true, rule: RuleId::NO_POLICY }
    };
    canvas.finish(rest)
}

/// Ports of the protocols, and all that is none of them as one port.
#[derive(Default)]
struct Canvas {
    protocols: [Steps; 3],
    others: Steps,
}

impl Canvas {
    fn tier<'a>(&mut self, rules: impl Iterator<Item = &'a Rule<'a>>, names: &[Named<'_>]) {
        for rule in rules {
            let verdict = match rule.action {
                RuleAction::Accept => Some(Verdict { allow: true, rule: rule.id }),
                RuleAction::Deny => Some(Verdict { allow: false, rule: rule.id }),
                RuleAction::Pass => None,
            };
            let Some(ports) = rule.ports else {
                self.everything(verdict);
                continue;
            };
            for port in ports {
                match port {
                    PortSpec::Range(protocol, first, last) => {
                        self.protocols[*protocol as usize].fill(*first, *last, verdict);
                    }
                    PortSpec::Named(name) => {
                        let numbers = names.iter().find(|(known, _)| *known == name);
                        for number in numbers.into_iter().flat_map(|(_, numbers)| numbers.iter()) {
                            self.protocols[name.protocol as usize].fill(*number, *number, verdict);
                        }
                    }
                }
            }
        }
        for steps in self.protocols.iter_mut().chain([&mut self.others]) {
            steps.0.retain(|_, (_, verdict)| verdict.is_some());
        }
    }

    fn everything(&mut self, verdict: Option<Verdict>) {
        for steps in &mut self.protocols {
            steps.fill(0, u16::MAX, verdict);
        }
        self.others.fill(0, 0, verdict);
    }

    /// `rest` decides what is left. The row for every packet says what other protocols get; longer matches say what
    /// differs from that.
    fn finish(mut self, rest: Verdict) -> Vec<(Ports, Verdict)> {
        self.everything(Some(rest));
        let others = self.others.merged().first().map_or(rest, |(_, _, verdict)| *verdict);
        let mut rows = vec![(Ports::ANY, others)];
        for (protocol, steps) in Protocol::ALL.into_iter().zip(&self.protocols) {
            for (first, last, verdict) in steps.merged() {
                if verdict == others {
                    continue;
                }
                rows.extend(
                    port_prefixes(first, last).into_iter().map(|(port, bits)| {
                        (Ports { protocol: Some(protocol), port, bits }, verdict)
                    }),
                );
            }
        }
        rows.sort_unstable();
        rows
    }
}

/// Ports of one protocol with what was said first about each: first port → last port and verdict.
#[derive(Default)]
struct Steps(BTreeMap<u16, (u16, Option<Verdict>)>);

impl Steps {
    /// Gives what is free of `first..=last` to the verdict.
    fn fill(&mut self, first: u16, last: u16, verdict: Option<Verdict>) {
        let mut at = u32::from(first);
        if let Some((_, (end, _))) = self.0.range(..=first).next_back() {
            at = at.max(u32::from(*end) + 1);
        }
        let taken: Vec<(u16, u16)> =
            self.0.range(first..=last).map(|(start, (end, _))| (*start, *end)).collect();
        let stop = (u32::from(last) + 1, u32::from(last));
        let taken = taken.into_iter().map(|(start, end)| (u32::from(start), u32::from(end)));
        for (start, end) in taken.chain(std::iter::once(stop)) {
            if at < start {
                let narrow = |port: u32| u16::try_from(port).expect("at most the last port");
                self.0.insert(narrow(at), (narrow(start - 1), verdict));
            }
            at = at.max(end + 1);
        }
    }

    /// Neighbours of one verdict joined.
    fn merged(&self) -> Vec<(u16, u16, Verdict)> {
        let mut all: Vec<(u16, u16, Verdict)> = Vec::new();
        let decided =
            self.0.iter().filter_map(|(first, (last, verdict))| Some((*first, *last, (*verdict)?)));
        for (first, last, verdict) in decided {
            match all.last_mut() {
                Some((_, end, own)) if *own == verdict && first == *end + 1 => *end = last,
                _ => all.push((first, last, verdict)),
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(id: u32, stage: Stage, action: RuleAction, ports: Option<&[PortSpec]>) -> Rule<'_> {
        Rule { id: RuleId(id), stage, action, list: None, ports }
    }

    fn at(rows: &[(Ports, Verdict)], port: u16) -> (bool, u32) {
        let rows = rows.iter().map(|(ports, verdict)| crate::Row {
            class: crate::Class::OUTSIDE,
            direction: crate::Direction::Ingress,
            ports: *ports,
            verdict: *verdict,
        });
        let table = crate::Table::new(rows.collect());
        let said = table.decide(crate::Direction::Ingress, crate::Class::OUTSIDE, 6, port);
        said.map(|verdict| (verdict.allow, verdict.rule.0)).expect("every packet has a row")
    }

    #[test]
    fn tiers_come_one_after_the_other_and_pass_skips_the_rest_of_one() {
        use RuleAction::{Accept, Deny, Pass};
        use Stage::{Admin, Baseline, Namespaced};
        let web = [PortSpec::Range(Protocol::Tcp, 80, 89)];
        let one = [PortSpec::Range(Protocol::Tcp, 85, 85)];
        let rules = [
            rule(1, Admin, Pass, Some(&one)),
            rule(2, Admin, Deny, Some(&web)),
            rule(3, Namespaced, Accept, Some(&one)),
            rule(4, Baseline, Pass, Some(&web)),
            rule(5, Baseline, Deny, None),
        ];
        let isolated = rows(rules.iter(), Some(RuleId(9)), &[]);
        let ports = [80, 85, 86, 90].map(|port| at(&isolated, port));
        assert_eq!(ports, [(false, 2), (true, 3), (false, 2), (false, 9)]);
        let open = rows(rules.iter().filter(|rule| rule.stage != Namespaced), None, &[]);
        let ports = [80, 85, 86, 90].map(|port| at(&open, port));
        assert_eq!(ports, [(false, 2), (true, 0), (false, 2), (false, 5)]);
    }
}
