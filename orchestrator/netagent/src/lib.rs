//! orch-netagent
