//! Trains a run's models together: starts the devices, runs the fleet, and reports the outcome.

use crate::plan::{PlannedJob, Sharing, describe_rehearsal, roomy_arenas};
use crate::print::{say, warn};
use crate::run::judge::Judges;
use crate::run::observer::RunObserver;
use crate::run::outcome;
use crate::run::standing::Standing;
use crate::run::watch::Watch;
use crate::rundir::{self, RunDir};
use crate::setup::recipe::Sources;
use hydra::base::{Error, Result};
use hydra::device::{Device, FleetMemory, start_fleet};
use hydra::engine::TurnOptions;
use hydra::spill::named;
use hydra::trace::{Keep, Recorder, RecorderOptions};
use hydra::train::results::{ModelResult, Status};
use hydra::train::{Checkpoint, Fleet, ModelToTrain, Weights};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// What a run starts from.
pub struct Beginning {
    pub planned: PlannedJob,
    pub standings: Vec<Standing>,
    /// The checkpoint that each model resumes from.
    pub checkpoints: Vec<Option<Checkpoint>>,
    /// What ends models early.
    pub judges: Judges,
}

/// A run that has come to its end.
pub struct Trained {
    /// How far each model came.
    pub models: Vec<Value>,
    /// The error of the models that failed, if some did.
    pub failed: Option<Error>,
}

/// Why training ended early.
pub struct Failure {
    /// Reported once everything is in order.
    pub error: Error,
    /// Whether no step has ended, so that there is nothing worth keeping.
    pub untouched: bool,
    /// How far each model had come; empty if training had not begun.
    pub models: Vec<Value>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, untouched: true, models: Vec::new() }
    }
}

/// Trains all models that have not ended, from their checkpoints or from the start. With `quiet`, nothing is printed.
///
/// # Errors
/// When the data or the machine is at fault; [`Error::Interrupted`] after a checkpoint.
pub fn train(
    dir: &mut RunDir,
    mut beginning: Beginning,
    stop: &AtomicBool,
    quiet: bool,
) -> std::result::Result<Trained, Failure> {
    // These files mark the directory as a run's.
    dir.write(rundir::PLAN, beginning.planned.text().as_bytes())?;
    dir.write(rundir::JOB, beginning.planned.job.record().as_bytes())?;
    dir.folder(rundir::INBOX)?;
    // Models that have ended stay out; the others have their own numbers in the fleet.
    let active = (0..beginning.planned.models.len()).filter(|&m| beginning.standings[m].ended.is_none());
    let active: Vec<usize> = active.collect();
    let (mut fleet, arenas, validates) = beginning.start(&active, quiet)?;
    let Beginning { planned, standings, judges, .. } = beginning;
    let began_with = planned.models.len();
    let mut observer = RunObserver::new((planned, standings, judges), dir, (&fleet, arenas), stop, quiet);
    for (m, valid) in active.into_iter().zip(validates) {
        observer.watch(m, valid)?;
    }
    outcome::drop_lost_rows(&observer.planned.job, &observer.standings)?;
    // An existing results.csv would describe an earlier state of the models.
    let results = observer.dir.at(rundir::RESULTS);
    if results.exists() {
        std::fs::remove_file(&results).map_err(|e| Error::io("remove", &results, e))?;
    }
    // Done last, so that a refused start leaves the older trace in its place.
    record(&mut observer, &mut fleet)?;
    let result = fleet.run(&mut observer, stop);
    observer.watches.iter().for_each(Watch::finish);
    observer.live.iter_mut().for_each(|live| live.finish(fleet.engine()));
    ended(&observer, &mut fleet, began_with, result, quiet)
}

