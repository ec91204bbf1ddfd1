//! The state of the cluster: a revisioned key-value store, and the watch cache that the API server reads.
//!
//! - [`Store`] is the contract: get, paged list at a revision, create, compare-and-swap update and delete, watch from
//!   a revision, compaction. [`EtcdStore`] is its reference implementation; `tests/suite/behaviour.rs` is the suite that any
//!   other one has to pass.
//! - [`managed`] runs an etcd for those who have none: a child process that outlives its parent.
//! - [`admin`] is for operators: members, snapshots, rights.
//! - [`cache`] holds all objects in memory, fed by *one* watch on the store, and serves lists and thousands of watches.
//! - [`compaction`] forgets history that nobody asks for any more.
//!
//! What the values mean is left to others: the store knows keys, bytes and revisions, and the cache one thing more,
//! where `metadata.resourceVersion` goes ([`splice_resource_version`]).

pub mod admin;
pub mod cache;
pub mod compaction;
mod etcd;
pub mod managed;
mod resource_version;
mod store;

pub use etcd::{EtcdConfig, EtcdStore, epoch};
pub use resource_version::splice_resource_version;
pub use store::{
    Guard, KeyValue, Page, Revision, Store, StoreError, StoreEvent, WatchBatch, prefix_end,
};
