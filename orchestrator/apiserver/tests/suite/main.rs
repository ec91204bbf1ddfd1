//! The API server over HTTPS on a real etcd. One program: each takes minutes to compile.

mod access;
mod http2;
mod objects;
mod outage;
mod priority;
mod proxy;
mod several;
mod support;
mod watching;
mod yaml;
