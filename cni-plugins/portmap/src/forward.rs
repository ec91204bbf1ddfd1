//! Forwards: what the kernel holds of mappings, and the steps to what it should hold. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cni_nftables::{COMMENT_MAX, Element, Target, Transaction};
use cni_spec::{AttachmentId, Error, NetworkName, Owner, code};
use ipnetwork::IpNetwork;

use crate::conf::{Mapping, Protocol, Settings};
use crate::rules::{CHAIN_ALL, subnet_chain};

/// The maps, from whose elements a forward is read back.
pub(crate) const MAPS: [&str; 4] = ["any4", "at4", "any6", "at6"];

/// Begins the comment of an element that has a twin for masquerading …
const WITH_SNAT: &str = "cni-snat:";
/// … and of one that has none.
const WITHOUT_SNAT: &str = "cni:";

/// Whose a forward is.
pub(crate) fn owner(network: &NetworkName, id: &AttachmentId) -> Owner {
    Owner::new(network, id, COMMENT_MAX - WITH_SNAT.len())
}

/// One port of the host that leads to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Forward {
    pub(crate) protocol: Protocol,
    /// `None` is every address of the family.
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) to: IpAddr,
    pub(crate) to_port: u16,
    /// Whether its connections may be masqueraded.
    pub(crate) snat: bool,
    pub(crate) owner: Owner,
}

/// Forwards of a table, and the containers' addresses in `pods4` and `pods6`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Present {
    pub(crate) forwards: Vec<Forward>,
    pub(crate) pods: BTreeSet<IpAddr>,
}

/// What to change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) remove: Vec<Forward>,
    pub(crate) remove_pods: Vec<IpAddr>,
    pub(crate) add: Vec<Forward>,
    /// Address and the chain that it leads to.
    pub(crate) add_pods: Vec<(IpAddr, String)>,
}

impl Forward {
    /// `None` if the element is not one that we have made.
    pub(crate) fn parse(set: &str, element: &Element) -> Option<Self> {
        let (snat, owner) = match element.comment.strip_prefix(WITH_SNAT) {
            Some(owner) => (true, owner),
            None => (false, element.comment.strip_prefix(WITHOUT_SNAT)?),
        };
        let Target::Value(value) = &element.target else { return None };
        let bytes = if set.ends_with('4') { 4 } else { 16 };
        let (host_ip, rest) = if set.starts_with("at") {
            (Some(parse_ip(element.key.get(..bytes)?)?), element.key.get(bytes..)?)
        } else {
            (None, element.key.as_slice())
        };
        Some(Self {
            protocol: Protocol(*rest.first()?),
            host_ip,
            host_port: parse_port(rest.get(4..)?)?,
            to: parse_ip(value.get(..bytes)?)?,
            to_port: parse_port(value.get(bytes..)?)?,
            snat,
            owner: Owner::of_comment(owner),
        })
    }

    fn set(&self) -> String {
        let kind = if self.host_ip.is_some() { "at" } else { "any" };
        format!("{kind}{}", digit(self.to))
    }

    fn key(&self) -> Vec<u8> {
        let mut key = self.host_ip.map(ip_bytes).unwrap_or_default();
        key.extend([self.protocol.0, 0, 0, 0]);
        key.extend(port_bytes(self.host_port));
        key
    }

    fn element(&self) -> Element {
        let mut value = ip_bytes(self.to);
        value.extend(port_bytes(self.to_port));
        let prefix = if self.snat { WITH_SNAT } else { WITHOUT_SNAT };
        let comment = format!("{prefix}{}", self.owner);
        Element { key: self.key(), target: Target::Value(value), comment }
    }

    /// Whether a packet could mean both.
    fn overlaps(&self, other: &Self) -> bool {
        let address = match (self.host_ip, other.host_ip) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        address
            && self.to.is_ipv4() == other.to.is_ipv4()
            && (self.protocol, self.host_port) == (other.protocol, other.host_port)
    }

    /// The host's side, for people.
    pub(crate) fn describe(&self) -> String {
        let host = match self.host_ip {
            Some(IpAddr::V4(ip)) => format!("{ip}:"),
            Some(IpAddr::V6(ip)) => format!("[{ip}]:"),
            None => String::new(),
        };
        format!("{host}{}/{}", self.host_port, self.protocol.name())
    }
}

