//! Packets by direction and reason, for Prometheus. The programs count; this reads what they counted.

use std::fmt::Write as _;
use std::sync::OnceLock;

use orch_ebpf_loader::{Maps, Pins};
use orch_ebpf_maps::{Direction, Loss, Reason, state};

/// Where the maps are, once there are any. One process is one agent.
static PINS: OnceLock<Pins> = OnceLock::new();

/// From now on the counters of these maps are told.
pub(super) fn tell(pins: &Pins) {
    let _ = PINS.set(pins.clone());
}

/// The counters in Prometheus' text format; nothing if policy is off.
pub(crate) fn render() -> String {
    let read = |pins| {
        let maps = Maps::open(pins).ok()?;
        let states =
            maps.endpoints().ok()?.into_iter().map(|(_, row)| row.state).collect::<Vec<_>>();
        Some(text(&maps.counters().ok()?, &maps.event_losses().ok()?, &states))
    };
    PINS.get().and_then(read).unwrap_or_default()
}

fn text(counters: &[(Direction, Reason, u64)], losses: &[(Loss, u64)], states: &[u8]) -> String {
    let mut text = String::from(
        "# HELP orch_net_policy_packets Packets from and to pods by what the policy programs said.\n\
         # TYPE orch_net_policy_packets counter\n",
    );
    for (direction, reason, packets) in counters {
        let direction = match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let verdict = if reason.is_drop() { "dropped" } else { "passed" };
        let reason = reason.name();
        let _ = writeln!(
            text,
            "orch_net_policy_packets_total{{direction=\"{direction}\",verdict=\"{verdict}\",reason=\"{reason}\"}} {packets}"
        );
    }
    text.push_str(
        "# HELP orch_net_policy_events_lost Dropped packets and new flows that `orchctl net flows` could not tell of.\n\
         # TYPE orch_net_policy_events_lost counter\n",
    );
    for (loss, events) in losses {
        let cause = loss.name();
        let _ = writeln!(text, "orch_net_policy_events_lost_total{{cause=\"{cause}\"}} {events}");
    }
    text.push_str(
        "# HELP orch_net_policy_endpoints Pods of the node by whether it is known what applies to them; locked: it does not fit into maps.\n\
         # TYPE orch_net_policy_endpoints gauge\n",
    );
    for (name, state) in
        [("pending", state::PENDING), ("ready", state::READY), ("locked", state::LOCKED)]
    {
        let count = states.iter().filter(|one| **one == state).count();
        let _ = writeln!(text, "orch_net_policy_endpoints{{state=\"{name}\"}} {count}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_has_direction_verdict_and_reason() {
        let text = text(
            &[(Direction::Ingress, Reason::Policy, 7)],
            &[(Loss::RingFull, 3)],
            &[state::READY, state::LOCKED, state::READY],
        );
        for line in [
            "orch_net_policy_packets_total{direction=\"ingress\",verdict=\"dropped\",reason=\"policy\"} 7",
            "orch_net_policy_events_lost_total{cause=\"ring-full\"} 3",
            "orch_net_policy_endpoints{state=\"pending\"} 0",
            "orch_net_policy_endpoints{state=\"ready\"} 2",
            "orch_net_policy_endpoints{state=\"locked\"} 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{text}");
        }
    }
}
