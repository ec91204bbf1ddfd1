//! Compiles the C programs with clang. They need no headers but their own.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `CLANG`, then what Debian calls it.
const NAMES: [&str; 7] =
    ["clang", "clang-19", "clang-18", "clang-17", "clang-16", "clang-15", "clang-14"];

fn main() {
    // Not env!: a target folder that several copies of the tree share would keep the first one's path.
    let progs =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../progs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    // From the package's folder: a copy of the tree is not to look at the original.
    println!("cargo:rerun-if-changed=../progs");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = clang();
    for name in ["policy", "services"] {
        compile(&clang, &progs, name, &out);
    }
}

fn compile(clang: &str, progs: &Path, name: &str, out: &Path) {
    let source = progs.join(format!("{name}.bpf.c"));
    let status = Command::new(clang)
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unused-function"])
        // The object is the same wherever the tree lies.
        .arg(format!("-ffile-prefix-map={}=ebpf/progs", progs.display()))
        .arg("-c")
        .arg(&source)
        .arg("-o")
        .arg(out.join(format!("{name}.o")))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{clang} cannot compile {}: {status}", source.display()),
        Err(error) => panic!("start {clang}: {error}"),
    }
}

fn clang() -> String {
    let given = env::var("CLANG").ok();
    let runs = |name: &&str| {
        Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    match given.as_deref().into_iter().chain(NAMES).find(runs) {
        Some(name) => name.to_owned(),
        None => panic!("clang is missing, which compiles the eBPF programs: run `make deps`"),
    }
}