fn digit(ip: IpAddr) -> char {
    if ip.is_ipv4() { '4' } else { '6' }
}

fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(crate) fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

fn port_bytes(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn parse_port(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|port| u16::from_be_bytes(*port))
}

/// What the mappings mean for a container with these addresses.
pub(crate) fn desired(
    mappings: &[Mapping],
    addresses: &[IpNetwork],
    settings: &Settings,
    owner: &Owner,
) -> Vec<Forward> {
    let mut forwards = Vec::new();
    for mapping in mappings {
        // An address of the host is of one family, and so is what leads there.
        let same =
            |ip: &&IpNetwork| mapping.host_ip.is_none_or(|host| host.is_ipv4() == ip.is_ipv4());
        for address in addresses.iter().filter(same) {
            forwards.push(Forward {
                protocol: mapping.protocol,
                host_ip: mapping.host_ip.filter(|ip| !ip.is_unspecified()),
                host_port: mapping.host_port,
                to: address.ip(),
                to_port: mapping.container_port,
                snat: settings.snat,
                owner: owner.clone(),
            });
        }
    }
    // `8080:80` says what `127.0.0.1:8080:80` beside it says, and more.
    let everywhere: Vec<Forward> =
        forwards.iter().filter(|forward| forward.host_ip.is_none()).cloned().collect();
    forwards.retain(|forward| {
        forward.host_ip.is_none()
            || !everywhere.contains(&Forward { host_ip: None, ..forward.clone() })
    });
    forwards
}

/// Steps of ADD. What is there of this attachment, or leads to an address that is this container's now, is what a
/// killed ADD or a container that went without DEL has left, and goes.
pub(crate) fn plan_add(
    present: &Present,
    want: &[Forward],
    addresses: &[IpNetwork],
    settings: &Settings,
    owner: &Owner,
) -> Result<Plan, Error> {
    for (index, forward) in want.iter().enumerate() {
        if want.iter().take(index).any(|before| before.overlaps(forward)) {
            return Err(Error::new(
                code::INVALID_CONFIG,
                format!("\"portMappings\" has the host port {} twice", forward.describe()),
            ));
        }
    }
    let is_stale = |forward: &&Forward| {
        forward.owner == *owner || addresses.iter().any(|address| address.ip() == forward.to)
    };
    let remove: Vec<Forward> = present.forwards.iter().filter(is_stale).cloned().collect();
    for other in present.forwards.iter().filter(|forward| !is_stale(forward)) {
        if let Some(forward) = want.iter().find(|forward| forward.overlaps(other)) {
            return Err(Error::new(
                code::HOST_PORT_TAKEN,
                format!(
                    "the host port {} is taken: {} leads to {} of {}",
                    forward.describe(),
                    other.describe(),
                    std::net::SocketAddr::new(other.to, other.to_port),
                    other.owner,
                ),
            ));
        }
    }
    let chain = |address: &IpNetwork| {
        if settings.masquerade_all { CHAIN_ALL.to_owned() } else { subnet_chain(address) }
    };
    let masqueraded = |address: &&IpNetwork| {
        want.iter().any(|forward| forward.snat && forward.to == address.ip())
    };
    let mut ips: BTreeSet<IpAddr> = remove.iter().map(|forward| forward.to).collect();
    ips.extend(addresses.iter().map(IpNetwork::ip));
    Ok(Plan {
        remove_pods: ips.into_iter().filter(|ip| present.pods.contains(ip)).collect(),
        add_pods: addresses
            .iter()
            .filter(masqueraded)
            .map(|address| (address.ip(), chain(address)))
            .collect(),
        remove,
        add: want.to_vec(),
    })
}

