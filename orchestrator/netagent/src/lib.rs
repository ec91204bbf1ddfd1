//! tmp
pub mod dns;
pub mod files;
pub mod lease;
pub mod mac;
pub mod network;
pub mod services;
