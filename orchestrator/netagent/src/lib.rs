//! tmp
pub mod dns;
pub mod files;
pub mod lease;
pub mod mac;
pub mod network;
pub mod services;
pub mod status;
pub mod sysctl;
pub(crate) fn chain(error: &dyn std::error::Error) -> String { error.to_string() }