/// Steps of DEL and GC: what `is_gone` says goes, and containers to which nothing leads any more.
pub(crate) fn plan_remove(present: &Present, is_gone: impl Fn(&Forward) -> bool) -> Plan {
    let (remove, stay): (Vec<Forward>, Vec<Forward>) =
        present.forwards.iter().cloned().partition(is_gone);
    let used: BTreeSet<IpAddr> = stay.iter().map(|forward| forward.to).collect();
    let gone: BTreeSet<IpAddr> = remove.iter().map(|forward| forward.to).collect();
    let remove_pods =
        gone.difference(&used).filter(|ip| present.pods.contains(ip)).copied().collect();
    Plan { remove, remove_pods, ..Plan::default() }
}

impl Plan {
    /// As one transaction: first what goes, so that the same key may come again.
    pub(crate) fn write(&self, transaction: &mut Transaction) {
        let twin = |forward: &Forward| format!("snat_{}", forward.set());
        for forward in &self.remove {
            transaction.delete(&forward.set(), &forward.key());
            if forward.snat {
                transaction.delete(&twin(forward), &forward.key());
            }
        }
        for ip in &self.remove_pods {
            transaction.delete(&format!("pods{}", digit(*ip)), &ip_bytes(*ip));
        }
        for forward in &self.add {
            let element = forward.element();
            transaction.add(&forward.set(), &element);
            if forward.snat {
                transaction.add(&twin(forward), &Element { target: Target::None, ..element });
            }
        }
        for (ip, chain) in &self.add_pods {
            let target = Target::Jump(chain.clone());
            let element = Element { key: ip_bytes(*ip), target, comment: String::new() };
            transaction.add(&format!("pods{}", digit(*ip)), &element);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::NetConf;

    fn owner(id: &str) -> Owner {
        let (container_id, ifname) = (id.parse().expect("good"), "eth0".parse().expect("good"));
        super::owner(&"net".parse().expect("good"), &AttachmentId { container_id, ifname })
    }

    fn forward(host: &str, to: &str, id: &str) -> Forward {
        let (ip, port) = host.rsplit_once(':').expect("IP:PORT");
        let to: std::net::SocketAddr = to.parse().expect("good");
        Forward {
            protocol: Protocol::TCP,
            host_ip: Some(ip).filter(|ip| !ip.is_empty()).map(|ip| ip.parse().expect("good")),
            host_port: port.parse().expect("good"),
            to: to.ip(),
            to_port: to.port(),
            snat: true,
            owner: owner(id),
        }
    }

    fn add(present: &Present, want: &[Forward], address: &str, id: &str) -> Result<Plan, Error> {
        let settings = NetConf::default().settings().expect("good");
        plan_add(present, want, &[address.parse().expect("good")], &settings, &owner(id))
    }

    fn present(forwards: &[Forward]) -> Present {
        Present {
            forwards: forwards.to_vec(),
            pods: forwards.iter().map(|forward| forward.to).collect(),
        }
    }

    #[test]
    fn a_forward_reads_back_from_its_element() {
        for forward in [
            forward(":80", "10.1.0.2:8080", "a"),
            forward("192.0.2.1:80", "10.1.0.2:8080", "a"),
            forward(":80", "[fd00::2]:8080", "a"),
            Forward { snat: false, ..forward("2001:db8::1:80", "[fd00::2]:8080", "a") },
        ] {
            assert_eq!(Forward::parse(&forward.set(), &forward.element()), Some(forward));
        }
        let foreign =
            Element { comment: "mine".to_owned(), ..forward(":80", "10.1.0.2:1", "a").element() };
        assert_eq!(Forward::parse("any4", &foreign), None);
        assert_eq!(
            Forward::parse(
                "at6",
                &Element { key: vec![1], ..forward(":80", "10.1.0.2:1", "a").element() }
            ),
            None
        );
    }

    #[test]
    fn a_mapping_that_another_one_covers_is_none_of_its_own() {
        let conf = |mappings| -> NetConf {
            let conf = serde_json::json!({"runtimeConfig": {"portMappings": mappings}});
            serde_json::from_value(conf).expect("of the right types")
        };
        let narrow = serde_json::json!({"hostPort": 80, "containerPort": 1, "hostIP": "127.0.0.1"});
        let wide = serde_json::json!({"hostPort": 80, "containerPort": 1, "hostIP": "0.0.0.0"});
        let other = serde_json::json!({"hostPort": 81, "containerPort": 1, "hostIP": "127.0.0.1"});
        let conf = conf(serde_json::json!([narrow, wide, other]));
        let (settings, mappings) = (conf.settings().expect("good"), conf.mappings().expect("good"));
        let want =
            desired(&mappings, &["10.1.0.2/24".parse().expect("net")], &settings, &owner("a"));
        let hosts: Vec<String> = want.iter().map(Forward::describe).collect();
        assert_eq!(hosts, ["80/tcp", "127.0.0.1:81/tcp"]);
    }

    #[test]
    fn a_port_of_another_container_is_a_conflict_that_names_it() {
        let seen = present(&[forward(":80", "10.1.0.2:8080", "a")]);
        for host in [":80", "192.0.2.1:80"] {
            let want = [forward(host, "10.1.0.3:8080", "b")];
            let error = add(&seen, &want, "10.1.0.3/24", "b").expect_err("taken");
            assert_eq!(error.code, code::HOST_PORT_TAKEN);
            assert!(error.msg.contains("net/a/eth0") && error.msg.contains("80/tcp"), "{error}");
        }
        let at = present(&[forward("192.0.2.1:80", "10.1.0.2:8080", "a")]);
        let elsewhere = [forward("192.0.2.2:80", "10.1.0.3:8080", "b")];
        assert!(add(&at, &elsewhere, "10.1.0.3/24", "b").is_ok());
        let udp = [Forward { protocol: Protocol::UDP, ..forward(":80", "10.1.0.3:8080", "b") }];
        assert!(add(&seen, &udp, "10.1.0.3/24", "b").is_ok());
        assert!(add(&seen, &[forward(":80", "10.1.0.3:8080", "b")], "10.1.0.3/24", "b").is_err());
    }

    #[test]
    fn what_leads_to_the_containers_address_or_is_its_own_is_replaced() {
        // `gone` had the address before and went without DEL; `b` was killed in its first ADD.
        let seen = present(&[
            forward(":80", "10.1.0.3:80", "gone"),
            forward(":81", "10.1.0.9:81", "b"),
            forward(":82", "10.1.0.4:82", "c"),
        ]);
        let want = [forward(":80", "10.1.0.3:8080", "b")];
        let plan = add(&seen, &want, "10.1.0.3/24", "b").expect("no conflict");
        assert_eq!(plan.remove, seen.forwards[..2]);
        assert_eq!(plan.remove_pods.len(), 2);
        assert_eq!(plan.add, want);
        assert_eq!(
            plan.add_pods,
            [("10.1.0.3".parse().expect("good"), "from_10.1.0.0/24".to_owned())]
        );
    }

    #[test]
    fn removal_keeps_the_address_that_others_lead_to() {
        let seen = present(&[
            forward(":80", "10.1.0.2:80", "a"),
            forward(":81", "10.1.0.2:81", "b"),
            forward(":82", "10.1.0.4:82", "b"),
        ]);
        let plan = plan_remove(&seen, |forward| forward.owner == owner("b"));
        assert_eq!(plan.remove, seen.forwards[1..]);
        assert_eq!(plan.remove_pods, ["10.1.0.4".parse::<IpAddr>().expect("good")]);
        assert_eq!(plan_remove(&seen, |_| false), Plan::default());
    }

    #[test]
    fn a_port_twice_in_one_call_is_refused() {
        let want = [forward(":80", "10.1.0.2:1", "a"), forward(":80", "10.1.0.2:2", "a")];
        assert_eq!(
            add(&Present::default(), &want, "10.1.0.2/24", "a").expect_err("twice").code,
            code::INVALID_CONFIG
        );
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_an_element_of_any_bytes_is_read_or_skipped(
            key in prop::collection::vec(any::<u8>(), 0..40),
            value in prop::collection::vec(any::<u8>(), 0..40),
            rest in ".{0,20}",
        ) {
            let element = Element { key, target: Target::Value(value), comment: format!("cni:{rest}") };
            for map in MAPS {
                if let Some(forward) = Forward::parse(map, &element) {
                    prop_assert_eq!(Forward::parse(map, &forward.element()), Some(forward));
                }
            }
        }
    }
}
