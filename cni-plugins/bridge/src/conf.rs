//! The configuration: as it is written, and as it is meant.

use cni_netlink::{MacBytes, PortVlan, parse_unicast_mac};
use cni_spec::{CniArgs, Dns, Error, IfName, code, first_said, or_default};
use serde::Deserialize;

/// Highest VLAN: 4095 is reserved (IEEE 802.1Q).
const VLAN_MAX: u16 = 4094;
/// The VLAN that the kernel gives to every port of a bridge that filters.
pub(crate) const DEFAULT_VLAN: u16 = 1;
/// Smallest MTU of IPv4 (RFC 791) and largest of a veth.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

/// Network configuration of `type: bridge`, with the keys of the reference plugin.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    /// Name of the bridge.
    pub bridge: String,
    /// The bridge has the gateway's address.
    pub is_gateway: bool,
    /// As `isGateway`, and pods get a default route by it.
    pub is_default_gateway: bool,
    /// Another address of the bridge in the same subnet is replaced instead of being an error.
    pub force_address: bool,
    /// Packets of pods to the outside get the host's address.
    pub ip_masq: bool,
    /// How. What was written for the reference plugin counts, `iptables` as well as `nftables`: the packets fare the same.
    pub ip_masq_backend: Option<String>,
    /// MTU of the bridge and both ends; 0 is the kernel's default.
    pub mtu: u32,
    /// Frames may leave by the port they came in, so that a pod reaches itself through a Service.
    pub hairpin_mode: bool,
    /// The bridge takes all frames.
    pub promisc_mode: bool,
    /// VLAN of the pod's port.
    pub vlan: u16,
    /// VLANs that go to the pod with their tags.
    #[serde(deserialize_with = "or_default")]
    pub vlan_trunk: Vec<TrunkRange>,
    /// The port stays in VLAN 1, too.
    pub preserve_default_vlan: bool,
    /// Frames from the pod with another MAC than its own are dropped.
    pub macspoofchk: bool,
    /// IPv6 addresses wait for duplicate address detection.
    pub enabledad: bool,
    /// The pod's interface stays down.
    pub disable_container_interface: bool,
    /// Pods cannot talk to each other over the bridge.
    pub port_isolation: bool,
    /// Where addresses come from; none is pure layer 2.
    #[serde(deserialize_with = "or_default")]
    pub ipam: IpamConf,
    /// Name service for the result.
    #[serde(deserialize_with = "or_default")]
    pub dns: Dns,
    /// `args.cni` of the runtime.
    #[serde(deserialize_with = "or_default")]
    pub args: Args,
    /// Capability arguments.
    #[serde(deserialize_with = "or_default")]
    pub runtime_config: MacArg,
}

impl Default for NetConf {
    fn default() -> Self {
        Self {
            bridge: "cni0".to_owned(),
            is_gateway: false,
            is_default_gateway: false,
            force_address: false,
            ip_masq: false,
            ip_masq_backend: None,
            mtu: 0,
            hairpin_mode: false,
            promisc_mode: false,
            vlan: 0,
            vlan_trunk: Vec::new(),
            preserve_default_vlan: true,
            macspoofchk: false,
            enabledad: false,
            disable_container_interface: false,
            port_isolation: false,
            ipam: IpamConf::default(),
            dns: Dns::default(),
            args: Args::default(),
            runtime_config: MacArg::default(),
        }
    }
}

/// One entry of `vlanTrunk`: a VLAN, or a range of them.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct TrunkRange {
    /// A VLAN.
    pub id: Option<u16>,
    /// The first of a range.
    #[serde(rename = "minID")]
    pub min: Option<u16>,
    /// The last of a range.
    #[serde(rename = "maxID")]
    pub max: Option<u16>,
}

/// The part of `ipam` that is for this plugin.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct IpamConf {
    /// Name of the IPAM plugin.
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub plugin: String,
}

/// `args`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Args {
    /// `args.cni`.
    #[serde(deserialize_with = "or_default")]
    pub cni: MacArg,
}

/// A place where a MAC may be asked for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct MacArg {
    /// The MAC, or empty.
    #[serde(deserialize_with = "or_default")]
    pub mac: String,
}

