//! Training one model: how, from what to what, and a session that does it. A session is a fleet of one.

use super::fleet::Fleet;
use super::optimizer::{Optimizer, Schedule};
use super::trainee::Recruit;
use super::weights::Weights;
use crate::base::{DType, Error, Result};
use crate::data::{Batch, Source};
use crate::device::sim::CostModel;
use crate::device::{DeviceSpec, DiskSpec, FleetMemory, start_fleet};
use crate::engine::{Engine, StepResult};
use crate::graph::{Graph, Mode};
use crate::nn::{InputShape, Network};
use crate::spill::{Model, Placed, Plan, PlanOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How to train a model.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Seed of everything random: initial weights, order of the data, dropout.
    pub seed: u64,
    /// Samples of a minibatch.
    pub batch: usize,
    /// Samples of a microbatch; divides `batch`.
    pub microbatch: usize,
    /// Steps in all.
    pub steps: u64,
    /// The update.
    pub optimizer: Optimizer,
    /// The learning rate over the steps.
    pub schedule: Schedule,
    /// Greatest global norm of a gradient; larger ones are scaled down.
    pub clip: Option<f64>,
    /// The plan's budgets and wishes; moments are filled in from the optimizer.
    pub plan: PlanOptions,
    /// The device; its arena's size comes from the plan.
    pub device: DeviceSpec,
    /// The folder of the disk tier, for plans that put anything there.
    pub disk: Option<PathBuf>,
    /// Validate after every so many steps, where there is held-out data.
    pub valid_every: u64,
    /// Seconds without any completion after which the run ends; ten estimated steps where that is longer.
    pub patience_secs: f64,
    /// Fill the arena with NaN first, so that use of what was never written shows.
    pub poison: bool,
    /// Element type of weights and activations: F32, or Bf16 with f32 masters.
    pub dtype: DType,
    /// Products of f32 may round their factors to tf32; for the cuda device, emulated or not.
    pub tf32: bool,
    /// What cuts its text into tokens: any words that are the same as long as it is. With another, a checkpoint's weights mean nothing; none: not compared.
    pub tokenizer: Option<String>,
    /// The config.json that describes the network: with another, a checkpoint's weights mean something else; none: not compared.
    pub network: Option<String>,
    /// Parameters whose names begin with one of these stay as they are: of them a step needs the weights alone, no gradients and no moments.
    pub frozen: Vec<String>,
    /// What it is trained and validated on, by the job file's keys: any words that are the same as long as that is. A change is told.
    pub data: Vec<(&'static str, String)>,
}

impl TrainOptions {
    /// One sample a step, torch's AdamW, no budget.
    pub fn new(steps: u64) -> Self {
        TrainOptions {
            seed: 0,
            batch: 1,
            microbatch: 1,
            steps,
            optimizer: Optimizer::default(),
            schedule: Schedule::Constant,
            clip: None,
            plan: PlanOptions::default(),
            device: DeviceSpec::default(),
            disk: None,
            valid_every: 50,
            patience_secs: 60.0,
            poison: false,
            dtype: DType::F32,
            tf32: false,
            tokenizer: None,
            network: None,
            frozen: Vec::new(),
            data: Vec::new(),
        }
    }
}

/// A training step as a caller sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// What the engine gave.
    pub result: StepResult,
    /// Learning rate of the update.
    pub lr: f64,
}

/// What happens during a run, told as it happens.
pub trait Observer {
    /// A step has ended.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn step(&mut self, report: &StepReport) -> Result<()>;

    /// Held-out data was evaluated after `step` steps.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()>;

    /// Asked before a step is begun: whether to let the model rest after `step` steps and validate it, beside the times that are due anyway.
    fn wants_rest(&mut self, step: u64) -> bool {
        let _ = step;
        false
    }

    /// Asked before a step is begun, and after every step and validation: whether the model ends here, as if these had been all its steps.
    fn wants_end(&mut self) -> bool {
        false
    }

    /// Asked after every step: whether to save a checkpoint now, with the model at rest.
    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    /// The model, number `model` of the engine's, is at rest after `step` steps, and its state is in the host's store.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        let _ = (step, engine, model);
        Ok(())
    }

    /// The model has come to its end, validated and at rest; its state is in the host's store.
    ///
    /// # Errors
    /// Whatever should make a failure of it.
    fn ended(&mut self, engine: &Engine, model: usize) -> Result<()> {
        let _ = (engine, model);
        Ok(())
    }
}

/// Watches nothing.
impl Observer for () {
    fn step(&mut self, _: &StepReport) -> Result<()> {
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }
}

/// A closure watches the steps alone.
impl<F: FnMut(&StepReport) -> Result<()>> Observer for F {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self(report)
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }
}

