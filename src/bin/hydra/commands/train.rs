//! `hydra train`: plans, makes the run's directory, trains the models together, and reports what became of each.

use crate::args::{JobFile, Resume};
use crate::job::Job;
use crate::machine::free_memory_bytes;
use crate::plan::{plan_to_fit, summary, warn_of_warmups, why_not};
use crate::print::{say, warn};
use crate::run::inbox::{Inbox, Taken};
use crate::run::judge::Judges;
use crate::run::outcome;
use crate::run::signals::Signals;
use crate::run::standing::{Standing, check_names, open_checkpoints, standings, tell_changes, tell_lost};
use crate::run::training::{Beginning, Failure, Trained, train};
use crate::rundir::{self, Found, RunDir, inspect};
use hydra::base::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;

/// Trains the job of a file.
///
/// # Errors
/// When the job, the data or the machine is at fault; [`Error::Interrupted`] when the run was stopped, after a
/// checkpoint or before there was one.
pub fn run(JobFile { job: path, set }: &JobFile, resume: Resume, json: bool) -> Result<()> {
    let signals = Signals::install()?;
    let mut job = Job::load(path, set)?;
    let out = job.run.out.clone();
    let goes_on = resume != Resume::Never && rundir::holds_run(&out);
    // Locked before anything in it is read, so that no other process changes it meanwhile.
    let held = goes_on.then(|| RunDir::take(&out)).transpose()?;
    let taken = if goes_on { Inbox::taken(&out.join(rundir::INBOX)) } else { Taken::default() };
    taken.jobs.iter().try_for_each(|path| job.add(path))?;
    let planned = plan_to_fit(path, job, &Rc::default(), true, free_memory_bytes())?;
    let names: Vec<&str> = planned.job.models.iter().map(|m| m.name.as_str()).collect();
    let found = inspect(&out, &names, resume)?;
    let checkpoints = match found {
        Found::Run => {
            check_names(&out, &names, resume)?;
            open_checkpoints(&planned, resume)?
        }
        Found::Free => planned.models.iter().map(|_| None).collect(),
    };
    let mut judges = Judges::new(&out, found)?;
    let standings = standings(&planned, &checkpoints, &taken, &mut judges);
    if standings.iter().all(|s| s.ended.is_some()) {
        return already_done(&planned.job, &standings, json);
    }
    tell_lost(&planned, &checkpoints, &standings, resume)?;
    if let Some(why) = why_not(path, &planned, free_memory_bytes()) {
        return Err(Error::Device(why));
    }
    warn_of_warmups(&planned.job, 0, &planned.models);
    for (m, checkpoint) in checkpoints.iter().enumerate().filter(|(m, _)| standings[*m].ended.is_none()) {
        checkpoint.iter().for_each(|checkpoint| tell_changes(&planned.models[m].prepared, checkpoint));
    }
    if !json {
        summary(&planned);
    }
    signals.wait_for_the_step();
    let mut dir = held.map_or_else(|| RunDir::take(&out), Ok)?;
    match train(&mut dir, Beginning { planned, standings, checkpoints, judges }, &signals.stop, json) {
        Ok(Trained { models, failed }) => {
            if json {
                say_models(&out, models);
            } else {
                say(format!("run: {}", out.display()));
            }
            failed.map_or(Ok(()), Err)
        }
        Err(Failure { error, untouched, models }) => {
            let vain = untouched && found == Found::Free;
            if vain {
                dir.abandon();
            } else if json && !models.is_empty() {
                say_models(&out, models);
            }
            Err(match error {
                Error::Interrupted { at, .. } => Error::Interrupted { at, checkpoint: Some(!vain) },
                other => other,
            })
        }
    }
}

/// Prints the one JSON object of a run.
fn say_models(out: &Path, models: Vec<Value>) {
    say(json!({ "run": out.display().to_string(), "models": models }));
}

/// Reports that all is done, and writes files for which the run may have had no time.
fn already_done(job: &Job, standings: &[Standing], json: bool) -> Result<()> {
    let out = &job.run.out;
    outcome::drop_lost_rows(job, standings)?;
    let rows = outcome::rows(job, standings, |_| None);
    outcome::write_results(&out.join(rundir::RESULTS), &rows)?;
    let folder = out.join(rundir::INBOX);
    let waiting = Inbox::new(folder.clone()).wait_look().len();
    if waiting > 0 {
        warn(format!("{}: of no use to a run that is done: {waiting} waiting there", folder.display()));
    }
    if json {
        say_models(out, rows.iter().map(|row| outcome::row_json(row, true)).collect());
    } else {
        say(format!("{}: the run is done already; nothing to do", out.display()));
    }
    Ok(())
}
