//! cni-bridge
