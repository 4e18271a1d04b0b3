//! How a model is trained, according to its job.

use crate::job::model::{Length, Model, Precision};
use crate::job::{Job, Policy};
use crate::setup::checks::check_frozen;
use hydra::base::{DType, Result};
use hydra::data::Source;
use hydra::nn::{self, Network};
use hydra::spill::{Baseline, PlanOptions};
use hydra::train::TrainOptions;

/// More steps than this are refused, as for the job file's own key.
const MOST_STEPS: u64 = i32::MAX as u64;

/// The options of a `model` of the job; the data's identity and the options about the device are filled in by others.
///
/// # Errors
/// When a key is incompatible with the data or the network.
pub fn train_options(job: &Job, model: &Model, network: &dyn Network, source: &dyn Source) -> Result<TrainOptions> {
    let mut options = TrainOptions::new(steps(model, source)?);
    options.seed = job.run.seed;
    options.batch = model.batch;
    options.microbatch = microbatch(job, model)?;
    if model.loss_rows.is_some() && network.labels().vocab.is_none() {
        return Err(model.fault("loss_rows", "is for models over tokens; leave it out"));
    }
    options.loss_rows = model.loss_rows;
    check_frozen(model, network)?;
    options.frozen = model.frozen.clone();
    options.low_rank = model.lora.clone();
    options.dtype = if model.dtype == Precision::Bf16 { DType::Bf16 } else { DType::F32 };
    options.tf32 = model.dtype == Precision::Tf32;
    (options.optimizer, options.clip, options.schedule) = (model.optimizer, model.clip, model.schedule);
    options.network = Some(nn::settings(&network.config()).to_string());
    options.valid_every = model.valid.as_ref().map_or(50, |v| v.every);
    options.plan =
        PlanOptions { slots: job.run.slots.unwrap_or(2), recompute: job.run.recompute, ..PlanOptions::default() };
    Ok(options)
}

/// Samples of a microbatch. In a pipeline they follow from the number of microbatches in it: by default as many as
/// there are devices, or the largest smaller number that divides the batch.
fn microbatch(job: &Job, model: &Model) -> Result<usize> {
    if job.run.policy != Policy::Lines(Baseline::Gpipe) {
        return Ok(model.microbatch);
    }
    let devices: usize = job.devices.iter().map(|d| d.count).sum();
    let fits = |n: usize| model.batch.is_multiple_of(n);
    let count = match job.run.pipeline_microbatches {
        Some(stated) if !fits(stated) => {
            let batch = model.batch;
            let what = format!("run.pipeline_microbatches = {stated} does not divide the batch of {batch}");
            return Err(model.fault("batch", what));
        }
        Some(stated) => stated,
        None => (1..=devices).rev().find(|&n| fits(n)).unwrap_or(1),
    };
    Ok(model.batch / count)
}

/// Steps of a run.
fn steps(model: &Model, source: &dyn Source) -> Result<u64> {
    let (key, steps) = match model.length {
        Length::Steps(steps) => ("steps", steps),
        Length::Epochs(epochs) => {
            let batches = source.batches_per_epoch();
            if batches == u64::MAX {
                return Err(model.fault("epochs", "random data has no end; write steps"));
            }
            let steps = epochs.checked_mul(batches).filter(|steps| (1..=MOST_STEPS).contains(steps));
            let too_many = || format!("{epochs} of {batches} minibatches are more than {MOST_STEPS} steps");
            ("epochs", steps.ok_or_else(|| model.fault("epochs", too_many()))?)
        }
    };
    match source.spec().batches {
        Some(ready) if steps > ready => {
            Err(model.fault(key, format!("{steps} steps are more than the {ready} minibatches of the file")))
        }
        _ => Ok(steps),
    }
}
