use std::sync::Arc;

use hickory_proto::op::Query;
use k8s_openapi::api::core::v1::Namespace;
use serde_json::json;

use super::super::zone::desired_zone;
use super::*;
use crate::services::model::SERVICE_NAME;
use crate::services::model::tests::{service, slice};

fn domain() -> Domain {
    Domain {
        name: "cluster.local".to_owned(),
        dns_ips: vec![[10, 96, 0, 10].into(), "fd00:10:96::a".parse().expect("address")],
        networks: vec![
            "10.96.0.0/12".parse().expect("CIDR"),
            "10.244.0.0/16".parse().expect("CIDR"),
            "fd00:10:96::/112".parse().expect("CIDR"),
        ],
    }
}

fn zone() -> Zone {
    let namespace = |name: &str| -> Arc<Namespace> {
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}})).expect("a Namespace"))
    };
    let named = |name: &str, spec: serde_json::Value| {
        service(json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec}))
    };
    let services = [
        named(
            "web",
            json!({
                "clusterIP": "10.96.3.4",
                "ports": [{"name": "http", "port": 80}, {"port": 81}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            }),
        ),
        named(
            "both",
            json!({
                "clusterIP": "10.96.3.6",
                "clusterIPs": ["10.96.3.6", "fd00:10:96::36"],
                "ports": [{"name": "http", "port": 80}],
            }),
        ),
        named("db", json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]})),
        named("six", json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]})),
        named("empty", json!({"clusterIP": "None"})),
        named("out", json!({"type": "ExternalName", "externalName": "www.example.org"})),
        named(
            "alias",
            json!({"type": "ExternalName", "externalName": "web.default.svc.cluster.local"}),
        ),
        named(
            "circle",
            json!({"type": "ExternalName", "externalName": "circle.default.svc.cluster.local"}),
        ),
    ];
    let slices = [slice(json!({
        "metadata": {"name": "db-1", "namespace": "default", "labels": {SERVICE_NAME: "db"}},
        "addressType": "IPv4",
        "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": ["10.244.1.7"], "hostname": "db-0"},
            {"addresses": ["10.244.2.8"]},
            {"addresses": ["10.244.2.9"], "conditions": {"ready": false}},
        ],
    }))];
    let slices = [
        slices[0].clone(),
        slice(json!({
            "metadata": {"name": "six-1", "namespace": "default", "labels": {SERVICE_NAME: "six"}},
            "addressType": "IPv6",
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["fd00:10:244:2::8"]}],
        })),
    ];
    desired_zone(&services, &slices, &[namespace("default"), namespace("lonely")])
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_str(name).expect(name), kind));
    query
}

fn ask(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
    match answer(&query(name, kind), &domain(), Some(&zone())) {
        Outcome::Done(response) => {
            let answers = response.answers.iter().map(|record| record.data.to_string()).collect();
            (response.metadata.response_code, answers)
        }
        other => panic!("{name} is ours, not {other:?}"),
    }
}

#[track_caller]
fn check(name: &str, kind: RecordType, code: ResponseCode, answers: &[&str]) {
    let (seen_code, seen) = ask(name, kind);
    assert_eq!(
        (seen_code, seen.iter().map(String::as_str).collect::<Vec<_>>()),
        (code, answers.to_vec()),
        "{name}"
    );
}

use ResponseCode::{NXDomain, NoError};

#[test]
fn services_have_their_cluster_ip_in_any_case() {
    check("web.default.svc.cluster.local.", RecordType::A, NoError, &["10.96.3.4"]);
    check("WEB.Default.svc.CLUSTER.local.", RecordType::A, NoError, &["10.96.3.4"]);
}

#[test]
fn what_exists_without_the_type_is_no_data_and_what_does_not_exist_is_nxdomain() {
    for name in [
        "web.default.svc.cluster.local.",
        "_tcp.web.default.svc.cluster.local.",
        "lonely.svc.cluster.local.",
        "svc.cluster.local.",
        "db-0.db.default.svc.cluster.local.",
    ] {
        check(name, RecordType::AAAA, NoError, &[]);
    }
    for name in [
        "nobody.default.svc.cluster.local.",
        "web.nowhere.svc.cluster.local.",
        "nowhere.svc.cluster.local.",
        "x.web.default.svc.cluster.local.",
        "_http._udp.web.default.svc.cluster.local.",
        "empty.default.svc.cluster.local.",
        "example.org.cluster.local.",
    ] {
        check(name, RecordType::A, NXDomain, &[]);
    }
}

#[test]
fn a_denial_carries_the_soa_that_limits_it() {
    for name in ["nobody.default.svc.cluster.local.", "lonely.svc.cluster.local."] {
        let Outcome::Done(response) = answer(&query(name, RecordType::A), &domain(), Some(&zone()))
        else {
            panic!("{name} is ours");
        };
        assert!(matches!(&response.authorities[0].data, RData::SOA(soa) if soa.minimum == 5));
        assert!(response.metadata.authoritative);
    }
}

#[test]
fn headless_services_have_their_ready_endpoints_and_hostnames() {
    check("db.default.svc.cluster.local.", RecordType::A, NoError, &["10.244.1.7", "10.244.2.8"]);
    check("db-0.db.default.svc.cluster.local.", RecordType::A, NoError, &["10.244.1.7"]);
    check("10-244-2-8.db.default.svc.cluster.local.", RecordType::A, NoError, &["10.244.2.8"]);
    check("10-244-2-9.db.default.svc.cluster.local.", RecordType::A, NXDomain, &[]);
}

