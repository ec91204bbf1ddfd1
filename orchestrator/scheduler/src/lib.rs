//! orch-scheduler
