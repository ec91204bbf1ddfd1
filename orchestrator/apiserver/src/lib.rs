//! The API server: the Kubernetes API on the wire, over a [`Store`](orch_store::Store).
//!
//! One generic REST store serves every kind. What kinds there are is data (`resources`, the type table, and the
//! facts of `orch-facts`); what differs between them is in `strategy`, `admission` and `services`. The way of a
//! request: `server` (TLS) → `auth`, `impersonate` (who) → `request` (what is asked for) → `authz` (may they) → `read`,
//! `watch`, `write`, `subresources`, `reviews` or `proxy` → `respond`, `table`. Who owns which field after a write is `managed`.
//!
//! Reads come from the watch cache as bytes; nothing is parsed that need not be. Writes are compare-and-swap
//! transactions on the store.

mod admission;
mod auth;
mod authz;
mod bootstrap;
mod certificates;
mod compress;
mod decode;
mod discovery;
mod events;
mod families;
mod health;
mod impersonate;
mod kubernetes_endpoints;
mod managed;
mod oidc;
mod printers;
mod proxy;
mod read;
mod request;
mod resources;
mod respond;
mod reviews;
mod server;
mod services;
mod state;
mod strategy;
mod subresources;
mod table;
mod watch;
mod write;

pub use server::{ApiServer, Error, Options};