/// What the configuration means; holds only what can be done.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) bridge: IfName,
    pub(crate) gateway: bool,
    pub(crate) default_gateway: bool,
    pub(crate) force_address: bool,
    pub(crate) masquerade: bool,
    pub(crate) mtu: Option<u32>,
    pub(crate) hairpin: bool,
    pub(crate) promiscuous: bool,
    /// VLANs of the pod's port; empty if the bridge is not to filter.
    pub(crate) vlans: Vec<PortVlan>,
    /// VLAN that the bridge's own address is in, and the link that has it.
    pub(crate) gateway_vlan: Option<(u16, IfName)>,
    pub(crate) drop_default_vlan: bool,
    pub(crate) check_spoofing: bool,
    pub(crate) detect_duplicates: bool,
    pub(crate) keep_down: bool,
    pub(crate) isolated: bool,
    pub(crate) mac: Option<MacBytes>,
    /// Name of the IPAM plugin; `None` is pure layer 2.
    pub(crate) ipam: Option<String>,
    pub(crate) dns: Dns,
}

fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

impl NetConf {
    /// Checks values and combinations.
    ///
    /// # Errors
    /// Code 7 for what makes no sense, code 2 for what this plugin does not do.
    pub(crate) fn settings(&self, args: &CniArgs) -> Result<Settings, Error> {
        let bridge = IfName::new(self.bridge.as_str())
            .map_err(|error| invalid(format!("\"bridge\": {error}")))?;
        if self.hairpin_mode && self.promisc_mode {
            return Err(invalid("\"hairpinMode\" and \"promiscMode\" exclude each other"));
        }
        if self.disable_container_interface && !self.ipam.plugin.is_empty() {
            return Err(invalid(
                "\"disableContainerInterface\" is true, and an interface that is down has no \"ipam\"",
            ));
        }
        if self.mtu != 0 && !MTU_RANGE.contains(&self.mtu) {
            return Err(invalid(format!(
                "\"mtu\" is {} and has to be 0 or from {} to {}",
                self.mtu,
                MTU_RANGE.start(),
                MTU_RANGE.end()
            )));
        }
        match self.ip_masq_backend.as_deref() {
            None | Some("" | "nftables" | "iptables") => {}
            Some(other) => {
                let msg = format!(
                    "\"ipMasqBackend\" is \"{other}\" and has to be \"nftables\" or \"iptables\""
                );
                return Err(Error::new(code::UNSUPPORTED_FIELD, msg));
            }
        }
        let vlans = self.port_vlans()?;
        let gateway = self.is_gateway || self.is_default_gateway;
        let gateway_vlan = match self.vlan {
            vlan if vlan != 0 && gateway => {
                let name = IfName::new(format!("{bridge}.{vlan}")).map_err(|error| {
                    invalid(format!("name of the gateway of \"vlan\" {vlan}: {error}"))
                })?;
                Some((vlan, name))
            }
            _ => None,
        };
        Ok(Settings {
            bridge,
            gateway,
            default_gateway: self.is_default_gateway,
            force_address: self.force_address,
            masquerade: self.ip_masq,
            mtu: (self.mtu != 0).then_some(self.mtu),
            hairpin: self.hairpin_mode,
            promiscuous: self.promisc_mode,
            drop_default_vlan: !self.preserve_default_vlan
                && vlans.iter().all(|vlan| vlan.id != DEFAULT_VLAN),
            vlans,
            gateway_vlan,
            check_spoofing: self.macspoofchk,
            detect_duplicates: self.enabledad,
            keep_down: self.disable_container_interface,
            isolated: self.port_isolation,
            mac: self.asked_mac(args)?,
            ipam: Some(self.ipam.plugin.clone()).filter(|plugin| !plugin.is_empty()),
            dns: self.dns.clone(),
        })
    }

    fn port_vlans(&self) -> Result<Vec<PortVlan>, Error> {
        if self.vlan > VLAN_MAX {
            return Err(invalid(format!(
                "\"vlan\" is {} and has to be from 0 to {VLAN_MAX}",
                self.vlan
            )));
        }
        let mut vlans: Vec<PortVlan> =
            (self.vlan != 0).then(|| PortVlan::access(self.vlan)).into_iter().collect();
        for range in &self.vlan_trunk {
            let wrong = |why: &str| invalid(format!("\"vlanTrunk\": {why}"));
            let (first, last) = match (range.id, range.min, range.max) {
                (Some(id), None, None) => (id, id),
                (None, Some(min), Some(max)) if min <= max => (min, max),
                (None, Some(_), Some(_)) => return Err(wrong("\"minID\" is above \"maxID\"")),
                (Some(_), _, _) => {
                    return Err(wrong("an entry has either \"id\" or \"minID\" and \"maxID\""));
                }
                (None, _, _) => {
                    return Err(wrong("an entry needs \"id\", or \"minID\" and \"maxID\""));
                }
            };
            if first == 0 || last > VLAN_MAX {
                return Err(wrong(&format!("{first} to {last} is not within 1 to {VLAN_MAX}")));
            }
            for id in first..=last {
                if vlans.iter().all(|vlan| vlan.id != id) {
                    vlans.push(PortVlan::tagged(id));
                }
            }
        }
        Ok(vlans)
    }