/// Traces `network` for the options' microbatches, element type and device with the tensors of `inputs`: the training graph with its
/// gradient and the evaluation graph.
///
/// # Errors
/// When the network does not take the inputs, or the microbatch does not divide the batch.
pub fn trace_model(network: &dyn Network, inputs: &[InputShape], options: &TrainOptions) -> Result<Model> {
    let &TrainOptions { batch, microbatch, dtype, tf32, .. } = options;
    let scratch = options.device.wants_scratch();
    if microbatch == 0 || !batch.is_multiple_of(microbatch) {
        return Err(Error::bad(format!("microbatch {microbatch} does not divide batch {batch}")));
    }
    let trace = |mode| -> Result<Graph> {
        let mut graph = Graph { scratch, tf32, ..network.trace(mode, dtype, microbatch, inputs)? };
        for start in &options.frozen {
            if !graph.parameters.iter().any(|p| p.name.starts_with(start)) {
                return Err(Error::bad(format!("frozen: the name of no parameter begins with {start}")));
            }
        }
        graph.freeze(|name| options.frozen.iter().any(|start| name.starts_with(start)));
        Ok(graph)
    };
    Model::new(trace(Mode::Training)?, Some(trace(Mode::Evaluation)?), batch / microbatch)
}

/// The tensors of a data source, as a network's inputs.
pub fn inputs_of(source: &dyn Source) -> Vec<InputShape> {
    let tensors = &source.spec().tensors;
    tensors.iter().map(|(name, dtype, shape)| InputShape::new(name.clone(), shape.axes().to_vec(), *dtype)).collect()
}

/// A model in training, alone on one device.
pub struct Session {
    fleet: Fleet,
}

impl Session {
    /// Starts the device and fills the store with the first weights. `model` and `plan` come from [`trace_model`] and [`Plan::new`].
    ///
    /// # Errors
    /// When memory, threads or the disk cannot be had, weights are missing, or an option is absurd.
    pub fn new(
        network: &dyn Network,
        weights: Weights,
        (model, plan): (Arc<Model>, Arc<Plan>),
        source: Box<dyn Source>,
        valid: Option<Box<dyn Source>>,
        options: TrainOptions,
    ) -> Result<Session> {
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
        options.optimizer.check()?;
        let device = start_fleet(std::slice::from_ref(&options.device), memory)?;
        let recruit = Recruit { network, weights, placed: Placed::alone(model, plan), source, valid, options };
        Ok(Session { fleet: Fleet::new(vec![recruit], device, None)? })
    }

    /// Goes on from `step`: state was written by the caller, data starts there. `source` is a fresh one of the same kind.
    ///
    /// # Errors
    /// When that is after the last step, or the loader's thread cannot be started.
    pub fn start_at(&mut self, step: u64, source: Box<dyn Source>) -> Result<()> {
        self.fleet.start_at(0, step, source)
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        self.fleet.engine()
    }

    /// The engine, to record events or write state.
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
    /// What the engine, the data or `observer` gives; [`Error::Interrupted`] when `stop` was set before the end, the validation there included.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<()> {
        let mut crew: Vec<&mut dyn Observer> = vec![observer];
        self.fleet.run(&mut crew, stop)?;
        self.fleet.take_failure(0).map_or(Ok(()), Err)
    }
}

/// The batch's tensors in the order of the graph's inputs.
pub(super) fn batch_inputs<'a>(names: &[String], batch: &'a Batch) -> Result<Vec<&'a [u8]>> {
    let of = |name: &String| {
        batch
            .get(name)
            .map(|t| t.bytes())
            .ok_or_else(|| Error::bad(format!("the batch lacks {name}, which the model reads")))
    };
    names.iter().map(of).collect()
}

/// Plans a traced model under `options` with this machine's measured rates.
///
/// # Errors
/// As [`Plan::new`].
pub fn plan_model(model: &Model, options: &TrainOptions, cost: &CostModel) -> Result<Plan> {
    let wishes =
        PlanOptions { moments: options.optimizer.moments(), clips: options.clip.is_some(), ..options.plan.clone() };
    Plan::new(model, &wishes, cost)
}

/// Traces `network` for the tensors of `source` and plans it: all that [`Session::new`] needs besides weights and data.
///
/// # Errors
/// As [`trace_model`] and [`Plan::new`]; and when the source's minibatch is not `options.batch`.
pub fn prepare(
    network: &dyn Network,
    source: &dyn Source,
    options: &TrainOptions,
    cost: &CostModel,
) -> Result<(Arc<Model>, Arc<Plan>)> {
    let found = source.spec().batch;
    if found != options.batch {
        return Err(Error::bad(format!("the data has {found} samples a minibatch, the options say {}", options.batch)));
    }
    let model = trace_model(network, &inputs_of(source), options)?;
    let plan = plan_model(&model, options, cost)?;
    Ok((Arc::new(model), Arc::new(plan)))
}
