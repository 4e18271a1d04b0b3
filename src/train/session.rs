//! A session trains one model on one device: a fleet of one.

use super::checkpoint::{Checkpoint, write_checkpoint};
use super::fleet::Fleet;
use super::forward::wait_forward_trained;
use super::observer::{Observer, StepReport};
use super::options::TrainOptions;
use super::prepare::prepare;
use super::save::save_model;
use super::trainee::ModelToTrain;
use super::weights::Weights;
use crate::base::{Error, Result, Shape};
use crate::data::{Batch, Source};
use crate::device::{DiskSpec, FleetMemory, calibrate, start_fleet};
use crate::engine::Engine;
use crate::nn::{Form, Network};
use crate::spill::{Model, Placed, Plan};
use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A model in training, alone on one device.
pub struct Session {
    fleet: Fleet,
    options: TrainOptions,
    /// Steps that have ended and have not been reported yet.
    untold: VecDeque<StepReport>,
}

impl Session {
    /// Measures the options' device, which takes a second or two, traces the network, plans with the measured rates,
    /// and starts: [`prepare`](super::prepare()) and [`Session::new`] in one call.
    ///
    /// # Errors
    /// As both: when an option is invalid, the network does not take the source's tensors, no plan fits the budgets, or
    /// memory, threads or weights are not available.
    pub fn start(
        network: &dyn Network,
        weights: Weights,
        source: Box<dyn Source>,
        valid: Option<Box<dyn Source>>,
        options: TrainOptions,
    ) -> Result<Session> {
        options.check()?;
        let planned = prepare(network, source.as_ref(), &options, &calibrate(&options.device)?)?;
        Session::new(weights, planned, source, valid, options)
    }

    /// Starts the device and fills the store with the first weights. `model` and `plan` come from
    /// [`prepare`](super::prepare()) or, with options of one's own, from [`trace_model`](super::trace_model) and
    /// [`plan_model`](super::plan_model).
    ///
    /// # Errors
    /// When memory, threads or the disk are not available, weights are missing, an option is invalid or disagrees with
    /// the model or the plan, or the plan is for another model or for several devices.
    pub fn new(
        weights: Weights,
        (model, plan): (Arc<Model>, Arc<Plan>),
        source: Box<dyn Source>,
        valid: Option<Box<dyn Source>>,
        options: TrainOptions,
    ) -> Result<Session> {
        if plan.choice.crosses {
            return Err(Error::bad("the plan crosses devices, and a session has one"));
        }
        let disk = match (plan.host.disk_bytes, &options.disk) {
            (0, _) => None,
            (bytes, Some(path)) => Some(DiskSpec { path: path.clone(), bytes, bytes_per_sec: None }),
            (bytes, None) => {
                return Err(Error::bad(format!(
                    "the plan puts {bytes} bytes on the disk, and the options name no folder"
                )));
            }
        };
        let memory = FleetMemory {
            arena_bytes: vec![plan.arena.bytes],
            host_bytes: plan.host.bytes,
            poison: options.poison,
            disk,
            ..FleetMemory::default()
        };
        options.check()?;
        let device = start_fleet(std::slice::from_ref(&options.device), memory)?;
        let placed = Placed::alone(model, plan);
        let model = ModelToTrain { weights, placed, source, valid, options: options.clone() };
        Ok(Session { fleet: Fleet::new(vec![model], device, None)?, options, untold: VecDeque::new() })
    }

    /// Resumes from the checkpoint at `path`, before the first step. Returns the number of steps done by then, or
    /// `None` where there is no such file.
    ///
    /// # Errors
    /// When the file cannot be read or belongs to another run ([`Checkpoint::check`]), or a step has begun.
    pub fn resume(&mut self, path: &Path) -> Result<Option<u64>> {
        let Some(mut checkpoint) = Checkpoint::open(path)? else { return Ok(None) };
        checkpoint.check(&self.options, self.engine().model(0))?;
        self.fleet.start_at(0, checkpoint.step())?;
        checkpoint.restore(self.fleet.engine_mut(), 0)?;
        Ok(Some(checkpoint.step()))
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        self.fleet.engine()
    }

    /// The engine, to record events or write state. A caller who begins steps or evaluations on it must wait for them
    /// before calling the session again.
    pub fn engine_mut(&mut self) -> &mut Engine {
        self.fleet.engine_mut()
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.fleet.steps_done(0)
    }

