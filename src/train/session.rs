//! A model in training: its plan, its engine, its data, and the loop over steps.
//!
//! The loop keeps two steps in flight, so that no lane stands still while the host reads a loss. Everything that a caller sees, the
//! progress line, the metrics, the trace, comes from the results and events of the same engine.

use super::optimizer::{Optimizer, Schedule};
use crate::base::{DType, Error, Result};
use crate::data::{Batch, Limits, Loader, Source, check_ids, labelled};
use crate::device::sim::CostModel;
use crate::device::{DeviceMemory, DeviceSpec};
use crate::engine::{Engine, EngineOptions, StepInput, StepResult, Stored};
use crate::graph::{Graph, Mode};
use crate::nn::{InputShape, Network, Pretrained, init};
use crate::spill::{Model, Plan, PlanOptions};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
            valid_every: 50,
            patience_secs: 60.0,
            poison: false,
            dtype: DType::F32,
            tf32: false,
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

    /// Asked after every step: whether to save a checkpoint now, with `session` at rest. `None`: not now.
    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    /// The session is at rest after `step` steps, and its state is in the host's store.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn checkpoint(&mut self, step: u64, session: &Session) -> Result<()> {
        let _ = (step, session);
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
    let trace = |mode| network.trace(mode, dtype, microbatch, inputs).map(|graph| Graph { scratch, tf32, ..graph });
    Model::new(trace(Mode::Training)?, Some(trace(Mode::Evaluation)?), batch / microbatch)
}

/// The tensors of a data source, as a network's inputs.
pub fn inputs_of(source: &dyn Source) -> Vec<InputShape> {
    let tensors = &source.spec().tensors;
    tensors.iter().map(|(name, dtype, shape)| InputShape::new(name.clone(), shape.axes().to_vec(), *dtype)).collect()
}

/// Where a session's first weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// A Hugging Face directory.
    Pretrained(&'a Pretrained),
    /// Drawn from the seed.
    Random,
}

/// A model in training.
pub struct Session {
    engine: Engine,
    options: TrainOptions,
    loader: Loader,
    valid: Option<Box<dyn Source>>,
    valid_batch: Batch,
    limits: Limits,
    /// For each graph input, the batch tensor's name.
    names: Vec<String>,
    /// Steps done.
    done: u64,
}

impl Session {
    /// Starts the devices and fills the store with the first weights. `model` and `plan` come from [`trace_model`] and [`Plan::new`].
    ///
    /// # Errors
    /// When memory or threads cannot be had, weights are missing, or an option is absurd.
    pub fn new(
        network: &dyn Network,
        weights: Weights,
        (model, plan): (Arc<Model>, Arc<Plan>),
        source: Box<dyn Source>,
        valid: Option<Box<dyn Source>>,
        options: TrainOptions,
    ) -> Result<Session> {
        options.optimizer.check()?;
        let memory =
            DeviceMemory { arena_bytes: plan.arena.bytes, host_bytes: plan.host.bytes, poison: options.poison };
        let device = options.device.start(memory)?;
        let decays = model.train.parameters.iter().map(|p| options.optimizer.decays(p.shape.axes().len())).collect();
        // One task of a large model may take long: nothing is wrong while a whole step's time has not passed a few times.
        let patience_secs = options.patience_secs.max(10.0 * plan.estimated_secs);
        let engine_options = EngineOptions { seed: options.seed, model: 0, patience_secs, decays };
        let mut engine = Engine::new(Arc::clone(&model), plan, device, engine_options);
        fill(&mut engine, &model.train, weights, options.seed)?;
        let labels = network.labels();
        let limits = Limits { vocab: labels.vocab, classes: Some(labels.classes) };
        let valid_batch = valid.as_ref().map_or(Batch { tensors: Vec::new() }, |v| Batch::zeros(v.spec()));
        let names = model.train.inputs.iter().map(|i| i.name.clone()).collect();
        let loader = Loader::start_limited(source, 0, crate::data::DEFAULT_AHEAD, limits)?;
        Ok(Session { engine, options, loader, valid, valid_batch, limits, names, done: 0 })
    }

    /// Goes on from `step`: state was written by the caller, data starts there. `source` is a fresh one of the same kind.
    ///
    /// # Errors
    /// When the loader's thread cannot be started.
    pub fn start_at(&mut self, step: u64, source: Box<dyn Source>) -> Result<()> {
        self.loader = Loader::start_limited(source, step, crate::data::DEFAULT_AHEAD, self.limits)?;
        self.done = step;
        Ok(())
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The engine, to record events or write state.
    pub fn engine_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.done
    }

