//! What the program does while a model trains: metrics, checkpoints, progress, selection, and at the end the model's
//! directory.

use crate::plan::Planned;
use crate::print::{note, warn};
use crate::run::judge::Judge;
use crate::run::progress::Progress;
use crate::rundir;
use hydra::base::{Result, format_secs};
use hydra::engine::{Engine, Stored};
use hydra::train::Verdict;
use hydra::train::metrics::{Metrics, Row, StepRow, ValidRow};
use hydra::train::results::Status;
use hydra::train::{Observer, StepReport, save_adapters, save_model, write_checkpoint, write_last_checkpoint};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run that is killed without warning loses at most this much, unless saving takes long.
const BETWEEN_CHECKPOINTS: Duration = Duration::from_secs(600);
/// Saving delays all models of the run, so it takes at most a twentieth of the time.
const SHARE_OF_SAVING: u32 = 20;

/// Time between a model's checkpoints, if a checkpoint of every model takes `saving` in all.
fn between_checkpoints(saving: Duration) -> Duration {
    BETWEEN_CHECKPOINTS.max(saving.saturating_mul(SHARE_OF_SAVING))
}

/// Watches one model.
pub struct Watch<'a> {
    planned: Rc<Planned>,
    metrics: Metrics,
    progress: Progress,
    stop: &'a AtomicBool,
    folder: PathBuf,
    /// When the last checkpoint was written, and how long that took.
    saved_at: Instant,
    took: Duration,
    /// The time that the last checkpoints of all training models took.
    saving: Rc<Cell<Duration>>,
    /// The judge that may end it early.
    judge: Option<Judge>,
    validates: bool,
    /// How it is to end early, once its steps in flight are done.
    ends: Option<Status>,
    /// Steps done.
    pub done: u64,
    /// The last losses.
    pub loss: Option<f32>,
    pub valid_loss: Option<f32>,
    /// How it ended, once it has.
    pub status: Option<Status>,
}

impl<'a> Watch<'a> {
    /// Watches `planned`, which goes on from step `from`, and writes to `folder`, which also contains `metrics`.
    pub fn new(
        planned: &Rc<Planned>,
        (folder, from): (&Path, u64),
        metrics: Metrics,
        progress: Progress,
        (stop, saving): (&'a AtomicBool, &Rc<Cell<Duration>>),
        judge: Option<Judge>,
        validates: bool,
    ) -> Watch<'a> {
        Watch {
            metrics,
            progress,
            stop,
            folder: folder.to_path_buf(),
            saved_at: Instant::now(),
            took: Duration::ZERO,
            saving: Rc::clone(saving),
            judge,
            validates,
            ends: None,
            done: from,
            loss: None,
            valid_loss: None,
            status: None,
            planned: Rc::clone(planned),
        }
    }

    fn steps(&self) -> u64 {
        self.planned.prepared.options.steps
    }

    /// Ends the model after its steps in flight, with this status; the model is saved.
    pub fn end_early(&mut self, status: Status) {
        self.ends.get_or_insert(status);
    }

    /// Notes how the model ended.
    pub fn end(&mut self, status: Status) {
        self.note_saving(Duration::ZERO);
        self.progress.end(&status);
        if status == Status::Cancelled {
            let name = &self.planned.prepared.name;
            note(format!("{name}: has left the run after {} of {} steps", self.done, self.steps()));
        }
        self.status = Some(status);
    }

    /// Seconds of its steps and validations, including those before an interruption.
    pub fn secs(&self) -> f64 {
        self.metrics.secs()
    }

    /// Removes its progress line.
    pub fn finish(&self) {
        self.progress.finish();
    }

    /// Writes a checkpoint after `step` steps.
    fn save(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        let (path, began) = (self.folder.join(rundir::CHECKPOINT), Instant::now());
        self.wait_records()?;
        write_checkpoint(&path, engine, model, &self.planned.prepared.options, step)?;
        self.saved_at = Instant::now();
        self.note_saving(self.saved_at - began);
        Ok(())
    }

    /// Waits until the records of the steps done are on the disk. A checkpoint must follow them there: rows of steps
    /// that it covers would never be written again.
    fn wait_records(&mut self) -> Result<()> {
        self.metrics.wait_sync()?;
        self.judge.as_ref().map_or(Ok(()), Judge::wait_sync)
    }

