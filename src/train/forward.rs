//! One batch through a model in evaluation mode.

use super::prepare::batch_inputs;
use super::weights::Weights;
use crate::base::{DType, Error, Result, Shape};
use crate::data::{Batch, check_ids};
use crate::device::sim::CostModel;
use crate::device::{DeviceMemory, DeviceSpec};
use crate::engine::{Engine, EngineOptions};
use crate::graph::Mode;
use crate::nn::{InputShape, Pretrained};
use crate::spill::{Model, Plan, PlanOptions, Updates};
use std::sync::Arc;

/// Runs `batch`, whose tensors have the sample as their first axis, and gives the logits with their shape. Waits for
/// the device.
///
/// # Errors
/// When the model does not take these tensors, an id is out of range, memory cannot be had, or a weight or a
/// logit is not finite.
pub fn wait_forward(pretrained: &Pretrained, batch: &Batch) -> Result<(Shape, Vec<f32>)> {
    let network = pretrained.network.as_ref();
    check_ids(batch)?;
    let samples = batch.tensors.first().and_then(|t| t.shape.axes().first()).copied().unwrap_or(0);
    let mut inputs = Vec::new();
    for tensor in &batch.tensors {
        match tensor.shape.axes().split_first() {
            Some((&n, axes)) if n == samples => inputs.push(InputShape::new(tensor.name.clone(), axes, tensor.dtype)),
            _ => {
                let (name, shape) = (&tensor.name, &tensor.shape);
                return Err(Error::bad(format!("{name}: shape {shape} has another batch than {samples}")));
            }
        }
    }
    let graph = network.trace(Mode::Evaluation, DType::F32, samples, &inputs)?;
    let shape = match graph.logits {
        Some(logits) => graph.info(logits).shape.clone(),
        None => return Err(Error::bad("the model has no logits")),
    };
    let model = Arc::new(Model::evaluation(graph)?);
    // Nothing is chosen by these rates: without a budget there is nothing to choose.
    let cost = CostModel::stated(1e11, 2e10, 1e10);
    let plan = Arc::new(Plan::new(&model, &PlanOptions { updates: Updates::PLAIN, ..PlanOptions::default() }, &cost)?);
    let memory = DeviceMemory { arena_bytes: plan.arena.bytes, host_bytes: plan.host.bytes, poison: false };
    let device = DeviceSpec::default().start(memory)?;
    // A large batch may take its time: there is one task only.
    let options = EngineOptions { patience_secs: 3600.0, ..EngineOptions::new(0, &model) };
    let mut engine = Engine::new(Arc::clone(&model), plan, device, options);
    Weights::Pretrained(pretrained).write(&mut engine, 0, 0)?;
    let logits = engine.wait_logits(0, &batch_inputs(&model.train, batch)?)?;
    if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
        let (place, found) = (shape.position(at), logits[at]);
        return Err(Error::Device(format!(
            "the logits are not finite: {found} at {place}; the inputs or the weights are too large"
        )));
    }
    Ok((shape, logits))
}
