use std::net::Ipv4Addr;

use serde_json::json;

use super::*;

pub(crate) const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const PLACE: Place<'_> = Place { node: "node-1", zone: Some("a") };

pub(crate) fn service(value: serde_json::Value) -> Arc<Service> {
    Arc::new(serde_json::from_value(value).expect("a Service"))
}

pub(crate) fn slice(value: serde_json::Value) -> Arc<EndpointSlice> {
    Arc::new(serde_json::from_value(value).expect("an EndpointSlice"))
}

fn web(spec: serde_json::Value) -> Arc<Service> {
    service(json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec}))
}

fn web_slice(name: &str, endpoints: serde_json::Value) -> Arc<EndpointSlice> {
    slice(json!({
        "metadata": {"name": name, "namespace": "default", "labels": {SERVICE_NAME: "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    }))
}

fn ports(services: &[Arc<Service>], slices: &[Arc<EndpointSlice>]) -> Vec<Port> {
    desired_ports(services, slices, PLACE, &[DNS_IP.into()])
}

#[test]
fn ready_endpoints_of_all_slices_serve_the_port_of_their_name() {
    let service = web(json!({
        "clusterIP": "10.96.3.4",
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "other", "port": 81}],
    }));
    let slices = [
        web_slice(
            "a",
            json!([
                {"addresses": ["10.244.1.2"], "nodeName": "node-1", "conditions": {"ready": true}},
                {"addresses": ["10.244.1.9"], "conditions": {"ready": false, "serving": false}},
            ]),
        ),
        web_slice("b", json!([{"addresses": ["10.244.2.2"], "nodeName": "node-2"}])),
    ];
    let ports = ports(&[service], &slices);
    assert_eq!(ports.len(), 2);
    let http = &ports[0];
    assert_eq!(http.id, "default/web/tcp/80");
    assert_eq!(http.node_port, Some(30080));
    let seen: Vec<_> = http.endpoints.iter().map(|one| (one.ip.to_string(), one.local)).collect();
    assert_eq!(seen, [("10.244.1.2".to_owned(), true), ("10.244.2.2".to_owned(), false)]);
    assert!(ports[1].endpoints.is_empty(), "no slice has a port named other");
}

#[test]
fn terminating_endpoints_serve_only_while_none_is_ready() {
    let service = web(json!({"clusterIP": "10.96.3.4", "ports": [{"name": "http", "port": 80}]}));
    let leaving = json!({
        "addresses": ["10.244.1.2"],
        "conditions": {"ready": false, "serving": true, "terminating": true},
    });
    let alone = ports(std::slice::from_ref(&service), &[web_slice("a", json!([leaving]))]);
    assert_eq!(alone[0].pool(false).len(), 1);
    let relieved =
        ports(&[service], &[web_slice("a", json!([leaving, {"addresses": ["10.244.2.2"]}]))]);
    let pool = relieved[0].pool(false);
    assert_eq!(pool.iter().map(|one| one.ip.to_string()).collect::<Vec<_>>(), ["10.244.2.2"]);
}

#[test]
fn headless_external_name_and_the_dns_service_have_no_rules() {
    let services = [
        web(json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        web(json!({"type": "ExternalName", "externalName": "example.org"})),
        web(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]})),
    ];
    assert_eq!(ports(&services, &[]), []);
}

#[test]
fn both_families_have_their_own_addresses_and_endpoints() {
    let both = web(json!({
        "clusterIP": "10.96.3.4",
        "clusterIPs": ["10.96.3.4", "fd00:10:96::304"],
        "ports": [{"name": "http", "port": 80}],
    }));
    let mut six = EndpointSlice::clone(&web_slice("b", json!([{"addresses": ["fd00:10:244::2"]}])));
    six.address_type = "IPv6".to_owned();
    let slices = [web_slice("a", json!([{"addresses": ["10.244.1.2"]}])), Arc::new(six)];
    let ports = ports(&[both], &slices);
    for (v6, ip, endpoint) in
        [(false, "10.96.3.4", "10.244.1.2"), (true, "fd00:10:96::304", "fd00:10:244::2")]
    {
        let port = ports[0].in_family(v6).expect("both families");
        assert_eq!(port.cluster_ips, [ip.parse::<IpAddr>().expect("address")]);
        let ips: Vec<_> = port.pool(false).iter().map(|one| one.ip.to_string()).collect();
        assert_eq!(ips, [endpoint]);
    }
    let four = web(json!({"clusterIP": "10.96.3.4", "ports": [{"name": "http", "port": 80}]}));
    assert_eq!(self::ports(&[four], &slices)[0].in_family(true), None);
}

/// Who serves clients of node-1 in zone a.
fn preferred(hints: [serde_json::Value; 3]) -> Vec<String> {
    let service = web(json!({"clusterIP": "10.96.3.4", "ports": [{"name": "http", "port": 80}]}));
    let endpoints = hints
        .into_iter()
        .enumerate()
        .map(|(index, hints)| json!({"addresses": [format!("10.244.{index}.2")], "hints": hints}));
    let slice = web_slice("a", endpoints.collect());
    let ports = ports(&[service], &[slice]);
    ports[0].pool(false).iter().map(|one| one.ip.to_string()).collect()
}

#[test]
fn hints_are_followed_if_all_have_some_and_some_name_us() {
    let zone = |name: &str| json!({"forZones": [{"name": name}]});
    let node = |name: &str, zone: &str| json!({"forNodes": [{"name": name}], "forZones": [{"name": zone}]});
    let all = ["10.244.0.2", "10.244.1.2", "10.244.2.2"];
    assert_eq!(preferred([zone("a"), zone("b"), zone("a")]), ["10.244.0.2", "10.244.2.2"]);
    assert_eq!(preferred([zone("b"), zone("b"), zone("c")]), all, "none is for us");
    assert_eq!(preferred([zone("a"), json!(null), zone("b")]), all, "one has no hint");
    let here = [node("node-1", "a"), node("node-2", "a"), node("node-3", "b")];
    assert_eq!(preferred(here), ["10.244.0.2"]);
    let not_here = [node("node-4", "a"), node("node-2", "a"), node("node-3", "b")];
    assert_eq!(preferred(not_here), ["10.244.0.2", "10.244.1.2"], "the zone instead");
}

#[test]
fn a_load_balancers_addresses_and_ranges_are_told_apart_from_external_ips() {
    let service = service(json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.3.4",
            "externalIPs": ["198.51.100.7"],
            "loadBalancerSourceRanges": ["192.0.2.0/24", " 2001:db8::/32 "],
            "ports": [{"port": 80}],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.8"},
            {"ip": "198.51.100.9", "ipMode": "Proxy"},
            {"hostname": "lb.example.org"},
        ]}},
    }));
    let port = &ports(&[service], &[])[0];
    let texts = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&port.external_ips), ["198.51.100.7"]);
    assert_eq!(texts(&port.balancer_ips), ["198.51.100.8"], "a proxy wants to see its traffic");
    assert_eq!(port.source_ranges.len(), 2);
}

#[test]
fn a_health_check_counts_the_pods_of_this_node() {
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIP": "10.96.3.4",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 31000,
        "ports": [{"name": "http", "port": 80}],
    });
    let endpoint = |ip: &str, node: &str, ready: bool| json!({"addresses": [ip], "nodeName": node, "conditions": {"ready": ready}});
    let slice = web_slice(
        "a",
        json!([
            endpoint("10.244.1.2", "node-1", true),
            endpoint("10.244.1.3", "node-1", false),
            endpoint("10.244.2.2", "node-2", true),
        ]),
    );
    let checks = desired_health_checks(&[web(spec.clone())], &[slice], "node-1");
    assert_eq!(checks[&31000].local, 1);
    let mut cluster = spec;
    cluster["externalTrafficPolicy"] = json!("Cluster");
    assert!(desired_health_checks(&[web(cluster)], &[], "node-1").is_empty());
}
