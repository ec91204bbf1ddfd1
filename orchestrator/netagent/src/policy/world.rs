//! From the API's objects to what the compiler reads. Each object is read once for each of its versions.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_ebpf_loader::{Announcement, PodRef};
use orch_ebpf_maps::{ADDRESS_NODE, ADDRESS_REMOTE_NODE, ADDRESS_SERVICE, ClassKey};
use orch_policy::{ClusterPolicy, Name, PodFacts, Policy, Prefix, World};

/// What the API server said last.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// All pods.
    pub pods: Vec<Arc<Pod>>,
    /// All namespaces.
    pub namespaces: Vec<Arc<Namespace>>,
    /// All policies.
    pub policies: Vec<Arc<NetworkPolicy>>,
    /// All ClusterNetworkPolicies.
    pub cluster_policies: Vec<Arc<ClusterNetworkPolicy>>,
    /// All nodes.
    pub nodes: Vec<Arc<Node>>,
    /// All Services.
    pub services: Vec<Arc<Service>>,
}

/// What this node knows of itself.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Name of the Node object.
    pub node: String,
    /// Addresses in its network namespace.
    pub addresses: Vec<IpAddr>,
    /// Endpoints that the plugin has made.
    pub endpoints: Vec<Announcement>,
    /// The whole pod network.
    pub pod_network: Option<Ipv4Network>,
    /// The same of IPv6.
    pub pod_network6: Option<Ipv6Network>,
    /// Where cluster IPs come from.
    pub service_cidr: Option<Ipv4Network>,
}

/// Keeps the world up to date.
#[derive(Debug, Default)]
pub struct Reader {
    world: World,
    pods: HashMap<Name, (Arc<Pod>, Vec<IpAddr>)>,
    policies: HashMap<Name, Arc<NetworkPolicy>>,
}

impl Reader {
    /// The world as it was read last.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Reads it anew; false if nothing has changed that policy looks at.
    pub fn read(&mut self, cluster: &Cluster, local: &Local) -> bool {
        let mut changed = self.read_pods(cluster, local);
        changed |= set(&mut self.world.node, local.node.clone());
        let policies: BTreeSet<Name> =
            cluster.policies.iter().map(|policy| name(&policy.metadata)).collect();
        self.policies.retain(|name, _| policies.contains(name));
        let before = self.world.policies.len();
        self.world.policies.retain(|name, _| policies.contains(name));
        changed |= self.world.policies.len() != before;
        for policy in &cluster.policies {
            let name = name(&policy.metadata);
            let same = self.policies.get(&name).is_some_and(|seen| Arc::ptr_eq(seen, policy));
            if !same {
                let read = Policy::from_api(policy);
                changed |= self.world.policies.get(&name) != Some(&read);
                self.world.policies.insert(name.clone(), read);
                self.policies.insert(name, policy.clone());
            }
        }
        let namespaces = cluster.namespaces.iter().map(|namespace| {
            let meta = &namespace.metadata;
            (meta.name.clone().unwrap_or_default(), meta.labels.clone().unwrap_or_default())
        });
        changed |= set(&mut self.world.namespaces, namespaces.collect());
        // There are few of them.
        let policies = cluster.cluster_policies.iter().map(|policy| {
            let name = policy.metadata.name.clone().unwrap_or_default();
            (name, ClusterPolicy::from_api(policy))
        });
        changed |= set(&mut self.world.cluster_policies, policies.collect());
        changed |= set(&mut self.world.nodes, nodes(cluster, local));
        // Nodes' labels are asked for by such policies alone.
        let labels = cluster.nodes.iter().filter(|_| !cluster.cluster_policies.is_empty());
        let labels = labels.map(|node| {
            let meta = &node.metadata;
            (meta.name.clone().unwrap_or_default(), meta.labels.clone().unwrap_or_default())
        });
        changed |= set(&mut self.world.node_labels, labels.collect());
        let v4 = local.pod_network.map(IpNetwork::V4);
        let ranges = v4.into_iter().chain(local.pod_network6.map(IpNetwork::V6));
        let ranges = ranges.filter_map(|range| Prefix::new(range.network(), range.prefix()));
        changed | set(&mut self.world.pod_ranges, ranges.collect())
    }

