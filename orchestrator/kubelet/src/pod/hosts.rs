//! `/etc/hosts` and `/etc/resolv.conf` of a pod, as text.

use std::fmt::Write as _;
use std::net::IpAddr;

use orch_api::k8s_openapi::api::core::v1::Pod;

use crate::api;

/// glibc and the kubelet both stop at three servers.
const MAX_SERVERS: usize = 3;
/// Longest list of search domains (kubelet's limit).
const MAX_SEARCHES: usize = 32;

/// The cluster's DNS as pods are told about it.
#[derive(Debug, Clone)]
pub(crate) struct ClusterDns {
    pub(crate) ip: IpAddr,
    pub(crate) ip_v6: Option<IpAddr>,
    pub(crate) domain: String,
}

impl ClusterDns {
    /// The server that a pod with these addresses can reach.
    fn server(&self, ips: &[IpAddr]) -> IpAddr {
        let ipv6_alone = !ips.is_empty() && ips.iter().all(IpAddr::is_ipv6);
        self.ip_v6.filter(|_| ipv6_alone).unwrap_or(self.ip)
    }
}

/// The name a pod knows itself by.
pub(crate) fn hostname(pod: &Pod) -> String {
    let spec = api::spec(pod);
    let name = spec
        .hostname
        .filter(|name| !name.is_empty())
        .or_else(|| pod.metadata.name.clone())
        .unwrap_or_default();
    // A label of DNS holds 63 characters, and Linux 64 in a host name.
    let mut cut: String = name.chars().take(63).collect();
    while cut.ends_with(['-', '.']) {
        cut.pop();
    }
    cut
}

