//! The configuration: as it is written, and as it is meant.

use cni_netlink::TokenBucket;
use cni_spec::{Error, code, or_default};
use serde::Deserialize;
use serde_json::Value;

/// How long a packet may wait at most, in milliseconds; what would wait longer is dropped.
const LATENCY_MS: u64 = 25;

/// Network configuration of `type: bandwidth`, with the keys of the reference plugin. Ingress is to the container, egress
/// from it. The values of the configuration count before those of the runtime.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    /// Rates for every container of the network.
    #[serde(flatten)]
    pub rates: Rates,
    /// Capability arguments.
    #[serde(deserialize_with = "or_default")]
    pub runtime_config: RuntimeConfig,
    /// Networks that are not shaped; a later invention of the reference that is not known here.
    pub unshaped_subnets: Option<Value>,
    /// The only networks that are shaped; likewise.
    pub shaped_subnets: Option<Value>,
}

/// `runtimeConfig`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// Rates for this container.
    #[serde(deserialize_with = "or_default")]
    pub bandwidth: Rates,
}

/// Rates in bits a second, bursts in bits; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rates {
    /// To the container.
    #[serde(deserialize_with = "or_default")]
    pub ingress_rate: i64,
    /// To the container.
    #[serde(deserialize_with = "or_default")]
    pub ingress_burst: i64,
    /// From the container.
    #[serde(deserialize_with = "or_default")]
    pub egress_rate: i64,
    /// From the container.
    #[serde(deserialize_with = "or_default")]
    pub egress_burst: i64,
}

/// What the configuration means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// To the container.
    pub(crate) ingress: Option<TokenBucket>,
    /// From the container.
    pub(crate) egress: Option<TokenBucket>,
}

impl Limits {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl NetConf {
    pub(crate) fn limits(&self) -> Result<Limits, Error> {
        for (key, value) in
            [("unshapedSubnets", &self.unshaped_subnets), ("shapedSubnets", &self.shaped_subnets)]
        {
            if let Some(value) = value.as_ref().filter(|value| !is_empty(value)) {
                let msg = format!("\"{key}\" is {value}; this plugin shapes all traffic alike");
                return Err(Error::new(code::UNSUPPORTED_FIELD, msg));
            }
        }
        let rates =
            if self.rates == Rates::default() { self.runtime_config.bandwidth } else { self.rates };
        Ok(Limits {
            ingress: bucket("ingress", rates.ingress_rate, rates.ingress_burst)?,
            egress: bucket("egress", rates.egress_rate, rates.egress_burst)?,
        })
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

fn bucket(direction: &str, rate: i64, burst: i64) -> Result<Option<TokenBucket>, Error> {
    let invalid = |msg: String| Error::new(code::INVALID_CONFIG, msg);
    let positive = |key: &str, value: i64| {
        u64::try_from(value)
            .map_err(|_| invalid(format!("\"{direction}{key}\" is {value}, less than nothing")))
    };
    let (rate_bits, burst_bits) = (positive("Rate", rate)?, positive("Burst", burst)?);
    match (rate_bits, burst_bits) {
        (0, 0) => return Ok(None),
        (0, _) => {
            return Err(invalid(format!(
                "\"{direction}Burst\" is {burst} without \"{direction}Rate\""
            )));
        }
        (_, 0) => {
            return Err(invalid(format!(
                "\"{direction}Rate\" is {rate} without \"{direction}Burst\""
            )));
        }
        _ => {}
    }
    // Less than a byte a second would be none, which the kernel takes for no rate at all.
    let rate = (rate_bits / 8).max(1);
    let burst = u32::try_from(burst_bits / 8).map_err(|_| {
        invalid(format!("\"{direction}Burst\" is {burst} bits, and 4 GB are the most"))
    })?;
    let burst = burst.max(1);
    let waiting = rate.saturating_mul(LATENCY_MS) / 1000;
    let limit = u32::try_from(waiting.saturating_add(u64::from(burst))).unwrap_or(u32::MAX);
    Ok(Some(TokenBucket { rate, burst, limit }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn limits(value: Value) -> Result<Limits, Error> {
        serde_json::from_value::<NetConf>(value).expect("of the right types").limits()
    }

    #[test]
    fn bits_become_bytes_and_the_configuration_counts_before_the_runtime() {
        let runtime = json!({"bandwidth": {"ingressRate": 8000, "ingressBurst": 800}});
        let both = limits(json!({"runtimeConfig": runtime})).expect("good");
        assert_eq!(both.ingress, Some(TokenBucket { rate: 1000, burst: 100, limit: 125 }));
        assert_eq!(both.egress, None);
        let fixed = json!({"egressRate": 80, "egressBurst": 8, "runtimeConfig": runtime});
        let fixed = limits(fixed).expect("good");
        assert_eq!((fixed.ingress, fixed.egress.map(|b| b.rate)), (None, Some(10)));
        assert!(limits(json!({"runtimeConfig": null})).expect("nothing").is_empty());
    }

    #[test]
    fn values_that_make_no_sense_are_named() {
        for (value, word) in [
            (json!({"ingressRate": 1}), "ingressBurst"),
            (json!({"egressBurst": 1}), "egressRate"),
            (json!({"ingressRate": -1, "ingressBurst": 1}), "-1"),
            (json!({"ingressRate": 1, "ingressBurst": 8_i64 << 32}), "4 GB"),
        ] {
            let error = limits(value).expect_err(word);
            assert!(error.code == code::INVALID_CONFIG && error.msg.contains(word), "{error}");
        }
        let error = limits(json!({"unshapedSubnets": ["10.0.0.0/8"]})).expect_err("unknown");
        assert_eq!(error.code, code::UNSUPPORTED_FIELD);
        assert!(limits(json!({"unshapedSubnets": [], "shapedSubnets": null})).is_ok());
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_any_numbers_are_a_limit_or_refused(rate in any::<i64>(), burst in any::<i64>()) {
            if let Ok(Some(bucket)) = bucket("ingress", rate, burst) {
                prop_assert!(bucket.rate > 0 && bucket.limit >= bucket.burst);
            }
        }
    }
}
