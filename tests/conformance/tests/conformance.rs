//! All rows as one suite: `CNI_UNDER_TEST=/usr/lib/cni` asks the same of other plugins.
//!
//! Ours have to meet every row. Of others, the suite says at the end where they fall short, and that is no failure.

mod rows;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use tests_conformance::{Bed, UNDER_TEST, foreign};

use crate::rows::{Row, TABLES};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Some(folder) = foreign().filter(|folder| !folder.join("bridge").exists()) {
        eprintln!("error: {UNDER_TEST}: {} has no plugin `bridge`", folder.display());
        eprintln!("hint: Debian has the reference plugins as containernetworking-plugins");
        return ExitCode::FAILURE;
    }
    let trials = TABLES.iter().flat_map(|(table, rows)| rows.iter().map(|row| trial(table, *row)));
    let outcome = libtest_mimic::run(&arguments, trials.collect());
    let Some(folder) = foreign().filter(|_| !arguments.list) else { return outcome.exit_code() };
    eprintln!(
        "{} meets {} of {} rows; it falls short in the {} above that failed",
        folder.display(),
        outcome.num_passed,
        outcome.num_passed + outcome.num_failed,
        outcome.num_failed
    );
    ExitCode::SUCCESS
}

fn trial(table: &str, (name, row): Row) -> Trial {
    Trial::test(format!("{table}::{name}"), move || {
        let bed = Bed::new().map_err(|error| Failed::from(format!("{error:#}")))?;
        row(&bed).map_err(|error| Failed::from(format!("{error:#}")))
    })
}
