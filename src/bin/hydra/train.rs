//! `hydra train`: plans, makes the run's directory, trains the models together, and says what became of each.

use crate::args::Resume;
use crate::planning::{Planned, PlannedJob, Sharing, free_memory_bytes, plan_job};
use crate::print::{say, table};
use crate::progress::{Board, Progress};
use crate::rundir::{self, Found, RunDir, inspect};
use crate::show::summary;
use crate::watch::{Watch, identity};
use hydra::base::{Error, Result, format_bytes, format_secs};
use hydra::device::{FleetMemory, start_fleet};
use hydra::engine::TurnOptions;
use hydra::sched::by_name;
use hydra::spill::named;
use hydra::trace::{Keep, Recorder, RecorderOptions};
use hydra::train::Selection;
use hydra::train::results::{self, ModelResult, Status};
use hydra::train::{Checkpoint, Fleet, Observer, Recruit};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains the job at `path`.
///
/// # Errors
/// What the job, the data or the machine is at fault for; [`Error::Interrupted`] after a checkpoint.
pub fn run(path: &Path, sets: &[String], resume: Resume, json: bool) -> Result<()> {
    let stop = stop_on_signals()?;
    let planned = plan_job(path, sets, true)?;
    let out = planned.job.run.out.clone();
    let names: Vec<&str> = planned.job.models.iter().map(|m| m.name.as_str()).collect();
    let found = inspect(&out, &names, resume)?;
    let checkpoints = match found {
        Found::Run => open_checkpoints(&planned, resume)?,
        Found::Free => planned.models.iter().map(|_| None).collect(),
    };
    let all_done =
        |c: &Option<Checkpoint>, m: &Planned| c.as_ref().is_some_and(|c| c.step() == m.prepared.options.steps);
    if checkpoints.iter().zip(&planned.models).all(|(c, m)| all_done(c, m)) {
        return already_done(&out, json);
    }
    check_memory(&planned)?;
    if !json {
        summary(&planned);
    }
    let mut dir = RunDir::take(&out)?;
    let trained = start(&mut dir, &planned).and_then(|()| train_all(&mut dir, planned, checkpoints, &stop, json));
    match trained {
        Ok(Trained { models, failed }) => {
            if json {
                say(json!({ "run": out, "models": models }));
            } else {
                say(format!("run: {}", out.display()));
            }
            failed.map_or(Ok(()), Err)
        }
        Err(Failure { error, untouched }) => {
            if untouched && found == Found::Free {
                dir.abandon();
            }
            Err(error)
        }
    }
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
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, untouched: true }
    }
}

/// Memory is handed out before it is there; a run that will not get it should not begin.
fn check_memory(planned: &PlannedJob) -> Result<()> {
    let (Some(free), wants) = (free_memory_bytes(), planned.wants_bytes()) else { return Ok(()) };
    if wants <= free {
        return Ok(());
    }
    let names: Vec<&str> = planned.models.iter().map(|m| m.prepared.name.as_str()).collect();
    Err(Error::Device(format!(
        "{}: the machine has {} of memory free, the run needs {} ({} for the devices, {} for the host's store); write a smaller memory under [[device]]",
        names.join(", "),
        format_bytes(free),
        format_bytes(wants),
        format_bytes(wants - planned.map.host_bytes),
        format_bytes(planned.map.host_bytes)
    )))
}

/// Sets the flag on the first SIGINT or SIGTERM, and ends the program on the second.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))?;
    Ok(stop)
}

