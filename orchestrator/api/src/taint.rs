//! Taints and tolerations (Kubernetes, "Taints and Tolerations").

use k8s_openapi::api::core::v1::{Taint, Toleration};

pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
pub const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// Whether one toleration covers a taint.
#[must_use]
pub fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    let key = toleration.key.as_deref().unwrap_or_default();
    if !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        // An empty key goes with Exists only.
        _ if key.is_empty() => false,
        _ => {
            toleration.value.as_deref().unwrap_or_default()
                == taint.value.as_deref().unwrap_or_default()
        }
    }
}

/// The first toleration that covers a taint.
#[must_use]
pub fn tolerating<'a>(tolerations: &'a [Toleration], taint: &Taint) -> Option<&'a Toleration> {
    tolerations.iter().find(|toleration| covers(toleration, taint))
}

/// Whether any toleration covers a taint.
#[must_use]
pub fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerating(tolerations, taint).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toleration(key: &str, operator: &str, value: &str, effect: &str) -> Toleration {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Toleration {
            key: some(key),
            operator: some(operator),
            value: some(value),
            effect: some(effect),
            toleration_seconds: None,
        }
    }

    #[test]
    fn tolerations_by_table() {
        let taint = Taint {
            key: "a".to_owned(),
            value: Some("1".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        };
        for (toleration, expected) in [
            (toleration("a", "", "1", "NoSchedule"), true),
            (toleration("a", "Equal", "2", ""), false),
            (toleration("a", "Exists", "", ""), true),
            (toleration("", "Exists", "", ""), true),
            (toleration("", "", "", ""), false),
            (toleration("a", "Exists", "", "NoExecute"), false),
            (toleration("b", "Exists", "", ""), false),
        ] {
            assert_eq!(covers(&toleration, &taint), expected, "{toleration:?}");
        }
    }
}
