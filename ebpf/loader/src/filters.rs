//! Programs as filters of a `clsact` qdisc, on kernels that have no TCX links (before 6.6). A filter has no pin: it lives as
//! long as its link does, so what is there is asked of the kernel (rtnetlink, `RTM_GETTFILTER`).

use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, OwnedFd};

use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::{Error, Hook};

/// First, so that nobody before us can end the chain.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
/// Of `linux/pkt_sched.h`: the two hooks of a clsact qdisc.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
const TYPE_MASK: u16 = 0x3fff;
/// `nlmsghdr` and `tcmsg`.
const HEADER: usize = 16;
const TC_HEADER: usize = 20;
/// The kernel sends no longer parts of a dump.
const PART: usize = 32 << 10;

/// A filter that runs a program of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Filter {
    priority: u16,
    handle: u32,
    /// Of the program.
    id: u32,
}

/// Makes the link run `program` at the hook: in place of a former one, without a packet in between, or beside the filters of
/// others.
pub(crate) fn attach(
    program: &mut SchedClassifier,
    ifname: &str,
    ifindex: u32,
    hook: Hook,
) -> Result<(), Error> {
    let name = hook.program();
    match tc::qdisc_add_clsact(ifname) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {
        }
        Err(error) => return Err(Error::program("make the qdisc for", name)(error.into())),
    }
    let id = program.info().map_err(Error::program("look at", name))?.id();
    if let Some(have) = find(ifindex, hook)? {
        return if have.id == id { Ok(()) } else { replace(program, ifname, hook, have) };
    }
    let at =
        |handle| TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle, classid: None });
    let made = program.attach_with_options(ifname, hook.direction(), at(HANDLE)).or_else(|_| {
        // Somebody else's is there; the kernel finds a place beside it.
        program.attach_with_options(ifname, hook.direction(), at(TcHandle::from(0)))
    });
    let link = program
        .take_link(made.map_err(Error::program("attach", name))?)
        .map_err(Error::program("keep the link of", name))?;
    // Dropped, it would be detached.
    mem::forget(link);
    Ok(())
}

fn replace(
    program: &mut SchedClassifier,
    ifname: &str,
    hook: Hook,
    have: Filter,
) -> Result<(), Error> {
    let name = hook.program();
    let handle = TcHandle::from(have.handle);
    let link = SchedClassifierLink::attached(ifname, hook.direction(), have.priority, handle, None)
        .map_err(|error| Error::program("find the filter of", name)(TcError::from(error).into()))?;
    let id = program.attach_to_link(link).map_err(Error::program("replace", name))?;
    let link = program.take_link(id).map_err(Error::program("keep the link of", name))?;
    mem::forget(link);
    Ok(())
}

/// Whether the link runs the program of this number at the hook.
pub(crate) fn is_attached(ifindex: u32, hook: Hook, id: u32) -> Result<bool, Error> {
    Ok(find(ifindex, hook)?.is_some_and(|filter| filter.id == id))
}

/// Changes every link of the namespace that has a former program of the hook over to `program`.
pub(crate) fn upgrade(program: &mut SchedClassifier, hook: Hook) -> Result<(), Error> {
    let name = hook.program();
    let id = program.info().map_err(Error::program("look at", name))?.id();
    for (ifindex, ifname) in links() {
        if let Some(have) = find(ifindex, hook)?
            && have.id != id
        {
            replace(program, &ifname, hook, have)?;
        }
    }
    Ok(())
}

/// Takes our filters from all links of the namespace.
pub(crate) fn take_all() {
    for (_, ifname) in links() {
        for hook in Hook::POLICY {
            // Most links have none.
            let _ = tc::qdisc_detach_program(&ifname, hook.direction(), hook.program());
        }
    }
}

fn links() -> Vec<(u32, String)> {
    let all = nix::net::if_::if_nameindex();
    let named = all.iter().flatten().filter_map(|link| {
        let name = link.name().to_str().ok()?;
        Some((link.index(), name.to_owned()))
    });
    named.collect()
}

