//! cni-nftables
