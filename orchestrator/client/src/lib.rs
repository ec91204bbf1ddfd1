//! Talking to the API server: typed get, list, watch, create, patch, delete, and the raw requests below them.
//!
//! [`Client`] sends requests through a [`Transport`]: HTTPS to one of several servers, or straight into the API
//! server of the same process. [`Api`] is the typed view of one kind. Caches and work queues are in
//! `orch-reconcile`.

mod api;
mod client;
mod error;
mod fence;
mod https;
mod kubeconfig;
mod pulse;
mod transport;
mod unverified;
mod watch;

pub use api::{Api, DeleteParams, Kind, ListParams, ObjectList, Patch, collection_path};
pub use client::Client;
pub use error::Error;
pub use fence::Fence;
pub use https::{ClientConfig, NOT_DONE, Upgraded};
pub use kubeconfig::{read_servers, write_servers};
pub use transport::{Body, Transport, empty_body, full_body};
pub use unverified::unverified_tls;
pub use watch::{WatchEvent, lines};
