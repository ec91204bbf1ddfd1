//! cni-loopback