impl Beginning {
    /// Starts the devices, and on them the fleet of the `active` models, each from where it resumes; also returns the
    /// arenas' sizes and which models have held-out data.
    fn start(&mut self, active: &[usize], quiet: bool) -> Result<(Fleet, Vec<u64>, Vec<bool>)> {
        let (planned, checkpoints) = (&self.planned, &mut self.checkpoints);
        let open = |&m: &usize| planned.models[m].prepared.sources(&planned.texts);
        let sources = active.iter().map(open).collect::<Result<Vec<_>>>()?;
        planned.models.iter().for_each(|model| model.prepared.close());
        let (device, arenas) = start_devices(planned)?;
        let model = |(&m, sources): (&usize, Sources)| {
            let model = planned.models[m].fleet_model(sources);
            // Weights that a checkpoint contains are not also read or drawn; it does not contain frozen ones.
            let has_all = checkpoints[m].is_some() && !model.placed.model.train.parameters.iter().any(|p| p.frozen);
            let weights = if has_all { Weights::Later } else { model.weights };
            ModelToTrain { weights, ..model }
        };
        let models: Vec<ModelToTrain> = active.iter().zip(sources).map(model).collect();
        let validates = models.iter().map(|model| model.valid.is_some()).collect();
        // A model that is only to be saved has no steps left, but a rehearsal needs at least one.
        let left = |&m: &usize| planned.models[m].prepared.options.steps.saturating_sub(self.standings[m].from).max(1);
        let rehearsal = planned.rehearse(active, &active.iter().map(left).collect::<Vec<u64>>())?;
        rehearsal.iter().filter(|_| !quiet).for_each(|found| say(describe_rehearsal(found)));
        let sharing = rehearsal.map_or_else(|| planned.sharing.clone(), |found| Sharing::Turns(found.policy));
        let turns = sharing.policy(&planned.job.run).map(|policy| TurnOptions {
            policy,
            units: planned.units(),
            costs: planned.machine.costs(),
            shared_bytes_per_sec: planned.machine.shared_bytes_per_sec,
            arena_bytes: planned.map.arena_bytes.clone(),
            room_bytes: arenas.clone(),
        });
        let mut fleet = Fleet::new(models, device, turns)?;
        if let Sharing::Lines(lines) = &planned.sharing {
            let number = |m: &usize| active.iter().position(|a| a == m);
            fleet.run_in_order(lines.iter().map(|line| line.iter().filter_map(number).collect()).collect())?;
        }
        for (i, &m) in active.iter().enumerate() {
            if let Some(checkpoint) = &mut checkpoints[m] {
                checkpoint.restore(fleet.engine_mut(), i)?;
                fleet.start_at(i, self.standings[m].from)?;
            }
        }
        Ok((fleet, arenas, validates))
    }
}

/// Closes the trace, writes the results and reports the outcome of a run that began with `began_with` models and ended
/// with `result`.
fn ended(
    observer: &RunObserver,
    fleet: &mut Fleet,
    began_with: usize,
    result: Result<()>,
    quiet: bool,
) -> std::result::Result<Trained, Failure> {
    let recorded = fleet.engine_mut().take_recorder().map(Recorder::finish).transpose();
    // Files taken from the inbox are worth keeping too.
    let nothing_done = observer.planned.models.len() == began_with
        && observer.standings.iter().all(|s| s.from == 0)
        && (0..observer.active.len()).all(|i| fleet.steps_done(i) == 0);
    let watch = |m: usize| observer.active.iter().position(|&a| a == m).map(|at| &observer.watches[at]);
    let rows = outcome::rows(&observer.planned.job, &observer.standings, watch);
    let has_ended = |m: usize| observer.standings[m].ended.is_some() || watch(m).is_some_and(|w| w.status.is_some());
    let models = || rows.iter().map(|row| outcome::row_json(row, has_ended(row.model))).collect();
    let kept = |error| Failure { error, untouched: nothing_done, models: models() };
    let failed = |watch: &Watch| matches!(watch.status, Some(Status::Failed(_)));
    if let ([watch], [model]) = (&observer.watches[..], &observer.planned.models[..])
        && failed(watch)
        && let Some(error) = fleet.take_failure(0)
    {
        return Err(kept(named(&model.prepared.name, error)));
    }
    result.map_err(kept)?;
    let written = outcome::write_results(&observer.dir.at(rundir::RESULTS), &rows).and(recorded.map(drop));
    if !quiet {
        outcome::tell(&observer.planned, observer.dir, &rows);
    }
    let failed: Vec<&ModelResult> = rows.iter().filter(|r| matches!(r.status, Status::Failed(_))).collect();
    let failed = failed.first().map(|first| {
        let (count, all, name, why) = (failed.len(), rows.len(), &first.name, first.status.reason());
        let message = format!("{count} of {all} models failed; {name}: {why}");
        // The exit code that the first failed model would have had alone.
        if observer.codes.get(&first.model) == Some(&2) { Error::BadInput(message) } else { Error::Device(message) }
    });
    match (written, &failed) {
        (Ok(()), _) => {}
        (Err(error), None) => return Err(kept(error)),
        // The models' outcome is more informative.
        (Err(error), Some(_)) => warn(error),
    }
    Ok(Trained { models: models(), failed })
}

