//! What the controllers may be told.

use std::time::Duration;

/// What the controllers may be told. The defaults are upstream's.
#[derive(Debug, Clone)]
pub struct Options {
    /// Certificate of the cluster's authority in PEM: pods find it in the ConfigMap `kube-root-ca.crt`.
    pub cluster_ca: String,
    /// A node that renewed neither Lease nor status for this long is taken for lost. Longer than several renewals.
    pub node_grace: Duration,
    /// A node that registered and never became alive gets this long.
    pub node_startup_grace: Duration,
    /// Pods tolerate a lost node for this long where they asked for nothing else than admission's 300 s. None: for
    /// those 300 s.
    pub eviction_after: Option<Duration>,
    /// Whether pods on a lost node are removed from the API without the node's word for it. Their replacements start
    /// at once then; if the node is alive but cut off, both run until it is back.
    pub force_delete_lost_pods: bool,
    /// How long pods of a Node object that was deleted are kept.
    pub pod_gc_quarantine: Duration,
    /// Who signs the nodes' certificates. None: nobody does.
    pub signers: Option<crate::Signers>,
    /// Set where several control planes run: only the holder of the Lease works. Differs between all processes.
    pub leader_identity: Option<String>,
    /// A leader that died is followed within 7 s instead of 17.
    pub fast_election: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cluster_ca: String::new(),
            node_grace: Duration::from_secs(50),
            node_startup_grace: Duration::from_secs(60),
            eviction_after: None,
            force_delete_lost_pods: false,
            pod_gc_quarantine: Duration::from_secs(40),
            signers: None,
            leader_identity: None,
            fast_election: false,
        }
    }
}

impl Options {
    /// Short timers, for labs: a lost node's pods run elsewhere within seconds. Goes with agents that renew every 2 s.
    ///
    /// Lost after 8 s (four renewals), evicted 4 s later: a moment in which a node that only stumbled can come back.
    #[must_use]
    pub fn fast() -> Self {
        Self {
            node_grace: Duration::from_secs(8),
            node_startup_grace: Duration::from_secs(20),
            eviction_after: Some(Duration::from_secs(4)),
            force_delete_lost_pods: true,
            pod_gc_quarantine: Duration::from_secs(5),
            fast_election: true,
            ..Self::default()
        }
    }
}
