//! orch-cri
