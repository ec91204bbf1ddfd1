//! Ports of bridges and their VLANs.

use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, LinkAttribute, LinkExtentMask, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{HEADER_BYTES, INDEX_AT, byte, link_message};
use crate::socket::{all_attributes, attribute, read_u16, read_u32};
use crate::{Netlink, NetlinkError};

// Attributes of a port inside `IFLA_LINKINFO`, and of its VLANs (`linux/if_link.h`, `linux/if_bridge.h`).
const PORT_STATE: u16 = 1;
const PORT_HAIRPIN: u16 = 4;
const PORT_ISOLATED: u16 = 33;
const PORT_STATE_FORWARDING: u8 = 3;
const BRIDGE_VLAN_INFO: u16 = 2;

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

impl Netlink {
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

pub(super) fn parse_port(data: &[u8]) -> BridgePort {
    BridgePort {
        forwarding: byte(data, PORT_STATE) == Some(PORT_STATE_FORWARDING),
        hairpin: byte(data, PORT_HAIRPIN) == Some(1),
        isolated: byte(data, PORT_ISOLATED) == Some(1),
    }
}

pub(crate) fn parse_vlans(payload: &[u8]) -> Vec<PortVlan> {
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
