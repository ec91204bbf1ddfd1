//! The network agent on real parts. One program: each takes minutes to compile.

mod agent;
mod big_tcp;
mod chaos;
mod connect_time;
mod fast_path;
mod fast_path_ipv6;
mod flannel;
mod ipv6;
mod join;
mod lease;
mod overlay;
mod policy;
mod policy_ipv6;
mod services;
mod support;
