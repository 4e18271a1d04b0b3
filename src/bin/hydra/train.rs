//! `hydra train`: plans, makes the run's directory, trains the models one after another, saves them.

use crate::args::Resume;
use crate::planning::{Planned, PlannedJob, free_memory_bytes, plan_job};
use crate::print::say;
use crate::progress::Progress;
use crate::rundir::{self, Found, RunDir, inspect};
use crate::show::summary;
use hydra::base::{Error, LaneId, LaneKind, Result, format_bytes, format_secs};
use hydra::engine::{Engine, Stored};
use hydra::nn;
use hydra::spill::named;
use hydra::trace::{Keep, Recorder, RecorderOptions};
use hydra::train::metrics::{Metrics, Row, StepRow, ValidRow};
use hydra::train::{Checkpoint, Identity, Observer, Session, StepReport, write_checkpoint};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run that is killed without a word loses no more than this.
const BETWEEN_CHECKPOINTS: Duration = Duration::from_secs(600);

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
        Ok(models) => {
            if json {
                say(json!({ "run": out, "models": models }));
            } else {
                say(format!("run: {}", out.display()));
            }
            Ok(())
        }
        Err(Failure { error, untouched }) => {
            if untouched && found == Found::Free {
                dir.abandon();
            }
            Err(error)
        }
    }
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
    let Some(free) = free_memory_bytes() else { return Ok(()) };
    for Planned { prepared, plan, .. } in &planned.models {
        let wants = plan.arena.bytes + plan.host.bytes;
        if wants > free {
            return Err(Error::Device(format!(
                "{}: the machine has {} of memory free, the run needs {} ({} for the device, {} for the host's store); write a smaller memory under [[device]]",
                prepared.name,
                format_bytes(free),
                format_bytes(wants),
                format_bytes(plan.arena.bytes),
                format_bytes(plan.host.bytes)
            )));
        }
    }
    Ok(())
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
            checkpoint.check(identity(model), &model.model, model.plan.moments)?;
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

