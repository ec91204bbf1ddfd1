//! orch-config
