//! `hydra train`: plans, makes the run's directory, trains the models together, and says what became of each.

use crate::args::Resume;
use crate::job::Job;
use crate::machine::free_memory_bytes;
use crate::plan::fitting::{plan_to_fit, why_not};
use crate::plan::placing::Sharing;
use crate::plan::planned::{PlannedJob, warn_of_warmups};
use crate::plan::rehearsal::describe_rehearsal;
use crate::plan::room::roomy_arenas;
use crate::plan::words::summary;
use crate::print::{say, warn};
use crate::run::inbox::{Inbox, Taken};
use crate::run::judge::Judges;
use crate::run::observer::RunObserver;
use crate::run::outcome;
use crate::run::progress::Board;
use crate::run::signals::Signals;
use crate::run::standing::{Standing, check_names, open_checkpoints, standings, tell_changes, tell_lost};
use crate::run::watch::Watch;
use crate::rundir::{self, Found, RunDir, inspect};
use hydra::base::{Error, Result};
use hydra::device::{Device, FleetMemory, start_fleet};
use hydra::engine::TurnOptions;
use hydra::spill::named;
use hydra::trace::{Keep, Recorder, RecorderOptions};
use hydra::train::results::{self, ModelResult, Status};
use hydra::train::{Checkpoint, Fleet, ModelToTrain, Weights};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

/// Trains the job at `path`.
///
/// # Errors
/// What the job, the data or the machine is at fault for; [`Error::Interrupted`] after a checkpoint, or before there
/// was one.
pub fn run(path: &Path, sets: &[String], resume: Resume, json: bool) -> Result<()> {
    let signals = Signals::install()?;
    let mut job = Job::load(path, sets)?;
    let out = job.run.out.clone();
    let goes_on = resume != Resume::Never && rundir::holds_run(&out);
    // Before anything of it is read, so that nobody changes it meanwhile.
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
    let trained = start(&mut dir, &planned)
        .and_then(|()| train_all(&mut dir, planned, (standings, checkpoints, judges), &signals.stop, json));
    match trained {
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

/// A run that has come to its end.
struct Trained {
    models: Vec<Value>,
    /// Some of its models have failed.
    failed: Option<Error>,
}

/// Why training ended early.
struct Failure {
    error: Error,
    /// No step has ended: there is nothing worth keeping.
    untouched: bool,
    /// How far each model had come; empty before the first could.
    models: Vec<Value>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, untouched: true, models: Vec::new() }
    }
}