fn identity(model: &Planned) -> Identity {
    let options = &model.prepared.options;
    Identity { seed: options.seed, batch: options.batch, microbatch: options.microbatch }
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

fn train_all(
    dir: &mut RunDir,
    planned: PlannedJob,
    checkpoints: Vec<Option<Checkpoint>>,
    stop: &AtomicBool,
    json: bool,
) -> std::result::Result<Vec<Value>, Failure> {
    let alone = planned.models.len() == 1;
    let keep = (planned.job.run.trace_first, planned.job.run.trace_last);
    let mut rows = Vec::new();
    for (model, checkpoint) in planned.models.into_iter().zip(checkpoints) {
        let name = model.prepared.name.clone();
        let any = !rows.is_empty();
        let trained = train_model(dir, model, checkpoint, keep, alone, stop, json);
        let row = trained.map_err(|f| Failure { error: named(&name, f.error), untouched: f.untouched && !any })?;
        rows.push(row);
    }
    Ok(rows)
}

/// Trains one model from its checkpoint, or from the start, and saves it. A checkpoint of the last step is written only after the
/// model, and so tells that there is nothing left to do.
fn train_model(
    dir: &mut RunDir,
    mut planned: Planned,
    checkpoint: Option<Checkpoint>,
    (first, last): (u64, u64),
    alone: bool,
    stop: &AtomicBool,
    quiet: bool,
) -> std::result::Result<Value, Failure> {
    let name = planned.prepared.name.clone();
    let folder = dir.folder(&name)?;
    let saved = folder.join(rundir::MODEL);
    let steps = planned.prepared.options.steps;
    let from = checkpoint.as_ref().map_or(0, Checkpoint::step);
    if from == steps {
        return Ok(json!({ "name": name, "steps": steps, "model": saved }));
    }
    let sources = planned.prepared.sources()?;
    let plan = (Arc::clone(&planned.model), Arc::clone(&planned.plan));
    let options = planned.prepared.options.clone();
    let (network, weights) = (planned.prepared.network(), planned.prepared.weights());
    let mut session = Session::new(network, weights, plan, sources.train, sources.valid, options)?;
    if let Some(mut checkpoint) = checkpoint {
        checkpoint.restore(session.engine_mut(), 0)?;
        session.start_at(from, planned.prepared.sources()?.train)?;
    }
    let trace = if alone { dir.at(rundir::TRACE) } else { folder.join(rundir::TRACE) };
    keep_older_trace(&trace, from)?;
    dir.will_make(&trace);
    let keep = Keep { first: from.saturating_add(first), last, total_steps: steps };
    let recorder = RecorderOptions::new(keep, lanes(), vec![name.clone()]);
    session.engine_mut().record(Recorder::create(&trace, recorder)?);
    let metrics = folder.join(rundir::METRICS);
    dir.will_make(&metrics);
    let checkpoint = folder.join(rundir::CHECKPOINT);
    let began = Instant::now();
    let mut watch = Watch {
        metrics: Metrics::open(&metrics, from)?,
        progress: Progress::new(&name, from, steps, quiet),
        stop,
        checkpoint: checkpoint.clone(),
        identity: identity(&planned),
        steps,
        saved_at: began,
        tokens: planned.prepared.step_tokens(),
        samples: planned.prepared.options.batch as u64,
        last_loss: None,
        last_valid: None,
    };
    let result = session.run(&mut watch, stop);
    watch.progress.finish();
    let recorded = session.engine_mut().take_recorder().map(Recorder::finish).transpose();
    let kept = |error| Failure { error, untouched: session.steps_done() == 0 && !checkpoint.exists() };
    result.map_err(kept)?;
    recorded.map_err(kept)?;
    save_model(&saved, &planned, session.engine()).map_err(kept)?;
    write_checkpoint(&checkpoint, session.engine(), 0, identity(&planned), steps).map_err(kept)?;
    let secs = began.elapsed().as_secs_f64();
    let (loss, valid) = (watch.last_loss, watch.last_valid);
    if !quiet {
        let valid = valid.map_or(String::new(), |v: f32| format!(", held-out loss {v:.4}"));
        let loss = loss.map_or(String::new(), |l: f32| format!(", loss {l:.4}"));
        say(format!("{name}: {steps} steps done in {}{loss}{valid}", format_secs(secs)));
        say(format!("  model       {}", saved.display()));
        say(format!("  metrics     {}", metrics.display()));
        say(format!("  trace       {} (opens in https://ui.perfetto.dev)", trace.display()));
    }
    let mut row = json!({ "name": name, "steps": steps, "loss": loss, "secs": secs, "model": saved });
    if let Some(valid) = valid {
        row["valid_loss"] = valid.into();
    }
    Ok(row)
}

/// The lanes that a model on one device uses.
fn lanes() -> Vec<LaneId> {
    let device = [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost];
    device.into_iter().map(|kind| LaneId::device(0, kind)).chain([LaneId::host(LaneKind::HostMath)]).collect()
}

/// A resumed run has a trace of its own; the one before it is kept beside it.
fn keep_older_trace(trace: &Path, from: u64) -> Result<()> {
    if from == 0 || !trace.exists() {
        return Ok(());
    }
    let older = trace.with_file_name(format!("trace-until-{from}.json"));
    std::fs::rename(trace, &older).map_err(|e| Error::io("rename", trace, e))
}

/// Writes the Hugging Face directory, tensor by tensor.
fn save_model(dir: &Path, planned: &Planned, engine: &Engine) -> Result<()> {
    let (form, mut counts) = planned.prepared.form()?;
    let batches = (planned.prepared.options.steps * planned.model.microbatches as u64) as i64;
    for name in &form.counters {
        let count = counts.entry(name.clone()).or_insert(0);
        *count = count.saturating_add(batches);
    }
    let graph = &planned.model.train;
    let parameters: BTreeMap<&str, usize> =
        graph.parameters.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let states: BTreeMap<&str, usize> = graph.states.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
    nn::save(dir, &form, &counts, &mut |name| match (parameters.get(name), states.get(name)) {
        (Some(&i), _) => Ok(engine.read_parameter(0, Stored::Weight, i)),
        (None, Some(&i)) => Ok(engine.read_state(0, i)),
        (None, None) => Err(Error::bad(format!("tensor {name}: the network has no such tensor"))),
    })
}

/// Writes metrics and checkpoints and shows progress as a session runs.
struct Watch<'a> {
    metrics: Metrics,
    progress: Progress,
    stop: &'a AtomicBool,
    checkpoint: PathBuf,
    identity: Identity,
    steps: u64,
    /// When the last checkpoint was written.
    saved_at: Instant,
    tokens: Option<u64>,
    samples: u64,
    last_loss: Option<f32>,
    last_valid: Option<f32>,
}

impl Observer for Watch<'_> {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        let result = &report.result;
        let per_sec = |count: u64| count as f64 / result.secs.max(1e-9);
        let tokens_per_sec = self.tokens.map(per_sec);
        let samples_per_sec = if self.tokens.is_none() { Some(per_sec(self.samples)) } else { None };
        self.metrics.write(&Row::Step(StepRow {
            step: result.step,
            loss: result.loss,
            lr: report.lr,
            grad_norm: result.grad_norm,
            tokens_per_sec,
            samples_per_sec,
            secs: result.secs,
            compute_secs: result.bound.compute,
            h2d_secs: result.bound.h2d,
            d2h_secs: result.bound.d2h,
            host_secs: result.bound.host,
            disk_secs: result.bound.disk,
            idle_secs: result.bound.idle,
        }))?;
        self.last_loss = Some(result.loss);
        let units = if self.tokens.is_some() { "tokens" } else { "samples" };
        let rate = tokens_per_sec.or(samples_per_sec).unwrap_or(0.0);
        self.progress.step(result.step, result.loss, rate, units);
        Ok(())
    }

    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()> {
        self.metrics.write(&Row::Valid(ValidRow { step, valid_loss: loss, secs }))?;
        self.last_valid = Some(loss);
        self.progress.note(&format!("after {step} steps  held-out loss {loss:.4}  ({})", format_secs(secs)));
        Ok(())
    }

    fn wants_checkpoint(&mut self) -> bool {
        self.saved_at.elapsed() >= BETWEEN_CHECKPOINTS
    }

    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        // The last one is written after the model is saved.
        let due = self.stop.load(Ordering::Relaxed) || self.wants_checkpoint();
        if step < self.steps && due {
            write_checkpoint(&self.checkpoint, engine, model, self.identity, step)?;
            self.saved_at = Instant::now();
        }
        Ok(())
    }
}
