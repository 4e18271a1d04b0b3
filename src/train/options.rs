//! How a model is trained, as values.

use super::optimizer::{Optimizer, Schedule};
use crate::base::{DType, Error, Result};
use crate::device::DeviceSpec;
use crate::engine::EngineOptions;
use crate::graph::{LowRank, adapted_layer};
use crate::spill::{Model, Plan, PlanOptions, Updates};
use std::path::PathBuf;

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
    /// The learning rate as a function of the step.
    pub schedule: Schedule,
    /// Largest global norm of the gradient; larger gradients are scaled down to it.
    pub clip: Option<f64>,
    /// Budgets and preferences for the plan; `updates` is filled in from the optimizer.
    pub plan: PlanOptions,
    /// The device; its arena's size comes from the plan.
    pub device: DeviceSpec,
    /// The folder of the disk tier, for plans that use it.
    pub disk: Option<PathBuf>,
    /// Steps between validations, where there is held-out data; at least 1.
    pub valid_every: u64,
    /// Seconds without any completion after which the run ends, or ten estimated steps where that is longer. On the
    /// host, time in which a task computes does not count.
    pub patience_secs: f64,
    /// Fill the arena with NaN first, so that reads of memory that was never written show.
    pub poison: bool,
    /// Element type of weights and activations: F32, or Bf16 with f32 masters.
    pub dtype: DType,
    /// Matrix products of f32 may round their factors to tf32; for the cuda device, emulated or not.
    pub tf32: bool,
    /// Rows of logits that are computed at a time, as in [`crate::graph::Graph::loss_rows`].
    pub loss_rows: Option<usize>,
    /// Identifies the tokenizer: any text that changes whenever the tokenizer does. A checkpoint is refused where it
    /// differs, since its weights would mean nothing; `None`: not compared.
    pub tokenizer: Option<String>,
    /// The settings of the network, [`crate::nn::settings`]. A checkpoint is refused where they differ, since its
    /// weights would mean something else; `None`: not compared.
    pub network: Option<String>,
    /// Parameters whose names begin with one of these are not trained: a step needs only their weights, no gradients
    /// and no moments.
    pub frozen: Vec<String>,
    /// Low-rank adapters to train beside linear layers' weights; everything else is frozen.
    pub low_rank: Option<LowRank>,
    /// Identifies the training and validation data, by keys that begin with `data.` or `valid.`: any text that changes
    /// whenever the data does. On resume a change is reported.
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
            loss_rows: None,
            tokenizer: None,
            network: None,
            frozen: Vec::new(),
            low_rank: None,
            data: Vec::new(),
        }
    }

    /// Refuses invalid options.
    ///
    /// # Errors
    /// When a number is out of its range, or a key of `data` does not begin as it should.
    pub fn check(&self) -> Result<()> {
        self.optimizer.check()?;
        self.schedule.check()?;
        let &TrainOptions { batch, microbatch, valid_every, patience_secs, dtype, .. } = self;
        if microbatch == 0 || batch == 0 || !batch.is_multiple_of(microbatch) {
            return Err(Error::bad(format!("microbatch {microbatch} does not divide batch {batch}")));
        }
        if let Some(clip) = self.clip.filter(|&clip| !(clip > 0.0 && clip.is_finite())) {
            return Err(Error::bad(format!("clip is {clip}, want a number above 0, or none")));
        }
        if valid_every == 0 {
            return Err(Error::bad("valid_every is 0, want 1 or more; without held-out data nothing is validated"));
        }
        if patience_secs.is_nan() || patience_secs <= 0.0 {
            return Err(Error::bad(format!("patience_secs is {patience_secs}, want more than 0")));
        }
        if !matches!(dtype, DType::F32 | DType::Bf16) {
            return Err(Error::bad(format!("dtype is {dtype}, want f32 or bf16")));
        }
        if let Some(low_rank) = &self.low_rank {
            low_rank.check()?;
            if !self.frozen.is_empty() {
                return Err(Error::bad("frozen: all is frozen beside low-rank adapters; leave it out"));
            }
        }
        let is_of_data = |key: &str| key.starts_with("data.") || key.starts_with("valid.");
        match self.data.iter().find(|(key, _)| !is_of_data(key)) {
            Some((key, _)) => {
                Err(Error::bad(format!("data: the key {key:?} begins neither with data. nor with valid.")))
            }
            None => Ok(()),
        }
    }

    /// What the optimizer needs from a plan.
    pub fn updates(&self) -> Updates {
        Updates { moments: self.optimizer.moments(), clips: self.clip.is_some() }
    }

    /// Whether a parameter of this name is not trained.
    pub(super) fn freezes(&self, name: &str) -> bool {
        match &self.low_rank {
            Some(_) => adapted_layer(name).is_none(),
            None => self.frozen.iter().any(|start| name.starts_with(start)),
        }
    }

    /// The options with which an engine runs the model: for a loop of one's own.
    pub fn engine_options(&self, model: &Model, plan: &Plan) -> EngineOptions {
        let parameters = &model.train.parameters;
        let decays = parameters.iter().map(|p| self.optimizer.decays(p.shape.axes().len())).collect();
        // One task of a large model may take long: nothing is wrong while a whole step's time has not passed a few
        // times.
        let patience_secs = self.patience_secs.max(10.0 * plan.estimated_secs);
        EngineOptions { seed: self.seed, patience_secs, decays, steps: self.steps }
    }
}
