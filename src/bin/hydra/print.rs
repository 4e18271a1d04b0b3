//! Printing to standard output, which may be a pipe that nobody reads any more, or a file on a disk that is full.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

/// Why a line could not be printed, the first time.
static REFUSED: OnceLock<io::Error> = OnceLock::new();

/// Prints a line. Where nobody reads, the work goes on in silence: a run must not fail because `head` has seen enough.
/// What the system refuses is told at the end, since the work is of use without its words: by [`refused`].
pub fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush())
        && error.kind() != ErrorKind::BrokenPipe
    {
        // The first says it.
        let _ = REFUSED.set(error);
    }
}

/// Why not all was printed, if somebody reads and it was not.
pub fn refused() -> Option<&'static io::Error> {
    REFUSED.get()
}

/// Prints a line on standard error, where standard output holds something else. It may be closed; then nobody wants to
/// know.
pub fn say_beside(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Prints a line on standard error: something that the user should know and that ends nothing.
pub fn warn(line: impl Display) {
    say_beside(format!("warning: {line}"));
}

/// Prints a line on standard error: something that happened because somebody asked for it.
pub fn note(line: impl Display) {
    say_beside(format!("note: {line}"));
}

/// Prints an error on standard error: what ends the program.
pub fn complain(line: impl Display) {
    say_beside(format!("error: {line}"));
}

/// So many of `what`, which has its plural in s.
pub fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") }
}

/// Rows as aligned columns, two spaces between; the first column to the left, the others to the right.
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
