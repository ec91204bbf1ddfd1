//! Writes a program's reference from its command line definition. Part of the tests of `orchctl` and of `orchestrator`,
//! which compare what is in this folder with what the code says.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Arg, Command};

/// Variable with which the tests write the files instead of comparing them.
const WRITE: &str = "ORCH_WRITE_DOCS";

/// The file in docs/reference says this, or is written if [`WRITE`] is set.
pub(crate) fn ensure(name: &str, wanted: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference").join(name);
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, wanted).expect("write the reference");
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let first = wanted.lines().zip(found.lines()).find(|(wanted, found)| wanted != found);
    assert!(
        wanted == found,
        "docs/reference/{name} is not what the code says: run `make docs`\nfirst difference: {first:?}"
    );
}

/// The whole program.
pub(crate) fn program(mut command: Command) -> String {
    command.build();
    let name = command.get_name().to_owned();
    let mut text = format!(
        "# {name}\n\n<!-- Written by `make docs` from the code; changes here are lost. -->\n\n{}.\n",
        command.get_about().map(ToString::to_string).unwrap_or_default()
    );
    let global: Vec<&Arg> = command.get_arguments().filter(|arg| arg.is_global_set()).collect();
    if !global.is_empty() {
        text.push_str("\nEvery command takes:\n\n");
        table(&mut text, &global);
    }
    commands(&mut text, &command, &name);
    text
}

fn commands(text: &mut String, command: &Command, path: &str) {
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name());
        if sub.get_subcommands().next().is_none() {
            leaf(text, sub, &path);
        }
        commands(text, sub, &path);
    }
}

fn leaf(text: &mut String, command: &Command, path: &str) {
    let about = command.get_long_about().or(command.get_about());
    let _ = write!(text, "\n## {path}\n");
    if let Some(about) = about {
        let about = about.to_string();
        let end = if about.ends_with('.') { "" } else { "." };
        let _ = write!(text, "\n{about}{end}\n");
    }
    let own: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_global_set() && !arg.is_hide_set())
        .filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()))
        .collect();
    if !own.is_empty() {
        text.push('\n');
        table(text, &own);
    }
    if let Some(example) = command.get_after_help() {
        let _ = write!(text, "\n```\n{}\n```\n", example.to_string().trim_end());
    }
}

fn table(text: &mut String, args: &[&Arg]) {
    text.push_str("| Argument | Meaning |\n| --- | --- |\n");
    for arg in args {
        let _ = writeln!(text, "| {} | {} |", shape(arg), cell(&meaning(arg)));
    }
}

/// `-o, --output FORMAT`, `FILE…`.
fn shape(arg: &Arg) -> String {
    let value = arg
        .get_value_names()
        .map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        .filter(|_| arg.get_action().takes_values());
    let dots = match arg.get_num_args() {
        Some(range) if range.max_values() > 1 => "…",
        _ => "",
    };
    let flags: Vec<String> = [
        arg.get_short().map(|short| format!("-{short}")),
        arg.get_long().map(|long| format!("--{long}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut shape = flags.join(", ");
    if let Some(value) = value {
        let space = if shape.is_empty() { "" } else { " " };
        let _ = write!(shape, "{space}{value}{dots}");
    }
    format!("`{}`", shape.replace('|', "\\|"))
}

fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut notes = Vec::new();
    let possible: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    if arg.get_action().takes_values() && !possible.is_empty() {
        notes.push(possible.join(", "));
    }
    let defaults: Vec<_> =
        arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if arg.get_action().takes_values() && defaults.iter().any(|value| !value.is_empty()) {
        notes.push(format!("default `{}`", defaults.join(",")));
    }
    if let Some(variable) = arg.get_env() {
        notes.push(format!("environment `{}`", variable.to_string_lossy()));
    }
    if arg.is_required_set() && arg.get_long().is_some() {
        notes.push("required".to_owned());
    }
    if notes.is_empty() { help } else { format!("{help} ({})", notes.join("; ")) }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
