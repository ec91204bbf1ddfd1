//! Links: bridges and their ports, veth pairs, VXLAN devices.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::address::parse_ip;
use crate::socket::{all_attributes, attribute, read_u16, read_u32, text};
use crate::{MacBytes, Netlink, NetlinkError};

const HEADER_BYTES: usize = 16;
const INDEX_AT: usize = 4;
const FLAGS_AT: usize = 8;
/// Longest name of a link, without the zero byte.
const NAME_MAX_BYTES: usize = 15;

// Attributes inside `IFLA_LINKINFO` and below (`linux/if_link.h`, `linux/if_bridge.h`).
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_PORT_DATA: u16 = 5;
const BRIDGE_VLAN_FILTERING: u16 = 7;
const PORT_STATE: u16 = 1;
const PORT_HAIRPIN: u16 = 4;
const PORT_ISOLATED: u16 = 33;
const PORT_STATE_FORWARDING: u8 = 3;
const VXLAN_ID: u16 = 1;
const VXLAN_LINK: u16 = 3;
const VXLAN_LOCAL: u16 = 4;
const VXLAN_LEARNING: u16 = 7;
const VXLAN_PORT: u16 = 15;
const VXLAN_LOCAL6: u16 = 17;
const BRIDGE_VLAN_INFO: u16 = 2;
// `linux/if_link.h`, `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_ARP_NOTIFY: u16 = 22;

/// A link as the kernel holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Index, unique in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// MAC; zeros where there is none.
    pub mac: MacBytes,
    /// MTU.
    pub mtu: u32,
    /// Whether it is switched on (`IFF_UP`).
    pub up: bool,
    /// Whether it could carry packets now: for a veth, whether both ends are up.
    pub carrier: bool,
    /// Whether somebody asked for all frames.
    pub promiscuous: bool,
    /// Whether it takes all multicast frames.
    pub all_multicast: bool,
    /// Packets that may wait at its way out.
    pub queue_length: u32,
    /// Index of the bridge, or other link, that it is a port of.
    pub master: Option<u32>,
    /// Index of the other end of a veth pair, or of the link below.
    pub peer: Option<u32>,
    /// Free text, up to 255 bytes.
    pub alias: Option<String>,
    /// Group that it was put into; 0 is the default one.
    pub group: u32,
    /// Set for the port of a bridge.
    pub port: Option<BridgePort>,
}

/// What a link is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge {
        /// Whether it looks at VLAN tags.
        vlan_filtering: bool,
    },
    /// One end of a veth pair.
    Veth,
    /// A VXLAN device.
    Vxlan(Vxlan),
    /// Another kind, by the kernel's name for it.
    Other(String),
    /// A physical link, or the loopback.
    #[default]
    Plain,
}

/// Attributes of a VXLAN device that are fixed at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Underlay address of this end.
    pub local: Option<IpAddr>,
    /// Index of the underlay's link.
    pub underlay_index: Option<u32>,
    /// Whether it learns from what it receives.
    pub learning: bool,
}

/// State of a bridge's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgePort {
    /// Whether frames pass now.
    pub forwarding: bool,
    /// Whether frames may leave by the port they came in.
    pub hairpin: bool,
    /// Whether it cannot talk to other isolated ports.
    pub isolated: bool,
}

/// A VLAN of a bridge's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortVlan {
    /// Identifier, 1 to 4094.
    pub id: u16,
    /// Frames that come in without a tag belong to it.
    pub pvid: bool,
    /// Its frames go out without a tag.
    pub untagged: bool,
}

impl PortVlan {
    /// The VLAN of an access port: tags stay inside the bridge.
    #[must_use]
    pub fn access(id: u16) -> Self {
        Self { id, pvid: true, untagged: true }
    }

    /// A VLAN of a trunk port.
    #[must_use]
    pub fn tagged(id: u16) -> Self {
        Self { id, pvid: false, untagged: false }
    }
}

/// A bridge to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bridge {
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: Option<u32>,
    /// MAC. One that is given stays; else a bridge takes the lowest of its ports, and changes with them.
    pub mac: Option<MacBytes>,
    /// Whether it looks at VLAN tags.
    pub vlan_filtering: bool,
    /// Switched on at once.
    pub up: bool,
}

