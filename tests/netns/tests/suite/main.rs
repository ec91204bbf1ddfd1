//! The plugins on the real kernel, in network namespaces of their own; one program.

mod bandwidth;
mod bridge;
mod kill;
mod portmap;
mod removal;
mod vxlan;
