//! MAC spoof check: a port that is checked lets in frames of its pod's MAC only.

use cni_netlink::MacBytes;
use cni_nftables::{Nft, NftError};
use cni_spec::{Error, code};

use crate::name::mac_text;

const TABLE: &str = "bridge cni_spoofcheck";
/// Before everything else that looks at bridged frames.
const PRIORITY_FIRST: i32 = -300;

/// Checks a port.
pub(crate) fn guard(port: &str, mac: MacBytes) -> Result<(), Error> {
    apply(&guard_script(port, mac)).map_err(|error| failed(&error, "check a port for spoofed MACs"))
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
fn guard_script(port: &str, mac: MacBytes) -> String {
    let mac = mac_text(mac);
    format!(
        "add table {TABLE}\n\
         add map {TABLE} ports {{ type ifname : verdict; }}\n\
         add chain {TABLE} input {{ type filter hook prerouting priority {PRIORITY_FIRST}; policy accept; }}\n\
         flush chain {TABLE} input\n\
         add rule {TABLE} input iifname vmap @ports\n\
         add chain {TABLE} port_{port}\n\
         flush chain {TABLE} port_{port}\n\
         add rule {TABLE} port_{port} ether saddr != {mac} drop\n\
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
        let script = guard_script("veth0", [2, 0, 0, 0, 0, 0xa]);
        assert!(script.contains("port_veth0 ether saddr != 02:00:00:00:00:0a drop"), "{script}");
    }
}
