//! What a machine has that a lab might leave behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tests_e2e::shell;

/// Where labs live, each in a folder of its own.
const LABS: &str = "/var/lib/orch/";

/// Links, mounts, nft tables, and processes of the lab's programs; not the mounts of another lab, which may come and go
/// while this one runs.
pub(crate) struct Machine {
    things: BTreeSet<String>,
    lab: PathBuf,
}

impl Machine {
    #[must_use]
    pub(crate) fn observe(lab: &Path) -> Self {
        let mut things = BTreeSet::new();
        let mut note = |kind: &str, text: &str| {
            things.extend(text.lines().map(|line| format!("{kind} {line}")));
        };
        note("link", &links());
        note("mount", &mounts(lab));
        note("nft", &said("nft", &["list", "tables"]));
        note("process", &processes(lab));
        Self { things, lab: lab.to_owned() }
    }

    /// # Errors
    /// There is more than before, after a moment for the kernel to clean up.
    pub(crate) fn unchanged(&self) -> anyhow::Result<()> {
        tests_e2e::eventually("a machine as it was before", Duration::from_secs(10), || {
            let now = Self::observe(&self.lab);
            let new: Vec<_> = now.things.difference(&self.things).collect();
            if !new.is_empty() {
                bail!("{new:#?}");
            }
            Ok(())
        })
    }
}

fn said(program: &str, args: &[&str]) -> String {
    let run = shell::run(Command::new(program).args(args), b"", Duration::from_secs(10));
    run.context("a tool of the tests").map(|output| output.text()).unwrap_or_default()
}

fn links() -> String {
    let text = said("ip", &["-o", "link"]);
    // "7: name@peer: <…": the number and the flags may change.
    text.lines()
        .filter_map(|line| line.split(':').nth(1))
        .map(|name| name.trim().to_owned() + "\n")
        .collect()
}

fn mounts(lab: &Path) -> String {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| !point.starts_with(LABS) || Path::new(point).starts_with(lab))
        .map(|point| point.to_owned() + "\n")
        .collect()
}

/// Programs that a lab starts, by name and command line, without their PIDs.
fn processes(lab: &Path) -> String {
    let lab = lab.to_string_lossy();
    let mut lines = String::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        let words = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        if line.contains(&*lab) && !line.contains("orchctl") {
            lines += &line;
            lines.push('\n');
        }
    }
    lines
}
