//! orch-pki
