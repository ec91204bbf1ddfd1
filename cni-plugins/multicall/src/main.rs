//! All CNI plugins as one executable, told apart by the name it is called by.
//!
//! One static file, hard-linked under each plugin's name: the kernel keeps one copy in memory, and a plugin that
//! delegates to another one of them needs no second process (`cni_invoke::Delegate`).

use std::env;
use std::path::Path;
use std::process::ExitCode;

/// A plugin's `main`.
type Main = fn() -> ExitCode;

/// Each plugin by its name.
const PLUGINS: [(&str, Main); 10] = [
    ("bandwidth", cni_bandwidth::main),
    ("bridge", cni_bridge::main),
    ("firewall", cni_firewall::main),
    ("host-local", || cni_skel::main(&cni_ipam::HostLocal)),
    ("loopback", cni_loopback::main),
    ("policy", cni_policy::main),
    ("portmap", cni_portmap::main),
    ("static", || cni_skel::main(&cni_ipam::Static)),
    ("tuning", cni_tuning::main),
    ("vxlan", || cni_skel::main(&cni_vxlan::Vxlan)),
];

/// Exit code for wrong usage.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut args = env::args_os();
    let called = args.next().unwrap_or_default();
    let name = Path::new(&called).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match plugin(name) {
        // A CNI plugin has no arguments; a person's are answered with what this is.
        Some(main) if env::var_os("CNI_COMMAND").is_some() || args.len() == 0 => main(),
        _ => explain(&mut args),
    }
}

fn plugin(name: &str) -> Option<Main> {
    PLUGINS.iter().find(|(plugin, _)| *plugin == name).map(|(_, main)| *main)
}

/// stdout stays empty here as well: a runtime that starts this file under a wrong name gets no half answer.
fn explain(args: &mut dyn Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let first = args.next();
    let asked = first.as_deref().and_then(|arg| arg.to_str());
    let names: Vec<&str> = PLUGINS.iter().map(|(name, _)| *name).collect();
    eprintln!(
        "cni-plugins {version}: the CNI plugins {names} in one executable.\n\n\
         It is the plugin whose name it is called by, so install it under each name, for example:\n  \
         for name in {list}; do ln -f cni-plugins /opt/cni/bin/$name; done\n\n\
         Container runtimes call plugins with CNI_* variables and a network configuration on stdin\n\
         (CNI specification, https://www.cni.dev/docs/spec/); people have no use for them by hand.",
        version = env!("CARGO_PKG_VERSION"),
        names = names.join(", "),
        list = names.join(" "),
    );
    match asked {
        Some("--help" | "-h" | "help" | "--version" | "-V") => ExitCode::SUCCESS,
        _ => ExitCode::from(USAGE),
    }
}