/// Says so, and writes what the run may have had no time for.
fn already_done(job: &Job, standings: &[Standing], json: bool) -> Result<()> {
    let out = &job.run.out;
    outcome::drop_lost_rows(job, standings)?;
    let rows = outcome::rows(job, standings, |_| None);
    write_results(&out.join(rundir::RESULTS), &rows)?;
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

/// Writes results.csv, of several models.
fn write_results(path: &Path, rows: &[ModelResult]) -> Result<()> {
    if rows.len() > 1 { results::write(path, rows) } else { Ok(()) }
}

/// Writes what marks the directory as a run's.
fn start(dir: &mut RunDir, planned: &PlannedJob) -> std::result::Result<(), Failure> {
    dir.write(rundir::PLAN, planned.text().as_bytes())?;
    dir.write(rundir::JOB, planned.job.record().as_bytes())?;
    dir.folder(rundir::INBOX)?;
    Ok(())
}

/// Trains all models that have not ended, from their checkpoints or from the start.
fn train_all(
    dir: &mut RunDir,
    planned: PlannedJob,
    (standings, mut checkpoints, judges): (Vec<Standing>, Vec<Option<Checkpoint>>, Judges),
    stop: &AtomicBool,
    quiet: bool,
) -> std::result::Result<Trained, Failure> {
    // Models that have ended keep out; the others have numbers of their own in the fleet.
    let active: Vec<usize> = (0..planned.models.len()).filter(|&m| standings[m].ended.is_none()).collect();
    let mut sources = Vec::new();
    for &m in &active {
        sources.push(planned.models[m].prepared.sources(&planned.texts)?);
    }
    planned.models.iter().for_each(|model| model.prepared.close());
    let (device, arenas) = start_devices(&planned)?;
    let mut models = Vec::new();
    for (&m, sources) in active.iter().zip(sources) {
        let model = planned.models[m].fleet_model(sources);
        // What a checkpoint has is not read, drawn or written twice.
        let weights = if checkpoints[m].is_some() { Weights::Later } else { model.weights };
        models.push(ModelToTrain { weights, ..model });
    }
    // One that is only to be saved runs through none; a rehearsal wants one.
    let left = |&m: &usize| planned.models[m].prepared.options.steps.saturating_sub(standings[m].from).max(1);
    let rehearsal = planned.rehearse(&active, &active.iter().map(left).collect::<Vec<u64>>())?;
    let sharing = match rehearsal {
        Some(found) => {
            if !quiet {
                say(describe_rehearsal(&found));
            }
            Sharing::Turns(found.policy)
        }
        None => planned.sharing.clone(),
    };
    let turns = sharing.policy(&planned.job.run).map(|policy| TurnOptions {
        policy,
        units: planned.units(),
        costs: planned.machine.costs(),
        shared_bytes_per_sec: planned.machine.shared_bytes_per_sec,
        arena_bytes: planned.map.arena_bytes.clone(),
        room_bytes: arenas.clone(),
    });
    let validates: Vec<bool> = models.iter().map(|model| model.valid.is_some()).collect();
    let mut fleet = Fleet::new(models, device, turns)?;
    if let Sharing::Lines(lines) = &planned.sharing {
        let number = |m: &usize| active.iter().position(|a| a == m);
        fleet.run_in_order(lines.iter().map(|line| line.iter().filter_map(number).collect()).collect())?;
    }
    for (i, &m) in active.iter().enumerate() {
        if let Some(checkpoint) = &mut checkpoints[m] {
            checkpoint.restore(fleet.engine_mut(), i)?;
            fleet.start_at(i, standings[m].from)?;
        }
    }
    let board = Board::new(quiet, active.len(), planned.machine.devices.len());
    let live = board.live(fleet.engine());
    let inbox = Inbox::new(dir.at(rundir::INBOX));
    let began_with = planned.models.len();
    let filled = planned.map.arena_bytes.iter().copied().map(Some).collect();
    let mut observer = RunObserver {
        planned,
        standings,
        watches: Vec::new(),
        active: Vec::new(),
        dir,
        board,
        live,
        judges,
        inbox,
        arenas,
        filled,
        stop,
        codes: BTreeMap::new(),
        saving: Rc::default(),
    };
    for (&m, valid) in active.iter().zip(validates) {
        observer.watch(m, valid)?;
    }
    outcome::drop_lost_rows(&observer.planned.job, &observer.standings)?;
    // It would be of models that have not come so far.
    let results = observer.dir.at(rundir::RESULTS);
    if results.exists() {
        std::fs::remove_file(&results).map_err(|e| Error::io("remove", &results, e))?;
    }
    // Last, so that a start that was refused leaves the older trace in its place.
    record(&mut observer, &active, &mut fleet)?;
    let result = fleet.run(&mut observer, stop);
    observer.watches.iter().for_each(Watch::finish);
    observer.live.iter_mut().for_each(|live| live.finish(fleet.engine()));
    let recorded = fleet.engine_mut().take_recorder().map(Recorder::finish).transpose();
    // Files that were taken are worth keeping too.
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
    let written = write_results(&observer.dir.at(rundir::RESULTS), &rows).and(recorded.map(drop));
    if !quiet {
        outcome::tell(&observer.planned, observer.dir, &rows);
    }
    let failed: Vec<&ModelResult> = rows.iter().filter(|r| matches!(r.status, Status::Failed(_))).collect();
    let failed = failed.first().map(|first| {
        let (count, all, name, why) = (failed.len(), rows.len(), &first.name, first.status.reason());
        let message = format!("{count} of {all} models failed; {name}: {why}");
        // The code that the first would have had alone.
        if observer.codes.get(&first.model) == Some(&2) { Error::BadInput(message) } else { Error::Device(message) }
    });
    match (written, &failed) {
        (Ok(()), _) => {}
        (Err(error), None) => return Err(kept(error)),
        // What became of the models tells more.
        (Err(error), Some(_)) => warn(error),
    }
    Ok(Trained { models: models(), failed })
}

/// Starts the devices, with room for models that come later where they can, and says how large the arenas are.
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
        // A machine that refuses what might be of use later has enough for what is needed now, or says so itself.
        if roomy != needed
            && let Ok(device) = start(&roomy)
        {
            return Ok((device, roomy));
        }
    }
    Ok((start(&needed)?, needed))
}

/// Records the run's first and last steps.
fn record(observer: &mut RunObserver, active: &[usize], fleet: &mut Fleet) -> Result<()> {
    let (planned, standings) = (&observer.planned, &observer.standings);
    let trace = observer.dir.at(rundir::TRACE);
    let first = active.iter().map(|&m| standings[m].from).min().unwrap_or(0);
    // Of a run that begins anew the trace is of steps that nothing else is left of.
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

/// A resumed run has a trace of its own; the one before it is kept beside it.
fn keep_older_trace(trace: &Path, from: u64) -> Result<()> {
    if !trace.exists() {
        return Ok(());
    }
    // It may have gone on from there before, and been killed before its next checkpoint.
    let mut names = (1..).map(|n| trace.with_file_name(rundir::older_trace(from, n)));
    let older = names.find(|older| !older.exists()).expect("there are more numbers than files");
    std::fs::rename(trace, &older).map_err(|e| Error::io("rename", trace, e))
}
