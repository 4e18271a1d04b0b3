//! A session trains one model on one device. It is a fleet of one.

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
    /// Steps that have ended and that nobody was told of.
    untold: VecDeque<StepReport>,
}

impl Session {
    /// Measures the options' device, which takes a second or two, traces and plans by what it achieves, and starts: all
    /// that [`prepare`](super::prepare()) and [`Session::new`] do.
    ///
    /// # Errors
    /// As both: when an option is absurd, the network does not take the source's tensors, no plan fits the budgets, or
    /// memory, threads or weights cannot be had.
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
    /// When memory, threads or the disk cannot be had, weights are missing, an option is absurd or another than the
    /// model's or the plan's, or the plan is another model's or crosses devices.
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

    /// Goes on from the checkpoint at `path`, before the first step; gives the steps that it had done, or `None` where
    /// there is no such file.
    ///
    /// # Errors
    /// When the file cannot be read or is of another run ([`Checkpoint::check`]), or a step has begun.
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

    /// The engine, to record events or write state. Steps and evaluations that are begun here are waited for here,
    /// before the session goes on.
    pub fn engine_mut(&mut self) -> &mut Engine {
        self.fleet.engine_mut()
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.fleet.steps_done(0)
    }

    /// Runs the remaining steps, or until `stop` is set; then the state is in the host's store. Validates every
    /// [`TrainOptions::valid_every`] steps and at the end. Waits for the device throughout.
    ///
    /// # Errors
    /// What the engine, the data or `observer` gives; [`Error::Interrupted`] when `stop` was set before the end, the
    /// validation there included. A model that has failed trains no more: every later call is an error that says why,
    /// but that [`Session::wait_checkpoint`], [`Session::wait_save`] and [`Session::wait_forward`] take what is whole
    /// of it.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<()> {
        self.fleet.check_failed(0)?;
        while let Some(report) = self.untold.pop_front() {
            observer.step(&report)?;
        }
        let mut observers: Vec<&mut dyn Observer> = vec![observer];
        self.fleet.run(&mut observers, stop)?;
        self.fleet.take_failure(0).map_or(Ok(()), Err)
    }

    /// Waits for the next step and tells of it; `None` after the last. The step after it has begun by then, so that the
    /// device does not wait for the caller. Nothing is validated or saved but when asked for.
    ///
    /// # Errors
    /// What the engine or the data gives; then as after [`Session::run`].
    pub fn wait_step(&mut self) -> Result<Option<StepReport>> {
        match self.untold.pop_front() {
            Some(report) => Ok(Some(report)),
            None => self.fleet.wait_step(0, true),
        }
    }

    /// Evaluates the model on one pass over `source`, and gives the mean loss of its labelled positions. A step that
    /// has begun ends first.
    ///
    /// # Errors
    /// When the data is at fault, has no label or no end, or the engine fails.
    pub fn wait_evaluation(&mut self, source: &mut dyn Source) -> Result<f32> {
        self.wait_begun()?;
        self.fleet.wait_evaluation(0, source)
    }

    /// The logits of a batch of any size, and their shape, after all steps that have begun; later steps are as if
    /// nobody had asked. `network` is the one that is trained. They are those of
    /// [`wait_forward`](super::wait_forward()) with what [`Session::wait_save`] writes, to the bit where that is f32:
    /// on the host and in f32, of a bf16 model by the f32 masters, with adapters in the weights. So they take memory
    /// beside the plan's, as is said there. What is frozen of a bf16 model is rounded, as steps have it.
    ///
    /// # Errors
    /// As [`wait_forward`](super::wait_forward()); when `network` has other tensors than the model, or of other shapes;
    /// when weights were to come from a checkpoint and none came, the engine fails, and after a loss that is not
    /// finite, as [`Session::wait_checkpoint`].
    pub fn wait_forward(&mut self, network: &dyn Network, batch: &Batch) -> Result<(Shape, Vec<f32>)> {
        self.fleet.trainees[0].check_weights()?;
        self.wait_home()?;
        let logits = wait_forward_trained(network, (self.engine(), 0), self.options.low_rank.as_ref(), batch);
        self.engine_mut().skip_time(0);
        logits
    }

    /// Writes a checkpoint of all steps that have begun, from which [`Session::resume`] goes on. Of a model that its
    /// data or its observer has ended these are whole too; where a loss is not finite, it is of the steps before.
    ///
    /// # Errors
    /// When the engine fails, or the file cannot be written; an older one is whole then. After a loss that is not
    /// finite, when the step itself has changed running statistics, or the step behind it weights.
    pub fn wait_checkpoint(&mut self, path: &Path) -> Result<()> {
        self.wait_home()?;
        write_checkpoint(path, self.engine(), 0, &self.options, self.steps_done())
    }

    /// Saves the model, which began with the weights `first`, after all steps that have begun, as [`save_model`] does.
    ///
    /// # Errors
    /// As [`save_model`]; when the engine fails; and after a loss that is not finite, as [`Session::wait_checkpoint`].
    pub fn wait_save(&mut self, dir: &Path, form: &Form, first: Weights) -> Result<()> {
        self.wait_home()?;
        let low_rank = self.options.low_rank.as_ref();
        save_model(dir, form, (self.engine(), 0), first, low_rank, self.steps_done())
    }

    /// Brings home what the steps that have begun leave; of a model that has failed, what its last whole step has left.
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
