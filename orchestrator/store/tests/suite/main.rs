//! The store on a real etcd. One program: each takes a minute to compile.

mod behaviour;
mod cache;
mod managed;
mod support;
