//! Programs as filters of a clsact qdisc, as on kernels before 6.6.

use orch_ebpf_loader::uninstall;

use super::*;

fn tc(words: &str) -> String {
    let output = Command::new("tc").args(words.split_whitespace()).output().expect("tc starts");
    assert!(output.status.success(), "tc {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Filters with programs on the pod's link.
fn count(direction: &str) -> usize {
    let shown = tc(&format!("filter show dev pod0 {direction}"));
    shown.lines().filter(|line| line.contains("direct-action")).count()
}

#[test]
fn a_link_has_each_program_once_and_others_keep_their_filters() {
    in_world(|w| {
        let pins = w.pins.clone().without_tcx();
        let on = |hook| is_attached(&pins, "pod0", w.pod, hook).expect("asked");
        assert!(!on(Hook::FromPod) && !on(Hook::ToPod), "there is no qdisc yet");
        // Somebody is there first, where ours would be.
        tc("qdisc add dev pod0 clsact");
        let theirs = w.pins.folder().join("programs/to_wire");
        tc(&format!(
            "filter add dev pod0 ingress pref 1 handle 1 bpf direct-action object-pinned {}",
            theirs.display()
        ));
        assert!(!on(Hook::FromPod), "another's");
        for hook in [Hook::FromPod, Hook::ToPod] {
            attach(&pins, "pod0", w.pod, hook).expect("attached");
            attach(&pins, "pod0", w.pod, hook).expect("attached again");
            assert!(on(hook));
        }
        assert_eq!((count("ingress"), count("egress")), (2, 1));
        assert!(uninstall(&pins).expect("removed"));
        assert_eq!((count("ingress"), count("egress")), (1, 0), "theirs stays");
    });
}

/// Programs of another build: they have our names and let nothing through.
fn former() -> aya::Ebpf {
    let folder = tempfile::tempdir().expect("a folder");
    let (source, object) = (folder.path().join("former.c"), folder.path().join("former.o"));
    let text = "#include \"bpf.h\"\n\
        SEC(\"classifier\") int from_pod(struct __sk_buff *skb) { (void)skb; return TCX_DROP; }\n\
        SEC(\"classifier\") int to_pod(struct __sk_buff *skb) { (void)skb; return TCX_DROP; }\n\
        char _license[] SEC(\"license\") = \"GPL\";\n";
    std::fs::write(&source, text).expect("written");
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/../progs/include");
    let made = Command::new(std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned()))
        .args(["-target", "bpf", "-O2", "-g", "-Wno-unused-function", "-I", include, "-c"])
        .arg(&source)
        .arg("-o")
        .arg(&object)
        .status();
    assert!(made.expect("clang, which built this, starts").success());
    aya::EbpfLoader::new().load_file(&object).expect("loaded")
}

#[test]
fn a_new_program_takes_the_place_of_the_old_one_on_every_link() {
    for has_tcx in [true, false] {
        in_world(move |w| {
            let pins = w.pins.clone();
            let pins = if has_tcx { pins } else { pins.without_tcx() };
            let mut former = former();
            for hook in [Hook::FromPod, Hook::ToPod] {
                let pin = pins.folder().join("programs").join(hook.program());
                std::fs::remove_file(&pin).expect("pinned");
                let program: &mut SchedClassifier = former
                    .program_mut(hook.program())
                    .expect("there")
                    .try_into()
                    .expect("a filter");
                program.load().expect("loaded");
                program.pin(&pin).expect("pinned");
                attach(&pins, "pod0", w.pod, hook).expect("attached");
            }
            let on = |hook| is_attached(&pins, "pod0", w.pod, hook).expect("asked");
            assert!(on(Hook::FromPod) && on(Hook::ToPod));
            install(&pins).expect("the programs of this build");
            assert!(on(Hook::FromPod) && on(Hook::ToPod), "on the link, too");
            if !has_tcx {
                assert_eq!((count("ingress"), count("egress")), (1, 1), "in the old ones' place");
                tc("filter del dev pod0 ingress");
                assert!(!on(Hook::FromPod), "what somebody takes away is missed");
            }
        });
    }
}