    /// Runs the remaining steps, or until `stop` is set; the state is then in the host store. Validates every
    /// [`TrainOptions::valid_every`] steps and at the end. Waits for the device throughout.
    ///
    /// # Errors
    /// Errors of the engine, the data or `observer`; [`Error::Interrupted`] when `stop` was set before the end,
    /// including the last validation. A model that has failed cannot be trained further: every later call is an error
    /// that says why, except that [`Session::wait_checkpoint`], [`Session::wait_save`] and [`Session::wait_forward`]
    /// still work on the state of its last whole step, where there is one.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<()> {
        self.fleet.check_failed(0)?;
        while let Some(report) = self.untold.pop_front() {
            observer.step(&report)?;
        }
        let mut observers: Vec<&mut dyn Observer> = vec![observer];
        self.fleet.run(&mut observers, stop)?;
        self.fleet.take_failure(0).map_or(Ok(()), Err)
    }

    /// Waits for the next step and reports it; `None` after the last. The step after it has already begun by then, so
    /// that the device does not wait for the caller. Validates and saves nothing by itself.
    ///
    /// # Errors
    /// Errors of the engine or the data; after one, later calls behave as after [`Session::run`].
    pub fn wait_step(&mut self) -> Result<Option<StepReport>> {
        match self.untold.pop_front() {
            Some(report) => Ok(Some(report)),
            None => self.fleet.wait_step(0, true),
        }
    }

    /// Evaluates the model on one pass over `source` and returns the mean loss over its labelled positions. A step that
    /// has begun ends first.
    ///
    /// # Errors
    /// When the data is invalid, has no label or no end, or the engine fails.
    pub fn wait_evaluation(&mut self, source: &mut dyn Source) -> Result<f32> {
        self.wait_begun()?;
        self.fleet.wait_evaluation(0, source)
    }

    /// The logits of a batch of any size, and their shape, after all steps that have begun; later steps are not
    /// affected. `network` is the one in training. The logits are those of [`wait_forward`](super::wait_forward()) with
    /// the weights that [`Session::wait_save`] writes, bit for bit where those are f32: computed on the host in f32,
    /// for a bf16 model from the f32 masters, with adapters merged into the weights. This takes memory in addition to
    /// the plan's, as described there. Frozen parameters of a bf16 model are rounded to bf16, as in training.
    ///
    /// # Errors
    /// As [`wait_forward`](super::wait_forward()); when `network` has other tensors or shapes than the model; when
    /// weights were to come from a checkpoint that was never read; when the engine fails; and after a loss that is not
    /// finite, as [`Session::wait_checkpoint`].
    pub fn wait_forward(&mut self, network: &dyn Network, batch: &Batch) -> Result<(Shape, Vec<f32>)> {
        self.fleet.trainees[0].check_weights()?;
        self.wait_home()?;
        let logits = wait_forward_trained(network, (self.engine(), 0), self.options.low_rank.as_ref(), batch);
        self.engine_mut().skip_time(0);
        logits
    }

    /// Writes a checkpoint of all steps that have begun, from which [`Session::resume`] continues. After an error of
    /// the data or the observer it holds these steps too; after a loss that is not finite, the steps before that one.
    ///
    /// # Errors
    /// When the engine fails, or the file cannot be written; an older checkpoint stays intact. After a loss that is not
    /// finite, when that step has already changed running statistics, or the step after it weights.
    pub fn wait_checkpoint(&mut self, path: &Path) -> Result<()> {
        self.wait_home()?;
        write_checkpoint(path, self.engine(), 0, &self.options, self.steps_done())
    }

    /// Saves the model after all steps that have begun, as [`save_model`] does. `first` are the weights it started
    /// from.
    ///
    /// # Errors
    /// As [`save_model`]; when the engine fails; and after a loss that is not finite, as [`Session::wait_checkpoint`].
    pub fn wait_save(&mut self, dir: &Path, form: &Form, first: Weights) -> Result<()> {
        self.wait_home()?;
        let low_rank = self.options.low_rank.as_ref();
        save_model(dir, form, (self.engine(), 0), first, low_rank, self.steps_done())
    }

    /// Brings the state home after the steps that have begun; of a model that has failed, after its last whole step.
    fn wait_home(&mut self) -> Result<()> {
        let standing = self.fleet.check_failed(0);
        if standing.is_ok() {
            self.wait_begun()?;
        }
        self.fleet.engine_mut().wait_home(0).map_err(|error| match standing {
            Err(why) if !self.fleet.engine().has_failed() => Error::bad(format!("{why}; {error}")),
            _ => error,
        })
    }

    /// Waits for the steps that have begun.
    fn wait_begun(&mut self) -> Result<()> {
        while let Some(report) = self.fleet.wait_step(0, false)? {
            self.untold.push_back(report);
        }
        Ok(())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("fleet", &self.fleet).field("options", &self.options).finish_non_exhaustive()
    }
}