    /// Writes a checkpoint of a model that ends with this fault, so that a resumed run need not repeat its steps. A
    /// state that is not finite cannot be resumed from, so the previous checkpoint stays.
    fn keep(&mut self, engine: &Engine, model: usize, fault: &str) {
        let graph = &engine.model(model).train;
        let is_finite = |read: Result<Vec<f32>>| read.is_ok_and(|values| values.iter().all(|x| x.is_finite()));
        let mut weights = (0..graph.parameters.len()).map(|i| engine.read_parameter(model, Stored::Weight, i));
        let mut states = (0..graph.states.len()).map(|i| engine.read_state(model, i));
        if !weights.all(is_finite) || !states.all(is_finite) {
            return;
        }
        let (name, done) = (self.planned.prepared.name.clone(), self.done);
        match self.save(done, engine, model) {
            Ok(()) => warn(format!(
                "{name}: {fault}; a checkpoint after {done} steps is there, from which --resume auto tries again"
            )),
            Err(error) => warn(format!("{name}: no checkpoint after {done} steps either: {error}")),
        }
    }

    fn note_saving(&mut self, took: Duration) {
        self.saving.set((self.saving.get() + took).saturating_sub(self.took));
        self.took = took;
    }

    /// Reports a loss to its judge.
    fn report(&mut self, step: u64, metric: f32) -> Result<()> {
        let Some(judge) = &self.judge else { return Ok(()) };
        if let Verdict::Stop(reason) = judge.report(step, metric)?
            && step < self.steps()
        {
            self.progress.note(&format!("stopped: {reason}"));
            self.end_early(Status::Stopped(reason));
        }
        Ok(())
    }
}

