//! orch-apiserver
