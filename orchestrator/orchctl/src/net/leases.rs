//! The subnet leases as they stand in etcd, read with plain eyes: what does not parse is shown too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, LeaseTimeToLiveOptions, TlsOptions,
};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::Serialize;
use serde_json::Value;

/// One call to etcd, a leader election included.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(5);

/// The network as etcd has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Leases {
    /// The whole pod network.
    pub(super) network: Option<Ipv4Network>,
    /// The same for IPv6.
    pub(super) network_v6: Option<Ipv6Network>,
    /// `vxlan`, `host-gw` …
    pub(super) backend: String,
    /// VXLAN network identifier.
    pub(super) vni: u32,
    /// UDP port.
    pub(super) port: u16,
    /// Whether nodes on one link may do without VXLAN.
    pub(super) direct_routing: bool,
    /// All keys below `subnets/`.
    pub(super) leases: Vec<LeaseView>,
}

/// One key below `subnets/`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LeaseView {
    /// The last part of the key.
    pub(super) key: String,
    /// IPv4 subnet of the node.
    pub(super) subnet: Option<Ipv4Network>,
    /// IPv6 subnet of the node.
    pub(super) subnet_v6: Option<Ipv6Network>,
    /// Its address on the underlay.
    pub(super) public_ip: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub(super) public_ip_v6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw` …; `None` is a reservation.
    pub(super) backend: Option<String>,
    /// VXLAN network identifier.
    pub(super) vni: Option<u32>,
    /// MAC of its VTEP.
    pub(super) vtep_mac: Option<String>,
    /// MAC of its IPv6 VTEP.
    pub(super) vtep_mac_v6: Option<String>,
    /// Seconds that the lease lives without renewal; `None` is for ever.
    pub(super) ttl_secs: Option<i64>,
    /// Seconds that it lives after each renewal.
    pub(super) granted_secs: Option<i64>,
    /// etcd's revision of the last change.
    pub(super) mod_revision: i64,
}

impl Leases {
    /// The lease of the node with this address, VTEP MAC or subnet: an address may be another one from outside.
    pub(super) fn of(
        &self,
        address: Option<Ipv4Addr>,
        mac: Option<&str>,
        subnet: Option<Ipv4Network>,
    ) -> Option<&LeaseView> {
        let find = |fits: &dyn Fn(&LeaseView) -> bool| self.leases.iter().find(|one| fits(one));
        find(&|lease| address.is_some() && lease.public_ip == address)
            .or_else(|| find(&|lease| mac.is_some() && lease.vtep_mac.as_deref() == mac))
            .or_else(|| {
                find(&|lease| subnet.is_some() && lease.subnet == subnet && lease.backend.is_some())
            })
    }
}

impl LeaseView {
    /// Subnet of a family.
    pub(super) fn subnet_of(&self, ipv4: bool) -> Option<IpNetwork> {
        if ipv4 { self.subnet.map(IpNetwork::V4) } else { self.subnet_v6.map(IpNetwork::V6) }
    }

    /// Address on the underlay, of a family.
    pub(super) fn public_ip_of(&self, ipv4: bool) -> Option<IpAddr> {
        if ipv4 { self.public_ip.map(IpAddr::V4) } else { self.public_ip_v6.map(IpAddr::V6) }
    }

    /// MAC of the VTEP of a family.
    pub(super) fn vtep_mac_of(&self, ipv4: bool) -> Option<&str> {
        if ipv4 { self.vtep_mac.as_deref() } else { self.vtep_mac_v6.as_deref() }
    }

    /// Whether packets to it go as they are, without VXLAN.
    pub(super) fn is_host_gw(&self) -> bool {
        self.backend.as_deref() == Some("host-gw")
    }

    /// Whether the node behind it takes part in the overlay.
    pub(super) fn is_vxlan(&self, vni: u32) -> bool {
        self.backend.as_deref() == Some("vxlan") && self.vni.unwrap_or(vni) == vni
    }
}

/// Reads configuration and leases.
///
/// # Errors
/// etcd does not answer, or its certificates cannot be read.
pub(super) async fn read(urls: &[String], pki: &Path, prefix: &str) -> anyhow::Result<Leases> {
    let limit = tokio::time::timeout(CALL_LIMIT, read_all(urls, pki, prefix)).await;
    match limit {
        Ok(outcome) => outcome,
        Err(_) => bail!("etcd at {} does not answer", urls.join(",")),
    }
    .context("read the subnet leases")
}

/// A client; etcd itself is first met by the first call.
///
/// # Errors
/// Its certificates cannot be read.
pub(super) async fn connect(urls: &[String], pki: &Path) -> anyhow::Result<Client> {
    let mut options = ConnectOptions::new().with_connect_timeout(CALL_LIMIT);
    if urls.iter().any(|url| url.starts_with("https://")) {
        let file = |name: &str| {
            let path = pki.join(name);
            std::fs::read(&path).with_context(|| format!("read {}", path.display()))
        };
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(file("etcd-ca.crt")?))
            .identity(Identity::from_pem(file("etcd-client.crt")?, file("etcd-client.key")?));
        options = options.with_tls(tls);
    }
    Client::connect(urls, Some(options)).await.context("connect to etcd")
}

async fn read_all(urls: &[String], pki: &Path, prefix: &str) -> anyhow::Result<Leases> {
    let mut client = connect(urls, pki).await?;
    let config = client.get(format!("{prefix}/config"), None).await?;
    let mut leases = config.kvs().first().map(|kv| parse_config(kv.value())).unwrap_or_default();
    let folder = format!("{prefix}/subnets/");
    let found = client.get(folder.clone(), Some(GetOptions::new().with_prefix())).await?;
    for kv in found.kvs() {
        let key = String::from_utf8_lossy(kv.key());
        let key = key.strip_prefix(&folder).unwrap_or(&key);
        let mut view = parse_lease(key, kv.value());
        view.mod_revision = kv.mod_revision();
        if kv.lease() != 0 {
            // One call a key is right for a command that a person runs now and then, and only for that.
            let life =
                client.lease_time_to_live(kv.lease(), None::<LeaseTimeToLiveOptions>).await?;
            view.ttl_secs = Some(life.ttl());
            view.granted_secs = Some(life.granted_ttl());
        }
        leases.leases.push(view);
    }
    Ok(leases)
}

/// Reads flannel's configuration, with flannel's defaults. Pure.
pub(super) fn parse_config(json: &[u8]) -> Leases {
    let config: Value = serde_json::from_slice(json).unwrap_or_default();
    let backend = field(&config, "Backend");
    let number = |name: &str| field(backend, name).as_u64();
    let network = |name: &str| field(&config, name).as_str();
    let dual_stack = field(&config, "EnableIPv6").as_bool() == Some(true);
    Leases {
        network: network("Network").and_then(|text| text.parse().ok()),
        network_v6: network("IPv6Network")
            .filter(|_| dual_stack)
            .and_then(|text| text.parse().ok()),
        backend: field(backend, "Type").as_str().unwrap_or("udp").to_owned(),
        vni: number("VNI")
            .and_then(|vni| u32::try_from(vni).ok())
            .unwrap_or(orch_config::VXLAN_VNI),
        port: number("Port")
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port != 0)
            .unwrap_or(orch_config::VXLAN_PORT),
        direct_routing: field(backend, "DirectRouting").as_bool() == Some(true),
        leases: Vec::new(),
    }
}

/// A field whatever the case of its name, as flannel's decoder has it.
fn field<'a>(object: &'a Value, name: &str) -> &'a Value {
    let found = object.as_object().and_then(|fields| {
        fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    });
    found.unwrap_or(&Value::Null)
}

/// Reads one key and its value. Pure.
pub(super) fn parse_lease(key: &str, json: &[u8]) -> LeaseView {
    let value: Value = serde_json::from_slice(json).unwrap_or_default();
    let subnets: Vec<String> = key
        .split('&')
        .filter_map(|part| part.rsplit_once('-').map(|(ip, len)| format!("{ip}/{len}")))
        .collect();
    let text = |name: &str| value[name].as_str();
    // A node without IPv4 has its VXLAN data in the other field.
    let data = match &value["BackendData"] {
        Value::Null => &value["BackendV6Data"],
        data => data,
    };
    LeaseView {
        key: key.to_owned(),
        subnet: subnets.iter().find_map(|subnet| subnet.parse().ok()),
        subnet_v6: subnets.iter().find_map(|subnet| subnet.parse().ok()),
        public_ip: text("PublicIP").and_then(|text| text.parse().ok()),
        public_ip_v6: text("PublicIPv6").and_then(|text| text.parse().ok()),
        backend: text("BackendType").map(str::to_owned),
        vni: data["VNI"].as_u64().and_then(|vni| u32::try_from(vni).ok()),
        vtep_mac: data["VtepMAC"].as_str().map(str::to_lowercase),
        vtep_mac_v6: value["BackendV6Data"]["VtepMAC"].as_str().map(str::to_lowercase),
        ..LeaseView::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_keys_and_values_are_read() {
        let view = parse_lease(
            "10.5.52.0-24&fc00:0:0:3::-64",
            br#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"AA:bb:cc:00:11:22"}}"#,
        );
        assert_eq!(view.subnet.map(|subnet| subnet.to_string()).as_deref(), Some("10.5.52.0/24"));
        assert_eq!(view.subnet_v6, "fc00:0:0:3::/64".parse().ok());
        assert_eq!(view.public_ip, Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(view.vtep_mac.as_deref(), Some("aa:bb:cc:00:11:22"));
        assert!(view.is_vxlan(1) && !view.is_vxlan(7));
    }

    #[test]
    fn what_is_damaged_is_shown_and_not_dropped() {
        let view = parse_lease("nonsense", b"{");
        assert_eq!(view.key, "nonsense");
        assert_eq!((view.subnet, view.public_ip, view.backend), (None, None, None));
    }

    #[test]
    fn a_configuration_has_flannels_defaults() {
        let config =
            parse_config(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Port":0}}"#);
        assert_eq!((config.vni, config.port), (1, 8472));
        assert!(!config.direct_routing);
        assert_eq!(parse_config(b"{}").backend, "udp");
        let direct = parse_config(
            br#"{"network":"10.244.0.0/16","backend":{"type":"vxlan","directRouting":true}}"#,
        );
        assert!(direct.direct_routing && direct.network.is_some(), "case does not matter");
    }
}
