//! orch-facts
