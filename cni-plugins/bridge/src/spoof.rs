//! MAC spoof check: a port that is checked lets in frames of its pod's MAC only.

use cni_netlink::{MacBytes, mac_text};
use std::collections::BTreeSet;

use cni_nftables::{Family, Nft, NftError, Table};
use cni_spec::{Error, NetworkName, code};

use crate::name::short;

const TABLE: &str = "bridge cni_spoofcheck";
const TABLE_NAME: &str = "cni_spoofcheck";
/// Begins the name of a port's chain.
const CHAIN: &str = "port_";
/// Before everything else that looks at bridged frames.
const PRIORITY_FIRST: i32 = -300;

/// Checks a port of a network.
pub(crate) fn guard(network: &NetworkName, port: &str, mac: MacBytes) -> Result<(), Error> {
    apply(&guard_script(network, port, mac))
        .map_err(|error| failed(&error, "check a port for spoofed MACs"))
}

/// Ports of a network that are checked, whether they still exist or not.
pub(crate) fn guarded(network: &NetworkName) -> Result<BTreeSet<String>, Error> {
    let listing = Nft::default()
        .listing(&Table::new(Family::Bridge, TABLE_NAME))
        .map_err(|error| failed(&error, "list the ports that are checked for spoofed MACs"))?;
    Ok(listing.map(|text| ports_of(&text, network)).unwrap_or_default())
}

/// Pure: the ports whose rule has the network's mark in its comment.
fn ports_of(listing: &str, network: &NetworkName) -> BTreeSet<String> {
    let mark = format!("comment \"{}\"", short(network.as_str()));
    let mut chain = None;
    let mut ports = BTreeSet::new();
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ") {
            chain = name.split(' ').next().and_then(|name| name.strip_prefix(CHAIN));
        } else if line.ends_with(&mark) {
            ports.extend(chain.map(ToOwned::to_owned));
        }
    }
    ports
}

/// Stops checking ports; ones that are not checked are fine.
pub(crate) fn release(ports: &[String]) -> Result<(), Error> {
    if ports.is_empty() {
        return Ok(());
    }
    apply(&release_script(ports))
        .map_err(|error| failed(&error, "stop checking a port for spoofed MACs"))
}

/// Whether a port is checked.
pub(crate) fn is_guarded(port: &str) -> Result<bool, Error> {
    // A rule that jumps to the chain of this port is only there while the chain is.
    match apply(&format!("list chain {TABLE} port_{port}\n")) {
        Ok(()) => Ok(true),
        Err(NftError::Refused { .. }) => Ok(false),
        Err(error) => Err(failed(&error, "look for the check of a port")),
    }
}

fn apply(script: &str) -> Result<(), NftError> {
    Nft::default().apply(script)
}

fn failed(error: &NftError, doing: &str) -> Error {
    Error::from_chain(code::INTERNAL, error).context(doing)
}

/// Repeated, it replaces the port's MAC.
fn guard_script(network: &NetworkName, port: &str, mac: MacBytes) -> String {
    let mac = mac_text(mac);
    let network = short(network.as_str());
    format!(
        "add table {TABLE}\n\
         add map {TABLE} ports {{ type ifname : verdict; }}\n\
         add chain {TABLE} input {{ type filter hook prerouting priority {PRIORITY_FIRST}; policy accept; }}\n\
         flush chain {TABLE} input\n\
         add rule {TABLE} input iifname vmap @ports\n\
         add chain {TABLE} port_{port}\n\
         flush chain {TABLE} port_{port}\n\
         add rule {TABLE} port_{port} ether saddr != {mac} drop comment \"{network}\"\n\
         add element {TABLE} ports {{ \"{port}\" : jump port_{port} }}\n"
    )
}

/// Adds before it removes, so that what is missing is no error.
fn release_script(ports: &[String]) -> String {
    let mut script =
        format!("add table {TABLE}\nadd map {TABLE} ports {{ type ifname : verdict; }}\n");
    for port in ports {
        script.push_str(&format!(
            "add chain {TABLE} port_{port}\n\
             add element {TABLE} ports {{ \"{port}\" : jump port_{port} }}\n\
             delete element {TABLE} ports {{ \"{port}\" }}\n\
             flush chain {TABLE} port_{port}\n\
             delete chain {TABLE} port_{port}\n"
        ));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_lets_in_its_own_mac_only() {
        let network = "net".parse().expect("good");
        let script = guard_script(&network, "veth0", [2, 0, 0, 0, 0, 0xa]);
        assert!(script.contains("port_veth0 ether saddr != 02:00:00:00:00:0a drop"), "{script}");
    }

    #[test]
    fn checked_ports_are_found_by_their_network() {
        let (net, other) = ("net".parse().expect("good"), "other".parse().expect("good"));
        let rule = |network| {
            format!("ether saddr != 02:00:00:00:00:0a drop comment \"{}\"", short(network))
        };
        let listing = format!(
            "table bridge {TABLE_NAME} {{\n\tchain input {{\n\t\tiifname vmap @ports\n\t}}\n\n\
             \tchain port_vetha {{\n\t\t{}\n\t}}\n\n\tchain port_vethb {{\n\t\t{}\n\t}}\n}}\n",
            rule("net"),
            rule("other")
        );
        assert_eq!(ports_of(&listing, &net), BTreeSet::from(["vetha".to_owned()]));
        assert_eq!(ports_of(&listing, &other), BTreeSet::from(["vethb".to_owned()]));
    }
}
