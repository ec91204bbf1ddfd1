//! The overlay's way through the firewall of others.
//!
//! Docker sets the policy of iptables' FORWARD to DROP, and other firewalls do the like. An `accept` in a table of our own
//! does not help: in nftables a packet passes only if every base chain of a hook lets it pass, so whoever drops wins. What
//! helps is an accept inside their chain. Docker leaves the chain DOCKER-USER to others, goes through it first, and
//! keeps it over its own restarts; without Docker the rule goes to the head of FORWARD itself, as flannel does it.
//!
//! Nothing is written where nothing drops. The rules are found again by their comment.

use std::fs;
use std::process::{Command, Stdio};

use ipnetwork::Ipv4Network;
use orch_config::FIREWALL_COMMENT as COMMENT;

const FORWARD: &str = "FORWARD";
const DOCKER_USER: &str = "DOCKER-USER";
/// Names of the tables of the old iptables in this network namespace.
const LEGACY_TABLES: &str = "/proc/self/net/ip_tables_names";

/// Why the way is not open.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The program is missing or could not be run.
    #[error("run {program}, to see whether a firewall drops the pod network's packets")]
    Run {
        /// The program.
        program: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It refused.
    #[error("{program} {arguments}: {message}")]
    Refused {
        /// The program.
        program: &'static str,
        /// Its arguments.
        arguments: String,
        /// Its words.
        message: String,
    },
}

/// One change of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Accept from (`-s`) or to (`-d`) this network, at the head of the chain.
    Insert(&'static str, &'static str, Ipv4Network),
    /// Remove a rule, given as `iptables -S` prints it, less its `-A`.
    Delete(String),
}

/// The steps, given the text of `iptables -S`. Pure.
#[must_use]
pub fn plan(rules: &str, cluster: Ipv4Network) -> Vec<Step> {
    let has = |line: &str| rules.lines().any(|rule| rule.trim() == line);
    let docker = has(&format!("-N {DOCKER_USER}"));
    // Rules with conditions are somebody's purpose; those without are a policy.
    let drops = has(&format!("-P {FORWARD} DROP"))
        || has(&format!("-A {FORWARD} -j DROP"))
        || rules.lines().any(|rule| rule.starts_with(&format!("-A {FORWARD} -j REJECT")));
    let chain = match (docker, drops) {
        (true, _) => Some(DOCKER_USER),
        (false, true) => Some(FORWARD),
        (false, false) => None,
    };
    let mine = |rule: &&str| rule.starts_with("-A ") && rule.contains(COMMENT);
    let right = |rule: &str| {
        chain.is_some_and(|chain| {
            ["-s", "-d"].iter().any(|side| rule == rule_text(chain, side, cluster))
        })
    };
    let mut steps: Vec<Step> = Vec::new();
    if let Some(chain) = chain {
        let missing = |side: &&&str| !has(&rule_text(chain, side, cluster));
        let sides: [&'static str; 2] = ["-s", "-d"];
        steps.extend(sides.iter().filter(missing).map(|side| Step::Insert(chain, side, cluster)));
    }
    let stale = rules.lines().map(str::trim).filter(mine).filter(|rule| !right(rule));
    steps.extend(stale.map(|rule| Step::Delete(rule["-A ".len()..].to_owned())));
    steps
}

/// As `iptables -S` prints it.
fn rule_text(chain: &str, side: &str, cluster: Ipv4Network) -> String {
    format!("-A {chain} {side} {cluster} -m comment --comment \"{COMMENT}\" -j ACCEPT")
}

/// Opens the way, in the namespace of the calling thread; says how many rules that took.
///
/// # Errors
/// If there is a firewall of iptables that cannot be read or written.
pub fn ensure(cluster: Ipv4Network) -> Result<usize, ForwardError> {
    let mut count = 0;
    if has_nft_filter() {
        count += ensure_with("iptables-nft", cluster)?;
    }
    let legacy = fs::read_to_string(LEGACY_TABLES).unwrap_or_default();
    if legacy.lines().any(|table| table == "filter") {
        count += ensure_with("iptables-legacy", cluster)?;
    }
    Ok(count)
}

/// Asked of the kernel, so that a node without iptables' tables costs no process.
fn has_nft_filter() -> bool {
    // A kernel that cannot be asked is asked by the tool, which then says why.
    cni_netlink::nft_ip_chain_exists("filter", FORWARD).unwrap_or(true)
}

fn ensure_with(program: &'static str, cluster: Ipv4Network) -> Result<usize, ForwardError> {
    let rules = run(program, &["-S".to_owned()])?;
    let steps = plan(&rules, cluster);
    for step in &steps {
        run(program, &arguments(step))?;
    }
    Ok(steps.len())
}

fn arguments(step: &Step) -> Vec<String> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    match step {
        Step::Insert(chain, side, cluster) => words(&[
            "-I",
            chain,
            side,
            &cluster.to_string(),
            "-m",
            "comment",
            "--comment",
            COMMENT,
            "-j",
            "ACCEPT",
        ]),
        Step::Delete(rule) => {
            // Only our comment is quoted.
            let mut arguments = vec!["-D".to_owned()];
            for (place, part) in rule.split('"').enumerate() {
                if place % 2 == 1 {
                    arguments.push(part.to_owned());
                } else {
                    arguments.extend(part.split_whitespace().map(str::to_owned));
                }
            }
            arguments
        }
    }
}

