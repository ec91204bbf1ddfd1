//! Changing links, and removing them.

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::link_message;
use crate::{MacBytes, Netlink, NetlinkError};

// `linux/if_link.h`, `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_ARP_NOTIFY: u16 = 22;

impl Netlink {
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
        self.change(0, RouteNetlinkMessage::SetLink(mac_message(index, mac)), || {
            format!("set MAC of link {index}")
        })
    }

    /// Puts a link into a group; 0 is the default one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_group(&self, index: u32, group: u32) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::Group(group), "set group of")
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

/// The message that sets a link's MAC.
pub(crate) fn mac_message(index: u32, mac: MacBytes) -> LinkMessage {
    let mut message = link_message(index);
    message.attributes.push(LinkAttribute::Address(mac.to_vec()));
    message
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
