//! orch-client
