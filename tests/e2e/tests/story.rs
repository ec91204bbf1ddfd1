//! A user's story, told in one lab of three nodes: deploy, look, scale, roll, break things, go.
//!
//! The chapters run in order, in one lab, with stock kubectl where there is one and `orchctl` otherwise. `main`
//! brings the lab up, runs the chapters and takes the lab down; that nothing is left is the last thing checked.

mod chapters;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use tests_e2e::testlab::{Client, TestLab, lab_dir};

use crate::chapters::{CHAPTERS, Chapter, Needs};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The chapters share one lab.
    arguments.test_threads = Some(1);
    if arguments.list {
        libtest_mimic::run(&arguments, trials(&Client::Orchctl, None)).exit();
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!(
            "error: the end-to-end tests need root: they start a lab of network namespaces and containers"
        );
        return ExitCode::FAILURE;
    }
    let before = chapters::leftovers::Machine::observe(&lab_dir());
    let lab = match TestLab::up() {
        Ok(lab) => Box::leak(Box::new(lab)),
        Err(error) => {
            eprintln!("error: the lab does not come up: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("the lab is up; the client is {:?}", lab.client);
    let outcome = libtest_mimic::run(&arguments, trials(&lab.client, Some(lab)));
    if outcome.has_failed() {
        eprintln!("{}", lab.logs());
    }
    if std::env::var_os("ORCH_E2E_KEEP").is_some() {
        eprintln!("the lab stays up in {}", lab.dir.display());
        return outcome.exit_code();
    }
    if let Err(error) = lab.down().and_then(|()| before.unchanged()) {
        eprintln!("error: the lab left something behind: {error:#}");
        return ExitCode::FAILURE;
    }
    outcome.exit_code()
}

fn trials(client: &Client, lab: Option<&'static TestLab>) -> Vec<Trial> {
    let trial = |chapter: &Chapter| {
        let run = chapter.run;
        let told = match (chapter.needs, client) {
            (Needs::Kubectl, Client::Orchctl) => false,
            (Needs::Chaos, _) if std::env::var_os("ORCH_CHAOS").is_none() => false,
            _ => lab.is_some(),
        };
        // Ignored where there is no stock kubectl (what it shows is what kubectl itself makes of our answers), and
        // chaos unless it is asked for.
        Trial::test(chapter.name, move || match lab {
            Some(lab) => run(lab).map_err(|error| format!("{error:#}").into()),
            None => Ok(()),
        })
        .with_ignored_flag(!told && lab.is_some())
    };
    CHAPTERS.iter().map(trial).collect()
}
