//! What must hold between crates, as tests: the allowed direction of dependencies inside the workspace, and which
//! licences and how many versions of the big libraries its dependencies may bring.
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
    ("cni-bandwidth", 4),
    ("cni-bridge", 4),
    ("cni-firewall", 4),
    ("cni-loopback", 4),
    ("cni-portmap", 4),
    ("cni-tuning", 4),
    ("cni-vxlan", 4),
    ("cni-policy", 4),
    ("cni-ipam", 4),
    // Engines.
    ("orch-store", 3),
    ("orch-reconcile", 3),
    ("orch-cri", 3),
    ("orch-pki", 3),
    ("orch-policy", 3),
    ("orch-ebpf-loader", 3),
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
    ("orch-ebpf-maps", 1),
];

/// Edges inside one layer, with the reason.
pub const SIDEWAYS: &[(&str, &str, &str)] = &[
    ("cni-bridge", "cni-ipam", "delegation to host-local without a second process"),
    ("cni-vxlan", "cni-bridge", "vxlan delegates to bridge without a second process"),
];

/// Prefixes of crates that build without `orchestrator/`: those of `cni-plugins/` and of `ebpf/`.
pub const STANDALONE: [&str; 2] = ["cni-", "orch-ebpf-"];

/// Licences that may be linked into an Apache-2.0 program, by SPDX name. MPL-2.0 is weak copyleft by file: used
/// unchanged, it asks for nothing but the notice.
pub const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "MPL-2.0",
    "MPL-2.0+",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Libraries of which there is one version: their types appear in interfaces between crates, or they are large.
pub const SINGLE: &[&str] = &[
    "axum",
    "bollard",
    "bytes",
    "etcd-client",
    "http",
    "http-body",
    "hyper",
    "hyper-util",
    "ipnetwork",
    "k8s-openapi",
    "netlink-packet-route",
    "nix",
    "prost",
    "rcgen",
    "rustls",
    "serde_json",
    "tokio",
    "tokio-rustls",
    "tokio-tungstenite",
    "tonic",
    "tower",
];

/// Whether an SPDX expression (annex D of the specification, and the older `A/B`) allows the use: one side of each
/// `OR`, both of each `AND`.
#[must_use]
pub fn is_allowed(expression: &str) -> bool {
    let text = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let (allowed, used) = any(&words);
    used == words.len() && allowed
}

/// `term OR term …`; the result, and how many words it took.
fn any(words: &[&str]) -> (bool, usize) {
    let (mut allowed, mut used) = all(words);
    while words.get(used) == Some(&"OR") {
        let (more, count) = all(&words[used + 1..]);
        allowed |= more;
        used += 1 + count;
    }
    (allowed, used)
}

/// `term AND term …`, which binds tighter.
fn all(words: &[&str]) -> (bool, usize) {
    let (mut allowed, mut used) = term(words);
    while words.get(used) == Some(&"AND") {
        let (more, count) = term(&words[used + 1..]);
        allowed &= more;
        used += 1 + count;
    }
    (allowed, used)
}

fn term(words: &[&str]) -> (bool, usize) {
    match words {
        ["(", rest @ ..] => {
            let (allowed, used) = any(rest);
            (allowed && rest.get(used) == Some(&")"), used + 2)
        }
        [licence, "WITH", exception, ..] => {
            (LICENCES.contains(&format!("{licence} WITH {exception}").as_str()), 3)
        }
        [licence, ..] => (LICENCES.contains(licence), 1),
        [] => (false, 0),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

    use super::*;

    const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");

    /// All packages that `Cargo.lock` names for Linux. The others are on no machine that built this, so looking at them
    /// would mean to fetch them.
    fn locked() -> Metadata {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        MetadataCommand::new()
            .manifest_path(WORKSPACE)
            .other_options(["--locked", "--filter-platform", &target].map(str::to_owned))
            .exec()
            .expect("cargo metadata --locked")
    }

    fn layer(name: &str) -> Option<u8> {
        LAYERS.iter().find(|(crate_name, _)| *crate_name == name).map(|(_, layer)| *layer)
    }

    /// Normal dependencies between crates of the workspace, as (user, used).
    fn edges() -> Vec<(String, String)> {
        let metadata = MetadataCommand::new()
            .manifest_path(WORKSPACE)
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
    fn the_cni_plugins_and_ebpf_build_without_the_orchestrator() {
        let standalone = |name: &str| STANDALONE.iter().any(|prefix| name.starts_with(prefix));
        let wrong: Vec<_> = edges()
            .into_iter()
            .filter(|(user, used)| standalone(user) && !standalone(used))
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

    #[test]
    fn every_crate_in_a_layer_exists() {
        let metadata = MetadataCommand::new()
            .manifest_path(WORKSPACE)
            .no_deps()
            .exec()
            .expect("cargo metadata");
        let names: BTreeSet<String> =
            metadata.packages.iter().map(|package| package.name.to_string()).collect();
        let gone: Vec<_> = LAYERS.iter().filter(|(name, _)| !names.contains(*name)).collect();
        assert!(gone.is_empty(), "layers of crates that are not there: {gone:?}");
    }

    #[test]
    fn every_dependency_has_a_licence_that_fits() {
        let wrong: Vec<String> = locked()
            .packages
            .iter()
            .filter(|package| !package.license.as_deref().is_some_and(is_allowed))
            .map(|package| format!("{} {}: {:?}", package.name, package.version, package.license))
            .collect();
        assert!(wrong.is_empty(), "licences that are not in LICENCES:\n{}", wrong.join("\n"));
    }

    #[test]
    fn there_is_one_version_of_each_big_library() {
        let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for package in &locked().packages {
            if SINGLE.contains(&package.name.as_str()) {
                versions
                    .entry(package.name.to_string())
                    .or_default()
                    .insert(package.version.to_string());
            }
        }
        let doubled: Vec<_> = versions.iter().filter(|(_, versions)| versions.len() > 1).collect();
        assert!(doubled.is_empty(), "{doubled:?}");
    }

    #[test]
    fn nothing_comes_from_outside_the_registry() {
        let wrong: Vec<String> = locked()
            .packages
            .iter()
            .filter(|package| {
                package.source.as_ref().is_some_and(|source| !source.repr.starts_with("registry+"))
            })
            .map(|package| format!("{} from {:?}", package.name, package.source))
            .collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn licence_expressions_are_understood() {
        for good in [
            "MIT",
            "GPL-3.0 OR MIT",
            "MIT/GPL-3.0",
            "(MIT OR GPL-3.0) AND ISC",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(is_allowed(good), "{good}");
        }
        for bad in
            ["GPL-3.0", "MIT AND GPL-3.0", "(MIT AND GPL-3.0) OR AGPL-3.0", "MIT AND", "", "( MIT"]
        {
            assert!(!is_allowed(bad), "{bad}");
        }
    }
}
