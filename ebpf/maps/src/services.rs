//! Services at connect time: twins of `ebpf/progs/include/services.h`, which says how they work together.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Part of the pin folder's name.
pub const SERVICES_VERSION: u32 = 2;
/// Entries of `frontends`.
pub const MAX_FRONTENDS: u32 = 65_536;
/// Entries of `backends` and of `members`.
pub const MAX_BACKENDS: u32 = 262_144;
/// Entries of `pod_namespaces`.
pub const MAX_POD_NAMESPACES: u32 = 4096;
/// `protocol` of frontends.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// An address as the programs compare it: IPv4 as `::ffff:a.b.c.d`.
fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn address(octets: [u8; 16], port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::from(octets).to_canonical(), u16::from_be(port))
}

/// What pods connect to.
#[repr(C, align(4))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// As on the wire.
    pub addr: [u8; 16],
    /// As on the wire.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

impl FrontendKey {
    /// The key of a TCP port.
    #[must_use]
    pub fn tcp(ip: IpAddr, port: u16) -> Self {
        Self { addr: octets(ip), port: port.to_be(), protocol: TCP, pad: 0 }
    }

    /// The key of a UDP port.
    #[must_use]
    pub fn udp(ip: IpAddr, port: u16) -> Self {
        Self { protocol: UDP, ..Self::tcp(ip, port) }
    }

    /// The address in Rust's types.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        address(self.addr, self.port)
    }
}

/// Where its backends are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frontend {
    /// First half of the backends' keys.
    pub service: u32,
    /// How many there are; never 0.
    pub count: u32,
    /// How long a client's backend is remembered; 0: not at all.
    pub affinity_secs: u32,
}

/// Place of a backend.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey {
    /// Of the frontend.
    pub service: u32,
    /// `0..count`.
    pub slot: u32,
}

/// What they are connected to.
#[repr(C, align(4))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// As on the wire.
    pub addr: [u8; 16],
    /// As on the wire.
    pub port: u16,
    /// Zero.
    pub pad: [u8; 2],
}

impl Backend {
    /// A backend from Rust's types.
    #[must_use]
    pub fn new(ip: IpAddr, port: u16) -> Self {
        Self { addr: octets(ip), port: port.to_be(), pad: [0; 2] }
    }

    /// The address in Rust's types.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        address(self.addr, self.port)
    }
}

/// That a frontend has a backend.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The frontend.
    pub to: FrontendKey,
    /// One of its backends.
    pub backend: Backend,
}