#[test]
fn named_ports_have_srv_records() {
    check(
        "_http._tcp.web.default.svc.cluster.local.",
        RecordType::SRV,
        NoError,
        &["0 100 80 web.default.svc.cluster.local."],
    );
    check(
        "_sql._tcp.db.default.svc.cluster.local.",
        RecordType::SRV,
        NoError,
        &[
            "0 50 5432 db-0.db.default.svc.cluster.local.",
            "0 50 5432 10-244-2-8.db.default.svc.cluster.local.",
        ],
    );
}

#[test]
fn addresses_have_names_and_strangers_are_forwarded() {
    check("4.3.96.10.in-addr.arpa.", RecordType::PTR, NoError, &["web.default.svc.cluster.local."]);
    check(
        "7.1.244.10.in-addr.arpa.",
        RecordType::PTR,
        NoError,
        &["db-0.db.default.svc.cluster.local."],
    );
    check("9.9.96.10.in-addr.arpa.", RecordType::PTR, NXDomain, &[]);
    for name in ["8.8.8.8.in-addr.arpa.", "example.org.", "local."] {
        assert!(
            matches!(
                answer(&query(name, RecordType::A), &domain(), Some(&zone())),
                Outcome::Forward
            ),
            "{name}"
        );
    }
}

#[test]
fn external_names_are_aliases_followed_inside_and_out() {
    check(
        "alias.default.svc.cluster.local.",
        RecordType::A,
        NoError,
        &["web.default.svc.cluster.local.", "10.96.3.4"],
    );
    let outside =
        answer(&query("out.default.svc.cluster.local.", RecordType::A), &domain(), Some(&zone()));
    assert!(
        matches!(outside, Outcome::Chase(_, target) if target.to_string() == "www.example.org.")
    );
    check("out.default.svc.cluster.local.", RecordType::CNAME, NoError, &["www.example.org."]);
    let (code, _) = ask("circle.default.svc.cluster.local.", RecordType::A);
    assert_eq!(code, ResponseCode::ServFail);
}

#[test]
fn pods_and_the_version_have_names() {
    check("10-244-1-7.default.pod.cluster.local.", RecordType::A, NoError, &["10.244.1.7"]);
    check("10-244-1-7.nowhere.pod.cluster.local.", RecordType::A, NXDomain, &[]);
    check("10-244-1.default.pod.cluster.local.", RecordType::A, NXDomain, &[]);
    check("dns-version.cluster.local.", RecordType::TXT, NoError, &["1.1.0"]);
}

#[test]
fn an_unknown_cluster_fails_instead_of_denying() {
    let outcome = answer(&query("web.default.svc.cluster.local.", RecordType::A), &domain(), None);
    assert!(
        matches!(outcome, Outcome::Done(response) if response.metadata.response_code == ResponseCode::ServFail)
    );
}

#[test]
fn an_answer_that_does_not_fit_is_cut_and_says_so() {
    let asked = query("db.default.svc.cluster.local.", RecordType::A);
    let mut response = response_to(&asked);
    let name = asked.queries[0].name().clone();
    response.add_answers(
        (0..100)
            .map(|last| Record::from_rdata(name.clone(), 5, RData::A(A::new(10, 244, 9, last)))),
    );
    let cut =
        Message::from_vec(&encode(&response, &asked, false).expect("encodes")).expect("decodes");
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole =
        Message::from_vec(&encode(&response, &asked, true).expect("encodes")).expect("decodes");
    assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, 100));
}

#[test]
fn unknown_versions_and_operations_are_refused_by_their_codes() {
    let mut newer = query("web.default.svc.cluster.local.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    newer.set_edns(edns);
    let outcome = answer(&newer, &domain(), Some(&zone()));
    assert!(
        matches!(outcome, Outcome::Done(response) if response.metadata.response_code == ResponseCode::BADVERS)
    );
    let mut update = query("web.default.svc.cluster.local.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    let outcome = answer(&update, &domain(), Some(&zone()));
    assert!(
        matches!(outcome, Outcome::Done(response) if response.metadata.response_code == ResponseCode::NotImp)
    );
}

#[test]
fn ipv6_addresses_have_names_both_ways() {
    use RecordType::{A, AAAA, ANY, PTR, SRV};
    check("both.default.svc.cluster.local.", A, NoError, &["10.96.3.6"]);
    check("both.default.svc.cluster.local.", AAAA, NoError, &["fd00:10:96::36"]);
    check("both.default.svc.cluster.local.", ANY, NoError, &["10.96.3.6", "fd00:10:96::36"]);
    check("ns.dns.cluster.local.", AAAA, NoError, &["fd00:10:96::a"]);
    check("six.default.svc.cluster.local.", AAAA, NoError, &["fd00:10:244:2::8"]);
    let own = "fd00-10-244-2--8.six.default.svc.cluster.local.";
    check(own, AAAA, NoError, &["fd00:10:244:2::8"]);
    check("fd00-10-244-2--8.default.pod.cluster.local.", AAAA, NoError, &["fd00:10:244:2::8"]);
    check("fd00-10-244-2--8.default.pod.cluster.local.", A, NoError, &[]);
    let arpa = |ip: &str| Name::from(ip.parse::<std::net::Ipv6Addr>().expect("address"));
    check(&arpa("fd00:10:96::36").to_string(), PTR, NoError, &["both.default.svc.cluster.local."]);
    check(&arpa("fd00:10:244:2::8").to_string(), PTR, NoError, &[own]);
    check(&arpa("fd00:10:96::99").to_string(), PTR, NXDomain, &[]);
    let name = "_http._tcp.both.default.svc.cluster.local.";
    let Outcome::Done(response) = answer(&query(name, SRV), &domain(), Some(&zone())) else {
        panic!("ours");
    };
    let glue: Vec<_> = response.additionals.iter().map(|one| one.data.to_string()).collect();
    assert_eq!(glue, ["10.96.3.6", "fd00:10:96::36"]);
}
