//! cni-vxlan
