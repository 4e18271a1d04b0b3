//! What became of a run's models: the rows of results.csv, of the JSON object at the end, and of the table.

use crate::job::Job;
use crate::plan::PlannedJob;
use crate::print::{say, table};
use crate::run::standing::Standing;
use crate::run::watch::Watch;
use crate::rundir::{self, RunDir};
use hydra::base::{Result, format_secs};
use hydra::train::metrics::{Row, read_rows, secs};
use hydra::train::results::{self, ModelResult, Status};
use hydra::train::write_safely;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A row for each model of the job, including those that ended before this start of the run; `watch` returns a model's
/// watch by its number.
pub fn rows<'a>(job: &Job, standings: &[Standing], watch: impl Fn(usize) -> Option<&'a Watch<'a>>) -> Vec<ModelResult> {
    let row = |m: usize| {
        let (model, standing, watch) = (&job.models[m], &standings[m], watch(m));
        let directory = job.run.out.join(&model.name);
        let (train_loss, valid_loss, secs) = match watch {
            Some(watch) if watch.done > standing.from && (watch.valid_loss.is_some() || standing.from == 0) => {
                (watch.loss, watch.valid_loss, watch.secs())
            }
            // It may have been validated in an earlier part of the run.
            Some(watch) if watch.done > standing.from => {
                (watch.loss, from_before(&directory.join(rundir::METRICS), watch.done).1, watch.secs())
            }
            _ => from_before(&directory.join(rundir::METRICS), standing.from),
        };
        ModelResult {
            model: m,
            name: model.name.clone(),
            searched: model.searched.clone(),
            status: watch.and_then(|w| w.status.clone()).or(standing.ended.clone()).unwrap_or(Status::Cancelled),
            steps: watch.map_or(standing.from, |w| w.done),
            train_loss,
            valid_loss,
            secs,
            directory,
        }
    };
    (0..job.models.len()).map(row).collect()
}

/// The last losses and the seconds of a model that trained before, for `steps` steps; unreadable values count as
/// unknown.
fn from_before(metrics: &Path, steps: u64) -> (Option<f32>, Option<f32>, f64) {
    let mut rows = read_rows(metrics).unwrap_or_default();
    rows.retain(|row| is_within(row, steps));
    let train = rows.iter().rev().find_map(|row| if let Row::Step(r) = row { Some(r.loss) } else { None });
    let valid = rows.iter().rev().find_map(|row| if let Row::Valid(r) = row { Some(r.valid_loss) } else { None });
    (train, valid, secs(&rows))
}

/// Whether a row belongs to the first `steps` steps, including the validation after them.
fn is_within(row: &Row, steps: u64) -> bool {
    match row {
        Row::Step(row) => row.step < steps,
        Row::Valid(row) => row.step <= steps,
    }
}

/// Removes from the metrics of models that had already ended the rows of steps beyond the checkpoint, which a later
/// start added and then lost. A file that cannot be read is left as it is.
///
/// # Errors
/// When a file cannot be written.
pub fn drop_lost_rows(job: &Job, standings: &[Standing]) -> Result<()> {
    for (model, standing) in job.models.iter().zip(standings).filter(|(_, s)| s.ended.is_some() && s.from > 0) {
        let metrics = job.run.out.join(&model.name).join(rundir::METRICS);
        let rows = read_rows(&metrics).unwrap_or_default();
        let kept: Vec<&Row> = rows.iter().filter(|row| is_within(row, standing.from)).collect();
        if kept.len() < rows.len() {
            write_safely(&metrics, |out| {
                kept.iter().try_for_each(|row| writeln!(out, "{}", serde_json::to_string(row)?))
            })?;
        }
    }
    Ok(())
}

/// Writes results.csv, if there are several models.
///
/// # Errors
/// When it cannot be written.
pub fn write_results(path: &Path, rows: &[ModelResult]) -> Result<()> {
    if rows.len() > 1 { results::write(path, rows) } else { Ok(()) }
}

/// The status shown for a model that was still training when the run ended.
const INTERRUPTED: &str = "interrupted";

/// The row in the JSON object at the end; with `has_ended`, the model had come to its own end before the run did.
pub fn row_json(row: &ModelResult, has_ended: bool) -> Value {
    let mut json = json!({
        "name": row.name,
        "status": if has_ended { row.status.word() } else { INTERRUPTED },
        "steps": row.steps,
        "loss": row.train_loss,
        "secs": row.secs,
        "model": saved(row).filter(|_| has_ended).map(|model| model.display().to_string()),
    });
    if let Some(valid) = row.valid_loss {
        json["valid_loss"] = valid.into();
    }
    if !row.status.reason().is_empty() {
        json["reason"] = row.status.reason().into();
    }
    json
}

/// The folder where a model that ended was saved. A failed one may have left a folder from an earlier part of the run
/// there, or a folder without weights.
fn saved(row: &ModelResult) -> Option<PathBuf> {
    let failed = matches!(row.status, Status::Failed(_));
    Some(row.directory.join(rundir::MODEL)).filter(|model| !failed && model.join(rundir::WEIGHTS).exists())
}

/// Prints how the run ended.
pub fn tell(planned: &PlannedJob, dir: &RunDir, rows: &[ModelResult]) {
    if let [row] = rows {
        let valid = row.valid_loss.map_or(String::new(), |v| format!(", held-out loss {v:.4}"));
        let loss = row.train_loss.map_or(String::new(), |l| format!(", loss {l:.4}"));
        let how = if row.status == Status::Done { String::new() } else { format!("{}, ", row.status.word()) };
        say(format!("{}: {how}{} steps done in {}{loss}{valid}", row.name, row.steps, format_secs(row.secs)));
        if let Some(model) = saved(row) {
            say(format!("  model       {}", model.display()));
        }
        say(format!("  metrics     {}", row.directory.join(rundir::METRICS).display()));
    } else {
        say(table(&results::table(rows)).trim_end());
        // Losses are comparable only within a search: other models have different training or held-out data.
        let is_one_search = matches!(&planned.job.searches[..], [search] if search.models.len() == rows.len());
        if let Some(best) = results::best(rows).filter(|_| is_one_search) {
            say(format!("best: {}, in {}", best.name, best.directory.join(rundir::MODEL).display()));
        }
        say(format!("  results     {}", dir.at(rundir::RESULTS).display()));
    }
    say(format!("  trace       {} (opens in https://ui.perfetto.dev)", dir.at(rundir::TRACE).display()));
    planned.idle_devices().into_iter().for_each(say);
}