/// A veth pair to make.
#[derive(Debug, Clone, Default)]
pub struct VethPair<'a> {
    /// Name of the near end.
    pub name: String,
    /// Name of the far end.
    pub peer_name: String,
    /// Namespace of the far end; `None` is this one.
    pub peer_netns: Option<BorrowedFd<'a>>,
    /// Index of the bridge that the near end is a port of.
    pub master: Option<u32>,
    /// MTU of both ends.
    pub mtu: Option<u32>,
    /// MAC of the near end.
    pub mac: Option<MacBytes>,
    /// MAC of the far end.
    pub peer_mac: Option<MacBytes>,
    /// Group of the near end: with it, unlike with an alias, the link is marked from its first moment on.
    pub group: Option<u32>,
    /// Near end switched on at once. The far end cannot be: the kernel answers `ENOTCONN`, its peer is not there yet.
    pub up: bool,
}

/// An intermediate functional block to make: what goes out by it comes in where it was redirected from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IfbDevice {
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: Option<u32>,
    /// Group.
    pub group: Option<u32>,
}

/// A VXLAN device to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Name.
    pub name: String,
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Underlay address of this end.
    pub local: Option<IpAddr>,
    /// Index of the underlay's link.
    pub underlay_index: Option<u32>,
    /// MAC; given at creation, so that udev has no time to choose one.
    pub mac: Option<MacBytes>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Whether it learns from what it receives. Always said, because the kernel's default is yes.
    pub learning: bool,
}

