//! What a machine has that a lab might leave behind.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tests_e2e::shell;

/// Links, mounts, nft tables, and processes of the lab's programs.
pub(crate) struct Machine {
    things: BTreeSet<String>,
}

impl Machine {
    #[must_use]
    pub(crate) fn observe() -> Self {
        let mut things = BTreeSet::new();
        let mut note = |kind: &str, text: &str| {
            things.extend(text.lines().map(|line| format!("{kind} {line}")));
        };
        note("link", &links());
        note("mount", &mounts());
        note("nft", &said("nft", &["list", "tables"]));
        note("process", &processes());
        Self { things }
    }

    /// # Errors
    /// There is more than before, after a moment for the kernel to clean up.
    pub(crate) fn unchanged(&self) -> anyhow::Result<()> {
        tests_e2e::eventually("a machine as it was before", Duration::from_secs(10), || {
            let now = Self::observe();
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

fn mounts() -> String {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| point.to_owned() + "\n")
        .collect()
}

/// Programs that a lab starts, by name and command line, without their PIDs.
fn processes() -> String {
    let mut lines = String::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        let words = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        if line.contains("/var/lib/orch/e2e") && !line.contains("orchctl") {
            lines += &line;
            lines.push('\n');
        }
    }
    lines
}
