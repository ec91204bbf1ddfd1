//! orch-reconcile
