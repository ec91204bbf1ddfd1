//! The plugins on the real kernel, in network namespaces of their own; one program.

mod bandwidth;
mod bridge;
mod firewall;
mod kill;
mod macs;
mod portmap;
mod removal;
mod tuning;
mod vxlan;
