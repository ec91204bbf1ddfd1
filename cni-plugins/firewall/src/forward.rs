//! The way through iptables' FORWARD, where Docker and others drop what they do not know.
//!
//! The table `filter` is iptables' own; `nft` writes into it what iptables can list: a chain of ours at the head of FORWARD,
//! which asks the administrator's chain and then accepts what is marked (`rules.rs`). Where there is no such table nothing
//! of it is made. The tables of `iptables-legacy` are out of nftables' reach.

use std::fs;

use cni_nftables::{Family, Netfilter, NetfilterError, Nft, Rule, Transaction, undisturbed};
use cni_spec::{Error, code};

use crate::pods::Pod;
use crate::rules::MARK;
use crate::table::failed;

const TABLE: &str = "filter";
const FORWARD: &str = "FORWARD";
/// Our chain in it.
const CHAIN: &str = "CNI-PODS";
const FAMILIES: [(Family, &str); 2] =
    [(Family::Ip, "/proc/net/ip_tables_names"), (Family::Ip6, "/proc/net/ip6_tables_names")];

/// What there is in the table of one family.
struct Seen {
    family: Family,
    forward: Vec<Rule>,
    /// `None` if there is no such chain.
    own: Option<Vec<Rule>>,
}

/// What is missing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Missing {
    jump: bool,
    admin: bool,
    accept: bool,
}

impl Missing {
    fn is_nothing(self) -> bool {
        !(self.jump || self.admin || self.accept)
    }
}

impl Seen {
    /// `None` if there is no chain FORWARD of iptables.
    fn read(netfilter: &Netfilter, family: Family) -> Result<Option<Self>, NetfilterError> {
        if !netfilter.has_chain(family, TABLE, FORWARD)? {
            return Ok(None);
        }
        let own = match netfilter.has_chain(family, TABLE, CHAIN)? {
            true => Some(netfilter.rules(family, TABLE, CHAIN)?),
            false => None,
        };
        Ok(Some(Self { family, forward: netfilter.rules(family, TABLE, FORWARD)?, own }))
    }

    fn jumps(&self) -> impl Iterator<Item = &Rule> {
        self.forward.iter().filter(|rule| leads_to(rule, CHAIN))
    }

    fn missing(&self, admin_chain: &str) -> Missing {
        let own = self.own.as_deref().unwrap_or_default();
        Missing {
            jump: self.jumps().next().is_none(),
            admin: !own.iter().any(|rule| leads_to(rule, admin_chain)),
            accept: !own.iter().any(|rule| rule.chain.is_none()),
        }
    }
}

fn leads_to(rule: &Rule, chain: &str) -> bool {
    rule.chain.as_deref() == Some(chain)
}

/// Pure. What is there stays where it is: our rule in front of those of others, the administrator's chain in front of ours.
fn script(family: Family, missing: Missing, admin_chain: &str) -> String {
    let mut script = format!("add chain {family} {TABLE} {CHAIN}\n");
    if missing.accept {
        script.push_str(&format!(
            "add rule {family} {TABLE} {CHAIN} meta mark and {MARK:#x} == {MARK:#x} counter accept \
             comment \"CNI firewall plugin rules\"\n"
        ));
    }
    if missing.admin {
        script.push_str(&format!(
            "add chain {family} {TABLE} {admin_chain}\n\
             insert rule {family} {TABLE} {CHAIN} counter jump {admin_chain} \
             comment \"CNI firewall plugin admin overrides\"\n"
        ));
    }
    if missing.jump {
        script.push_str(&format!(
            "insert rule {family} {TABLE} {FORWARD} counter jump {CHAIN} \
             comment \"CNI firewall plugin rules\"\n"
        ));
    }
    script
}

fn families(pods: &[Pod]) -> impl Iterator<Item = (Family, &'static str)> {
    let wanted = |family| pods.iter().any(|pod| pod.ip.is_ipv4() == (family == Family::Ip));
    FAMILIES.into_iter().filter(move |(family, _)| wanted(*family))
}

