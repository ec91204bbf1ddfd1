//! cni-netlink
