//! Attributes of the container's interface.

use cni_netlink::{Link, MacBytes, Netlink, mac_text};
use cni_spec::{Error, IfName, code};

use crate::failed;

/// Attributes to set, or as they were; what is `None` is left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) mac: Option<MacBytes>,
    pub(crate) mtu: Option<u32>,
    pub(crate) promiscuous: Option<bool>,
    pub(crate) all_multicast: Option<bool>,
    pub(crate) queue_length: Option<u32>,
}

impl Attributes {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Those of a link that `asked` has, too.
    fn of(link: &Link, asked: &Self) -> Self {
        Self {
            mac: asked.mac.map(|_| link.mac),
            mtu: asked.mtu.map(|_| link.mtu),
            promiscuous: asked.promiscuous.map(|_| link.promiscuous),
            all_multicast: asked.all_multicast.map(|_| link.all_multicast),
            queue_length: asked.queue_length.map(|_| link.queue_length),
        }
    }

    /// These, and those of `other` where there are none.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self {
            mac: self.mac.or(other.mac),
            mtu: self.mtu.or(other.mtu),
            promiscuous: self.promiscuous.or(other.promiscuous),
            all_multicast: self.all_multicast.or(other.all_multicast),
            queue_length: self.queue_length.or(other.queue_length),
        }
    }

    /// In what `seen` differs, for people.
    pub(crate) fn differences(&self, seen: &Self, ifname: &str) -> Vec<String> {
        let texts = |of: &Self| {
            [
                ("MAC", of.mac.map(mac_text)),
                ("MTU", of.mtu.map(|mtu| mtu.to_string())),
                ("promiscuous mode", of.promiscuous.map(|on| on.to_string())),
                ("all-multicast mode", of.all_multicast.map(|on| on.to_string())),
                ("queue length", of.queue_length.map(|packets| packets.to_string())),
            ]
        };
        let pairs = texts(self).into_iter().zip(texts(seen));
        pairs
            .filter_map(|((what, want), (_, seen))| match (want, seen) {
                (Some(want), Some(seen)) if want != seen => {
                    Some(format!("the {what} of {ifname} is {seen} and not {want}"))
                }
                _ => None,
            })
            .collect()
    }
}

fn find(netlink: &Netlink, ifname: &IfName) -> Result<Option<Link>, Error> {
    netlink.link(ifname.as_str()).map_err(failed)
}

/// The attributes of `asked` as they are, in the namespace of the calling thread.
pub(crate) fn read(ifname: &IfName, asked: &Attributes) -> Result<Attributes, Error> {
    let netlink = Netlink::open().map_err(failed)?;
    let link = find(&netlink, ifname)?.ok_or_else(|| {
        Error::new(code::INVALID_CONFIG, format!("the container has no interface {ifname}"))
    })?;
    Ok(Attributes::of(&link, asked))
}

/// Sets them, in the namespace of the calling thread; what is so already is left, and so is a link that is gone.
pub(crate) fn write(ifname: &IfName, want: &Attributes) -> Result<(), Error> {
    if want.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open().map_err(failed)?;
    let Some(link) = find(&netlink, ifname)? else { return Ok(()) };
    let (index, seen) = (link.index, Attributes::of(&link, want));
    let mut outcomes = Vec::new();
    if let Some(mtu) = want.mtu.filter(|_| want.mtu != seen.mtu) {
        outcomes.push(netlink.set_mtu(index, mtu));
    }
    if let Some(mac) = want.mac.filter(|_| want.mac != seen.mac) {
        outcomes.push(netlink.set_mac(index, mac));
    }
    if let Some(on) = want.promiscuous.filter(|_| want.promiscuous != seen.promiscuous) {
        outcomes.push(netlink.set_promiscuous(index, on));
    }
    if let Some(on) = want.all_multicast.filter(|_| want.all_multicast != seen.all_multicast) {
        outcomes.push(netlink.set_all_multicast(index, on));
    }
    if let Some(packets) = want.queue_length.filter(|_| want.queue_length != seen.queue_length) {
        outcomes.push(netlink.set_queue_length(index, packets));
    }
    let failures = outcomes.into_iter().filter_map(Result::err).map(failed).collect();
    Error::join(failures).map_or(Ok(()), Err)
}