impl Observer for Watch<'_> {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        let result = &report.result;
        let per_sec = |count: u64| count as f64 / result.secs.max(1e-9);
        let prepared = &self.planned.prepared;
        let tokens_per_sec = prepared.step_tokens().map(per_sec);
        let samples_per_sec = tokens_per_sec.is_none().then(|| per_sec(prepared.options.batch as u64));
        let row = StepRow { tokens_per_sec, samples_per_sec, ..StepRow::new(report) };
        self.metrics.write(&Row::Step(row))?;
        (self.loss, self.done) = (Some(result.loss), result.step + 1);
        let units = if tokens_per_sec.is_some() { "tokens" } else { "samples" };
        let rate = tokens_per_sec.or(samples_per_sec).unwrap_or(0.0);
        self.progress.step(result.step, result.loss, rate, units);
        if !self.validates {
            self.report(self.done, result.loss)?;
        }
        Ok(())
    }

    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()> {
        self.metrics.write(&Row::Valid(ValidRow { step, valid_loss: loss, secs }))?;
        self.valid_loss = Some(loss);
        self.progress.note(&format!("after {step} steps  held-out loss {loss:.4}  ({})", format_secs(secs)));
        self.report(step, loss)
    }

    fn wants_rest(&mut self, step: u64) -> bool {
        self.judge.as_ref().is_some_and(|judge| judge.has_rung(step))
    }

    fn wants_end(&mut self) -> bool {
        self.ends.is_some()
    }

    fn wants_checkpoint(&mut self) -> bool {
        self.saved_at.elapsed() >= between_checkpoints(self.saving.get())
    }

    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        // At its end the model itself is saved and then a checkpoint, unless the run stops before.
        let ends = step == self.steps() || self.ends.is_some();
        if self.stop.load(Ordering::Relaxed) {
            return self.save(step, engine, model);
        }
        if self.wants_checkpoint()
            && !ends
            && let Err(error) = self.save(step, engine, model)
        {
            // The disk may have room again by the next time, and a failed checkpoint is no reason to lose the model.
            self.saved_at = Instant::now();
            let (name, wait) = (&self.planned.prepared.name, between_checkpoints(self.saving.get()));
            let wait = format_secs(wait.as_secs_f64());
            warn(format!("{name}: no checkpoint after {step} steps: {error}; the next try is in {wait}"));
        }
        Ok(())
    }

    fn stuck(&mut self, engine: &Engine, model: usize) {
        self.keep(engine, model, "its next step could not begin");
    }

    /// Saves the model; a checkpoint of its last step is written only after that, and so indicates that nothing is left
    /// to do.
    fn ended(&mut self, engine: &Engine, model: usize) -> Result<()> {
        self.wait_records()?;
        let prepared = &self.planned.prepared;
        let folder = self.folder.join(rundir::MODEL);
        let low_rank = prepared.options.low_rank.as_ref();
        let save = |form| save_model(&folder, &form, (engine, model), prepared.weights(), low_rank, self.done);
        let saved = prepared.form().and_then(save).and_then(|()| match low_rank {
            Some(low_rank) => {
                save_adapters(&self.folder.join(rundir::ADAPTERS), (engine, model), low_rank, prepared.base())
            }
            None => Ok(()),
        });
        if let Err(error) = saved {
            self.keep(engine, model, "the model could not be saved");
            return Err(error);
        }
        let path = self.folder.join(rundir::CHECKPOINT);
        if let Err(error) = write_last_checkpoint(&path, engine, model, &prepared.options, self.done) {
            let name = &prepared.name;
            warn(format!(
                "{name}: the model is saved, and its last checkpoint is not; to go on trains it again: {error}"
            ));
        }
        let early = self.ends.take().filter(|_| self.done < self.steps());
        self.end(early.unwrap_or(Status::Done));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan_job;
    use crate::run::progress::Board;
    use hydra::device::{FleetMemory, start_fleet};
    use hydra::train::Fleet;

    const JOB: &str = "[[device]]
profile = 'v100'
[[model]]
name = 'm'
family = 'gpt2'
config = { n_layer = 1, n_embd = 16, n_head = 2, n_positions = 8, vocab_size = 11, bos_token_id = 0, eos_token_id = 0 }
data = { random = true }
steps = 5
";

    #[test]
    fn a_checkpoint_that_cannot_be_written_ends_nothing_but_a_run_that_stops() {
        let folder = tempfile::tempdir().unwrap();
        let (path, checkpoint) = (folder.path().join("job.toml"), folder.path().join(rundir::CHECKPOINT));
        std::fs::write(&path, JOB).unwrap();
        // No file takes the place of a folder.
        std::fs::create_dir(&checkpoint).unwrap();
        let planned = plan_job(&path, &[], &Rc::default()).unwrap();
        let memory = FleetMemory {
            arena_bytes: planned.map.arena_bytes.clone(),
            host_bytes: planned.map.host_bytes,
            poison: false,
            shared_bytes_per_sec: None,
            disk: None,
        };
        let device = start_fleet(&[planned.machine.first().spec.clone()], memory).unwrap();
        let model = &planned.models[0];
        let of_fleet = model.fleet_model(model.prepared.sources(&planned.texts).unwrap());
        let mut fleet = Fleet::new(vec![of_fleet], device, None).unwrap();
        let (stop, saving) = (AtomicBool::new(false), Rc::default());
        let metrics = Metrics::open(&folder.path().join(rundir::METRICS), 0).unwrap();
        let progress = Progress::new(&Board::new(true, 1, 1), "m", 0, 5);
        let mut watch = Watch::new(model, (folder.path(), 0), metrics, progress, (&stop, &saving), None, false);
        let began = Instant::now();
        watch.saved_at = began.checked_sub(BETWEEN_CHECKPOINTS).unwrap();
        fleet.run(&mut vec![&mut watch as &mut dyn Observer], &stop).unwrap();
        // Tried once, at the first step, and then not before it is due again.
        assert!(watch.done == 5 && watch.saved_at >= began);
        // Nor does its last one count, once the model is saved; that of a run that stops does.
        assert!(fleet.take_failure(0).is_none() && matches!(watch.status, Some(Status::Done)));
        stop.store(true, Ordering::Relaxed);
        assert!(watch.checkpoint(5, fleet.engine(), 0).unwrap_err().to_string().contains("is a folder"));
    }

    #[test]
    fn saving_takes_a_twentieth_of_the_time_at_most() {
        for (saving, between) in [(0, 600), (30, 600), (31, 620), (3600, 72_000)] {
            assert_eq!(between_checkpoints(Duration::from_secs(saving)), Duration::from_secs(between));
        }
    }
}
