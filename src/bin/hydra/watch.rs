//! What the program does as a model trains: metrics, checkpoints, progress, selection, and at the end the model's directory.

use crate::planning::Planned;
use crate::progress::Progress;
use crate::rundir;
use hydra::base::{Error, Result, format_secs};
use hydra::engine::{Engine, Stored};
use hydra::nn;
use hydra::train::metrics::{Metrics, Row, StepRow, ValidRow};
use hydra::train::{Identity, Observer, StepReport, write_checkpoint};
use hydra::train::{Selection, Verdict};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run that is killed without a word loses no more than this.
const BETWEEN_CHECKPOINTS: Duration = Duration::from_secs(600);

/// What a checkpoint must agree with the job in.
pub fn identity(model: &Planned) -> Identity {
    let options = &model.prepared.options;
    Identity { seed: options.seed, batch: options.batch, microbatch: options.microbatch }
}

/// Watches one model.
pub struct Watch<'a> {
    planned: &'a Planned,
    /// Its number in the job.
    number: usize,
    metrics: Metrics,
    progress: Progress,
    stop: &'a AtomicBool,
    folder: PathBuf,
    steps: u64,
    /// When the last checkpoint was written.
    saved_at: Instant,
    began: Instant,
    tokens: Option<u64>,
    samples: u64,
    /// What may end it early.
    selection: Option<Rc<RefCell<Selection>>>,
    validates: bool,
    /// Steps done.
    pub done: u64,
    /// The last losses.
    pub loss: Option<f32>,
    pub valid_loss: Option<f32>,
    /// Why selection ended it.
    pub stopped: Option<String>,
    /// Its directory is saved.
    pub saved: bool,
    /// Seconds until it ended.
    pub secs: f64,
}

impl<'a> Watch<'a> {
    /// Watches `planned`, number `number` of the job, which goes on from step `from`, and writes into `folder`.
    ///
    /// # Errors
    /// When the metrics cannot be written.
    pub fn new(
        planned: &'a Planned,
        number: usize,
        (folder, from): (&Path, u64),
        progress: Progress,
        stop: &'a AtomicBool,
        selection: Option<Rc<RefCell<Selection>>>,
        validates: bool,
    ) -> Result<Watch<'a>> {
        let now = Instant::now();
        Ok(Watch {
            metrics: Metrics::open(&folder.join(rundir::METRICS), from)?,
            progress,
            stop,
            folder: folder.to_path_buf(),
            steps: planned.prepared.options.steps,
            saved_at: now,
            began: now,
            tokens: planned.prepared.step_tokens(),
            samples: planned.prepared.options.batch as u64,
            selection,
            validates,
            done: from,
            loss: None,
            valid_loss: None,
            stopped: None,
            saved: false,
            secs: 0.0,
            planned,
            number,
        })
    }

    /// Takes its progress line away.
    pub fn finish(&self) {
        self.progress.finish();
    }

    /// Tells the selection how it does.
    fn report(&mut self, step: u64, metric: f32) {
        let Some(selection) = &self.selection else { return };
        let verdict = selection.borrow_mut().report(self.number, step, f64::from(metric));
        if let Verdict::Stop(reason) = verdict
            && step < self.steps
        {
            self.progress.note(&format!("stopped: {reason}"));
            self.stopped.get_or_insert(reason);
        }
    }
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
        (self.loss, self.done) = (Some(result.loss), result.step + 1);
        let units = if self.tokens.is_some() { "tokens" } else { "samples" };
        let rate = tokens_per_sec.or(samples_per_sec).unwrap_or(0.0);
        self.progress.step(result.step, result.loss, rate, units);
        if !self.validates {
            self.report(self.done, result.loss);
        }
        Ok(())
    }

    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()> {
        self.metrics.write(&Row::Valid(ValidRow { step, valid_loss: loss, secs }))?;
        self.valid_loss = Some(loss);
        self.progress.note(&format!("after {step} steps  held-out loss {loss:.4}  ({})", format_secs(secs)));
        self.report(step, loss);
        Ok(())
    }

    fn wants_rest(&mut self, step: u64) -> bool {
        self.selection.as_ref().is_some_and(|selection| selection.borrow().has_rung(step))
    }

    fn wants_end(&mut self) -> bool {
        self.stopped.is_some()
    }

    fn wants_checkpoint(&mut self) -> bool {
        self.saved_at.elapsed() >= BETWEEN_CHECKPOINTS
    }

    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        // The last one is written after the model is saved.
        let due = self.stop.load(Ordering::Relaxed) || self.wants_checkpoint();
        if step < self.steps && due && self.stopped.is_none() {
            write_checkpoint(&self.folder.join(rundir::CHECKPOINT), engine, model, identity(self.planned), step)?;
            self.saved_at = Instant::now();
        }
        Ok(())
    }

    /// Saves the model; a checkpoint of its last step is written only after it, and so tells that there is nothing left to do.
    fn ended(&mut self, engine: &Engine, model: usize) -> Result<()> {
        self.progress.finish();
        self.secs = self.began.elapsed().as_secs_f64();
        save_model(&self.folder.join(rundir::MODEL), self.planned, engine, model, self.done)?;
        write_checkpoint(&self.folder.join(rundir::CHECKPOINT), engine, model, identity(self.planned), self.done)?;
        self.saved = true;
        Ok(())
    }
}

/// Writes the Hugging Face directory, tensor by tensor.
fn save_model(dir: &Path, planned: &Planned, engine: &Engine, model: usize, steps: u64) -> Result<()> {
    let (form, mut counts) = planned.prepared.form()?;
    let batches = (steps * planned.model().microbatches as u64) as i64;
    for name in &form.counters {
        let count = counts.entry(name.clone()).or_insert(0);
        *count = count.saturating_add(batches);
    }
    let graph = &planned.model().train;
    let parameters: BTreeMap<&str, usize> =
        graph.parameters.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let states: BTreeMap<&str, usize> = graph.states.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
    nn::save(dir, &form, &counts, &mut |name| match (parameters.get(name), states.get(name)) {
        (Some(&i), _) => Ok(engine.read_parameter(model, Stored::Weight, i)),
        (None, Some(&i)) => Ok(engine.read_state(model, i)),
        (None, None) => Err(Error::bad(format!("tensor {name}: the network has no such tensor"))),
    })
}
