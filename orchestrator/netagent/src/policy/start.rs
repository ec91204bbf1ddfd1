//! What `--policy` comes to on this node: programs and maps in the kernel, or none.

use orch_config::Paths;
use orch_ebpf_loader::{Pins, install, uninstall};
use tracing::{error, info, warn};

use super::engine::Engine;
use super::{PLUGIN, metrics, socket_path, state_dir};
use crate::fast_path::{FastPath, Wanted};
use crate::status::PolicyStatus;
use crate::{Mode, chain};

/// What the setting came to on this node.
pub(crate) struct Start {
    /// Whether pods get the plugin.
    pub(crate) enforced: bool,
    /// Programs and maps, if they could be put into the kernel.
    pub(super) ready: Option<Ready>,
    status: PolicyStatus,
}

/// Programs and maps in the kernel.
pub(super) struct Ready {
    pub(super) pins: Pins,
    pub(super) engine: Engine,
}

impl Start {
    /// Puts programs and maps into the kernel, or takes them out.
    pub(crate) async fn new(mode: Mode, paths: &Paths) -> Self {
        let own = paths.clone();
        let made = tokio::task::spawn_blocking(move || Self::decide(mode, &own)).await;
        made.unwrap_or_else(|error| Self {
            // Closed rather than open by accident.
            enforced: mode != Mode::Off,
            ready: None,
            status: PolicyStatus {
                problems: vec![format!("the policy programs: {error}")],
                ..PolicyStatus::default()
            },
        })
    }

    fn decide(mode: Mode, paths: &Paths) -> Self {
        let pins = Pins::below(paths.root());
        let mut status = PolicyStatus { mode: mode.to_string(), ..PolicyStatus::default() };
        if mode == Mode::Off {
            match remove(&pins, paths) {
                Ok(true) => info!("NetworkPolicies are no longer enforced on this node"),
                Ok(false) => {}
                Err(why) => {
                    error!(why, "policy programs of an earlier run stay in force");
                    status.problems.push(why);
                }
            }
            return Self { enforced: false, ready: None, status };
        }
        // A node that enforced policies does not cease to because something is broken now.
        let was_enforced = pins.are_there();
        let ready = if paths.cni_bin_dir().join(PLUGIN).exists() {
            prepare(&pins)
        } else {
            Err(format!("the plugin \"{PLUGIN}\" is not in {}", paths.cni_bin_dir().display()))
        };
        match ready {
            Ok(ready) => {
                info!("NetworkPolicies are enforced on this node");
                Self { enforced: true, ready: Some(ready), status }
            }
            Err(why) if mode == Mode::Auto && !was_enforced => {
                warn!(why, "NetworkPolicies are not enforced on this node");
                status.problems.push(format!("NetworkPolicies are not enforced: {why}"));
                Self { enforced: false, ready: None, status }
            }
            Err(why) => {
                error!(why, "NetworkPolicies cannot be enforced; new pods wait");
                status.problems.push(format!("NetworkPolicies cannot be enforced: {why}"));
                Self { enforced: true, ready: None, status }
            }
        }
    }

    /// What people are told until the first look.
    pub(crate) fn status(&self) -> PolicyStatus {
        PolicyStatus { enforced: self.ready.is_some(), ..self.status.clone() }
    }
}

/// Puts them there.
pub(super) fn prepare(pins: &Pins) -> Result<Ready, String> {
    let made = install(pins).and_then(Engine::new).map_err(|error| chain(&error))?;
    metrics::tell(pins);
    Ok(Ready { pins: pins.clone(), engine: made })
}

/// Takes out what an earlier run put into the kernel; true if there was something.
fn remove(pins: &Pins, paths: &Paths) -> Result<bool, String> {
    // It has more than programs.
    let fast_path = FastPath::default().ensure(pins, &Wanted::default());
    let was_there = uninstall(pins).map_err(|error| chain(&error))?;
    fast_path.map_err(|error| chain(&error))?;
    for leftover in [state_dir(paths), socket_path(paths)] {
        let gone = if leftover.is_dir() {
            std::fs::remove_dir_all(&leftover)
        } else {
            std::fs::remove_file(&leftover)
        };
        match gone {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("remove {}: {error}", leftover.display()));
            }
            _ => {}
        }
    }
    Ok(was_there)
}
