//! What the programs of this node would do with a connection, by running them: the agent's part of `orchctl net explain`.

use std::collections::BTreeMap;

use orch_config::Paths;
use orch_ebpf_loader::{Connection, Error, Explanation, Kept, Maps, Pins, Probe, Question};
use orch_ebpf_maps::Direction;

use super::{rules_file, state_dir};
use crate::chain;

/// Runs the program of the pod's link on the connection's first packet. Leaves no trace.
///
/// # Errors
/// Why it could not be run.
pub fn explain(paths: &Paths, about: &Connection) -> Result<Explanation, String> {
    let text = |error: Error| chain(&error);
    let pins = Pins::below(paths.root());
    let maps = Maps::open(&pins).map_err(text)?;
    let kept = Kept::everything(&state_dir(paths)).map_err(text)?;
    let is_it = |one: &orch_ebpf_loader::Announcement| {
        one.pod.as_ref().is_some_and(|pod| (&pod.namespace, &pod.name) == (&about.namespace, &about.name))
            // A file may outlive its pod.
            && matches!(maps.endpoint(one.ifindex), Ok(Some(row)) if row.uid == one.uid)
    };
    let made = kept.into_iter().map(|(_, one)| one).find(is_it);
    let absent = || format!("the node has no endpoint of pod {}/{}", about.namespace, about.name);
    let ifindex = made.ok_or_else(absent)?.ifindex;
    let question = Question {
        ifindex,
        direction: if about.incoming { Direction::Ingress } else { Direction::Egress },
        peer: about.peer,
        protocol: about.protocol,
        port: about.port,
        born_here: about.from_node,
    };
    let ran = Probe::load(&pins).and_then(|mut probe| probe.ask(&maps, &question)).map_err(text)?;
    let ran = ran.ok_or_else(absent)?;
    let names: BTreeMap<u32, String> = std::fs::read(rules_file(paths))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    Ok(Explanation {
        passed: ran.passed,
        reason: ran.reason.name().to_owned(),
        rule: names.get(&ran.rule).cloned(),
    })
}
