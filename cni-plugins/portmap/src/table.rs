//! The tables in the kernel: observed, and changed.

use std::net::IpAddr;

use cni_nftables::{
    Family, Flows, Netfilter, NetfilterError, Nft, NftError, Transaction, forget_flows, undisturbed,
};
use cni_spec::{Error, Owner, code};
use ipnetwork::IpNetwork;

use crate::conf::{Protocol, RuleOptions, Settings};
use crate::forward::{Forward, MAPS, Plan, Present, parse_ip, plan_add, plan_remove};
use crate::rules::{CHAIN_ALL, RULE_COUNTS, TABLE_PREFIX, script, subnet_chain, table_name};

/// How often the rules are written because others took them away before an element was added.
const RULE_ATTEMPTS: u32 = 10;

/// The tables of this namespace.
pub(crate) struct Tables {
    netfilter: Netfilter,
}

pub(crate) fn failed(error: &NetfilterError) -> Error {
    let code = if error.is_outdated() { code::TRY_AGAIN } else { code::INTERNAL };
    Error::from_chain(code, error)
}

impl Tables {
    pub(crate) fn open() -> Result<Self, Error> {
        Ok(Self { netfilter: Netfilter::open().map_err(|error| failed(&error))? })
    }

    /// Whether nftables answers.
    pub(crate) fn probe(&self) -> Result<(), NetfilterError> {
        self.netfilter.generation().map(drop)
    }

    /// Makes the rules where they are missing, and the forwards.
    pub(crate) fn add(
        &self,
        want: &[Forward],
        addresses: &[IpNetwork],
        settings: &Settings,
        owner: &Owner,
    ) -> Result<(), Error> {
        let table = table_name(&settings.options);
        let chains: Vec<String> = if settings.masquerade_all {
            vec![CHAIN_ALL.to_owned()]
        } else {
            addresses.iter().map(subnet_chain).collect()
        };
        let subnets = if settings.masquerade_all { &[] } else { addresses };
        let plan = self.retry(
            || {
                let generation = self.netfilter.generation()?;
                for chain in &chains {
                    if !self.netfilter.has_chain(Family::Inet, &table, chain)? {
                        return Ok(Attempt::Rules);
                    }
                }
                let plan = match plan_add(&self.observe(&table)?, want, addresses, settings, owner)
                {
                    Ok(plan) => plan,
                    Err(error) => return Ok(Attempt::Refused(error)),
                };
                let mut transaction = Transaction::new(Family::Inet, &table, generation);
                plan.write(&mut transaction);
                self.netfilter.commit(&transaction)?;
                Ok(Attempt::Done(plan))
            },
            || write_rules(&table, &settings.options, subnets),
        )?;
        forget(plan.remove.iter().chain(&plan.add));
        Ok(())
    }

    /// Removes the forwards that `is_gone` says, from all tables; the last one takes its table with it, rules and all.
    pub(crate) fn remove(
        &self,
        is_gone: impl Fn(&Forward) -> bool,
        drop_empty: bool,
    ) -> Result<(), Error> {
        let tables = self.netfilter.tables(Family::Inet).map_err(|error| failed(&error))?;
        for table in tables.iter().filter(|name| name.starts_with(TABLE_PREFIX)) {
            let plan = self.retry(
                || {
                    let generation = self.netfilter.generation()?;
                    let present = match self.observe(table) {
                        // Somebody else was first.
                        Err(error) if error.is_missing() => {
                            return Ok(Attempt::Done(Plan::default()));
                        }
                        present => present?,
                    };
                    let plan = plan_remove(&present, &is_gone);
                    let mut transaction = Transaction::new(Family::Inet, table, generation);
                    if drop_empty && plan.remove.len() == present.forwards.len() {
                        transaction.delete_table();
                    } else {
                        plan.write(&mut transaction);
                    }
                    self.netfilter.commit(&transaction)?;
                    Ok(Attempt::Done(plan))
                },
                || Ok(()),
            )?;
            forget(plan.remove.iter());
        }
        Ok(())
    }

