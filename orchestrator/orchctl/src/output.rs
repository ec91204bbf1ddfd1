//! What goes to stdout.

use std::io::Write as _;

use comfy_table::{Table, presets};

/// What a person can do about an error; printed on a line of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Hint(pub String);

/// One line.
///
/// # Errors
/// stdout is closed.
pub fn line(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// Columns under headings, as `kubectl` prints them.
///
/// # Errors
/// stdout is closed.
pub fn table<R>(headings: &[&str], rows: R) -> anyhow::Result<()>
where
    R: IntoIterator<Item = Vec<String>>,
{
    line(&render(headings, rows))
}

fn render<R>(headings: &[&str], rows: R) -> String
where
    R: IntoIterator<Item = Vec<String>>,
{
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(headings);
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
    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let text = super::render(&["NAME", "AGE"], [vec!["web-0".to_owned(), "4m".to_owned()], vec!["a".to_owned(), "10m".to_owned()]]);
        assert_eq!(text, "NAME    AGE\nweb-0   4m\na       10m");
    }
}
