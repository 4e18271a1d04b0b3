//! Printing to standard output, which may be a closed pipe or a file on a full disk.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

/// The first error of printing a line.
static REFUSED: OnceLock<io::Error> = OnceLock::new();

/// Prints a line. If the pipe is closed, the program goes on silently: a run must not fail because `head` has exited.
/// Other errors are reported at the end, through [`refused`], since the work is useful without its output.
pub fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush())
        && error.kind() != ErrorKind::BrokenPipe
    {
        // Only the first error is kept.
        let _ = REFUSED.set(error);
    }
}

/// The error for which not everything was printed, if there was one other than a closed pipe.
pub fn refused() -> Option<&'static io::Error> {
    REFUSED.get()
}

/// Prints a line on standard error, when standard output carries something else. If standard error is closed, the line
/// is dropped.
pub fn say_beside(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Prints a line on standard error: a warning that does not end the program.
pub fn warn(line: impl Display) {
    say_beside(format!("warning: {line}"));
}

/// Prints a line on standard error: something that happened on request.
pub fn note(line: impl Display) {
    say_beside(format!("note: {line}"));
}

/// Prints the error that ends the program on standard error.
pub fn complain(line: impl Display) {
    say_beside(format!("error: {line}"));
}

/// `n` of `what`, whose plural is formed with s.
pub fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") }
}

/// Rows as aligned columns, two spaces between; the first column is left-aligned, the others right-aligned.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (c, cell) in row.iter().enumerate() {
            line +=
                &if c == 0 { format!(" {cell:<w$}", w = widths[c]) } else { format!("  {cell:>w$}", w = widths[c]) };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |cells: &[&str]| cells.iter().map(|c| c.to_string()).collect::<Vec<_>>();
        assert_eq!(
            table(&[row(&["a", "long"]), row(&["longer", "b", ""]), row(&[])]),
            "  a       long\n  longer     b\n\n"
        );
        assert_eq!(table(&[]), "");
    }
}
