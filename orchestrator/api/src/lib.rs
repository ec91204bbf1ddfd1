//! Kinds of the Kubernetes API and the words around them: types only, no I/O, no async, no clock.
//!
//! The types are `k8s-openapi`'s. What upstream keeps in its API machinery is here: [`quantity`], [`selector`],
//! the `Status` errors ([`status`]), [`names`], [`defaults`] and [`validate`] over JSON, and small helpers over
//! pods, nodes and taints.

pub use k8s_openapi;

pub mod bootstrap_token;
pub mod cluster_policy;
pub mod defaults;
pub mod meta;
pub mod names;
pub mod node;
pub mod pod;
pub mod priority;
pub mod quantity;
pub mod selector;
pub mod status;
pub mod taint;
pub mod validate;

pub use quantity::Quantity;
pub use selector::{FieldSelector, Selector};
pub use status::{ApiError, FieldError};