/// The managed hosts file. A pod in the node's own network gets the node's entries.
pub(crate) fn hosts_file(pod: &Pod, ips: &[IpAddr], dns: &ClusterDns, node_hosts: &str) -> String {
    let spec = api::spec(pod);
    let mut text = "# Kubernetes-managed hosts file.\n".to_owned();
    if api::is_host_network(pod) {
        text.push_str(node_hosts);
        if !text.ends_with('\n') {
            text.push('\n');
        }
    } else {
        text.push_str("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        text.push_str("fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n");
        let name = hostname(pod);
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for ip in ips {
            let _ = match spec.subdomain.as_deref().filter(|domain| !domain.is_empty()) {
                Some(subdomain) => writeln!(
                    text,
                    "{ip}\t{name}.{subdomain}.{namespace}.svc.{}\t{name}",
                    dns.domain
                ),
                None => writeln!(text, "{ip}\t{name}"),
            };
        }
    }
    if let Some(aliases) = spec.host_aliases.filter(|aliases| !aliases.is_empty()) {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let _ =
                writeln!(text, "{}\t{}", alias.ip, alias.hostnames.unwrap_or_default().join("\t"));
        }
    }
    text
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Resolver {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

impl Resolver {
    fn parse(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => all.servers.extend(words.next()),
                Some("search") => all.searches = words.collect(),
                Some("options") => all.options.extend(words),
                _ => {}
            }
        }
        all
    }

    fn render(&self) -> String {
        let mut text = String::new();
        for server in self.servers.iter().take(MAX_SERVERS) {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !self.searches.is_empty() {
            let few: Vec<_> = self.searches.iter().take(MAX_SEARCHES).map(String::as_str).collect();
            let _ = writeln!(text, "search {}", few.join(" "));
        }
        if !self.options.is_empty() {
            let _ = writeln!(text, "options {}", self.options.join(" "));
        }
        text
    }
}

/// The resolver configuration by the pod's `dnsPolicy` and `dnsConfig`.
pub(crate) fn resolv_conf(
    pod: &Pod,
    ips: &[IpAddr],
    dns: &ClusterDns,
    node_resolv: &str,
) -> String {
    let spec = api::spec(pod);
    let policy = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        // The node's network has the node's resolver, unless the other is asked for by name.
        "ClusterFirst" if api::is_host_network(pod) => "Default",
        other => other,
    };
    let mut resolver = match policy {
        "None" => Resolver::default(),
        "Default" => Resolver::parse(node_resolv),
        _ => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let domain = &dns.domain;
            let mut searches =
                vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
            searches.extend(
                Resolver::parse(node_resolv).searches.into_iter().filter(|name| name != "."),
            );
            Resolver {
                servers: vec![dns.server(ips).to_string()],
                searches,
                options: vec!["ndots:5".to_owned()],
            }
        }
    };
    if let Some(extra) = spec.dns_config {
        let add = |list: &mut Vec<String>, more: Option<Vec<String>>| {
            for item in more.unwrap_or_default() {
                if !list.contains(&item) {
                    list.push(item);
                }
            }
        };
        add(&mut resolver.servers, extra.nameservers);
        add(&mut resolver.searches, extra.searches);
        for option in extra.options.unwrap_or_default() {
            let Some(name) = option.name else { continue };
            resolver.options.retain(|known| known.split(':').next() != Some(name.as_str()));
            resolver.options.push(match option.value {
                Some(value) => format!("{name}:{value}"),
                None => name,
            });
        }
    }
    resolver.render()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn dns() -> ClusterDns {
        ClusterDns {
            ip: "10.96.0.10".parse().expect("an address"),
            ip_v6: "fd00:10:96::a".parse().ok(),
            domain: "cluster.local".to_owned(),
        }
    }

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(
            json!({ "metadata": { "name": "web-0", "namespace": "shop" }, "spec": spec }),
        )
        .expect("a pod")
    }

    #[test]
    fn the_cluster_comes_first_with_its_search_domains() {
        let text = resolv_conf(
            &pod(json!({ "containers": [] })),
            &["10.244.1.2".parse().expect("an address")],
            &dns(),
            "nameserver 1.1.1.1\nsearch corp.example\n",
        );
        assert_eq!(
            text,
            "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local corp.example\noptions ndots:5\n"
        );
    }

    #[test]
    fn a_pod_with_ipv6_alone_asks_over_ipv6() {
        let [four, six] =
            ["10.244.1.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().expect("an address"));
        for (ips, server) in
            [(vec![six], "fd00:10:96::a"), (vec![four, six], "10.96.0.10"), (vec![], "10.96.0.10")]
        {
            let text = resolv_conf(&pod(json!({ "containers": [] })), &ips, &dns(), "");
            assert!(text.starts_with(&format!("nameserver {server}\n")), "{ips:?}: {text}");
        }
    }

    #[test]
    fn policies_none_and_default_and_extra_options() {
        let none = pod(json!({ "containers": [], "dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["9.9.9.9"], "searches": ["a.b"], "options": [{ "name": "ndots", "value": "2" }, { "name": "rotate" }],
        } }));
        let text = resolv_conf(&none, &[], &dns(), "");
        assert_eq!(text, "nameserver 9.9.9.9\nsearch a.b\noptions ndots:2 rotate\n");
        let default = pod(json!({ "containers": [], "dnsPolicy": "Default" }));
        assert_eq!(
            resolv_conf(&default, &[], &dns(), "nameserver 1.1.1.1\n"),
            "nameserver 1.1.1.1\n"
        );
        let host = pod(json!({ "containers": [], "hostNetwork": true }));
        assert_eq!(resolv_conf(&host, &[], &dns(), "nameserver 1.1.1.1\n"), "nameserver 1.1.1.1\n");
    }

    #[test]
    fn the_hosts_file_knows_the_pod_and_its_aliases() {
        let pod = pod(json!({ "containers": [], "subdomain": "db",
            "hostAliases": [{ "ip": "10.0.0.1", "hostnames": ["one", "two"] }] }));
        let text = hosts_file(&pod, &["10.244.1.7".parse().expect("an address")], &dns(), "");
        assert!(text.contains("10.244.1.7\tweb-0.db.shop.svc.cluster.local\tweb-0\n"), "{text}");
        assert!(text.contains("10.0.0.1\tone\ttwo\n"), "{text}");
    }
}