impl Netlink {
    /// The link of a name, or `None`.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        if name.is_empty() || name.len() > NAME_MAX_BYTES {
            return Ok(None);
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.get_link(message, || format!("get link {name}"))
    }

    /// The link of an index, or `None`.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn link_at(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        self.get_link(link_message(index), || format!("get link {index}"))
    }

    fn get_link(
        &self,
        mut message: LinkMessage,
        request: impl Fn() -> String,
    ) -> Result<Option<Link>, NetlinkError> {
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut link = None;
        let result = self.ask(RouteNetlinkMessage::GetLink(message), request, |payload| {
            link = Some(parse_link(payload).ok_or("a link without name")?);
            Ok(())
        });
        match result {
            Ok(()) => Ok(link),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.dump_links(None)
    }

    /// Ports of a bridge.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn ports(&self, bridge: u32) -> Result<Vec<Link>, NetlinkError> {
        self.dump_links(Some(bridge))
    }

    fn dump_links(&self, master: Option<u32>) -> Result<Vec<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        message.attributes.extend(master.map(LinkAttribute::Controller));
        let read = |payload: &[u8]| {
            let link = parse_link(payload).ok_or("a link without name")?;
            Ok(Some(link).filter(|link| master.is_none() || link.master == master))
        };
        self.dump(RouteNetlinkMessage::GetLink(message), || "list links".to_owned(), read)
    }

    /// Makes a bridge.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken.
    pub fn create_bridge(&self, bridge: &Bridge) -> Result<Link, NetlinkError> {
        let mut info = vec![LinkInfo::Kind(InfoKind::Bridge)];
        if bridge.vlan_filtering {
            info.push(LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(true)])));
        }
        let mut message = new_link_message(&bridge.name, bridge.mtu, bridge.mac, bridge.up);
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.create(message, &bridge.name, "bridge")
    }

    /// Makes a veth pair and returns its near end.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if one of the names is taken.
    pub fn create_veth(&self, pair: &VethPair<'_>) -> Result<Link, NetlinkError> {
        let mut peer = new_link_message(&pair.peer_name, pair.mtu, pair.peer_mac, false);
        peer.attributes
            .extend(pair.peer_netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd())));
        let mut message = new_link_message(&pair.name, pair.mtu, pair.mac, pair.up);
        message.attributes.extend(pair.master.map(LinkAttribute::Controller));
        message.attributes.extend(pair.group.map(LinkAttribute::Group));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.create(message, &pair.name, "veth pair")
    }

    /// Makes an intermediate functional block, switched on.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken.
    pub fn create_ifb(&self, device: &IfbDevice) -> Result<Link, NetlinkError> {
        let mut message = new_link_message(&device.name, device.mtu, None, true);
        message.attributes.extend(device.group.map(LinkAttribute::Group));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        self.create(message, &device.name, "IFB device")
    }

    /// Makes a VXLAN device.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken, or another device has the VNI on this port.
    pub fn create_vxlan(&self, device: &VxlanDevice) -> Result<Link, NetlinkError> {
        let mut data = vec![
            InfoVxlan::Id(device.vni),
            InfoVxlan::Port(device.port),
            InfoVxlan::Learning(device.learning),
        ];
        data.extend(device.underlay_index.map(InfoVxlan::Link));
        data.extend(device.local.map(|local| match local {
            IpAddr::V4(local) => InfoVxlan::Local(local),
            IpAddr::V6(local) => InfoVxlan::Local6(local),
        }));
        let mut message = new_link_message(&device.name, device.mtu, device.mac, false);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(data)),
        ]));
        self.create(message, &device.name, "VXLAN device")
    }

    fn create(&self, message: LinkMessage, name: &str, what: &str) -> Result<Link, NetlinkError> {
        let request = || format!("create {what} {name}");
        let master = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(master) => Some(*master),
            _ => None,
        });
        let mut made = None;
        // From 6.2 on the kernel says what it has made, if asked to: without that the question comes second, and
        // waits for whatever the new link has set in motion.
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        self.get(flags, RouteNetlinkMessage::NewLink(message), request, |payload| {
            made = parse_link(payload);
            Ok(())
        })?;
        if let Some(made) = made.filter(|made| made.name == name) {
            // It says so before it puts the link under its master.
            return Ok(Link { master, ..made });
        }
        self.link(name)?.ok_or_else(|| NetlinkError::Kernel {
            request: request(),
            errno: libc::ENODEV,
            message: Some("somebody removed it at once".to_owned()),
        })
    }

    /// Removes a link; one that is missing is removed already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_link(&self, index: u32) -> Result<(), NetlinkError> {
        let request = || format!("remove link {index}");
        match self.change(0, RouteNetlinkMessage::DelLink(link_message(index)), request) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }

    /// Switches a link on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_up(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_flags(index, LinkFlags::Up, true, "switch on")
    }

    /// Switches a link off. The kernel then forgets routes and permanent neighbours on it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_down(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_flags(index, LinkFlags::Up, false, "switch off")
    }

    /// Lets a link take all frames, or only its own.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_promiscuous(&self, index: u32, on: bool) -> Result<(), NetlinkError> {
        self.set_flags(index, LinkFlags::Promisc, on, "set promiscuous mode of")
    }

    /// Lets a link take all multicast frames, or only those of its groups.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_all_multicast(&self, index: u32, on: bool) -> Result<(), NetlinkError> {
        self.set_flags(index, LinkFlags::Allmulti, on, "set all-multicast mode of")
    }

    /// Sets how many packets may wait at the way out.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_queue_length(&self, index: u32, packets: u32) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::TxQueueLen(packets), "set queue length of")
    }

    fn set_flags(
        &self,
        index: u32,
        flag: LinkFlags,
        on: bool,
        verb: &str,
    ) -> Result<(), NetlinkError> {
        let message = flags_message(index, flag, on);
        self.change(0, RouteNetlinkMessage::SetLink(message), || format!("{verb} link {index}"))
    }

    /// Makes a link a port of a bridge; `None` takes it out.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_master(&self, index: u32, master: Option<u32>) -> Result<(), NetlinkError> {
        // Index 0 is "no master" to the kernel.
        self.set(index, LinkAttribute::Controller(master.unwrap_or(0)), "set master of")
    }

    /// Sets the MTU.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::Mtu(mtu), "set MTU of")
    }

    /// Sets the MAC. With the sysctls `arp_notify` and `ndisc_notify` on, the kernel then tells the neighbours, even if
    /// it is the MAC that the link had.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mac(&self, index: u32, mac: MacBytes) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::Address(mac.to_vec()), "set MAC of")
    }

    /// Sets the alias.
    ///
    /// # Errors
    /// If the kernel refuses, as it does beyond 255 bytes.
    pub fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        self.change(0, RouteNetlinkMessage::SetLink(alias_message(index, alias)), || {
            format!("set alias of link {index}")
        })
    }

    /// Renames a link.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken.
    pub fn set_name(&self, index: u32, name: &str) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::IfName(name.to_owned()), "rename")
    }

    fn set(&self, index: u32, attribute: LinkAttribute, verb: &str) -> Result<(), NetlinkError> {
        let mut message = link_message(index);
        message.attributes.push(attribute);
        self.change(0, RouteNetlinkMessage::SetLink(message), || format!("{verb} link {index}"))
    }

    /// Switches VLAN filtering of a bridge.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_vlan_filtering(&self, bridge: u32, on: bool) -> Result<(), NetlinkError> {
        let mut message = link_message(bridge);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(on)])),
        ]));
        let request = || format!("set VLAN filtering of bridge {bridge}");
        self.change(0, RouteNetlinkMessage::NewLink(message), request)
    }

    /// Sets hairpin mode and isolation of a bridge's port.
    ///
    /// # Errors
    /// If it is no port of a bridge.
    pub fn set_port(&self, index: u32, hairpin: bool, isolated: bool) -> Result<(), NetlinkError> {
        let mut message = link_message(index);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![
                InfoBridgePort::HairpinMode(hairpin),
                InfoBridgePort::Isolated(isolated),
            ])),
        ]));
        self.change(0, RouteNetlinkMessage::NewLink(message), || {
            format!("set up bridge port {index}")
        })
    }

    /// VLANs of a bridge's port.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn vlans(&self, index: u32) -> Result<Vec<PortVlan>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Brvlan]));
        let read = |payload: &[u8]| {
            if read_u32(payload, INDEX_AT) != Some(index) {
                return Ok(None);
            }
            Ok(Some(parse_vlans(payload)))
        };
        let request = || format!("list VLANs of link {index}");
        let found = self.dump(RouteNetlinkMessage::GetLink(message), request, read)?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Adds a VLAN to a bridge's port.
    ///
    /// # Errors
    /// If it is no port of a bridge.
    pub fn add_vlan(&self, index: u32, vlan: PortVlan) -> Result<(), NetlinkError> {
        let request = || format!("add VLAN {} to link {index}", vlan.id);
        self.change(0, RouteNetlinkMessage::SetLink(vlan_message(index, vlan)), request)
    }

    /// Removes a VLAN from a bridge's port; one that is missing is removed already.
    ///
    /// # Errors
    /// If it is no port of a bridge.
    pub fn delete_vlan(&self, index: u32, id: u16) -> Result<(), NetlinkError> {
        let request = || format!("remove VLAN {id} from link {index}");
        match self.change(
            0,
            RouteNetlinkMessage::DelLink(vlan_message(index, PortVlan::tagged(id))),
            request,
        ) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn flags_message(index: u32, flag: LinkFlags, on: bool) -> LinkMessage {
    let mut message = link_message(index);
    message.header.change_mask = flag;
    message.header.flags = if on { flag } else { LinkFlags::empty() };
    message
}

/// The message that switches a link on.
pub(crate) fn up_message(index: u32) -> LinkMessage {
    flags_message(index, LinkFlags::Up, true)
}

/// The message that sets a link's alias.
pub(crate) fn alias_message(index: u32, alias: &str) -> LinkMessage {
    let mut message = link_message(index);
    message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
    message
}

/// The message that sets `arp_notify` of a link. What is set is a list of numbered values, unlike what is read, which is
/// an array of all; so it is written by hand.
pub(crate) fn arp_notify_message(index: u32) -> LinkMessage {
    let value = nested(IPV4_DEVCONF_ARP_NOTIFY, &1_u32.to_ne_bytes());
    let family = nested(libc::AF_INET as u16, &nested(IFLA_INET_CONF, &value));
    let mut message = link_message(index);
    message.attributes.push(LinkAttribute::Other(DefaultNla::new(libc::IFLA_AF_SPEC, family)));
    message
}

/// One attribute; the length of its value is a multiple of four.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes
}

