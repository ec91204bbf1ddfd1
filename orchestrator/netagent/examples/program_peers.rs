//! How long the kernel entries of many remote nodes take: one acknowledged request each, the same messages as one
//! pipelined batch and nothing else, and what the agent does (read the kernel, compare, one batch). By turns, each round in
//! network namespaces of its own. Needs root.
//!
//! `cargo run --release -p orch-netagent --example program_peers -- [PEERS] [ROUNDS]`

#![allow(clippy::print_stdout, reason = "it prints what it measures")]

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use cni_netlink::{
    AddressOptions, Change, FdbEntry, Neighbour, Netlink, NetlinkError, Route, VxlanDevice,
};
use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, unshare};
use orch_netagent::mac::Mac;
use orch_netagent::overlay::kernel::{OverlayError, apply_peers, observe_peers};
use orch_netagent::overlay::plan::{SeenPeers, WantedPeers, plan_peers};
use orch_netagent::overlay::{Path, Peer, Peers, ROUTE_PROTOCOL};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u32>());
    let count = arguments.next().transpose()?.unwrap_or(1000);
    let rounds = arguments.next().transpose()?.unwrap_or(9);
    let peers: Peers = (0..count).map(peer).collect();
    let names = [
        "acknowledged one by one",
        "raw batch",
        "agent, from nothing",
        "agent, nothing to do",
        "agent, one node joins",
        "agent, all gone and back",
    ];
    let mut times: Vec<Vec<Duration>> = names.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        let round = [
            in_netns(|netlink, device| one_by_one(netlink, device, &peers))?,
            in_netns(|netlink, device| raw(netlink, device, &peers))?,
        ];
        let agent = in_netns(|netlink, device| {
            let whole = time(|| whole_look(netlink, device, &peers))?;
            let idle = time(|| whole_look(netlink, device, &peers))?;
            let join = time(|| joins(netlink, device, &peers, peer(count)))?;
            // As after `ip link set down`: routes and neighbours are gone, forwarding entries are not.
            netlink.set_down(device)?;
            netlink.set_up(device)?;
            let again = time(|| whole_look(netlink, device, &peers))?;
            Ok([whole, idle, join, again])
        })?;
        for (all, one) in times.iter_mut().zip(round.into_iter().chain(agent)) {
            all.push(one);
        }
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    let medians: Vec<Duration> = times.iter_mut().map(median).collect();
    println!("{count} peers, {rounds} rounds; median, fastest, ratio to the raw batch");
    for ((name, times), median) in names.iter().zip(&times).zip(&medians) {
        println!(
            "{name:26} {:8.2} ms {:8.2} ms {:6.2}",
            median.as_secs_f64() * 1e3,
            times[0].as_secs_f64() * 1e3,
            median.as_secs_f64() / medians[1].as_secs_f64()
        );
    }
    Ok(())
}

fn peer(number: u32) -> (IpNetwork, Peer) {
    let base = Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() + (number << 8));
    let subnet = IpNetwork::new(base.into(), 24).expect("a valid length");
    let [_, _, high, low] = number.to_be_bytes();
    let public_ip = Ipv4Addr::new(198, 18, high, low).into();
    (subnet, Peer { subnet, public_ip, path: Path::Vxlan(Mac([2, 0, 0, 0, high, low])) })
}

fn time<E>(work: impl FnOnce() -> std::result::Result<(), E>) -> std::result::Result<Duration, E> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Runs something with a VXLAN device in a new namespace.
fn in_netns<T: Send>(work: impl FnOnce(&Netlink, u32) -> Result<T> + Send) -> Result<T> {
    let thread = || -> Result<T> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let netlink = Netlink::open()?;
        let device = netlink.create_vxlan(&VxlanDevice {
            name: "vxlan-orch".to_owned(),
            vni: 1,
            port: 8472,
            local: Some(Ipv4Addr::new(198, 18, 255, 1).into()),
            mac: Some([2, 0, 0, 0, 255, 255]),
            ..VxlanDevice::default()
        })?;
        netlink.set_up(device.index)?;
        let own = IpNetwork::from(std::net::IpAddr::from([10, 63, 0, 0]));
        netlink.add_address(device.index, own, &AddressOptions::default())?;
        work(&netlink, device.index)
    };
    std::thread::scope(|scope| scope.spawn(thread).join().expect("no panic"))
}

fn entries(peer: &Peer, link: u32) -> (FdbEntry, Neighbour, Route) {
    let Path::Vxlan(Mac(mac)) = peer.path else { unreachable!("all are in VXLAN") };
    let gateway = peer.gateway();
    (
        FdbEntry { link, mac, dst: Some(peer.public_ip) },
        Neighbour { link, ip: gateway, mac, permanent: true },
        Route {
            dst: peer.subnet,
            via: Some(gateway),
            link: Some(link),
            onlink: true,
            protocol: ROUTE_PROTOCOL,
            ..Route::default()
        },
    )
}

fn one_by_one(netlink: &Netlink, device: u32, peers: &Peers) -> Result<Duration> {
    let work = || -> std::result::Result<(), NetlinkError> {
        for peer in peers.values() {
            let (forwarding, neighbour, route) = entries(peer, device);
            netlink.replace_fdb(&forwarding)?;
            netlink.replace_neighbour(&neighbour)?;
            netlink.add_route(&route)?;
        }
        Ok(())
    };
    Ok(time(work)?)
}

fn raw(netlink: &Netlink, device: u32, peers: &Peers) -> Result<Duration> {
    // Known before the clock runs: only the kernel's work is measured, and the encoding.
    let mut changes = [Vec::new(), Vec::new(), Vec::new()];
    for peer in peers.values() {
        let (forwarding, neighbour, route) = entries(peer, device);
        changes[0].push(Change::PutFdb(forwarding));
        changes[1].push(Change::PutNeighbour(neighbour));
        changes[2].push(Change::AddRoute(route));
    }
    let changes = changes.concat();
    Ok(time(|| netlink.apply(&changes).map(|refused| assert!(refused.is_empty())))?)
}

fn whole_look(
    netlink: &Netlink,
    device: u32,
    peers: &Peers,
) -> std::result::Result<(), OverlayError> {
    let want = WantedPeers::new(peers, device, 0);
    let steps = plan_peers(&observe_peers(netlink, device)?, &want);
    apply_peers(netlink, device, &steps)
}

fn joins(
    netlink: &Netlink,
    device: u32,
    before: &Peers,
    new: (IpNetwork, Peer),
) -> std::result::Result<(), OverlayError> {
    let seen = SeenPeers::from(&WantedPeers::new(before, device, 0));
    let mut peers = before.clone();
    peers.insert(new.0, new.1);
    let steps = plan_peers(&seen, &WantedPeers::new(&peers, device, 0));
    assert_eq!(steps.len(), 3);
    apply_peers(netlink, device, &steps)
}
