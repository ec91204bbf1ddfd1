//! The `policy` plugin: NetworkPolicy for the pod that the plugins before it in the chain have attached.
//!
//! ADD puts the eBPF programs on the host end of the pod's veth, with an endpoint that is closed to all but its own
//! node, and returns once the network agent has said what applies. Without an agent there is no ADD (code 11, "try
//! again"): there is no way to be open by accident. What ADD returns is what the plugins before it returned.
//!
//! Keys of the configuration: `root`, below which the BPF file system with the programs is; `stateDir`, for what DEL has
//! to know; `socket` of the agent; `running`, which the agent sets when it calls. Start reading at [`Policy`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use cni_netlink::{Link, NetNs, Netlink, NetlinkError};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, AttachmentId, CniArgs, Error, IfName, NetworkName, code};
use ipnetwork::IpNetwork;
use orch_ebpf_loader::{
    Announcement, AskError, Hook, Kept, Maps, Pins, PodRef, Request, ask, attach, is_attached,
    sweep,
};
use orch_ebpf_maps::{ADDRESS_NODE, ClassKey, Endpoint, state};
use serde::Deserialize;

/// The agent answers in milliseconds, but may have to wait for its watch to show the pod.
const PATIENCE: Duration = Duration::from_secs(10);
/// For what does not have to be answered.
const COURTESY: Duration = Duration::from_secs(1);
/// Programs of a pod's link.
const HOOKS: [Hook; 2] = [Hook::FromPod, Hook::ToPod];

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy;

/// Its configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conf {
    /// Root of the node's files; the programs are below `<root>/sys/fs/bpf`.
    #[serde(default = "root")]
    pub root: PathBuf,
    /// What ADD made, one file for each attachment.
    pub state_dir: PathBuf,
    /// Socket of the network agent.
    pub socket: PathBuf,
    /// The container runs already, without the programs or with those of a former version: they come when it is known what
    /// applies, so that nothing of what is allowed is lost.
    #[serde(default)]
    pub running: bool,
}

fn root() -> PathBuf {
    PathBuf::from("/")
}

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Policy)
}

impl Plugin for Policy {
    type Conf = Conf;

