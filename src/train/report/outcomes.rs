//! What became of each model, from results.csv.

use crate::base::{Result, format_secs};
use crate::train::results;
use std::path::Path;

/// The table of models: columns and rows; both empty where there is no results.csv.
///
/// # Errors
/// When the file is damaged or cannot be read.
pub(super) fn outcomes(path: &Path) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let lines = if path.exists() { results::read(path)? } else { Vec::new() };
    let Some((header, rows)) = lines.split_first() else { return Ok((Vec::new(), Vec::new())) };
    // The page lies beside the models' files, so their directory is left out; a reason is shown with its status.
    let shown: Vec<usize> = (0..header.len()).filter(|&c| !matches!(&*header[c], "reason" | "directory")).collect();
    let title = |c: &usize| match &*header[*c] {
        "name" => "model",
        "steps_done" => "steps",
        "train_loss" => "loss",
        "valid_loss" => "held-out loss",
        "secs" => "time",
        other => other,
    };
    let reason = header.iter().position(|column| column == "reason");
    let cell = |row: &[String], c: usize| {
        let field = row[c].as_str();
        match &*header[c] {
            "train_loss" | "valid_loss" => match field.parse::<f64>() {
                Ok(loss) if loss.is_finite() => format!("{loss:.4}"),
                Ok(_) => "not finite".into(),
                Err(_) => "-".into(),
            },
            "secs" => field.parse().map_or("-".into(), format_secs),
            "status" => match reason.map(|c| row[c].as_str()).filter(|why| !why.is_empty()) {
                Some(why) => format!("{field}: {why}"),
                None => field.into(),
            },
            _ if field.is_empty() => "-".into(),
            _ => field.into(),
        }
    };
    let rows = rows.iter().map(|row| shown.iter().map(|&c| cell(row, c)).collect()).collect();
    Ok((shown.iter().map(|c| title(c).to_string()).collect(), rows))
}
