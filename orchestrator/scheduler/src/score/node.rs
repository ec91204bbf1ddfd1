//! Scores by the node alone: soft taints, preferred affinity, images that are there already.

use orch_api::taint;

use super::{MAX, Scores, normalize};
use crate::filter::Cycle;
use crate::node_info::NodeInfo;

/// An image smaller than this makes no difference (upstream, `plugins/imagelocality`).
const IMAGE_MIN_BYTES: i64 = 23 * 1024 * 1024;
/// Per container: an image larger than this makes no more difference.
const IMAGE_MAX_BYTES: i64 = 1000 * 1024 * 1024;

/// The fewer untolerated `PreferNoSchedule` taints, the better.
pub(super) fn taints(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let pod = cycle.pod;
    let count = |node: &&NodeInfo| {
        let soft = node.taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
        let untolerated = soft.filter(|taint| !taint::tolerates(&pod.tolerations, taint));
        i64::try_from(untolerated.count()).unwrap_or(i64::MAX)
    };
    let mut scores: Scores = nodes.iter().map(count).collect();
    normalize(&mut scores, true);
    Some(scores)
}

/// The sum of the weights of the preferred terms that match.
pub(super) fn affinity(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let terms = &cycle.pod.preferred_node_terms;
    if terms.is_empty() {
        return None;
    }
    let sum = |node: &&NodeInfo| {
        let matching = terms.iter().filter(|(_, term)| term.matches(&node.name, &node.labels));
        matching.map(|(weight, _)| weight).sum()
    };
    let mut scores: Scores = nodes.iter().map(sum).collect();
    normalize(&mut scores, false);
    Some(scores)
}

/// Nodes that have the images score by the images' size, less for images that few nodes have, so that one warm
/// node does not draw everything.
pub(super) fn images(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let images = &cycle.pod.images;
    let all = i64::try_from(cycle.cluster.node_count()).unwrap_or(i64::MAX).max(1);
    let most = IMAGE_MAX_BYTES.saturating_mul(i64::try_from(images.len()).unwrap_or(1).max(1));
    let score = |node: &&NodeInfo| {
        let shares = images.iter().filter_map(|image| {
            let size = node.images.get(image)?;
            Some(
                i128::from(*size) * i128::from(cycle.cluster.image_node_count(image))
                    / i128::from(all),
            )
        });
        let sum = i64::try_from(shares.sum::<i128>()).unwrap_or(i64::MAX);
        MAX * (sum.clamp(IMAGE_MIN_BYTES, most) - IMAGE_MIN_BYTES) / (most - IMAGE_MIN_BYTES)
    };
    Some(nodes.iter().map(score).collect())
}
