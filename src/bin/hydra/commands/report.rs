//! `hydra report`: a page of a run's schedule and losses, and of where its time went.

use crate::print::say;
use hydra::base::Result;
use hydra::train::write_report;
use std::path::Path;

/// Writes the report of the run in `run`.
///
/// # Errors
/// When `run` does not contain a run, or a file cannot be read or written.
pub fn run(run: &Path, json: bool) -> Result<()> {
    let page = write_report(run)?;
    match json {
        true => say(serde_json::json!({ "report": page.display().to_string() })),
        false => say(format!("{}: open it in a browser", page.display())),
    }
    Ok(())
}
