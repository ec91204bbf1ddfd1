//! What happens to an object, by what became of its owners. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

/// Keeps an owner until its dependents are gone.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// Keeps an owner until its dependents do not name it any more.
pub(super) const ORPHAN: &str = "orphan";

/// What became of an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Present,
    /// Deleted in the foreground: its dependents go first.
    WaitsForDependents,
    Gone,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<'a> {
    Keep,
    /// Others own it still: only these UIDs are taken off.
    DropOwners(Vec<&'a str>),
    /// Deletes it, propagated like this.
    Delete(&'static str),
}

pub(super) fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|one| one == finalizer)
}

/// Whether a dependent keeps its owner from going in the foreground.
pub(super) fn blocks(dependent: &ObjectMeta, owner: &str) -> bool {
    dependent
        .owner_references
        .iter()
        .flatten()
        .any(|reference| reference.uid == owner && reference.block_owner_deletion == Some(true))
}

/// Owners that a change of their dependent keeps from going no longer.
pub(super) fn unblocked<'a>(
    old: &'a ObjectMeta,
    new: &'a ObjectMeta,
) -> impl Iterator<Item = &'a OwnerReference> {
    let owners = old.owner_references.iter().flatten();
    owners.filter(|owner| blocks(old, &owner.uid) && !blocks(new, &owner.uid))
}

/// Whether an object that is about to be deleted in the foreground may wait for itself: one of its dependents waits
/// already. False alarms only mean that its owner does not wait for it.
pub(super) fn may_be_a_circle(dependents: &[(usize, ObjectMeta)]) -> bool {
    dependents.iter().any(|(_, dependent)| {
        dependent.deletion_timestamp.is_some() && has_finalizer(dependent, FOREGROUND)
    })
}

/// The object's owner references, none of which keeps its owner from going.
pub(super) fn unblocking(meta: &ObjectMeta) -> Vec<OwnerReference> {
    let owners = meta.owner_references.iter().flatten().cloned();
    owners.map(|owner| OwnerReference { block_owner_deletion: Some(false), ..owner }).collect()
}

/// Whether a changed object may need anything; `exists` looks into the cache only.
pub(super) fn is_worth_a_look(meta: &ObjectMeta, exists: impl Fn(&OwnerReference) -> bool) -> bool {
    if meta.deletion_timestamp.is_some() {
        return has_finalizer(meta, FOREGROUND) || has_finalizer(meta, ORPHAN);
    }
    meta.owner_references.iter().flatten().any(|owner| !exists(owner))
}

pub(super) fn plan<'a>(
    meta: &ObjectMeta,
    owners: &'a [(OwnerReference, Owner)],
    has_dependents: bool,
) -> Step<'a> {
    let of = |state: Owner| owners.iter().filter(move |(_, found)| *found == state);
    let present = of(Owner::Present).count();
    let waiting = of(Owner::WaitsForDependents).count();
    if owners.is_empty() || present == owners.len() {
        return Step::Keep;
    }
    if present > 0 {
        let lost = owners.iter().filter(|(_, state)| *state != Owner::Present);
        return Step::DropOwners(lost.map(|(owner, _)| owner.uid.as_str()).collect());
    }
    if waiting > 0 && has_dependents {
        // The owner waits for the whole tree below it.
        return Step::Delete("Foreground");
    }
    Step::Delete(if has_finalizer(meta, ORPHAN) {
        "Orphan"
    } else if has_finalizer(meta, FOREGROUND) {
        "Foreground"
    } else {
        "Background"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(states: &[Owner]) -> Vec<(OwnerReference, Owner)> {
        let reference = |n: usize| OwnerReference { uid: format!("u{n}"), ..Default::default() };
        states.iter().enumerate().map(|(n, state)| (reference(n), *state)).collect()
    }

    #[test]
    fn an_object_lives_as_long_as_one_owner_does() {
        use Owner::{Gone, Present, WaitsForDependents};
        let meta = ObjectMeta::default();
        for (states, dependents, expected) in [
            (&[][..], false, Step::Keep),
            (&[Present], false, Step::Keep),
            (&[Present, Gone], false, Step::DropOwners(vec!["u1"])),
            (&[WaitsForDependents, Present], true, Step::DropOwners(vec!["u0"])),
            (&[Gone], true, Step::Delete("Background")),
            (&[Gone, WaitsForDependents], false, Step::Delete("Background")),
            (&[WaitsForDependents], true, Step::Delete("Foreground")),
        ] {
            let owners = owners(states);
            assert_eq!(plan(&meta, &owners, dependents), expected, "{states:?}");
        }
    }

    #[test]
    fn only_marked_dependents_block() {
        let mut meta = ObjectMeta::default();
        let mut reference = OwnerReference { uid: "u".to_owned(), ..Default::default() };
        meta.owner_references = Some(vec![reference.clone()]);
        assert!(!blocks(&meta, "u"));
        reference.block_owner_deletion = Some(true);
        meta.owner_references = Some(vec![reference]);
        assert!(blocks(&meta, "u") && !blocks(&meta, "other"));
    }
}
