//! Packets by direction and reason, for Prometheus. The programs count; this reads what they counted.

use std::fmt::Write as _;
use std::sync::OnceLock;

use orch_ebpf_loader::{Maps, Pins};
use orch_ebpf_maps::{Direction, Reason};

/// Where the maps are, once there are any. One process is one agent.
static PINS: OnceLock<Pins> = OnceLock::new();

/// From now on the counters of these maps are told.
pub(super) fn tell(pins: &Pins) {
    let _ = PINS.set(pins.clone());
}

/// The counters in Prometheus' text format; nothing if policy is off.
pub(crate) fn render() -> String {
    let counters = PINS.get().and_then(|pins| Maps::open(pins).ok()?.counters().ok());
    counters.map_or_else(String::new, |counters| text(&counters))
}

fn text(counters: &[(Direction, Reason, u64)]) -> String {
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
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_has_direction_verdict_and_reason() {
        let text = text(&[(Direction::Ingress, Reason::Policy, 7)]);
        assert!(text.ends_with(
            "orch_net_policy_packets_total{direction=\"ingress\",verdict=\"dropped\",reason=\"policy\"} 7\n"
        ));
    }
}
