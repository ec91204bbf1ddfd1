//! The tutorial, run as it is written: every `sh` block of `docs/tutorial.md` in one shell, in a lab of its own, and
//! each line of the `text` block after it looked for in what it printed.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tests_e2e::shell;
use tests_e2e::testlab::{Client, find_client, programs};

const DOCUMENT: &str = include_str!("../../../docs/tutorial.md");
const LAB: &str = "/var/lib/orch/tutorial";
const UNDERLAY: &str = "172.31.241.0/24";
const LIMIT: Duration = Duration::from_secs(400);
/// Undoes what the tutorial made when it does not get to its end.
const CLEAN_UP: &str = "orchctl lab down
ip netns del mine 2>/dev/null || true
ip link del mine0 2>/dev/null || true
rm -rf /tmp/hello /tmp/cni /tmp/web.yaml";
/// Between what two blocks print.
const MARK: &str = "\u{1e}";

/// Something to type, and lines to be seen then.
struct Step<'a> {
    /// Where the block begins in the document.
    line: usize,
    script: String,
    expected: Vec<&'a str>,
}

fn steps(document: &str) -> anyhow::Result<Vec<Step<'_>>> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    let mut lines = document.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else { continue };
        let block: Vec<&str> =
            lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        match kind {
            "sh" => {
                steps.push(Step { line: number + 1, script: block.join("\n"), expected: vec![] });
            }
            "text" => {
                steps.last_mut().context("a block of text before one of sh")?.expected = block;
            }
            // Shown, not run.
            "" => {}
            other => bail!("line {}: a block of {other:?}: use sh, text or nothing", number + 1),
        }
    }
    Ok(steps)
}

/// Whether a line that was printed is the one expected; `…` stands for anything, several blanks for one.
fn matches(expected: &str, printed: &str) -> bool {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let (expected, printed) = (words(expected), words(printed));
    let mut parts = expected.split('…').map(str::trim);
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = printed.strip_prefix(first) else { return false };
    let mut open = false;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
        open = part.is_empty();
    }
    open || rest.is_empty()
}

#[test]
fn lines_match_with_gaps() {
    assert!(matches("web-… node-…", "web-abc   1/1  node-2 <none>"));
    assert!(matches("eth0… 10.99.0.2/24…", "eth0@if3  UP  10.99.0.2/24 fe80::1/64"));
    assert!(matches("pod/hello created", "pod/hello created"));
    assert!(!matches("pod/hello created", "pod/hello created already"));
    assert!(!matches("… cpu: 60m", "+  cpu: 50m"));
    assert!(matches("… cpu: 60m", "+   cpu: 60m"));
}

#[test]
fn the_tutorial_works_as_written() -> anyhow::Result<()> {
    let Client::Kubectl(kubectl) = find_client() else {
        eprintln!("skipped: the tutorial is told with kubectl, and there is none");
        return Ok(());
    };
    ensure!(nix::unistd::geteuid().is_root(), "the tutorial needs root");
    let programs = programs()?;
    let home = tempfile::tempdir()?;
    symlink(&kubectl, home.path().join("kubectl"))?;
    let steps = steps(DOCUMENT)?;
    ensure!(steps.len() > 10, "the tutorial has {} steps", steps.len());
    // What a run that was killed left behind.
    run(&programs, home.path(), CLEAN_UP)?.ok()?;

    let blocks = steps.iter().map(|step| format!("{}\necho; echo '{MARK}'\n", step.script));
    let script = format!("exec 2>&1\n{}", blocks.collect::<String>());
    let outcome = run(&programs, home.path(), &script);
    let cleaned = run(&programs, home.path(), CLEAN_UP).and_then(shell::Output::ok);
    let output = outcome?;
    let printed = format!("{}\n", output.text());
    let mut parts = printed.split(MARK);
    let mut wrong = Vec::new();
    for step in &steps {
        let part = parts.next().unwrap_or_default();
        for expected in &step.expected {
            if !part.lines().any(|line| matches(expected, line)) {
                wrong.push(format!(
                    "docs/tutorial.md:{}: no line is {expected:?} in:\n{part}",
                    step.line
                ));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    output.ok()?;
    cleaned.map(drop)
}

fn run(programs: &Path, home: &Path, script: &str) -> anyhow::Result<shell::Output> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let path = std::env::var("PATH").unwrap_or_default();
    // From a file: what runs in it may read standard input.
    let file = home.join("script");
    std::fs::write(&file, script)?;
    let mut command = Command::new("bash");
    command
        .args(["-eu", "-o", "pipefail"])
        .arg(&file)
        .current_dir(root)
        .env("PATH", format!("{}:{}:{path}", programs.display(), home.display()))
        // `scripts/install-cni` looks for the programs below it.
        .env("CARGO_TARGET_DIR", programs.parent().context("the programs' folder has a parent")?)
        .env("HOME", home)
        .env("ORCH_LAB", LAB)
        .env("ORCH_LAB_UNDERLAY", UNDERLAY)
        .env_remove("KUBECONFIG");
    shell::run(&mut command, b"", LIMIT)
}
