//! Scripts against the real kernel, in a network namespace of the test's own thread.

use std::time::Duration;

use cni_nftables::{Chain, Family, Hook, Nft, Set, Table};
use nix::sched::{CloneFlags, unshare};

fn in_own_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn service(name: &str, ip: &str) -> Table {
    let mut table = Table::new(Family::Ip, "orch-test");
    let element = (format!("{ip} . tcp . 80"), format!("goto svc-{name}"));
    table.set("services", Set::map("ipv4_addr . inet_proto . inet_service", "verdict", [element]));
    table.set("affinity", Set::dynamic("ipv4_addr", Duration::from_secs(10)));
    table.chain(
        "nat-prerouting",
        Chain::base(
            "nat",
            Hook::Prerouting,
            -100,
            ["ip daddr . meta l4proto . th dport vmap @services".to_owned()],
        ),
    );
    table.chain(
        format!("svc-{name}"),
        Chain::regular([
            "update @affinity { ip saddr }".to_owned(),
            "meta l4proto tcp dnat to 10.0.0.1:80".to_owned(),
        ]),
    );
    table
}

#[test]
fn an_update_leaves_what_a_replacement_would_write() {
    in_own_netns(|| {
        let nft = Nft::default();
        let (old, new) = (service("a", "10.96.0.1"), service("b", "10.96.0.2"));
        nft.apply(&new.replace_script()).expect("write the table");
        let wanted = nft.listing(&new).expect("list");
        nft.apply(&old.replace_script()).expect("write the old table over it");
        assert_ne!(nft.listing(&old).expect("list"), wanted);
        nft.apply(&new.update_script(&old)).expect("update");
        assert_eq!(nft.listing(&new).expect("list"), wanted);
    });
}

#[test]
fn a_refused_transaction_changes_nothing_and_says_which_line() {
    in_own_netns(|| {
        let nft = Nft::default();
        let table = service("a", "10.96.0.1");
        nft.apply(&table.replace_script()).expect("write the table");
        let before = nft.listing(&table).expect("list");
        let error = nft
            .apply(
                "delete chain ip orch-test svc-nobody\nflush chain ip orch-test nat-prerouting\n",
            )
            .expect_err("there is no such chain");
        assert!(error.is_refusal());
        assert!(
            error.to_string().contains("(in `delete chain ip orch-test svc-nobody`)"),
            "{error}"
        );
        assert_eq!(nft.listing(&table).expect("list"), before);
    });
}

#[test]
fn a_removed_table_lists_as_none_and_can_be_removed_again() {
    in_own_netns(|| {
        let nft = Nft::default();
        let table = service("a", "10.96.0.1");
        nft.apply(&table.replace_script()).expect("write the table");
        nft.remove(Family::Ip, "orch-test").expect("remove");
        nft.remove(Family::Ip, "orch-test").expect("remove again");
        assert_eq!(nft.listing(&table).expect("list"), None);
    });
}