    /// `runtimeConfig.mac`, else `args.cni.mac`, else `MAC` of `CNI_ARGS`.
    fn asked_mac(&self, args: &CniArgs) -> Result<Option<MacBytes>, Error> {
        let places = [
            ("\"runtimeConfig.mac\"", Some(self.runtime_config.mac.as_str()), code::INVALID_CONFIG),
            ("\"args.cni.mac\"", Some(self.args.cni.mac.as_str()), code::INVALID_CONFIG),
            ("CNI_ARGS: MAC", args.get("MAC"), code::INVALID_ENVIRONMENT),
        ];
        first_said(&places, "the MAC of one interface", parse_unicast_mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings, Error> {
        serde_json::from_str::<NetConf>(text).expect("JSON").settings(&CniArgs::default())
    }

    #[test]
    fn nothing_said_is_a_plain_bridge_cni0() {
        let plain = settings(r#"{"ipam":null,"args":null,"vlanTrunk":null}"#).expect("good");
        assert_eq!(plain.bridge.as_str(), "cni0");
        assert!(
            !plain.gateway && plain.ipam.is_none() && plain.mtu.is_none() && plain.vlans.is_empty()
        );
    }

    #[test]
    fn a_default_gateway_is_a_gateway() {
        assert!(settings(r#"{"isDefaultGateway":true}"#).expect("good").gateway);
    }

    #[test]
    fn what_makes_no_sense_or_is_not_done_is_refused() {
        let code_of = |text: &str| settings(text).expect_err(text).code;
        for wrong in [
            r#"{"bridge":"name-that-is-too-long"}"#,
            r#"{"bridge":""}"#,
            r#"{"hairpinMode":true,"promiscMode":true}"#,
            r#"{"disableContainerInterface":true,"ipam":{"type":"host-local"}}"#,
            r#"{"mtu":20}"#,
            r#"{"mtu":70000}"#,
            r#"{"vlan":4095}"#,
            r#"{"vlanTrunk":[{}]}"#,
            r#"{"vlanTrunk":[{"minID":5}]}"#,
            r#"{"vlanTrunk":[{"minID":5,"maxID":4}]}"#,
            r#"{"vlanTrunk":[{"id":5,"minID":4,"maxID":6}]}"#,
            r#"{"vlanTrunk":[{"id":0}]}"#,
            r#"{"vlanTrunk":[{"minID":5,"maxID":4095}]}"#,
            r#"{"vlan":100,"isGateway":true,"bridge":"a-long-bridge"}"#,
            r#"{"runtimeConfig":{"mac":"01:00:5e:00:00:01"}}"#,
            r#"{"args":{"cni":{"mac":"1:2:3:4:5:6"}}}"#,
        ] {
            assert_eq!(code_of(wrong), code::INVALID_CONFIG, "{wrong}");
        }
        assert_eq!(code_of(r#"{"ipMasqBackend":"pf"}"#), code::UNSUPPORTED_FIELD);
        settings(r#"{"ipMasqBackend":"iptables"}"#).expect("as written for the reference");
    }

    #[test]
    fn vlans_of_a_port_are_the_access_vlan_and_the_trunk() {
        let conf = r#"{"vlan":100,"vlanTrunk":[{"id":101},{"minID":200,"maxID":202},{"id":100}],"preserveDefaultVlan":false}"#;
        let got = settings(conf).expect("good");
        assert_eq!(got.vlans[0], PortVlan::access(100));
        assert_eq!(
            got.vlans[1..].iter().map(|vlan| vlan.id).collect::<Vec<_>>(),
            [101, 200, 201, 202]
        );
        assert!(got.drop_default_vlan);
        assert!(
            !settings(r#"{"vlan":1,"preserveDefaultVlan":false}"#).expect("good").drop_default_vlan
        );
    }

    #[test]
    fn the_mac_is_taken_from_the_first_place_that_has_one() {
        let args = CniArgs::parse("MAC=02:00:00:00:00:03").expect("good");
        let mac = |text: &str| {
            serde_json::from_str::<NetConf>(text).expect("JSON").settings(&args).expect("good").mac
        };
        assert_eq!(
            mac(
                r#"{"runtimeConfig":{"mac":"02-00-00-00-00-01"},"args":{"cni":{"mac":"02:00:00:00:00:02"}}}"#
            ),
            Some([2, 0, 0, 0, 0, 1])
        );
        assert_eq!(
            mac(r#"{"args":{"cni":{"mac":"02:00:00:00:00:02"}}}"#),
            Some([2, 0, 0, 0, 0, 2])
        );
        assert_eq!(mac("{}"), Some([2, 0, 0, 0, 0, 3]));
    }
}