    fn name(&self) -> &'static str {
        "policy"
    }

    fn about(&self) -> &'static str {
        "enforces NetworkPolicy for a container that other plugins have attached"
    }

    fn add(&self, req: AddRequest<Conf>) -> Result<AddResult, Error> {
        let previous = req.prev_result.as_ref().ok_or_else(|| {
            Error::new(code::INVALID_CONFIG, "\"policy\" has to come after a plugin that attaches")
        })?;
        let subject = Subject::of(previous, &req.ifname)?;
        let link = host_end(&NetNs::open(&req.netns).map_err(no_container)?, &req.ifname)?;
        let pins = Pins::below(&req.conf.root);
        let mut maps = open(&pins)?;
        let made = Announcement {
            ifindex: link.index,
            uid: rand::random(),
            addr: subject.addr,
            addr6: subject.addr6,
            pod: pod(&req.args),
        };
        // Kept before anything is made. A failure from here on leaves the pod closed, not open: taking the programs
        // away is for DEL, which the runtime owes after a failed ADD, and which removes the link as well.
        let id = req.attachment();
        kept(&req.conf, &req.name)
            .write(id.container_id.as_ref(), id.ifname.as_str(), &made)
            .map_err(io)?;
        for gateway in &subject.gateways {
            maps.put_address(ClassKey::host(*gateway), ADDRESS_NODE).map_err(again)?;
        }
        let closed = Endpoint {
            uid: made.uid,
            addr: made.addr.to_bits().to_be(),
            addr6: subject.addr6_bytes(),
            mac: subject.mac,
            state: state::PENDING,
            ..Endpoint::default()
        };
        maps.insert_endpoint(link.index, closed).map_err(again)?;
        let ask = || ask(&req.conf.socket, &Request::Add(made), PATIENCE);
        let answer = if req.conf.running {
            let answer = ask();
            // Without an agent the container stays as it is, guarded by what guarded it before.
            if !matches!(answer, Err(AskError::Away { .. })) {
                attach_all(&pins, &link)?;
            }
            answer
        } else {
            attach_all(&pins, &link)?;
            ask()
        };
        answer.map_err(|error| {
            Error::from_chain(code::TRY_AGAIN, &error).with_details(
                "the pod stays closed until the network agent says what applies to it",
            )
        })?;
        Ok(req.prev_result.unwrap_or_default())
    }

    fn del(&self, req: DelRequest<Conf>) -> Result<(), Error> {
        remove(&req.conf, &kept(&req.conf, &req.name), &req.attachment())
    }

    fn check(&self, req: CheckRequest<Conf>) -> Result<(), Error> {
        let bad = |msg: String| Err(Error::new(code::CHECK_FAILED, msg));
        let id = req.attachment();
        let kept = kept(&req.conf, &req.name);
        let Some(made) = kept.read(id.container_id.as_ref(), id.ifname.as_str()) else {
            return bad("nothing is known of this attachment".to_owned());
        };
        let pins = Pins::below(&req.conf.root);
        let endpoint =
            open(&pins)?.endpoint(made.ifindex).map_err(|error| Error::internal(&error))?;
        let Some(endpoint) = endpoint.filter(|endpoint| endpoint.uid == made.uid) else {
            return bad(format!("the endpoint of link {} is gone", made.ifindex));
        };
        if endpoint.state != state::READY {
            return bad(format!("the pod is closed (state {})", endpoint.state));
        }
        let subject = Subject::of(&req.prev_result, &req.ifname)?;
        let present = (endpoint.addr, endpoint.addr6, endpoint.mac);
        if present != (subject.addr.to_bits().to_be(), subject.addr6_bytes(), subject.mac) {
            return bad("the endpoint has another address or MAC than the pod".to_owned());
        }
        let link = host_end(&NetNs::open(&req.netns).map_err(no_container)?, &req.ifname)?;
        for hook in HOOKS {
            let on = is_attached(&pins, &link.name, link.index, hook)
                .map_err(|error| Error::internal(&error))?;
            if !on {
                return bad(format!("{} is not on link {}", hook.program(), link.name));
            }
        }
        Ok(())
    }

    /// DEL for what is kept of attachments that are gone.
    fn gc(&self, req: GcRequest<Conf>) -> Result<(), Error> {
        let kept = kept(&req.conf, &req.name);
        let known = kept.all().map_err(io)?.into_iter().filter_map(|(container, ifname)| {
            Some(AttachmentId {
                container_id: container.parse().ok()?,
                ifname: ifname.parse().ok()?,
            })
        });
        let gone = known.filter(|id| !req.valid.contains(id));
        let errors = gone
            .filter_map(|id| remove(&req.conf, &kept, &id).err().map(|error| error.context(id)))
            .collect();
        Error::join(errors).map_or(Ok(()), Err)
    }

    fn status(&self, req: StatusRequest<Conf>) -> Result<(), Error> {
        let not_available = |error: Error| Error { code: code::NOT_AVAILABLE, ..error };
        open(&Pins::below(&req.conf.root)).map_err(not_available)?;
        ask(&req.conf.socket, &Request::Status, COURTESY)
            .map(drop)
            .map_err(|error| Error::from_chain(code::NOT_AVAILABLE, &error))
    }
}

/// Who the pod is on the network, by what the plugins before said.
struct Subject {
    /// `0.0.0.0` in a network of IPv6 alone: no IPv4 packet is the pod's then.
    addr: Ipv4Addr,
    addr6: Option<Ipv6Addr>,
    gateways: Vec<IpAddr>,
    mac: [u8; 6],
}

impl Subject {
    fn of(result: &AddResult, ifname: &IfName) -> Result<Self, Error> {
        let missing = |what: &str| {
            Error::new(code::INVALID_CONFIG, format!("prevResult has no {what} of {ifname}"))
        };
        let (place, interface) = result
            .interfaces
            .iter()
            .enumerate()
            .find(|(_, link)| !link.sandbox.is_empty() && link.name == ifname.as_str())
            .ok_or_else(|| missing("interface"))?;
        let mac = parse_mac(&interface.mac).ok_or_else(|| missing("MAC"))?;
        // The first of each family.
        let (mut addr, mut addr6, mut gateways) = (None, None, Vec::new());
        for ip in result.ips.iter().filter(|ip| ip.interface.is_none_or(|of| of == place)) {
            let is_new = match ip.address {
                IpNetwork::V4(address) => addr.replace(addr.unwrap_or(address.ip())).is_none(),
                IpNetwork::V6(address) => addr6.replace(addr6.unwrap_or(address.ip())).is_none(),
            };
            gateways.extend(ip.gateway.filter(|_| is_new));
        }
        Ok(Self { addr: addr.unwrap_or(Ipv4Addr::UNSPECIFIED), addr6, gateways, mac })
    }

