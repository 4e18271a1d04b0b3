//! One batch through a model in evaluation mode.

use super::prepare::batch_inputs;
use super::save::trained;
use super::weights::Weights;
use crate::base::{DType, Error, Result, Shape};
use crate::data::{Batch, check_tensor, names};
use crate::device::sim::CostModel;
use crate::device::{DeviceMemory, DeviceSpec};
use crate::engine::{Engine, EngineOptions};
use crate::graph::{LowRank, Mode, adapted_layer};
use crate::nn::{InputShape, Network};
use crate::spill::{Model, Plan, PlanOptions, Updates};
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

/// Runs `batch`, whose tensors have the sample as their first axis, through `network` in evaluation mode, and returns
/// the logits with their shape: what the last layer computes before the loss. Labels are ignored. Weights that
/// `weights` does not give are drawn with seed 0. Waits for the device.
///
/// It runs on the host in f32 by the smallest plan: the weights are in host memory (4 bytes a parameter), and the
/// device has room for two of the largest layers and for the activations of the whole batch, layer by layer. No budget
/// applies.
///
/// # Errors
/// When the network does not take these tensors, an id is out of range, a weight is missing, has another shape or is to
/// come from a checkpoint, memory is not available, or a weight or a logit is not finite.
pub fn wait_forward(network: &dyn Network, weights: Weights, batch: &Batch) -> Result<(Shape, Vec<f32>)> {
    if matches!(weights, Weights::Later) {
        return Err(Error::bad("the weights are to come from a checkpoint, which a session reads"));
    }
    let mut tensors = batch.tensors.iter().filter(|tensor| tensor.name != names::LABELS).peekable();
    let samples = tensors.peek().and_then(|t| t.shape.axes().first()).copied().unwrap_or(0);
    if samples == 0 {
        return Err(Error::bad("the batch has no sample"));
    }
    let mut inputs = Vec::new();
    for tensor in tensors {
        check_tensor(tensor)?;
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
    // Nothing is chosen by these rates: of plans for the smallest budget all take as little memory.
    let cost = CostModel::stated(1e11, 2e10, 1e10);
    let plan_within = |device_budget| {
        Plan::new(&model, &PlanOptions { device_budget, updates: Updates::PLAIN, ..PlanOptions::default() }, &cost)
    };
    let least = plan_within(None)?.smallest_device_bytes;
    let plan = Arc::new(plan_within(Some(least))?);
    let memory = DeviceMemory { arena_bytes: plan.arena.bytes, host_bytes: plan.host.bytes, poison: false };
    let device = DeviceSpec::default().start(memory)?;
    // A layer of a large batch may take its time.
    let options = EngineOptions { patience_secs: 3600.0, ..EngineOptions::new(0, &model) };
    let mut engine = Engine::new(Arc::clone(&model), plan, device, options);
    weights.write(&mut engine, 0, 0)?;
    let logits = engine.wait_logits(0, &batch_inputs(&model.train, batch)?)?;
    if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
        let (place, found) = (shape.position(at), logits[at]);
        return Err(Error::Device(format!(
            "the logits are not finite: {found} at {place}; the inputs or the weights are too large"
        )));
    }
    Ok((shape, logits))
}

/// The logits of a batch with the trained weights of the engine's model number `model`, whose state is at home;
/// adapters of `low_rank` are merged into the weights.
///
/// # Errors
/// As [`wait_forward`]; when the network's tensors are not the model's; and when steps were begun since the state came
/// home, or the model ended in the middle of one.
pub(super) fn wait_forward_trained(
    network: &dyn Network,
    (engine, model): (&Engine, usize),
    low_rank: Option<&LowRank>,
    batch: &Batch,
) -> Result<(Shape, Vec<f32>)> {
    let asked = RefCell::new(HashSet::new());
    let give = |name: &str, shape: &Shape| {
        asked.borrow_mut().insert(name.to_string());
        trained(name, Some(shape), (engine, model), Weights::Random, low_rank).map(Some)
    };
    let logits = wait_forward(network, Weights::Given(&give), batch)?;
    let graph = &engine.model(model).train;
    let names = graph.parameters.iter().map(|p| &p.name).chain(graph.states.iter().map(|s| &s.name));
    let mut of_network = names.filter(|name| adapted_layer(name).is_none());
    match of_network.find(|&name| !asked.borrow().contains(name)) {
        Some(name) => Err(Error::bad(format!("tensor {name}: the network has no such tensor, and the model has"))),
        None => Ok(logits),
    }
}