    /// Runs the remaining steps, or until `stop` is set; then the state is in the host's store. Validates every
    /// [`TrainOptions::valid_every`] steps and at the end. Waits for the device throughout.
    ///
    /// # Errors
    /// What the engine, the data or `observer` gives; [`Error::Interrupted`] when `stop` was set before the last step.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<()> {
        let mut begun = self.done;
        let mut scales = VecDeque::with_capacity(4);
        let mut pause = false;
        // A run that stopped where a validation was due left it to the one that goes on.
        if begun > 0 && begun < self.options.steps && begun.is_multiple_of(self.options.valid_every.max(1)) {
            self.validate(observer)?;
            self.engine.skip_time();
        }
        while self.done < self.options.steps {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && !pause && self.engine.steps_in_flight() < 2 && begun < self.options.steps {
                scales.push_back(self.begin(begun)?);
                begun += 1;
                pause = self.valid.is_some() && begun.is_multiple_of(self.options.valid_every.max(1));
            }
            if self.engine.steps_in_flight() > 0 {
                let result = self.engine.wait_step()?;
                self.done = result.step + 1;
                let lr = scales.pop_front().expect("each step in flight has its learning rate");
                observer.step(&StepReport { result, lr })?;
                if observer.wants_checkpoint() {
                    pause = true;
                }
                if self.engine.steps_in_flight() > 0 {
                    continue;
                }
            }
            if pause || stopping {
                self.engine.wait_home()?;
                observer.checkpoint(self.done, self)?;
                if stopping && self.done < self.options.steps {
                    return Err(Error::Interrupted { step: self.done });
                }
                if self.done < self.options.steps && self.done.is_multiple_of(self.options.valid_every.max(1)) {
                    self.validate(observer)?;
                }
                self.engine.skip_time();
                pause = false;
            }
        }
        self.engine.wait_home()?;
        observer.checkpoint(self.done, self)?;
        self.validate(observer)
    }

    /// Begins a step and gives its learning rate.
    fn begin(&mut self, step: u64) -> Result<f64> {
        let batch = self.loader.next()?;
        let labels = labelled(&batch, 1)?.iter().sum::<u64>();
        if labels == 0 {
            return Err(Error::bad(format!("step {step}: no position of the minibatch has a label")));
        }
        let lr = self.options.schedule.lr(self.options.optimizer.lr(), step, self.options.steps);
        let input = StepInput {
            step,
            inputs: batch_inputs(&self.names, &batch)?,
            loss_scale: 1.0 / labels as f64,
            rule: self.options.optimizer.rule(step, lr),
            clip: self.options.clip,
        };
        self.engine.begin_step(&input)?;
        self.loader.recycle(batch);
        Ok(lr)
    }

    /// Evaluates all held-out data and tells the observer.
    fn validate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let Some(source) = &mut self.valid else { return Ok(()) };
        let began = std::time::Instant::now();
        let (mut sum, mut count) = (0.0, 0);
        for index in 0..source.batches_per_epoch() {
            source.fill(index, &mut self.valid_batch)?;
            check_ids(&self.valid_batch, self.limits)?;
            let labels = labelled(&self.valid_batch, 1)?.iter().sum::<u64>();
            if labels > 0 {
                // The sum over labelled positions; batches weigh by their number.
                sum += f64::from(self.engine.wait_evaluation(&batch_inputs(&self.names, &self.valid_batch)?, 1.0)?);
                count += labels;
            }
        }
        let loss = (sum / count.max(1) as f64) as f32;
        observer.valid(self.done, loss, began.elapsed().as_secs_f64())
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

/// Writes the first weights and states into the host's store.
fn fill(engine: &mut Engine, graph: &Graph, weights: Weights, seed: u64) -> Result<()> {
    for (i, parameter) in graph.parameters.iter().enumerate() {
        let values = match weights {
            Weights::Pretrained(pretrained) => pretrained.tensor(&parameter.name, &parameter.shape)?,
            Weights::Random => init::initial(parameter, i, seed),
        };
        engine.write_parameter(Stored::Weight, i, &values);
    }
    for (i, state) in graph.states.iter().enumerate() {
        let values = match weights {
            Weights::Pretrained(pretrained) => pretrained.tensor(&state.name, &state.shape)?,
            Weights::Random => init::initial_state(state),
        };
        engine.write_state(i, &values);
    }
    Ok(())
}

/// Plans a traced model under `options` with this machine's measured rates.
///
/// # Errors
/// As [`Plan::new`].
pub fn plan_model(model: &Model, options: &TrainOptions, cost: &CostModel) -> Result<Plan> {
    let wishes = PlanOptions { moments: options.optimizer.moments(), ..options.plan.clone() };
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
