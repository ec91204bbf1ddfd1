//! The table in the kernel: observed, and changed.

use cni_nftables::{Family, Netfilter, NetfilterError, Nft, Transaction, undisturbed};
use cni_spec::{Error, code};

use crate::pods::{
    BRIDGES, Bridges, PODS, Plan, Pod, Present, SAME, parse_name, plan_add, plan_remove,
};
use crate::rules::{RULE_COUNTS, TABLE, script};

/// How often the rules are written because others took them away before an element was added.
const RULE_ATTEMPTS: u32 = 10;
/// The chain that is written last.
const LAST_CHAIN: &str = "unmark_pods";

/// The table of this namespace.
pub(crate) struct Table {
    netfilter: Netfilter,
}

pub(crate) fn failed(error: &NetfilterError) -> Error {
    let code = if error.is_outdated() { code::TRY_AGAIN } else { code::INTERNAL };
    Error::from_chain(code, error)
}

impl Table {
    pub(crate) fn open() -> Result<Self, Error> {
        Ok(Self { netfilter: Netfilter::open().map_err(|error| failed(&error))? })
    }

    pub(crate) fn netfilter(&self) -> &Netfilter {
        &self.netfilter
    }

    /// Whether nftables answers.
    pub(crate) fn probe(&self) -> Result<(), NetfilterError> {
        self.netfilter.generation().map(drop)
    }

    /// Makes the rules where they are missing, and the container's elements.
    pub(crate) fn add(&self, want: &[Pod]) -> Result<(), Error> {
        for _ in 0..RULE_ATTEMPTS {
            let attempt = || {
                let generation = self.netfilter.generation()?;
                if !self.netfilter.has_chain(Family::Inet, TABLE, LAST_CHAIN)? {
                    return Ok(false);
                }
                self.commit(&plan_add(&self.observe()?, want), generation)?;
                Ok(true)
            };
            if undisturbed(attempt).map_err(|error| failed(&error))? {
                return Ok(());
            }
            Nft::default().apply(&script()).map_err(|error| {
                Error::from_chain(code::INTERNAL, &error).context("write the rules of the firewall")
            })?;
        }
        Err(Error::new(
            code::TRY_AGAIN,
            "the nftables rules of the firewall vanish again and again",
        ))
    }

    /// Removes the elements that `is_gone` says; with `drop_empty` the last one takes the table with it, rules and all.
    /// Returns whether the table is gone.
    pub(crate) fn remove(
        &self,
        is_gone: impl Fn(&Pod) -> bool,
        drop_empty: bool,
    ) -> Result<bool, Error> {
        let attempt = || {
            let generation = self.netfilter.generation()?;
            let present = match self.observe() {
                Err(error) if error.is_missing() => return Ok(true),
                present => present?,
            };
            let plan = plan_remove(&present, &is_gone);
            let drops = drop_empty && plan.remove.len() == present.pods.len();
            if drops {
                let mut transaction = Transaction::new(Family::Inet, TABLE, generation);
                transaction.delete_table();
                self.netfilter.commit(&transaction)?;
            } else {
                self.commit(&plan, generation)?;
            }
            Ok(drops)
        };
        undisturbed(attempt).map_err(|error| failed(&error))
    }

    /// What is missing, for people.
    pub(crate) fn differences(&self, want: &[Pod]) -> Result<Vec<String>, Error> {
        let present = match self.observe() {
            Err(error) if error.is_missing() => {
                return Ok(vec![format!("nftables has no table inet {TABLE}")]);
            }
            present => present.map_err(|error| failed(&error))?,
        };
        let missing = want.iter().filter(|pod| !present.pods.contains(pod));
        let mut differences: Vec<String> = missing
            .map(|pod| format!("the address {} is not let through as it should be", pod.ip))
            .collect();
        if present.bridges != Bridges::of(present.pods.iter()) {
            differences.push("other bridges are confined than those of the containers".to_owned());
        }
        let rules =
            self.netfilter.rule_chains(Family::Inet, TABLE).map_err(|error| failed(&error))?;
        for (chain, count) in RULE_COUNTS {
            if rules.iter().filter(|rule| rule == chain).count() < *count {
                differences
                    .push(format!("rules are missing in chain {chain} of table inet {TABLE}"));
            }
        }
        Ok(differences)
    }

    fn commit(&self, plan: &Plan, generation: u32) -> Result<(), NetfilterError> {
        let mut transaction = Transaction::new(Family::Inet, TABLE, generation);
        plan.write(&mut transaction);
        self.netfilter.commit(&transaction)
    }

    fn observe(&self) -> Result<Present, NetfilterError> {
        let mut present = Present::default();
        for set in PODS {
            let elements = self.netfilter.elements(Family::Inet, TABLE, set)?;
            present.pods.extend(elements.iter().filter_map(Pod::parse));
        }
        for (set, names) in
            [(BRIDGES, &mut present.bridges.confined), (SAME, &mut present.bridges.same)]
        {
            let elements = self.netfilter.elements(Family::Inet, TABLE, set)?;
            names.extend(elements.iter().filter_map(|element| parse_name(&element.key)));
        }
        Ok(present)
    }
}
