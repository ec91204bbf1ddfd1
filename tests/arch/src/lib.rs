//! The allowed direction of dependencies between the crates of the workspace, as a test.
//!
//! Layers from the top: programs, engines, hands, words. A crate uses crates of lower layers, and of its own
//! layer only along an edge named in [`SIDEWAYS`], each of which `ARCHITECTURE.md` shows.

/// Layer of each crate; a higher number may use a lower one.
pub const LAYERS: &[(&str, u8)] = &[
    // Processes that people start.
    ("orchestrator", 5),
    ("orchctl", 5),
    ("cni-plugins", 5),
    ("orch-pause", 5),
    ("orch-facts-generate", 5),
    ("nodeinfo", 5),
    // Programs: they meet in `api` and through the API server, never directly.
    ("orch-apiserver", 4),
    ("orch-scheduler", 4),
    ("orch-controllers", 4),
    ("orch-kubelet", 4),
    ("orch-netagent", 4),
    ("cni-bridge", 4),
    ("cni-loopback", 4),
    ("cni-vxlan", 4),
    ("cni-ipam", 4),
    // Engines.
    ("orch-store", 3),
    ("orch-reconcile", 3),
    ("orch-cri", 3),
    ("orch-pki", 3),
    ("cni-invoke", 3),
    ("cni-skel", 3),
    // Hands.
    ("orch-client", 2),
    ("orch-telemetry", 2),
    ("cni-netlink", 2),
    ("cni-nftables", 2),
    // Words: no I/O, no async, no clock.
    ("orch-api", 1),
    ("orch-config", 1),
    ("orch-facts", 1),
    ("cni-spec", 1),
];

/// Edges inside one layer, with the reason.
pub const SIDEWAYS: &[(&str, &str, &str)] = &[
    ("cni-bridge", "cni-ipam", "delegation to host-local without a second process"),
    ("cni-vxlan", "cni-bridge", "vxlan delegates to bridge without a second process"),
];

/// Folders whose crates build without `orchestrator/`.
pub const STANDALONE: &str = "cni-";

#[cfg(test)]
mod tests {
    use cargo_metadata::{DependencyKind, MetadataCommand};

    use super::*;

    fn layer(name: &str) -> Option<u8> {
        LAYERS.iter().find(|(crate_name, _)| *crate_name == name).map(|(_, layer)| *layer)
    }

    /// Normal dependencies between crates of the workspace, as (user, used).
    fn edges() -> Vec<(String, String)> {
        let metadata = MetadataCommand::new()
            .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
            .no_deps()
            .exec()
            .expect("cargo metadata");
        let names: Vec<String> =
            metadata.packages.iter().map(|package| package.name.to_string()).collect();
        let mut edges = Vec::new();
        for package in &metadata.packages {
            for dependency in &package.dependencies {
                if dependency.kind == DependencyKind::Normal && names.contains(&dependency.name) {
                    edges.push((package.name.to_string(), dependency.name.clone()));
                }
            }
        }
        edges
    }

    #[test]
    fn every_crate_uses_only_lower_layers() {
        let mut wrong = Vec::new();
        for (user, used) in edges() {
            if user.starts_with("tests-") {
                continue;
            }
            let (Some(above), Some(below)) = (layer(&user), layer(&used)) else {
                wrong.push(format!("{user} -> {used}: a crate has no layer in tests/arch"));
                continue;
            };
            let sideways = SIDEWAYS.iter().any(|(a, b, _)| *a == user && *b == used);
            if above <= below && !sideways {
                wrong.push(format!("{user} (layer {above}) uses {used} (layer {below})"));
            }
        }
        assert!(wrong.is_empty(), "new upward or sideways edges:\n{}", wrong.join("\n"));
    }

    #[test]
    fn the_cni_plugins_build_without_the_orchestrator() {
        let wrong: Vec<_> = edges()
            .into_iter()
            .filter(|(user, used)| user.starts_with(STANDALONE) && !used.starts_with(STANDALONE))
            .collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn every_sideways_edge_is_still_used() {
        let edges = edges();
        for (user, used, _) in SIDEWAYS {
            assert!(
                edges.iter().any(|(a, b)| a == user && b == used),
                "{user} -> {used} is no longer there"
            );
        }
    }
}