/// Starts the devices, if possible with room for models added later, and returns the arenas' sizes.
fn start_devices(planned: &PlannedJob) -> Result<(Box<dyn Device>, Vec<u64>)> {
    let specs: Vec<_> = planned.machine.devices.iter().map(|d| d.spec.clone()).collect();
    let start = |arena_bytes: &[u64]| {
        let memory = FleetMemory {
            arena_bytes: arena_bytes.to_vec(),
            host_bytes: planned.map.host_bytes,
            poison: false,
            shared_bytes_per_sec: planned.machine.shared_bytes_per_sec,
            disk: planned.disk(),
        };
        start_fleet(&specs, memory)
    };
    let needed = planned.map.arena_bytes.clone();
    if matches!(planned.sharing, Sharing::Turns(_)) {
        let roomy = roomy_arenas(planned);
        // If the machine refuses the spare room, try with only what is needed now; that may succeed, or return its own
        // error.
        if roomy != needed
            && let Ok(device) = start(&roomy)
        {
            return Ok((device, roomy));
        }
    }
    Ok((start(&needed)?, needed))
}

/// Records the run's first and last steps.
fn record(observer: &mut RunObserver, fleet: &mut Fleet) -> Result<()> {
    let (planned, standings, active) = (&observer.planned, &observer.standings, &observer.active);
    let trace = observer.dir.at(rundir::TRACE);
    let first = active.iter().map(|&m| standings[m].from).min().unwrap_or(0);
    // If the run begins anew, an older trace is about steps of which nothing else is left.
    if standings.iter().any(|s| s.from > 0) {
        keep_older_trace(&trace, first)?;
    }
    observer.dir.will_make(&trace);
    let run = &planned.job.run;
    let total_steps = active.iter().map(|&m| planned.models[m].prepared.options.steps).max().unwrap_or(0);
    let keep = Keep { first: run.trace_first, last: run.trace_last, total_steps };
    let names = active.iter().map(|&m| planned.models[m].prepared.name.clone()).collect();
    let begins = active.iter().map(|&m| standings[m].from).collect();
    let options = RecorderOptions { begins, ..RecorderOptions::new(keep, fleet.engine().lanes().to_vec(), names) };
    fleet.engine_mut().record(Recorder::create(&trace, options)?);
    Ok(())
}

/// A resumed run has its own trace; the previous one is kept beside it.
fn keep_older_trace(trace: &Path, from: u64) -> Result<()> {
    if !trace.exists() {
        return Ok(());
    }
    // The run may have resumed from there before, and been killed before its next checkpoint.
    let mut names = (1..).map(|n| trace.with_file_name(rundir::older_trace(from, n)));
    let older = names.find(|older| !older.exists()).expect("there are more numbers than files");
    std::fs::rename(trace, &older).map_err(|e| Error::io("rename", trace, e))
}
