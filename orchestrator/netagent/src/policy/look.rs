//! One look: what the node and the API server have now, into the kernel.

use std::collections::BTreeMap;

use cni_netlink::Netlink;
use orch_config::Paths;
use orch_ebpf_loader::{Announcement, Kept, Pins, sweep};
use tracing::{debug, info, warn};

use super::engine::{Engine, Report};
use super::node::{self, Seen};
use super::start::{Ready, prepare};
use super::world::{Cluster, Local, Reader, desired_addresses};
use super::{rules_file, state_dir};
use crate::chain;
use crate::fast_path::FastPath;
use crate::files::ensure_content;
use crate::status::FastPathStatus;

/// What goes from look to look.
#[derive(Default)]
pub(super) struct State {
    /// Where they could not be put into the kernel, each look tries again.
    pub(super) ready: Option<Ready>,
    pub(super) netlink: Option<Netlink>,
    pub(super) reader: Reader,
    pub(super) fast_path: FastPath,
}

/// What a look came to.
#[derive(Default)]
pub(super) struct Looked {
    /// `None` as long as the caches are not filled.
    pub(super) report: Option<Report>,
    pub(super) new_wires: Vec<String>,
    pub(super) fast_path: FastPathStatus,
}

/// Brings the world as it is now into force. Without a cluster, which is not known yet, only what the node knows itself.
pub(super) fn look(
    state: &mut State,
    paths: &Paths,
    cluster: Option<Cluster>,
    mut local: Local,
    vxlan_port: u16,
) -> Result<Looked, String> {
    if state.ready.is_none() {
        state.ready = Some(prepare(&Pins::below(paths.root()))?);
        info!("NetworkPolicies are enforced on this node");
    }
    let Some(Ready { pins, engine }) = &mut state.ready else {
        return Err("no programs".to_owned());
    };
    let netlink = match state.netlink.take() {
        Some(netlink) => netlink,
        None => Netlink::open().map_err(|error| chain(&error))?,
    };
    let seen = node::observe(&netlink).map_err(|error| chain(&error))?;
    // After a failure it is opened anew: it may hold the rest of an answer.
    state.netlink = Some(netlink);
    let new_wires = node::ensure_wires(pins, &seen).map_err(|error| chain(&error))?;
    local.addresses.extend(&seen.addresses);
    local.endpoints = endpoints(engine, pins, paths, &seen)?;
    let Some(cluster) = cluster else { return Ok(Looked { new_wires, ..Looked::default() }) };
    let changed = state.reader.read(&cluster, &local);
    let addresses = desired_addresses(state.reader.world(), &cluster, &local);
    engine.set_addresses(&addresses, vxlan_port).map_err(|error| chain(&error))?;
    let report =
        engine.look(&state.reader, changed, &local.endpoints).map_err(|error| chain(&error))?;
    if changed {
        tell_rules(engine, paths);
    }
    if report.written > 0 {
        let Report { revision, written: rows, judged_again, .. } = report;
        debug!(revision, rows, judged_again, "policies are in force");
    }
    Ok(Looked { report: Some(report), new_wires, ..Looked::default() })
}

/// What the numbers in flow events mean, for `orchctl net flows`.
fn tell_rules(engine: &Engine, paths: &Paths) {
    let rules: BTreeMap<u32, String> =
        engine.compiled().rules.iter().map(|(id, rule)| (id.0, rule.to_string())).collect();
    let text = serde_json::to_vec(&rules).expect("plain data has a JSON form");
    if let Err(error) = ensure_content(&rules_file(paths), &text) {
        warn!(error = %chain(&error), "the names of policy rules are not told");
    }
}

/// The endpoints that are there, after those that are gone were removed. The maps are read before the files: the plugin
/// writes its file first.
fn endpoints(
    engine: &mut Engine,
    pins: &Pins,
    paths: &Paths,
    seen: &Seen,
) -> Result<Vec<Announcement>, String> {
    let text = |error: orch_ebpf_loader::Error| chain(&error);
    let rows = engine.maps().endpoints().map_err(text)?;
    let kept = Kept::everything(&state_dir(paths)).map_err(text)?;
    let announced: Vec<Announcement> = kept.iter().map(|(_, one)| one.clone()).collect();
    let gone = |ifindex: u32| !seen.links.contains(&ifindex) && !link_exists(ifindex);
    let swept = engine.sweep(&rows, &announced, gone).map_err(text)?;
    for (file, one) in &kept {
        if gone(one.ifindex) {
            Kept::forget(file).map_err(text)?;
        }
    }
    // Pins of a link that went after the plugin's DEL, too.
    sweep(pins, |ifindex| !gone(ifindex)).map_err(text)?;
    if swept > 0 {
        debug!(endpoints = swept, "endpoints of links that are gone were removed");
    }
    Ok(announced)
}

/// Asks the kernel again: a link may have been made since all were listed.
fn link_exists(ifindex: u32) -> bool {
    nix::net::if_::if_indextoname(ifindex).is_ok()
}