/// The filter of a hook's program on a link; `None` also if the link is gone.
fn find(ifindex: u32, hook: Hook) -> Result<Option<Filter>, Error> {
    let parent = match hook.direction() {
        TcAttachType::Ingress => CLSACT_INGRESS,
        _ => CLSACT_EGRESS,
    };
    match dump(ifindex, parent) {
        Ok(answer) => Ok(parse(&answer, hook.program())),
        Err(Errno::ENODEV | Errno::EINVAL | Errno::ENOENT) => Ok(None),
        Err(errno) => {
            let error = TcError::IoError(io::Error::from(errno));
            Err(Error::program("ask for", hook.program())(error.into()))
        }
    }
}

/// All messages of the answer, one after the other.
fn dump(ifindex: u32, parent: u32) -> Result<Vec<u8>, Errno> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut request = Vec::with_capacity(HEADER + TC_HEADER);
    request.extend(u32::try_from(HEADER + TC_HEADER).unwrap_or_default().to_ne_bytes());
    request.extend(RTM_GETTFILTER.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([0; 4]);
    request.extend(ifindex.to_ne_bytes());
    request.extend([0; 4]);
    request.extend(parent.to_ne_bytes());
    request.extend([0; 4]);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = Vec::new();
    loop {
        let mut part = vec![0; PART];
        let length = recv(socket.as_raw_fd(), &mut part, MsgFlags::empty())?;
        part.truncate(length);
        for (kind, body) in messages(&part) {
            match kind {
                NLMSG_DONE => return Ok(answer),
                NLMSG_ERROR => {
                    let number = word(body, 0).map_or(0, |word| word.cast_signed());
                    return Err(Errno::from_raw(number.wrapping_neg()));
                }
                _ => {}
            }
        }
        if length == 0 {
            return Err(Errno::EPROTO);
        }
        answer.extend(part);
    }
}

/// The filter whose program has the name. Pure.
fn parse(answer: &[u8], name: &str) -> Option<Filter> {
    messages(answer).filter(|(kind, _)| *kind == RTM_NEWTFILTER).find_map(|(_, body)| {
        let (handle, info) = (word(body, 8)?, word(body, 16)?);
        let (_, options) =
            attributes(body.get(TC_HEADER..)?).find(|(kind, _)| *kind == TCA_OPTIONS)?;
        let get = |wanted| attributes(options).find(|(kind, _)| *kind == wanted);
        let (_, text) = get(TCA_BPF_NAME)?;
        if text.strip_suffix(&[0])? != name.as_bytes() {
            return None;
        }
        let (_, id) = get(TCA_BPF_ID)?;
        // The priority is the upper half.
        let priority = u16::try_from(info >> 16).ok()?;
        Some(Filter { priority, handle, id: word(id, 0)? })
    })
}

/// Type and body of each message.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = word(bytes, 0)? as usize;
        let body = bytes.get(HEADER..length)?;
        let kind = half(bytes, 4)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Type and value of each attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?);
        let value = bytes.get(4..length)?;
        let kind = half(bytes, 2)? & TYPE_MASK;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_or_of_another_name_is_no_filter() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = u16::try_from(4 + value.len()).expect("short").to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let options =
            [attribute(TCA_BPF_NAME, b"from_pod\0"), attribute(TCA_BPF_ID, &7_u32.to_ne_bytes())];
        let mut body = vec![0; 8];
        body.extend(1_u32.to_ne_bytes());
        body.extend(CLSACT_INGRESS.to_ne_bytes());
        body.extend(0x0001_0300_u32.to_ne_bytes());
        body.extend(attribute(TCA_OPTIONS, &options.concat()));
        let mut message = u32::try_from(HEADER + body.len()).expect("short").to_ne_bytes().to_vec();
        message.extend(RTM_NEWTFILTER.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend(body);
        assert_eq!(parse(&message, "from_pod"), Some(Filter { priority: 1, handle: 1, id: 7 }));
        assert_eq!(parse(&message, "to_pod"), None);
        for length in 0..message.len() {
            assert_eq!(parse(&message[..length], "from_pod"), None, "{length} bytes");
        }
    }
}