/// The checkpoints of a run that is there, compared with the job.
fn open_checkpoints(planned: &PlannedJob, resume: Resume) -> Result<Vec<Option<Checkpoint>>> {
    let mut checkpoints = Vec::new();
    for model in &planned.models {
        let path = planned.job.run.out.join(&model.prepared.name).join(rundir::CHECKPOINT);
        let checkpoint = Checkpoint::open(&path)?;
        if let Some(checkpoint) = &checkpoint {
            checkpoint.check(identity(model), model.model(), model.plan().moments)?;
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

fn already_done(out: &Path, json: bool) -> Result<()> {
    if json {
        say(json!({ "run": out, "models": [] }));
    } else {
        say(format!("{}: the run is done already; nothing to do", out.display()));
    }
    Ok(())
}

/// Writes what marks the directory as a run's.
fn start(dir: &mut RunDir, planned: &PlannedJob) -> std::result::Result<(), Failure> {
    let mut plan = format!("{:#}", planned.json());
    plan.push('\n');
    dir.write(rundir::PLAN, plan.as_bytes())?;
    dir.write(rundir::JOB, planned.job.source_text.as_bytes())?;
    Ok(())
}

/// Trains all models that are not done, from their checkpoints or from the start.
fn train_all(
    dir: &mut RunDir,
    mut planned: PlannedJob,
    mut checkpoints: Vec<Option<Checkpoint>>,
    stop: &AtomicBool,
    quiet: bool,
) -> std::result::Result<Trained, Failure> {
    let from: Vec<u64> = checkpoints.iter().map(|c| c.as_ref().map_or(0, Checkpoint::step)).collect();
    // Models that are done keep out; the others have numbers of their own in the fleet.
    let active: Vec<usize> =
        (0..planned.models.len()).filter(|&m| from[m] < planned.models[m].prepared.options.steps).collect();
    let mut sources = Vec::new();
    for &m in &active {
        let prepared = &mut planned.models[m].prepared;
        let twice = if from[m] > 0 { Some(prepared.sources()?) } else { None };
        sources.push((prepared.sources()?, twice));
    }
    let planned = &planned;
    let specs: Vec<_> = planned.machine.devices.iter().map(|d| d.spec.clone()).collect();
    let memory = FleetMemory {
        arena_bytes: planned.map.arena_bytes.clone(),
        host_bytes: planned.map.host_bytes,
        poison: false,
        shared_bytes_per_sec: planned.machine.shared_bytes_per_sec,
    };
    let device = start_fleet(&specs, memory)?;
    let mut recruits = Vec::new();
    let mut later = Vec::new();
    for (&m, (sources, twice)) in active.iter().zip(sources) {
        let model = &planned.models[m];
        later.push((sources.valid.is_some(), twice));
        recruits.push(Recruit {
            network: model.prepared.network(),
            weights: model.prepared.weights(),
            placed: model.placed.clone(),
            source: sources.train,
            valid: sources.valid,
            options: model.prepared.options.clone(),
        });
    }
    let turns = (planned.sharing == Sharing::Turns).then(|| TurnOptions {
        policy: by_name(planned.job.run.policy.word(), planned.job.run.seed).expect("turns are taken by a policy"),
        units: planned.units(),
        costs: planned.machine.costs(),
        shared_bytes_per_sec: planned.machine.shared_bytes_per_sec,
        arena_bytes: planned.map.arena_bytes.clone(),
    });
    let mut fleet = Fleet::new(recruits, device, turns)?;
    if let Sharing::Lines(lines) = &planned.sharing {
        let number = |m: &usize| active.iter().position(|a| a == m);
        fleet.line_up(lines.iter().map(|line| line.iter().filter_map(number).collect()).collect());
    }
    let mut validates = Vec::new();
    for (i, (valid, again)) in later.into_iter().enumerate() {
        validates.push(valid);
        if let (Some(checkpoint), Some(sources)) = (&mut checkpoints[active[i]], again) {
            checkpoint.restore(fleet.engine_mut(), i)?;
            fleet.start_at(i, from[active[i]], sources.train)?;
        }
    }
    record(dir, planned, &active, &from, &mut fleet)?;
    let board = Board::new(quiet, active.len(), specs.len());
    let live = board.live(fleet.engine()).map(|live| Rc::new(RefCell::new(live)));
    if let Some(live) = live.clone() {
        fleet.watch(move |engine| live.borrow_mut().look(engine));
    }
    let selections = selections(planned);
    let mut watches = Vec::new();
    for (i, &m) in active.iter().enumerate() {
        let model = &planned.models[m];
        let folder = dir.folder(&model.prepared.name)?;
        dir.will_make(&folder.join(rundir::METRICS));
        let progress = Progress::new(&board, &model.prepared.name, from[m], model.prepared.options.steps);
        let place = (folder.as_path(), from[m]);
        watches.push(Watch::new(model, m, place, progress, stop, selections[m].clone(), validates[i])?);
    }
    let mut observers: Vec<&mut dyn Observer> = watches.iter_mut().map(|w| w as &mut dyn Observer).collect();
    let result = fleet.run(&mut observers, stop);
    watches.iter().for_each(Watch::finish);
    live.iter().for_each(|live| live.borrow_mut().finish(fleet.engine()));
    let recorded = fleet.engine_mut().take_recorder().map(Recorder::finish).transpose();
    let nothing_done = (0..active.len()).all(|i| fleet.steps_done(i) == 0) && from.iter().all(|&f| f == 0);
    let kept = |error| Failure { error, untouched: nothing_done };
    let failures: Vec<Option<Error>> = (0..active.len()).map(|i| fleet.take_failure(i)).collect();
    if let [Some(_)] = &failures[..]
        && planned.models.len() == 1
    {
        let error = failures.into_iter().flatten().next().expect("matched just above");
        return Err(kept(named(&planned.models[0].prepared.name, error)));
    }
    result.map_err(kept)?;
    recorded.map_err(kept)?;
    let rows = rows(planned, &active, &watches, &failures, &from, &dir.at(""));
    if planned.models.len() > 1 {
        results::write(&dir.at(rundir::RESULTS), &rows).map_err(kept)?;
    }
    if !quiet {
        tell(planned, dir, &rows);
    }
    let failed: Vec<&ModelResult> = rows.iter().filter(|r| matches!(r.status, Status::Failed(_))).collect();
    let failed = failed.first().map(|first| {
        let (count, all, name, why) = (failed.len(), rows.len(), &first.name, first.status.reason());
        Error::Device(format!("{count} of {all} models failed; {name}: {why}"))
    });
    Ok(Trained { models: rows.iter().map(row_json).collect(), failed })
}

/// Records the run's first and last steps.
fn record(dir: &mut RunDir, planned: &PlannedJob, active: &[usize], from: &[u64], fleet: &mut Fleet) -> Result<()> {
    let trace = dir.at(rundir::TRACE);
    let first = active.iter().map(|&m| from[m]).min().unwrap_or(0);
    keep_older_trace(&trace, first)?;
    dir.will_make(&trace);
    let run = &planned.job.run;
    let total_steps = active.iter().map(|&m| planned.models[m].prepared.options.steps).max().unwrap_or(0);
    let last = active.iter().map(|&m| from[m]).max().unwrap_or(0);
    let keep = Keep { first: last.saturating_add(run.trace_first), last: run.trace_last, total_steps };
    let names = active.iter().map(|&m| planned.models[m].prepared.name.clone()).collect();
    let options = RecorderOptions::new(keep, fleet.engine().lanes().to_vec(), names);
    fleet.engine_mut().record(Recorder::create(&trace, options)?);
    Ok(())
}

/// A resumed run has a trace of its own; the one before it is kept beside it.
fn keep_older_trace(trace: &Path, from: u64) -> Result<()> {
    if !trace.exists() {
        return Ok(());
    }
    let older = trace.with_file_name(format!("trace-until-{from}.json"));
    std::fs::rename(trace, &older).map_err(|e| Error::io("rename", trace, e))
}

/// What may end each model early, shared by the models of a search.
fn selections(planned: &PlannedJob) -> Vec<Option<Rc<RefCell<Selection>>>> {
    let mut of = vec![None; planned.models.len()];
    for search in &planned.job.searches {
        if let Some(stop) = &search.stop {
            let shared = Rc::new(RefCell::new(stop.clone()));
            search.models.clone().for_each(|m| of[m] = Some(Rc::clone(&shared)));
        }
    }
    of
}

/// What became of each model.
fn rows(
    planned: &PlannedJob,
    active: &[usize],
    watches: &[Watch],
    failures: &[Option<Error>],
    from: &[u64],
    run: &Path,
) -> Vec<ModelResult> {
    let row = |m: usize| {
        let (model, place) = (&planned.models[m], active.iter().position(|&a| a == m));
        let watch = place.map(|i| &watches[i]);
        let status = match (place.and_then(|i| failures[i].as_ref()), watch) {
            (Some(error), _) => Status::Failed(error.to_string()),
            (None, Some(watch)) => match &watch.stopped {
                Some(reason) => Status::Stopped(reason.clone()),
                None if watch.saved => Status::Done,
                None => Status::Cancelled,
            },
            (None, None) => Status::Done,
        };
        ModelResult {
            model: m,
            name: model.prepared.name.clone(),
            searched: planned.job.models[m].searched.clone(),
            status,
            steps: watch.map_or(from[m], |w| w.done),
            train_loss: watch.and_then(|w| w.loss),
            valid_loss: watch.and_then(|w| w.valid_loss),
            secs: watch.map_or(0.0, |w| w.secs),
            directory: run.join(&model.prepared.name),
        }
    };
    (0..planned.models.len()).map(row).collect()
}

fn row_json(row: &ModelResult) -> Value {
    let mut json = json!({
        "name": row.name,
        "status": row.status.word(),
        "steps": row.steps,
        "loss": row.train_loss,
        "secs": row.secs,
        "model": row.directory.join(rundir::MODEL),
    });
    if let Some(valid) = row.valid_loss {
        json["valid_loss"] = valid.into();
    }
    if !row.status.reason().is_empty() {
        json["reason"] = row.status.reason().into();
    }
    json
}

/// Prints how it ended.
fn tell(planned: &PlannedJob, dir: &RunDir, rows: &[ModelResult]) {
    if let [row] = rows {
        let valid = row.valid_loss.map_or(String::new(), |v| format!(", held-out loss {v:.4}"));
        let loss = row.train_loss.map_or(String::new(), |l| format!(", loss {l:.4}"));
        say(format!("{}: {} steps done in {}{loss}{valid}", row.name, row.steps, format_secs(row.secs)));
        say(format!("  model       {}", row.directory.join(rundir::MODEL).display()));
        say(format!("  metrics     {}", row.directory.join(rundir::METRICS).display()));
    } else {
        say(table(&results::table(rows)).trim_end());
        if let Some(best) = results::best(rows) {
            say(format!("best: {}, in {}", best.name, best.directory.join(rundir::MODEL).display()));
        }
        say(format!("  results     {}", dir.at(rundir::RESULTS).display()));
    }
    say(format!("  trace       {} (opens in https://ui.perfetto.dev)", dir.at(rundir::TRACE).display()));
    planned.idle_devices().into_iter().for_each(say);
}
