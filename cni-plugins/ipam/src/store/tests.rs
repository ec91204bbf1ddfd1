//! Leases on a real disk, with the reference plugin played by plain file operations.

use std::collections::BTreeSet;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::allocate::lease_all;
use crate::mutate;
use crate::range::{Range, RangeSet};

fn id(container: &str) -> AttachmentId {
    AttachmentId {
        container_id: container.parse().expect("ID"),
        ifname: "eth0".parse().expect("name"),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("temporary folder")
}

fn set(subnet: &str) -> RangeSet {
    let range = Range::new(subnet.parse().expect("CIDR"), None, None, None).expect("range");
    RangeSet::new(0, vec![range]).expect("set")
}

#[test]
fn a_lease_has_the_references_form() {
    let dir = temp();
    let store = Store::create(&dir.path().join("net")).expect("opened");
    assert!(store.draft(&id("c1")).expect("draft").claim(0, ip("10.0.0.2")).expect("leased"));
    assert!(!store.draft(&id("c2")).expect("draft").claim(0, ip("10.0.0.2")).expect("taken"));
    let read = |name: &str| fs::read_to_string(dir.path().join("net").join(name)).expect(name);
    assert_eq!(read("10.0.0.2"), "c1\r\neth0");
    assert_eq!(read("last_reserved_ip.0"), "10.0.0.2");
    assert_eq!(store.leases_of(&id("c1")).expect("read"), [ip("10.0.0.2")]);
    let mut names: Vec<_> = fs::read_dir(dir.path().join("net"))
        .expect("listed")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
        .collect();
    names.sort();
    assert_eq!(names, [".by-attachment", "10.0.0.2", "last_reserved_ip.0", "lock"]);
    assert_eq!(fs::read_dir(&store.index).expect("listed").count(), 2, "stamp and one attachment");
}

/// Waits until a change would give the folder another time than it has. The clock of files ticks every few milliseconds.
fn wait_for_another_time(folder: &Path) {
    let time = |path: &Path| fs::metadata(path).expect("there").modified().expect("known");
    let clock = temp();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while time(clock.path()) <= time(folder) {
        assert!(std::time::Instant::now() < deadline, "the clock of files stands still");
        fs::write(clock.path().join("tick"), "").expect("written");
        fs::remove_file(clock.path().join("tick")).expect("removed");
    }
}

#[test]
fn what_the_reference_did_meanwhile_is_seen() {
    let dir = temp();
    drop(Store::create(dir.path()).expect("opened"));
    wait_for_another_time(dir.path());
    fs::write(dir.path().join("10.0.0.9"), "c9\r\neth0").expect("written");
    let store = Store::create(dir.path()).expect("opened");
    assert_eq!(store.leases_of(&id("c9")).expect("read"), [ip("10.0.0.9")]);
    drop(store);
    wait_for_another_time(dir.path());
    fs::remove_file(dir.path().join("10.0.0.9")).expect("removed");
    let store = Store::create(dir.path()).expect("opened");
    assert!(store.leases_of(&id("c9")).expect("read").is_empty());
}

#[test]
fn an_index_that_lies_is_overruled_by_the_lease_files() {
    let dir = temp();
    let store = Store::create(dir.path()).expect("opened");
    fs::write(store.index.join("c1@eth0"), "10.0.0.5\nnonsense\n").expect("written");
    assert!(store.leases_of(&id("c1")).expect("read").is_empty());
    // Behind the back of the index, within the same stamp: release still finds it.
    fs::write(dir.path().join("10.0.0.7"), "c7\r\neth0").expect("written");
    store.release_of(&id("c7")).expect("released");
    assert_eq!(store.owner(ip("10.0.0.7")).expect("read"), None);
}

#[test]
fn files_of_old_versions_and_with_white_space_are_understood() {
    let dir = temp();
    fs::write(dir.path().join("10.0.0.3"), "c3").expect("written");
    fs::write(dir.path().join("10.0.0.4"), " c4 \r\n eth0 \r\n").expect("written");
    let store = Store::create(dir.path()).expect("opened");
    assert_eq!(store.owner(ip("10.0.0.3")).expect("read"), Some(Owner::Container("c3".into())));
    assert_eq!(store.leases_of(&id("c3")).expect("read"), [ip("10.0.0.3")]);
    store.release_of(&id("c3")).expect("released");
    store.release_of(&id("c4")).expect("released");
    store.release_of(&id("c4")).expect("released again");
    assert!(store.all().expect("listed").is_empty());
}

#[test]
fn another_interface_of_the_container_keeps_its_lease() {
    let dir = temp();
    let store = Store::create(dir.path()).expect("opened");
    let second = AttachmentId { ifname: "eth1".parse().expect("name"), ..id("c1") };
    store.draft(&id("c1")).expect("draft").claim(0, ip("10.0.0.2")).expect("leased");
    store.draft(&second).expect("draft").claim(0, ip("10.0.0.3")).expect("leased");
    store.release_of(&id("c1")).expect("released");
    assert_eq!(store.leases_of(&second).expect("read"), [ip("10.0.0.3")]);
    assert!(store.leases_of(&id("c1")).expect("read").is_empty());
}

#[test]
fn empty_files_are_used_once_nothing_else_is_left() {
    let dir = temp();
    let store = Store::create(dir.path()).expect("opened");
    fs::write(dir.path().join("10.0.0.2"), "").expect("written");
    let sets = [set("10.0.0.0/29")];
    let mut given = BTreeSet::new();
    for container in ["a", "b", "c", "d", "e"] {
        let leases = lease_all(&store, &sets, &[], &id(container)).expect("leased");
        given.insert(leases[0].0.ip());
    }
    assert_eq!(given.len(), 5);
    assert!(given.contains(&ip("10.0.0.2")), "reclaimed last");
    let error = lease_all(&store, &sets, &[], &id("f")).expect_err("full");
    assert!(error.to_string().contains("5 of 5"), "{error}");
}

#[test]
fn a_long_run_of_leases_is_passed_in_one_step() {
    let dir = temp();
    for last in 2..=200 {
        fs::write(dir.path().join(format!("10.0.0.{last}")), format!("x{last}\r\neth0"))
            .expect("written");
    }
    let store = Store::create(dir.path()).expect("opened");
    let leases = lease_all(&store, &[set("10.0.0.0/24")], &[], &id("c1")).expect("leased");
    assert_eq!(leases[0].0.to_string(), "10.0.0.201/24");
}

#[test]
fn thirty_at_once_get_thirty_addresses() {
    let dir = temp();
    let path = dir.path().join("net");
    let given: BTreeSet<IpAddr> = std::thread::scope(|scope| {
        let tasks: Vec<_> = (0..30)
            .map(|n| {
                let path = &path;
                scope.spawn(move || {
                    let store = Store::create(path).expect("opened");
                    let sets = [set("10.0.0.0/24")];
                    lease_all(&store, &sets, &[], &id(&format!("c{n}"))).expect("leased")[0].0.ip()
                })
            })
            .collect();
        tasks.into_iter().map(|task| task.join().expect("joined")).collect()
    });
    assert_eq!(given.len(), 30);
}

#[derive(Debug, Clone)]
enum Step {
    Add(u8),
    Del(u8),
    ForeignAdd(u8, u8),
    ForeignDel(u8),
    KilledAfterLease(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        4 => (0u8..8).prop_map(Step::Add),
        3 => (0u8..8).prop_map(Step::Del),
        1 => (0u8..8, 2u8..7).prop_map(|(who, ip)| Step::ForeignAdd(who, ip)),
        1 => (2u8..7).prop_map(Step::ForeignDel),
        1 => (0u8..8, 2u8..7).prop_map(|(who, ip)| Step::KilledAfterLease(who, ip)),
    ];
    proptest::collection::vec(one, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a plain map as the model: whoever writes, no address has two owners, a full set is full, and after
    /// DEL nothing of the attachment is left.
    #[test]
    fn leases_follow_the_model(steps in steps()) {
        let dir = temp();
        let sets = [set("10.0.0.0/29")];
        let mut model: BTreeMap<IpAddr, u8> = BTreeMap::new();
        let address = |last: u8| ip(&format!("10.0.0.{last}"));
        let name = |who: u8| format!("c{who}");
        // Foreign writes come within one tick of an old kernel's clock here, far faster than any real plugin.
        let mut unseen = false;
        let open = |unseen: &mut bool| {
            let store = Store::create(dir.path()).expect("opened");
            if std::mem::take(unseen) {
                store.reindex().expect("indexed");
            }
            store
        };
        for step in steps {
            match step {
                Step::Add(who) => {
                    let store = open(&mut unseen);
                    let has = model.values().any(|owner| *owner == who);
                    match lease_all(&store, &sets, &[], &id(&name(who))) {
                        Ok(leases) => {
                            prop_assert!(!has);
                            prop_assert_eq!(model.insert(leases[0].0.ip(), who), None);
                        }
                        Err(_) => prop_assert!(has || model.len() == 5),
                    }
                }
                Step::Del(who) => {
                    let store = open(&mut unseen);
                    store.release_of(&id(&name(who))).expect("released");
                    model.retain(|_, owner| *owner != who);
                }
                Step::ForeignAdd(who, last) => {
                    let free = !model.contains_key(&address(last));
                    if free && !model.values().any(|owner| *owner == who) {
                        let file = dir.path().join(address(last).to_string());
                        fs::write(file, format!("{}\r\neth0", name(who))).expect("written");
                        model.insert(address(last), who);
                        unseen = true;
                    }
                }
                Step::KilledAfterLease(who, last) => {
                    let store = open(&mut unseen);
                    let free = !model.contains_key(&address(last));
                    if free && !model.values().any(|owner| *owner == who) {
                        let draft = store.draft(&id(&name(who))).expect("draft");
                        fs::hard_link(&draft.path, store.lease_file(address(last))).expect("linked");
                        std::mem::forget(draft);
                        model.insert(address(last), who);
                        unseen = true;
                    }
                }
                Step::ForeignDel(last) => {
                    let _ = fs::remove_file(dir.path().join(address(last).to_string()));
                    model.remove(&address(last));
                    unseen = true;
                }
            }
        }
        let store = Store::create(dir.path()).expect("opened");
        let seen: BTreeMap<IpAddr, Owner> = store.all().expect("listed").into_iter().collect();
        prop_assert_eq!(seen.len(), model.len());
        for (ip, who) in model {
            prop_assert_eq!(&seen[&ip], &Owner::Attachment(name(who), "eth0".to_owned()));
        }
    }
}

proptest! {
    #[test]
    fn fuzz_a_lease_file_of_any_bytes_has_some_owner(text in proptest::collection::vec(any::<u8>(), 0..64)) {
        let owner = Owner::parse(&text);
        if let Some(name) = owner.index_name() {
            prop_assert!(!name.contains('/') && !name.starts_with('.'));
        }
    }
}

proptest! {
    /// A folder in any state: whatever is in it, leases are found, freed and given.
    #[test]
    fn fuzz_a_folder_of_odd_files_is_cleared_and_used(
        leases in proptest::collection::btree_map(1..30_u8, mutate::bytes("lease"), 0..6),
        index in proptest::collection::btree_map("[a-z0-9@.]{1,12}", mutate::bytes("lease"), 0..4),
        last in mutate::bytes("lease"),
    ) {
        let dir = temp();
        std::fs::create_dir(dir.path().join(INDEX)).expect("made");
        for (low, text) in &leases {
            std::fs::write(dir.path().join(format!("10.0.0.{low}")), text).expect("written");
        }
        for (name, text) in index.iter().filter(|(name, _)| !matches!(name.as_str(), "." | "..")) {
            std::fs::write(dir.path().join(INDEX).join(name), text).expect("written");
        }
        std::fs::write(dir.path().join("last_reserved_ip.0"), last).expect("written");
        let store = Store::create(dir.path()).expect("opened");
        prop_assert_eq!(store.all().expect("listed").len(), leases.len());
        store.release_of(&id("c1")).expect("released");
        let range = Range::new("10.0.0.0/24".parse().expect("net"), None, None, None).expect("good");
        let sets = [RangeSet::new(0, vec![range]).expect("good")];
        let given = lease_all(&store, &sets, &[], &id("fresh")).expect("leased");
        prop_assert_eq!(store.leases_of(&id("fresh")).expect("read"), [given[0].0.ip()]);
        for (ip, _) in store.all().expect("listed") {
            store.release(ip).expect("released");
        }
        drop(store);
        let store = Store::create(dir.path()).expect("opened again");
        prop_assert!(store.all().expect("listed").is_empty());
    }
}
