//! When a pod's IPv6 addresses can be used.
//!
//! The kernel adds an address before it has joined the group in which neighbours ask for it: that, like duplicate address
//! detection, is left to a worker. On a busy host a pod that answers for ADD too early misses the first question, and whoever
//! asked asks again a second later.

use std::fs;
use std::net::Ipv6Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::kernel::KernelError;

/// Groups and addresses of the namespace that the thread is in.
const GROUPS: &str = "/proc/thread-self/net/igmp6";
const ADDRESSES: &str = "/proc/thread-self/net/if_inet6";
/// As the reference plugin. Detection takes up to two seconds, the rest less than a millisecond on an idle host.
const TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_micros(200);
const LAST_PAUSE: Duration = Duration::from_millis(20);
// `linux/if_addr.h`
const DAD_FAILED: u8 = 0x08;
const TENTATIVE: u8 = 0x40;

/// Waits until neighbours find these addresses of the pod's interface, and, where duplicates are detected, until there are
/// none. To be called in the pod's namespace.
pub(crate) fn wait(
    ifname: &str,
    ips: &[Ipv6Addr],
    detect_duplicates: bool,
) -> Result<(), KernelError> {
    let deadline = Instant::now() + TIMEOUT;
    let mut pause = FIRST_PAUSE;
    loop {
        // A kernel without these files has nothing to wait for.
        let Ok(groups) = fs::read_to_string(GROUPS) else { return Ok(()) };
        let mut settled = ips.iter().all(|ip| is_member(&groups, ifname, *ip));
        if detect_duplicates {
            let Ok(addresses) = fs::read_to_string(ADDRESSES) else { return Ok(()) };
            let states: Vec<(Ipv6Addr, u8)> = states(&addresses, ifname).collect();
            let failed =
                states.iter().find(|(ip, flags)| flags & DAD_FAILED != 0 && ips.contains(ip));
            if let Some((ip, _)) = failed {
                return Err(KernelError::Duplicate(*ip));
            }
            settled &= states.iter().all(|(_, flags)| flags & TENTATIVE == 0);
        }
        if settled {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(KernelError::Unsettled(ifname.to_owned()));
        }
        sleep(pause);
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Pure: whether the interface is in the solicited-node group of an address (RFC 4291 §2.7.1).
fn is_member(groups: &str, ifname: &str, ip: Ipv6Addr) -> bool {
    let [.., a, b, c] = ip.octets();
    let group = format!("ff0200000000000000000001ff{a:02x}{b:02x}{c:02x}");
    groups.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        words.next() == Some(ifname) && words.next() == Some(&group)
    })
}

/// Pure: addresses of the interface with their flags.
fn states<'a>(addresses: &'a str, ifname: &'a str) -> impl Iterator<Item = (Ipv6Addr, u8)> + 'a {
    addresses.lines().filter_map(move |line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [ip, _, _, _, flags, name] = words[..] else { return None };
        let ip = u128::from_str_radix(ip, 16).ok()?;
        (name == ifname).then_some((ip.into(), u8::from_str_radix(flags, 16).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_read() {
        let groups = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n\
                      2    eth0            ff0200000000000000000001ff000003     1 00000004 0\n";
        let ip = |text: &str| text.parse::<Ipv6Addr>().expect("an address");
        assert!(is_member(groups, "eth0", ip("fd88::3")));
        assert!(
            !is_member(groups, "eth0", ip("fd88::4")) && !is_member(groups, "eth1", ip("fd88::3"))
        );

        let addresses = "00000000000000000000000000000001 01 80 10 80       lo\n\
                         fd880000000000000000000000000003 02 40 00 c8     eth0\n\
                         nonsense\n";
        let found: Vec<_> = states(addresses, "eth0").collect();
        assert_eq!(found, [(ip("fd88::3"), 0xc8)]);
    }
}
