//! What goes to stdout, and how errors are told.

use std::io::Write as _;

use comfy_table::{Table, presets};

/// What a person can do about an error; printed on a line of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Hint(pub(crate) String);

/// The command line is wrong in a way that only its meaning shows; exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(String);

/// An error with a hint.
pub(crate) fn hinted(hint: impl Into<String>, message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Hint(hint.into())).context(message.into())
}

/// An error of usage.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(message.into()))
}

/// Exit code of an error: 2 for wrong usage, else 1.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Usage>().is_some() { 2 } else { 1 }
}

/// `error: …` and, where there is advice, `hint: …`.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    let causes: Vec<String> =
        error.chain().filter(|cause| !cause.is::<Hint>()).map(ToString::to_string).collect();
    let mut text = format!("error: {}", causes.join(": "));
    if let Some(hint) =
        error.downcast_ref::<Hint>().map(|hint| hint.0.clone()).or_else(|| general_hint(error))
    {
        text.push_str("\nhint: ");
        text.push_str(&hint);
    }
    text
}

/// Advice for what can happen to every command that talks to the API server.
fn general_hint(error: &anyhow::Error) -> Option<String> {
    let hint = match error.chain().find_map(|cause| cause.downcast_ref::<orch_client::Error>())? {
        orch_client::Error::Transport { source, .. }
            if format!("{source:?}").contains("ertificate") =>
        {
            "the server is not the one this kubeconfig was made for; `orchctl lab kubeconfig` prints the path of the \
             lab's, and KUBECONFIG or --kubeconfig names another"
        }
        orch_client::Error::Transport { .. } => {
            "see whether the cluster runs with `orchctl lab status`; start the lab with `make up`"
        }
        orch_client::Error::Api { code: 401, .. } => {
            "the server does not know these credentials; use the kubeconfig of this cluster (`orchctl lab kubeconfig` \
             prints the path of the lab's)"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// One line.
///
/// # Errors
/// stdout is closed.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// Columns under headings, as `kubectl` prints them.
///
/// # Errors
/// stdout is closed.
pub(crate) fn table<R>(headings: &[&str], rows: R) -> anyhow::Result<()>
where
    R: IntoIterator<Item = Vec<String>>,
{
    line(&render(headings, rows))
}

/// The same as text.
pub(crate) fn render<R>(headings: &[&str], rows: R) -> String
where
    R: IntoIterator<Item = Vec<String>>,
{
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headings);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let text = render(
            &["NAME", "AGE"],
            [vec!["web-0".to_owned(), "4m".to_owned()], vec!["a".to_owned(), "10m".to_owned()]],
        );
        assert_eq!(text, "NAME    AGE\nweb-0   4m\na       10m");
    }

    #[test]
    fn a_hint_has_a_line_of_its_own_and_usage_has_code_2() {
        let error = hinted("start a lab with `make up`", "there is no lab").context("run it");
        assert_eq!(
            describe(&error),
            "error: run it: there is no lab\nhint: start a lab with `make up`"
        );
        assert_eq!(exit_code(&error), 1);
        assert_eq!(exit_code(&usage("name one").context("delete")), 2);
    }

    #[test]
    fn an_unreachable_server_gets_advice() {
        let source = Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        let error = orch_client::Error::Transport {
            context: "the API server at a:1 cannot be reached".to_owned(),
            source,
        };
        let text = describe(&error.into());
        assert!(text.starts_with("error: the API server at a:1 cannot be reached: "), "{text}");
        assert!(text.contains("\nhint: see whether the cluster runs"), "{text}");
    }
}
