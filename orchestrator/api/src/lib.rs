//! orch-api