    /// What is missing of the forwards and the rules, for people.
    pub(crate) fn differences(
        &self,
        want: &[Forward],
        addresses: &[IpNetwork],
        settings: &Settings,
    ) -> Result<Vec<String>, Error> {
        let table = table_name(&settings.options);
        let present = match self.observe(&table) {
            Err(error) if error.is_missing() => {
                return Ok(vec![format!("nftables has no table inet {table}")]);
            }
            present => present.map_err(|error| failed(&error))?,
        };
        let mut missing = Vec::new();
        for forward in want.iter().filter(|forward| !present.forwards.contains(forward)) {
            missing.push(format!("the host port {} is not forwarded", forward.describe()));
        }
        let rules =
            self.netfilter.rule_chains(Family::Inet, &table).map_err(|error| failed(&error))?;
        let subnets: Vec<(String, usize)> =
            addresses.iter().map(|address| (subnet_chain(address), 1)).collect();
        let base = RULE_COUNTS.iter().map(|(chain, count)| ((*chain).to_owned(), *count));
        let needed = base.chain(subnets.into_iter().filter(|_| !settings.masquerade_all));
        for (chain, count) in needed {
            if rules.iter().filter(|rule| **rule == chain).count() < count {
                missing.push(format!("rules are missing in chain {chain} of table inet {table}"));
            }
        }
        let masqueraded = addresses.iter().filter(|address| {
            want.iter().any(|forward| forward.snat && forward.to == address.ip())
        });
        for address in masqueraded.filter(|address| !present.pods.contains(&address.ip())) {
            missing.push(format!("nothing masquerades forwarded connections to {}", address.ip()));
        }
        Ok(missing)
    }

    fn observe(&self, table: &str) -> Result<Present, NetfilterError> {
        let mut present = Present::default();
        for map in MAPS {
            let elements = self.netfilter.elements(Family::Inet, table, map)?;
            present.forwards.extend(elements.iter().filter_map(|one| Forward::parse(map, one)));
        }
        for pods in ["pods4", "pods6"] {
            let elements = self.netfilter.elements(Family::Inet, table, pods)?;
            present.pods.extend(elements.iter().filter_map(|one| parse_ip(&one.key)));
        }
        Ok(present)
    }

    /// Looks and steps until nobody was in between and no rules are missing.
    fn retry(
        &self,
        attempt: impl Fn() -> Result<Attempt, NetfilterError>,
        write_rules: impl Fn() -> Result<(), Error>,
    ) -> Result<Plan, Error> {
        for _ in 0..RULE_ATTEMPTS {
            match undisturbed(&attempt).map_err(|error| failed(&error))? {
                Attempt::Done(plan) => return Ok(plan),
                Attempt::Refused(error) => return Err(error),
                Attempt::Rules => write_rules()?,
            }
        }
        Err(Error::new(code::TRY_AGAIN, "the nftables rules for host ports vanish again and again"))
    }
}

/// What came of one look.
enum Attempt {
    Done(Plan),
    Refused(Error),
    /// Rules are missing.
    Rules,
}

fn write_rules(table: &str, options: &RuleOptions, subnets: &[IpNetwork]) -> Result<(), Error> {
    Nft::default().apply(&script(table, options, subnets)).map_err(|error| {
        let conditions = !options.conditions_v4.is_empty() || !options.conditions_v6.is_empty();
        let code = match &error {
            NftError::Refused { .. } if conditions => code::INVALID_CONFIG,
            _ => code::INTERNAL,
        };
        let context = if code == code::INVALID_CONFIG {
            "\"conditionsV4\", \"conditionsV6\""
        } else {
            "write the rules for host ports"
        };
        Error::from_chain(code, &error).context(context)
    })
}

fn flows_to(forward: &Forward) -> Flows {
    let any = match forward.to {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    Flows::To {
        protocol: forward.protocol.0,
        address: forward.host_ip.unwrap_or(any),
        port: forward.host_port,
    }
}

/// Makes conntrack forget what it has decided about the datagrams of these forwards. A UDP client never begins anew, so
/// its flow would lead to the former place for as long as it is busy; a TCP client does, and the look at conntrack's table
/// takes milliseconds. A flow that goes on as before is a nuisance to one client; a pod that does not start is worse.
fn forget<'a>(forwards: impl Iterator<Item = &'a Forward>) {
    let datagrams = forwards.filter(|forward| forward.protocol == Protocol::UDP);
    let flows: Vec<Flows> = datagrams.map(flows_to).collect();
    if let Err(error) = forget_flows(&flows) {
        eprintln!("portmap: make conntrack forget former flows: {error}");
    }
}