    /// As the endpoint has it.
    fn addr6_bytes(&self) -> [u8; 16] {
        self.addr6.map_or([0; 16], |addr| addr.octets())
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

/// The pod that the runtime names.
fn pod(args: &CniArgs) -> Option<PodRef> {
    let get = |key| args.get(key).filter(|value| !value.is_empty()).map(str::to_owned);
    Some(PodRef {
        namespace: get("K8S_POD_NAMESPACE")?,
        name: get("K8S_POD_NAME")?,
        uid: get("K8S_POD_UID"),
    })
}

/// The other end of the container's veth, in this namespace.
fn host_end(netns: &NetNs, ifname: &IfName) -> Result<Link, Error> {
    let internal = |error: NetlinkError| Error::internal(&error);
    let inside =
        Netlink::open_in(netns).map_err(internal)?.link(ifname.as_str()).map_err(internal)?;
    let peer = inside.and_then(|link| link.peer).ok_or_else(|| {
        Error::new(code::INVALID_CONFIG, format!("{ifname} is no end of a veth pair"))
    })?;
    let link = Netlink::open().and_then(|netlink| netlink.link_at(peer)).map_err(internal)?;
    link.ok_or_else(|| {
        Error::new(
            code::INVALID_CONFIG,
            format!("the other end of {ifname} is not in this namespace"),
        )
    })
}

fn no_container(error: NetlinkError) -> Error {
    let code = if error.is_not_found() { code::UNKNOWN_CONTAINER } else { code::INVALID_NETNS };
    Error::from_chain(code, &error).context("CNI_NETNS")
}

fn kept(conf: &Conf, network: &NetworkName) -> Kept {
    Kept::of(&conf.state_dir, network.as_ref())
}

fn io(error: orch_ebpf_loader::Error) -> Error {
    Error::from_chain(code::IO, &error)
}

/// The maps, once the agent has put programs and settings there.
fn open(pins: &Pins) -> Result<Maps, Error> {
    if !pins.are_there() {
        let msg = format!("no eBPF programs at {}", pins.folder().display());
        return Err(Error::new(code::TRY_AGAIN, msg)
            .with_details("the network agent puts them there; see whether it runs, and its log"));
    }
    Maps::open(pins).map_err(again)
}

fn again(error: orch_ebpf_loader::Error) -> Error {
    Error::from_chain(code::TRY_AGAIN, &error)
}

/// Both at once: the kernel takes milliseconds for each.
fn attach_all(pins: &Pins, link: &Link) -> Result<(), Error> {
    thread::scope(|scope| {
        let running: Vec<_> = HOOKS
            .iter()
            .map(|hook| scope.spawn(|| attach(pins, &link.name, link.index, *hook)))
            .collect();
        running.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done.map_err(again),
            Err(_) => Err(Error::new(code::INTERNAL, "a thread that attaches a program panicked")),
        })
    })
}

/// Undoes ADD, as far as there is something. The programs stay on the link, without an endpoint, so that it is closed
/// until the plugin that made it has removed it; their pins go with the next DEL or with the agent's sweep.
fn remove(conf: &Conf, kept: &Kept, id: &AttachmentId) -> Result<(), Error> {
    let (container, ifname) = (id.container_id.as_ref(), id.ifname.as_str());
    let Some(made) = kept.read(container, ifname) else {
        return kept.remove(container, ifname).map_err(io);
    };
    let pins = Pins::below(&conf.root);
    if pins.are_there() {
        let mut maps = Maps::open(&pins).map_err(|error| Error::internal(&error))?;
        let internal = |error: orch_ebpf_loader::Error| Error::internal(&error);
        let present = maps.endpoint(made.ifindex).map_err(internal)?;
        if present.is_some_and(|endpoint| endpoint.uid == made.uid) {
            maps.remove_endpoint(made.ifindex).map_err(internal)?;
        }
        let netlink = Netlink::open().map_err(|error| Error::internal(&error))?;
        let links = netlink.links().map_err(|error| Error::internal(&error))?;
        sweep(&pins, |ifindex| links.iter().any(|link| link.index == ifindex)).map_err(internal)?;
    }
    kept.remove(container, ifname).map_err(io)?;
    // An agent that is away learns it from what is kept.
    let gone = Request::Del { ifindex: made.ifindex, uid: made.uid };
    let _ = ask(&conf.socket, &gone, COURTESY);
    Ok(())
}

#[cfg(test)]
mod tests;