    /// A pod of this node has its address before the API server hears of it.
    fn read_pods(&mut self, cluster: &Cluster, local: &Local) -> bool {
        let mut announced: HashMap<Name, Vec<IpAddr>> = HashMap::new();
        for endpoint in &local.endpoints {
            if let Some(pod) = &endpoint.pod
                && is_of(cluster, pod)
            {
                let name = Name::new(&pod.namespace, &pod.name);
                announced.entry(name).or_default().extend(endpoint.addresses());
            }
        }
        let names: BTreeSet<Name> = cluster.pods.iter().map(|pod| name(&pod.metadata)).collect();
        self.pods.retain(|name, _| names.contains(name));
        let before = self.world.pods.len();
        self.world.pods.retain(|name, _| names.contains(name));
        let mut changed = self.world.pods.len() != before;
        for pod in &cluster.pods {
            let name = name(&pod.metadata);
            let more = announced.remove(&name).unwrap_or_default();
            let same = self
                .pods
                .get(&name)
                .is_some_and(|(seen, before)| Arc::ptr_eq(seen, pod) && *before == more);
            if same {
                continue;
            }
            let mut facts = PodFacts::from_api(pod);
            facts.ips.extend(&more);
            facts.ips.sort_unstable();
            facts.ips.dedup();
            changed |= self.world.pods.get(&name) != Some(&facts);
            self.world.pods.insert(name.clone(), facts);
            self.pods.insert(name, (pod.clone(), more));
        }
        changed
    }

    /// The API's pod that an announcement means: it may name a former one of the same name.
    #[must_use]
    pub fn knows(&self, pod: &PodRef) -> bool {
        self.pods
            .get(&Name::new(&pod.namespace, &pod.name))
            .is_some_and(|(known, _)| is_same(known, pod))
    }
}

/// Sets a value; false if it was the same.
fn set<T: PartialEq>(place: &mut T, value: T) -> bool {
    let changed = *place != value;
    *place = value;
    changed
}

fn is_of(cluster: &Cluster, pod: &PodRef) -> bool {
    cluster.pods.iter().any(|known| {
        known.metadata.name.as_deref() == Some(&pod.name)
            && known.metadata.namespace.as_deref() == Some(&pod.namespace)
            && is_same(known, pod)
    })
}

fn is_same(known: &Pod, pod: &PodRef) -> bool {
    pod.uid.is_none() || pod.uid == known.metadata.uid
}