fn new_link_message(name: &str, mtu: Option<u32>, mac: Option<MacBytes>, up: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    if up {
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    }
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    message
}

fn vlan_message(index: u32, vlan: PortVlan) -> LinkMessage {
    let mut flags = BridgeVlanInfoFlags::empty();
    flags.set(BridgeVlanInfoFlags::Pvid, vlan.pvid);
    flags.set(BridgeVlanInfoFlags::Untagged, vlan.untagged);
    let info = BridgeVlanInfo { flags, vid: vlan.id };
    let mut message = link_message(index);
    message.header.interface_family = AddressFamily::Bridge;
    message.attributes.push(LinkAttribute::AfSpecBridge(vec![AfSpecBridge::VlanInfo(info)]));
    message
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let flags = LinkFlags::from_bits_retain(read_u32(payload, FLAGS_AT)?);
    let attributes = payload.get(HEADER_BYTES..)?;
    let number = |kind: u16| attribute(attributes, kind).and_then(|value| read_u32(value, 0));
    let info = attribute(attributes, libc::IFLA_LINKINFO).unwrap_or_default();
    let master = number(libc::IFLA_MASTER).filter(|master| *master != 0);
    Some(Link {
        index: read_u32(payload, INDEX_AT)?,
        name: attribute(attributes, libc::IFLA_IFNAME).and_then(text)?,
        kind: parse_kind(info),
        mac: attribute(attributes, libc::IFLA_ADDRESS)
            .and_then(|mac| mac.try_into().ok())
            .unwrap_or_default(),
        mtu: number(libc::IFLA_MTU).unwrap_or_default(),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        promiscuous: flags.contains(LinkFlags::Promisc),
        all_multicast: flags.contains(LinkFlags::Allmulti),
        queue_length: number(libc::IFLA_TXQLEN).unwrap_or_default(),
        master,
        peer: number(libc::IFLA_LINK).filter(|peer| *peer != 0),
        alias: attribute(attributes, libc::IFLA_IFALIAS).and_then(text),
        group: number(libc::IFLA_GROUP).unwrap_or_default(),
        port: attribute(info, INFO_PORT_DATA).filter(|_| master.is_some()).map(parse_port),
    })
}

