//! orch-kubelet