/// Name of an object.
pub(super) fn name(meta: &ObjectMeta) -> Name {
    Name::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// Addresses of nodes: what their status says, and the first two of their subnets, which the VTEP and the bridge have.
fn nodes(cluster: &Cluster, local: &Local) -> BTreeMap<String, Vec<IpAddr>> {
    let mut all = BTreeMap::new();
    for node in &cluster.nodes {
        let name = node.metadata.name.clone().unwrap_or_default();
        let status = node.status.as_ref().and_then(|status| status.addresses.as_deref());
        let told = status.unwrap_or_default().iter().filter_map(|one| one.address.parse().ok());
        let own = node.spec.iter().flat_map(|spec| {
            spec.pod_cidr
                .iter()
                .chain(spec.pod_cidrs.iter().flatten())
                .flat_map(|cidr| first_two(cidr))
        });
        all.insert(name, told.chain(own).collect::<Vec<IpAddr>>());
    }
    let here = all.entry(local.node.clone()).or_default();
    here.extend(&local.addresses);
    for ips in all.values_mut() {
        ips.sort_unstable();
        ips.dedup();
    }
    all
}

/// The first two addresses of a subnet.
fn first_two(cidr: &str) -> Vec<IpAddr> {
    match cidr.parse() {
        Ok(IpNetwork::V4(subnet)) => {
            let base = subnet.network().to_bits();
            [base, base | 1].map(|bits| Ipv4Addr::from_bits(bits).into()).into()
        }
        Ok(IpNetwork::V6(subnet)) => {
            let base = subnet.network().to_bits();
            [base, base | 1].map(|bits| Ipv6Addr::from_bits(bits).into()).into()
        }
        Err(_) => Vec::new(),
    }
}

/// What addresses are to this node, whatever policies say: the map `addresses`.
#[must_use]
pub fn desired_addresses(
    world: &World,
    cluster: &Cluster,
    local: &Local,
) -> BTreeMap<ClassKey, u32> {
    let mut all = BTreeMap::new();
    if let Some(cidr) = local.service_cidr {
        all.insert(ClassKey::new(cidr.network(), cidr.prefix()), ADDRESS_SERVICE);
    }
    for address in cluster.services.iter().flat_map(|service| outside_addresses(service)) {
        all.insert(ClassKey::host(address), ADDRESS_SERVICE);
    }
    // A node's own address wins over a Service that has it, too: what is not translated stays on this node.
    for (name, ips) in &world.nodes {
        for ip in ips {
            if *name != world.node {
                // It may be a Service's external address, too.
                *all.entry(ClassKey::host(*ip)).or_insert(0) |= ADDRESS_REMOTE_NODE;
            }
        }
    }
    for ip in world.nodes.get(&world.node).into_iter().flatten() {
        all.insert(ClassKey::host(*ip), ADDRESS_NODE);
    }
    all
}

/// Addresses outside of the IPv4 range of cluster IPs at which a Service is translated.
fn outside_addresses(service: &Service) -> Vec<IpAddr> {
    let spec = service.spec.as_ref();
    let external = spec.and_then(|spec| spec.external_ips.as_deref()).unwrap_or_default();
    let balancers = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_deref())
        .unwrap_or_default();
    let balancers = balancers.iter().filter_map(|ingress| ingress.ip.as_deref());
    let own = spec.and_then(|spec| spec.cluster_ips.as_deref()).unwrap_or_default();
    let own = own.iter().map(String::as_str).filter(|ip| ip.contains(':'));
    external
        .iter()
        .map(String::as_str)
        .chain(balancers)
        .chain(own)
        .filter_map(|text| text.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, uid: &str, ip: Value) -> Arc<Pod> {
        let value = json!({
            "metadata": {"namespace": "a", "name": name, "uid": uid},
            "spec": {"nodeName": "one", "containers": []},
            "status": {"podIP": ip},
        });
        Arc::new(serde_json::from_value(value).expect("a pod"))
    }

    fn announced(name: &str, uid: &str) -> Announcement {
        Announcement {
            ifindex: 3,
            uid: 7,
            addr: Ipv4Addr::new(10, 244, 1, 9),
            addr6: None,
            pod: Some(PodRef {
                namespace: "a".to_owned(),
                name: name.to_owned(),
                uid: Some(uid.to_owned()),
            }),
        }
    }

    #[test]
    fn a_local_pod_has_its_address_before_the_api_server_knows() {
        let cluster = Cluster { pods: vec![pod("web", "u1", Value::Null)], ..Cluster::default() };
        let mut local = Local { node: "one".to_owned(), ..Local::default() };
        let mut reader = Reader::default();
        let web = Name::new("a", "web");
        assert!(reader.read(&cluster, &local), "a new pod");
        assert!(reader.world().pods[&web].ips.is_empty());
        assert!(!reader.read(&cluster, &local), "the same");
        local.endpoints = vec![announced("web", "u1")];
        assert!(reader.read(&cluster, &local), "a new address");
        assert_eq!(reader.world().pods[&web].ips[..], [IpAddr::from([10, 244, 1, 9])]);
        let told = Cluster { pods: vec![pod("web", "u1", json!("10.244.1.9"))], ..cluster.clone() };
        assert!(!reader.read(&told, &local), "known already");
        // A former pod of the same name is another one.
        local.endpoints = vec![announced("web", "u0")];
        assert!(reader.read(&cluster, &local));
        assert!(reader.world().pods[&web].ips.is_empty());
        assert!(!reader.knows(local.endpoints[0].pod.as_ref().expect("named")));
        assert!(reader.read(&Cluster::default(), &local));
        assert!(reader.world().pods.is_empty());
    }

    #[test]
    fn addresses_say_what_a_node_is() {
        let node = |name: &str, ip: &str, cidr: &str| {
            let value = json!({
                "metadata": {"name": name}, "spec": {"podCIDR": cidr},
                "status": {"addresses": [{"type": "InternalIP", "address": ip},
                                         {"type": "Hostname", "address": name}]},
            });
            Arc::new(serde_json::from_value::<Node>(value).expect("a node"))
        };
        let service = json!({"metadata": {"name": "s"}, "spec": {"externalIPs": ["192.0.2.80", "192.0.2.3"]}});
        let cluster = Cluster {
            nodes: vec![
                node("one", "192.0.2.1", "10.244.1.0/24"),
                node("two", "192.0.2.2", "10.244.2.0/24"),
                node("three", "192.0.2.3", "10.244.3.0/24"),
            ],
            services: vec![Arc::new(serde_json::from_value(service).expect("a Service"))],
            ..Cluster::default()
        };
        let local = Local {
            node: "one".to_owned(),
            addresses: vec![Ipv4Addr::new(10, 96, 0, 10).into()],
            service_cidr: "10.96.0.0/12".parse().ok(),
            ..Local::default()
        };
        let mut reader = Reader::default();
        reader.read(&cluster, &local);
        let all = desired_addresses(reader.world(), &cluster, &local);
        let flags = |text: &str| all[&ClassKey::host(text.parse::<IpAddr>().expect("an address"))];
        for own in ["192.0.2.1", "10.244.1.0", "10.244.1.1", "10.96.0.10"] {
            assert_eq!(flags(own), ADDRESS_NODE, "{own}");
        }
        for other in ["192.0.2.2", "10.244.2.0", "10.244.2.1"] {
            assert_eq!(flags(other), ADDRESS_REMOTE_NODE, "{other}");
        }
        assert_eq!(flags("192.0.2.80"), ADDRESS_SERVICE);
        assert_eq!(flags("192.0.2.3"), ADDRESS_SERVICE | ADDRESS_REMOTE_NODE);
        assert_eq!(all[&ClassKey::new(Ipv4Addr::new(10, 96, 0, 0), 12)], ADDRESS_SERVICE);
    }
}