/// Makes the way for these addresses, where there is an iptables to pass.
pub(crate) fn ensure(netfilter: &Netfilter, pods: &[Pod], admin_chain: &str) -> Result<(), Error> {
    for (family, legacy) in families(pods) {
        if let Some(seen) = Seen::read(netfilter, family).map_err(|error| failed(&error))? {
            let missing = seen.missing(admin_chain);
            if !missing.is_nothing() {
                Nft::default().apply(&script(family, missing, admin_chain)).map_err(|error| {
                    let doing = format!("open the chain {FORWARD} of iptables");
                    Error::from_chain(code::INTERNAL, &error).context(doing)
                })?;
            }
        }
        if fs::read_to_string(legacy).is_ok_and(|tables| tables.lines().any(|name| name == TABLE)) {
            eprintln!(
                "firewall: iptables-legacy has rules, too, where nftables makes no way; if packets are dropped there: \
                 iptables-legacy -I {FORWARD} -m mark --mark {MARK:#x}/{MARK:#x} -j ACCEPT"
            );
        }
    }
    Ok(())
}

/// What is missing of the way, for people.
pub(crate) fn differences(
    netfilter: &Netfilter,
    pods: &[Pod],
    admin_chain: &str,
) -> Result<Vec<String>, Error> {
    let mut differences = Vec::new();
    for (family, _) in families(pods) {
        let seen = Seen::read(netfilter, family).map_err(|error| failed(&error))?;
        if seen.is_some_and(|seen| !seen.missing(admin_chain).is_nothing()) {
            differences.push(format!(
                "the chain {FORWARD} of table {family} {TABLE} has no way to {CHAIN}"
            ));
        }
    }
    Ok(differences)
}

/// Removes the way, and the administrators' chains that nobody has put a rule into.
pub(crate) fn remove(netfilter: &Netfilter) -> Result<(), Error> {
    for (family, _) in FAMILIES {
        let admin_chains = undisturbed(|| {
            let generation = netfilter.generation()?;
            let Some(seen) = Seen::read(netfilter, family)? else { return Ok(Vec::new()) };
            let mut transaction = Transaction::new(seen.family, TABLE, generation);
            for rule in seen.jumps() {
                transaction.delete_rule(FORWARD, rule.handle);
            }
            if seen.own.is_some() {
                transaction.delete_chain(CHAIN);
            }
            netfilter.commit(&transaction)?;
            Ok(seen.own.unwrap_or_default().into_iter().filter_map(|rule| rule.chain).collect())
        });
        for chain in admin_chains.map_err(|error| failed(&error))? {
            remove_if_unused(netfilter, family, &chain).map_err(|error| failed(&error))?;
        }
    }
    Ok(())
}

fn remove_if_unused(
    netfilter: &Netfilter,
    family: Family,
    chain: &str,
) -> Result<(), NetfilterError> {
    let generation = netfilter.generation()?;
    if !netfilter.rules(family, TABLE, chain)?.is_empty() {
        return Ok(());
    }
    let mut transaction = Transaction::new(family, TABLE, generation);
    transaction.delete_chain(chain);
    match netfilter.commit(&transaction) {
        // The reference's plugin has the same chain.
        Err(error) if error.is_outdated() => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(chain: Option<&str>) -> Rule {
        Rule { handle: 1, chain: chain.map(str::to_owned) }
    }

    #[test]
    fn only_what_is_missing_is_written_and_the_administrator_comes_first() {
        let seen = |forward: &[Rule], own: Option<&[Rule]>| Seen {
            family: Family::Ip,
            forward: forward.to_vec(),
            own: own.map(<[Rule]>::to_vec),
        };
        let jump = [rule(Some("DOCKER-USER")), rule(Some(CHAIN))];
        let whole = seen(&jump, Some(&[rule(Some("CNI-ADMIN")), rule(None)]));
        assert!(whole.missing("CNI-ADMIN").is_nothing());
        assert_eq!(whole.missing("OTHER"), Missing { jump: false, admin: true, accept: false });
        let none = seen(&[], None).missing("CNI-ADMIN");
        let lines = script(Family::Ip, none, "CNI-ADMIN");
        let rules: Vec<&str> = lines.lines().filter(|line| line.contains(" rule ")).collect();
        assert_eq!(rules.len(), 3);
        assert!(rules[0].starts_with("add rule ip filter CNI-PODS meta mark and 0x1000 == 0x1000"));
        assert!(rules[1].starts_with("insert rule ip filter CNI-PODS counter jump CNI-ADMIN"));
        assert!(rules[2].starts_with("insert rule ip filter FORWARD counter jump CNI-PODS"));
        let emptied = seen(&[], Some(&[rule(Some("CNI-ADMIN")), rule(None)])).missing("CNI-ADMIN");
        assert_eq!(emptied, Missing { jump: true, admin: false, accept: false });
    }
}
