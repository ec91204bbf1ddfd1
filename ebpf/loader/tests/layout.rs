//! The structs of `maps.h` and their Rust twins are the same to the byte: clang itself says so.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use orch_ebpf_maps::{
    ADDRESS_NODE, ADDRESS_REMOTE_NODE, ADDRESS_SERVICE, Action, Address, AddressData, Backend,
    BackendKey, ClassKey, Config, Direction, Endpoint, EndpointRow, Event, FAMILY_BITS,
    FAMILY_IPV4, FAMILY_IPV6, FLOW_EITHER, Flow, FlowKey, Frontend, FrontendKey, ISOLATED_EGRESS,
    ISOLATED_INGRESS, LAYOUT_VERSION, Leg, Loss, MARK_PLAIN, MAX_BACKENDS, MAX_CLASS_ENTRIES,
    MAX_CLASS_MAPS, MAX_ENDPOINTS, MAX_FRONTENDS, MAX_POD_NAMESPACES, MAX_RULE_ENTRIES, MAX_TABLES,
    Member, Reason, Rule, RuleKey, SERVICES_VERSION, state,
};

macro_rules! layout {
    ($text:ident, $rust:ident = $c:literal { $($field:ident)* }) => {{
        let mut end = 0;
        $(
            writeln!(
                $text,
                "_Static_assert(__builtin_offsetof(struct {0}, {1}) == {2}, \"{0}.{1}\");",
                $c, stringify!($field), offset_of!($rust, $field)
            ).expect("written");
            assert!(offset_of!($rust, $field) >= end, "fields in order");
            end = offset_of!($rust, $field);
        )*
        let _ = end;
        writeln!(
            $text,
            "_Static_assert(sizeof(struct {0}) == {1}, \"size of {0}\");",
            $c, size_of::<$rust>()
        ).expect("written");
    }};
}

#[test]
fn rust_and_c_agree_on_layouts_and_numbers() {
    let mut text = String::from("#include \"fast_path.h\"\n#include \"services.h\"\n");
    layout!(text, Endpoint = "endpoint" { uid slot generation class_map table addr mac state flags revision addr6 });
    layout!(text, EndpointRow = "row" { endpoint link pad check });
    layout!(text, ClassKey = "class_key" { prefix_len });
    // In C the key is flat.
    for (field, offset) in
        [("family", offset_of!(AddressData, family)), ("addr", offset_of!(AddressData, addr))]
    {
        let offset = offset_of!(ClassKey, data) + offset;
        writeln!(
            text,
            "_Static_assert(__builtin_offsetof(struct class_key, {field}) == {offset}, \"{field}\");"
        )
        .expect("written");
    }
    layout!(text, RuleKey = "rule_key" { prefix_len peer_class direction protocol port });
    layout!(text, Rule = "rule" { id action pad });
    layout!(text, Address = "address" { flags });
    layout!(text, FlowKey = "flow_key" { uid remote local_port remote_port protocol family local pad });
    layout!(text, Leg = "leg" { last generation tcp_flags flags is_open pad });
    layout!(text, Flow = "flow" { legs });
    layout!(text, Event = "event" {
        time_ns uid ifindex saddr daddr sport dport protocol direction reason family rule peer_class
    });
    layout!(text, Config = "config" { version vxlan_port has_former pad });
    layout!(text, FrontendKey = "frontend_key" { addr port protocol pad });
    layout!(text, Frontend = "frontend" { service count affinity_secs });
    layout!(text, BackendKey = "backend_key" { service slot });
    layout!(text, Backend = "backend" { addr port pad });
    layout!(text, Member = "member" { to backend });
    let mut number = |name: &str, value: u64| {
        writeln!(text, "_Static_assert({name} == {value}, \"{name}\");").expect("written");
    };
    number("LAYOUT_VERSION", LAYOUT_VERSION.into());
    number("SERVICES_VERSION", SERVICES_VERSION.into());
    number("MAX_FRONTENDS", MAX_FRONTENDS.into());
    number("MAX_BACKENDS", MAX_BACKENDS.into());
    number("MAX_POD_NAMESPACES", MAX_POD_NAMESPACES.into());
    number("MAX_ENDPOINTS", MAX_ENDPOINTS.into());
    number("MAX_TABLES", MAX_TABLES.into());
    number("MAX_CLASS_MAPS", MAX_CLASS_MAPS.into());
    number("MAX_CLASS_ENTRIES", MAX_CLASS_ENTRIES.into());
    number("MAX_RULE_ENTRIES", MAX_RULE_ENTRIES.into());
    number("FAMILY_BITS", FAMILY_BITS.into());
    number("FAMILY_IPV4", FAMILY_IPV4.into());
    number("FAMILY_IPV6", FAMILY_IPV6.into());
    number("ENDPOINT_PENDING", state::PENDING.into());
    number("ENDPOINT_READY", state::READY.into());
    number("ENDPOINT_LOCKED", state::LOCKED.into());
    number("ISOLATED_INGRESS", ISOLATED_INGRESS.into());
    number("ISOLATED_EGRESS", ISOLATED_EGRESS.into());
    number("ADDRESS_NODE", ADDRESS_NODE.into());
    number("ADDRESS_SERVICE", ADDRESS_SERVICE.into());
    number("ADDRESS_REMOTE_NODE", ADDRESS_REMOTE_NODE.into());
    number("MARK_PLAIN", MARK_PLAIN.into());
    number("FLOW_EITHER", FLOW_EITHER.into());
    for loss in Loss::ALL {
        let name = format!("LOSS_{}", loss.name().to_uppercase().replace('-', "_"));
        number(&name, loss as u64);
    }
    number("INGRESS", Direction::Ingress as u64);
    number("EGRESS", Direction::Egress as u64);
    number("RULE_DENY", Action::Deny as u64);
    number("RULE_ALLOW", Action::Allow as u64);
    for reason in Reason::ALL {
        let name = format!("REASON_{}", reason.name().to_uppercase().replace('-', "_"));
        number(&name, *reason as u64);
        number(&format!("({name} >= FIRST_DROP)"), reason.is_drop().into());
    }

    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("layout.c");
    std::fs::write(&source, &text).expect("written");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../progs/include");
    let output = Command::new(std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned()))
        .args(["-target", "bpf", "-fsyntax-only", "-Wno-unused-function", "-I"])
        .arg(include)
        .arg(source)
        .output()
        .expect("clang, which built this, starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn c_has_no_reason_that_rust_does_not_know() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../progs/include/reasons.h");
    let text = std::fs::read_to_string(header).expect("read");
    let count = text.lines().filter(|line| line.trim_start().starts_with("REASON_")).count();
    assert_eq!(count, Reason::ALL.len() + 1, "all but REASON_COUNT");
}
