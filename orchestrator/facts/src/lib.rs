//! Facts about the types of the Kubernetes API, and what is read from them: protobuf bodies ([`protobuf`]), strict
//! field checks ([`strict`]), strategic merge patches ([`strategic`]), field ownership
//! ([`ownership`]) and OpenAPI documents
//! ([`openapi`], [`openapi_v2`]).
//!
//! The facts are data: `k8s-1.36.facts`, described at its head, and `network-policy-api-v1alpha2.facts`. Start with [`facts`].

pub mod openapi;
pub mod openapi_v2;
pub mod ownership;
pub mod protobuf;
pub mod strategic;
pub mod strict;
mod table;

pub use table::{Facts, Field, FieldType, Shape, Type, TypeId, facts};
