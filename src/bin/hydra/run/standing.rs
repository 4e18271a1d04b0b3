//! How far the models of a run had come before, according to their checkpoints.

use crate::args::Resume;
use crate::plan::{Planned, PlannedJob};
use crate::print::warn;
use crate::run::inbox::Taken;
use crate::run::judge::Judges;
use crate::rundir;
use crate::setup::Prepared;
use hydra::base::{Error, Result, nearest};
use hydra::train::results::Status;
use hydra::train::{Checkpoint, Verdict};
use std::path::Path;
use std::rc::Rc;

/// How far a model of the job had come when the run began, or when the model was added.
#[derive(Default)]
pub struct Standing {
    /// The step from which it goes on.
    pub from: u64,
    /// How it had ended, if it had; then it is not trained.
    pub ended: Option<Status>,
    /// How it is to end, if it was to end but the run ended first: no further step is trained, and the model is saved.
    pub ends: Option<Status>,
}

/// Looks for models of the run in `out` that have a checkpoint but are no longer among the job's models `names`: under
/// another name a model would begin anew.
///
/// # Errors
/// [`Error::BadInput`] if the run is required to resume.
pub fn check_names(out: &Path, names: &[&str], resume: Resume) -> Result<()> {
    let has_checkpoint = |name: &str| out.join(name).join(rundir::CHECKPOINT).exists();
    let gone = rundir::planned_names(out).into_iter().filter(|old| !names.contains(&old.as_str()));
    let gone: Vec<String> = gone.filter(|old| has_checkpoint(old)).collect();
    let [first, ..] = &gone[..] else { return Ok(()) };
    let fresh = names.iter().copied().filter(|name| !has_checkpoint(name));
    let near = nearest(first, fresh).map_or(String::new(), |near| format!("; is it {near:?} now?"));
    let list: Vec<String> = gone.iter().map(|name| format!("{name:?}")).collect();
    let what = format!("{}: has checkpoints of models that the job has not: {}", out.display(), list.join(", "));
    match resume {
        Resume::Require => Err(Error::bad(format!("{what}, and --resume require goes on with all{near}"))),
        Resume::Auto | Resume::Never => {
            warn(format!("{what}; they are left as they are{near}"));
            Ok(())
        }
    }
}

/// The checkpoints of an existing run, compared with the job.
///
/// # Errors
/// When one cannot be read or does not match the job, or there is none and `resume` requires one.
pub fn open_checkpoints(planned: &PlannedJob, resume: Resume) -> Result<Vec<Option<Checkpoint>>> {
    let mut checkpoints = Vec::new();
    for model in &planned.models {
        let path = planned.job.run.out.join(&model.prepared.name).join(rundir::CHECKPOINT);
        let checkpoint = Checkpoint::open(&path)?;
        if let Some(checkpoint) = &checkpoint {
            checkpoint.check(&model.prepared.options, model.model())?;
            let (done, steps) = (checkpoint.step(), model.prepared.options.steps);
            if done > steps {
                return Err(Error::bad(format!("{}: is after {done} steps, the job has {steps}", path.display())));
            }
        }
        checkpoints.push(checkpoint);
    }
    if resume == Resume::Require && checkpoints.iter().all(Option::is_none) {
        let out = planned.job.run.out.display();
        return Err(Error::bad(format!("{out}: the run has no checkpoint to resume from, as --resume require wants")));
    }
    Ok(checkpoints)
}

/// Prints which models have rows of steps but no checkpoint, so that they begin anew.
///
/// # Errors
/// [`Error::BadInput`] if the run is required to resume.
pub fn tell_lost(
    planned: &PlannedJob,
    checkpoints: &[Option<Checkpoint>],
    standings: &[Standing],
    resume: Resume,
) -> Result<()> {
    for (m, model) in planned.models.iter().enumerate() {
        let folder = planned.job.run.out.join(&model.prepared.name);
        let has_rows = std::fs::metadata(folder.join(rundir::METRICS)).is_ok_and(|metrics| metrics.len() > 0);
        if checkpoints[m].is_some() || standings[m].ended.is_some() || !has_rows {
            continue;
        }
        let what = format!("{}: has trained and has no checkpoint in {}", model.prepared.name, folder.display());
        if resume == Resume::Require {
            return Err(Error::bad(format!("{what}; --resume require goes on with all, auto begins it anew")));
        }
        warn(format!("{what}; it begins anew"));
    }
    Ok(())
}

/// Prints a line about what has changed in a model's training, which may be intended or a mistake.
pub fn tell_changes(prepared: &Prepared, checkpoint: &Checkpoint) {
    let changes = checkpoint.changes(&prepared.options);
    if !changes.is_empty() {
        let changes: Vec<String> = changes.iter().map(|c| format!("{} = {} (was {})", c.key, c.is, c.was)).collect();
        let (name, step) = (&prepared.name, checkpoint.step());
        warn(format!("{name}: goes on from step {step} with other settings than before: {}", changes.join(", ")));
    }
}

/// How far each model had come.
pub fn standings(
    planned: &PlannedJob,
    checkpoints: &[Option<Checkpoint>],
    taken: &Taken,
    judges: &mut Judges,
) -> Vec<Standing> {
    let from: Vec<u64> = checkpoints.iter().map(|c| c.as_ref().map_or(0, Checkpoint::step)).collect();
    let verdicts = judges.extend(&planned.job, &from);
    let standing = |((model, checkpoint), verdict): ((&Rc<Planned>, &Option<Checkpoint>), Verdict)| {
        let from = checkpoint.as_ref().map_or(0, Checkpoint::step);
        let end = match verdict {
            _ if from == model.prepared.options.steps => Some(Status::Done),
            _ if taken.cancelled.contains(&model.prepared.name) => Some(Status::Cancelled),
            Verdict::Stop(reason) => Some(Status::Stopped(reason)),
            Verdict::GoOn => None,
        };
        // Without a checkpoint there is nothing to save either.
        match checkpoint.as_ref().is_none_or(Checkpoint::ended) {
            true => Standing { from, ended: end, ends: None },
            false => Standing { from, ended: None, ends: end.filter(|end| *end != Status::Done) },
        }
    };
    planned.models.iter().zip(checkpoints).zip(verdicts).map(standing).collect()
}
