//! From a network and its data to what a session or an engine is made of: graphs and a plan.

use super::options::TrainOptions;
use crate::base::{DType, Error, Result};
use crate::data::{Batch, Source};
use crate::device::sim::CostModel;
use crate::engine::plan_alone;
use crate::graph::{Graph, Input, Mode};
use crate::nn::{InputShape, Network};
use crate::spill::{Model, Plan, PlanOptions};
use std::sync::Arc;

/// Traces `network` for the options' microbatches, element type and device with the tensors of `inputs`: the training
/// graph with its gradient and the evaluation graph.
///
/// # Errors
/// As [`TrainOptions::check`]; and when the network does not take the inputs.
pub fn trace_model(network: &dyn Network, inputs: &[InputShape], options: &TrainOptions) -> Result<Model> {
    options.check()?;
    let &TrainOptions { batch, microbatch, dtype, tf32, loss_rows, .. } = options;
    let scratch = options.device.wants_scratch();
    let trace = |mode: Mode| -> Result<Graph> {
        let mut graph = Graph { scratch, tf32, loss_rows, ..network.trace(mode, dtype, microbatch, inputs)? };
        for start in &options.frozen {
            if !graph.parameters.iter().any(|p| p.name.starts_with(start)) {
                return Err(Error::bad(format!("frozen: the name of no parameter begins with {start}")));
            }
        }
        graph.freeze(|name| options.frozen.iter().any(|start| name.starts_with(start)));
        if let Some(low_rank) = &options.low_rank {
            graph.adapt(low_rank, mode)?;
        }
        Ok(graph)
    };
    Model::new(trace(Mode::Training)?, Some(trace(Mode::Evaluation)?), batch / microbatch)
}

/// The tensors of a data source, as a network's inputs.
pub fn inputs_of(source: &dyn Source) -> Vec<InputShape> {
    let tensors = &source.spec().tensors;
    tensors.iter().map(|(name, dtype, shape)| InputShape::new(name.clone(), shape.axes().to_vec(), *dtype)).collect()
}

/// The bytes of a minibatch's tensors in the order of the graph's inputs, by name: what
/// [`Engine::begin_step`](crate::engine::Engine::begin_step) takes.
///
/// # Errors
/// When the minibatch lacks an input, or has numbers where the graph wants integers, or the other way round.
pub fn batch_inputs<'a>(graph: &Graph, batch: &'a Batch) -> Result<Vec<&'a [u8]>> {
    let of = |input: &Input| {
        let name = &input.name;
        let tensor = batch.get(name);
        let tensor = tensor.ok_or_else(|| Error::bad(format!("the batch lacks {name}, which the model reads")))?;
        match (tensor.dtype == DType::I32) == (input.dtype == DType::I32) {
            true => Ok(tensor.bytes()),
            false => {
                Err(Error::bad(format!("{name}: is {} in the batch, the model reads {}", tensor.dtype, input.dtype)))
            }
        }
    };
    graph.inputs.iter().map(of).collect()
}

/// Plans a traced model that has a device to itself, under `options` with this machine's measured rates.
///
/// # Errors
/// As [`Plan::new`].
pub fn plan_model(model: &Arc<Model>, options: &TrainOptions, cost: &CostModel) -> Result<Arc<Plan>> {
    let wishes =
        PlanOptions { moments: options.optimizer.moments(), clips: options.clip.is_some(), ..options.plan.clone() };
    plan_alone(model, &wishes, cost)
}

/// Traces `network` for the tensors of `source` and plans it: all that [`Session::new`](super::Session::new) needs
/// besides weights and data.
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
    let model = Arc::new(trace_model(network, &inputs_of(source), options)?);
    let plan = plan_model(&model, options, cost)?;
    Ok((model, plan))
}
