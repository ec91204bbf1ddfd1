//! What the agent counts, for Prometheus. One process is one agent, so there is one set of metrics; whoever serves HTTP
//! on this node (the kubelet) asks for the text with [`render`].
//!
//! Names are `orch_net_<noun>_<unit>`; there are no labels with values from outside, so the number of series is fixed.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cni_nftables::Usage;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::status::NetStatus;

/// A look at two nodes takes a millisecond, one at a thousand some tens of them.
const RECONCILE_BUCKETS_SECS: [f64; 10] =
    [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

struct Metrics {
    registry: Registry,
    reconcile_duration: Histogram,
    reconcile_errors: Counter,
    reconcile_steps: Counter,
    peers: Gauge,
    etcd_up: Gauge,
    problems: Gauge,
    lease_renewals: Counter,
    lease_renewal_failures: Counter,
    lease_acquisitions: Counter,
    lease_expiry: Gauge,
    /// Seconds since the epoch at which the lease ends; 0 if there is none.
    lease_ends_at: AtomicU64,
    services: Gauge,
    endpoints: Gauge,
    nft_applies: Counter,
    nft_errors: Counter,
    rx_drops: Gauge,
    tx_drops: Gauge,
    conntrack_flows: Gauge,
    conntrack_limit: Gauge,
    conntrack_drops: Gauge,
    packet_size: Gauge,
}

impl Metrics {
    fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("orch_net"),
            reconcile_duration: Histogram::new(RECONCILE_BUCKETS_SECS),
            reconcile_errors: Counter::default(),
            reconcile_steps: Counter::default(),
            peers: Gauge::default(),
            etcd_up: Gauge::default(),
            problems: Gauge::default(),
            lease_renewals: Counter::default(),
            lease_renewal_failures: Counter::default(),
            lease_acquisitions: Counter::default(),
            lease_expiry: Gauge::default(),
            lease_ends_at: AtomicU64::new(0),
            services: Gauge::default(),
            endpoints: Gauge::default(),
            nft_applies: Counter::default(),
            nft_errors: Counter::default(),
            rx_drops: Gauge::default(),
            tx_drops: Gauge::default(),
            conntrack_flows: Gauge::default(),
            conntrack_limit: Gauge::default(),
            conntrack_drops: Gauge::default(),
            packet_size: Gauge::default(),
        };
        let registry = &mut metrics.registry;
        registry.register_with_unit(
            "reconcile_duration",
            "Time of one look at the overlay: observe, compare, apply",
            Unit::Seconds,
            metrics.reconcile_duration.clone(),
        );
        for (name, help, counter) in [
            ("reconcile_errors", "Looks at the overlay that failed", &metrics.reconcile_errors),
            (
                "reconcile_steps",
                "Changes made to the overlay in the kernel",
                &metrics.reconcile_steps,
            ),
            ("lease_renewals", "Renewals of the subnet lease", &metrics.lease_renewals),
            (
                "lease_renewal_failures",
                "Renewals that failed, or came too late",
                &metrics.lease_renewal_failures,
            ),
            ("lease_acquisitions", "Times that a subnet was acquired", &metrics.lease_acquisitions),
            (
                "nft_applies",
                "Transactions of the Service table that the kernel took",
                &metrics.nft_applies,
            ),
            ("nft_errors", "Transactions of the Service table that failed", &metrics.nft_errors),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in [
            ("peers", "Remote nodes in the kernel", &metrics.peers),
            ("etcd_up", "Whether etcd answers: 1 or 0", &metrics.etcd_up),
            ("problems", "Problems that want a person", &metrics.problems),
            ("service_ports", "Service ports in the kernel", &metrics.services),
            ("service_endpoints", "Endpoints of Services in the kernel", &metrics.endpoints),
            (
                "device_rx_dropped_packets",
                "Packets that the VXLAN device dropped on their way in",
                &metrics.rx_drops,
            ),
            (
                "device_tx_dropped_packets",
                "Packets that the VXLAN device dropped on their way out",
                &metrics.tx_drops,
            ),
            ("conntrack_flows", "Flows that conntrack knows", &metrics.conntrack_flows),
            ("conntrack_limit_flows", "Flows that it may know", &metrics.conntrack_limit),
            (
                "conntrack_dropped_packets",
                "Packets dropped because they would have begun one flow too many",
                &metrics.conntrack_drops,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        registry.register_with_unit(
            "pod_packet_size",
            "Largest packet of a pod before it is cut into frames; 65536 without BIG TCP, 0 if not known",
            Unit::Bytes,
            metrics.packet_size.clone(),
        );
        registry.register_with_unit(
            "lease_expiry",
            "Time until the subnet lease ends unless it is renewed; -1 without a lease",
            Unit::Seconds,
            metrics.lease_expiry.clone(),
        );
        metrics
    }
}

/// A look at the overlay is over: how long it took, and how many changes it made if it succeeded.
pub(crate) fn reconciled(took: Duration, steps: Option<usize>) {
    METRICS.reconcile_duration.observe(took.as_secs_f64());
    match steps {
        Some(steps) => drop(METRICS.reconcile_steps.inc_by(steps as u64)),
        None => drop(METRICS.reconcile_errors.inc()),
    }
}

/// A subnet was acquired.
pub(crate) fn lease_acquired(ttl: Duration) {
    METRICS.lease_acquisitions.inc();
    lease_lives_for(ttl);
}

/// The subnet lease was renewed, or was not.
pub(crate) fn lease_renewed(ttl: Option<Duration>) {
    match ttl {
        Some(ttl) => {
            METRICS.lease_renewals.inc();
            lease_lives_for(ttl);
        }
        None => drop(METRICS.lease_renewal_failures.inc()),
    }
}

fn lease_lives_for(ttl: Duration) {
    METRICS.lease_ends_at.store(now_secs() + ttl.as_secs(), Ordering::Relaxed);
}

/// The Service table was written, or was refused.
pub(crate) fn nft_applied(ok: bool) {
    if ok {
        METRICS.nft_applies.inc()
    } else {
        METRICS.nft_errors.inc()
    };
}

/// What the agent says of itself changed.
pub(crate) fn status_changed(status: &NetStatus) {
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    METRICS.peers.set(count(status.peers.len()));
    METRICS.etcd_up.set(i64::from(status.etcd == "healthy"));
    METRICS.problems.set(count(status.problems.len()));
    METRICS.services.set(count(status.services.ports));
    METRICS.endpoints.set(count(status.services.endpoints));
    METRICS.packet_size.set(i64::from(status.big_tcp.size));
}

fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// All metrics of the network agent in Prometheus' text format.
///
/// Without the line `# EOF` of OpenMetrics, so that others can append theirs.
#[must_use]
pub fn render() -> String {
    let metrics = &*METRICS;
    let ends_at = metrics.lease_ends_at.load(Ordering::Relaxed);
    let left = match ends_at {
        0 => -1,
        at => i64::try_from(at.saturating_sub(now_secs())).unwrap_or(i64::MAX),
    };
    metrics.lease_expiry.set(left);
    let counters = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    if let Some([rx, tx]) = drops(&counters, orch_config::VXLAN_DEVICE) {
        metrics.rx_drops.set(rx);
        metrics.tx_drops.set(tx);
    }
    if let Some(usage) = Usage::observe() {
        let set = |gauge: &Gauge, number| gauge.set(i64::try_from(number).unwrap_or(i64::MAX));
        set(&metrics.conntrack_flows, usage.flows);
        set(&metrics.conntrack_limit, usage.limit);
        set(&metrics.conntrack_drops, usage.dropped);
    }
    let mut text = String::new();
    // Writing to a string cannot fail; what was written is good in any case.
    let _ = encode(&mut text, &metrics.registry);
    let mut text = text.trim_end_matches("# EOF\n").to_owned();
    text.push_str(&crate::policy::metrics::render());
    text
}

/// Dropped packets of a link, received and sent, from `/proc/net/dev`.
fn drops(text: &str, link: &str) -> Option<[i64; 2]> {
    let numbers = text.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        (name.trim() == link).then(|| rest.split_whitespace())
    })?;
    let numbers: Vec<i64> = numbers.map(|word| word.parse().unwrap_or(0)).collect();
    // bytes packets errs drop … eight of them for each direction
    Some([*numbers.get(3)?, *numbers.get(11)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_in_the_text() {
        reconciled(Duration::from_millis(3), Some(4));
        reconciled(Duration::from_millis(3), None);
        lease_acquired(Duration::from_secs(86_400));
        lease_renewed(Some(Duration::from_secs(86_400)));
        lease_renewed(None);
        nft_applied(true);
        nft_applied(false);
        let peers = vec![crate::status::PeerStatus::default(); 2];
        let big_tcp = crate::status::BigTcpStatus { size: 524_280, ..Default::default() };
        let etcd = "healthy".to_owned();
        status_changed(&NetStatus { peers, etcd, big_tcp, ..NetStatus::default() });
        let text = render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            let value =
                line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok());
            value.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
        };
        assert!(value("orch_net_peers") >= 2.0);
        for name in [
            "orch_net_reconcile_duration_seconds_count",
            "orch_net_reconcile_errors_total",
            "orch_net_reconcile_steps_total",
            "orch_net_lease_acquisitions_total",
            "orch_net_lease_renewals_total",
            "orch_net_lease_renewal_failures_total",
            "orch_net_nft_applies_total",
            "orch_net_nft_errors_total",
            "orch_net_etcd_up",
            "orch_net_pod_packet_size_bytes",
        ] {
            assert!(value(name) >= 1.0, "{name}:\n{text}");
        }
        assert!((86_000.0..=86_400.0).contains(&value("orch_net_lease_expiry_seconds")));
        assert!(!text.contains("# EOF"));
    }

    #[test]
    fn drops_are_read_from_proc() {
        let text = "Inter-|\n face |\n  vxlan-orch: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        assert_eq!(drops(text, "vxlan-orch"), Some([4, 12]));
        assert_eq!(drops(text, "eth0"), None);
    }
}