fn run(program: &'static str, arguments: &[String]) -> Result<String, ForwardError> {
    let output = Command::new(program)
        // Another program may hold the lock of iptables for a moment.
        .args(["-w", "5"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ForwardError::Run { program, source })?;
    if !output.status.success() {
        return Err(ForwardError::Refused {
            program,
            arguments: arguments.join(" "),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Ipv4Network {
        "10.244.0.0/16".parse().expect("CIDR")
    }

    #[test]
    fn rules_go_where_something_drops_and_into_dockers_own_chain_for_others() {
        let open = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n";
        assert_eq!(plan(open, cluster()), []);
        let closed = "-P FORWARD DROP\n";
        let inserted = |chain| {
            vec![Step::Insert(chain, "-s", cluster()), Step::Insert(chain, "-d", cluster())]
        };
        assert_eq!(plan(closed, cluster()), inserted("FORWARD"));
        assert_eq!(
            plan(
                "-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n",
                cluster()
            ),
            inserted("FORWARD")
        );
        let docker = "-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN\n";
        assert_eq!(plan(docker, cluster()), inserted("DOCKER-USER"));
    }

    #[test]
    fn our_rules_stay_and_those_of_another_network_or_place_go() {
        let mine = ["-s", "-d"].map(|side| rule_text("FORWARD", side, cluster())).join("\n");
        assert_eq!(plan(&format!("-P FORWARD DROP\n{mine}\n"), cluster()), []);
        let moved =
            plan(&format!("-P FORWARD DROP\n{mine}\n"), "10.5.0.0/16".parse().expect("CIDR"));
        assert_eq!(moved.len(), 4, "{moved:?}");
        let Step::Delete(rule) = &moved[2] else { panic!("{moved:?}") };
        assert_eq!(
            arguments(&Step::Delete(rule.clone())),
            [
                "-D",
                "FORWARD",
                "-s",
                "10.244.0.0/16",
                "-m",
                "comment",
                "--comment",
                COMMENT,
                "-j",
                "ACCEPT"
            ]
        );
        // Docker came later: the rules move to its chain.
        let docker = format!("-P FORWARD DROP\n-N DOCKER-USER\n{mine}\n");
        assert_eq!(plan(&docker, cluster()).len(), 4);
        // A firewall that opened up needs them no more.
        assert_eq!(plan(&format!("-P FORWARD ACCEPT\n{mine}\n"), cluster()).len(), 2);
    }
}