fn byte(attributes: &[u8], kind: u16) -> Option<u8> {
    attribute(attributes, kind)?.first().copied()
}

fn parse_port(data: &[u8]) -> BridgePort {
    BridgePort {
        forwarding: byte(data, PORT_STATE) == Some(PORT_STATE_FORWARDING),
        hairpin: byte(data, PORT_HAIRPIN) == Some(1),
        isolated: byte(data, PORT_ISOLATED) == Some(1),
    }
}

fn parse_kind(info: &[u8]) -> LinkKind {
    let Some(kind) = attribute(info, INFO_KIND).and_then(text) else { return LinkKind::Plain };
    let data = attribute(info, INFO_DATA).unwrap_or_default();
    match kind.as_str() {
        "bridge" => {
            LinkKind::Bridge { vlan_filtering: byte(data, BRIDGE_VLAN_FILTERING) == Some(1) }
        }
        "veth" => LinkKind::Veth,
        "vxlan" => LinkKind::Vxlan(Vxlan {
            vni: attribute(data, VXLAN_ID).and_then(|vni| read_u32(vni, 0)).unwrap_or_default(),
            port: attribute(data, VXLAN_PORT)
                .and_then(|port| read_u16(port, 0))
                .map_or(0, u16::from_be),
            local: attribute(data, VXLAN_LOCAL)
                .or_else(|| attribute(data, VXLAN_LOCAL6))
                .and_then(parse_ip),
            underlay_index: attribute(data, VXLAN_LINK)
                .and_then(|link| read_u32(link, 0))
                .filter(|link| *link != 0),
            learning: byte(data, VXLAN_LEARNING) == Some(1),
        }),
        _ => LinkKind::Other(kind),
    }
}

fn parse_vlans(payload: &[u8]) -> Vec<PortVlan> {
    let attributes = payload.get(HEADER_BYTES..).unwrap_or_default();
    let spec = attribute(attributes, libc::IFLA_AF_SPEC).unwrap_or_default();
    let infos = all_attributes(spec).filter(|(kind, _)| *kind == BRIDGE_VLAN_INFO);
    let vlan = |info: &[u8]| {
        let flags = BridgeVlanInfoFlags::from_bits_retain(read_u16(info, 0)?);
        Some(PortVlan {
            id: read_u16(info, 2)?,
            pvid: flags.contains(BridgeVlanInfoFlags::Pvid),
            untagged: flags.contains(BridgeVlanInfoFlags::Untagged),
        })
    };
    infos.filter_map(|(_, info)| vlan(info)).collect()
}
