//! Makes what a session or an engine needs, graphs and a plan, from a network and its data.

use super::options::TrainOptions;
use crate::base::{DType, Error, Result, Shape};
use crate::data::{Batch, Source};
use crate::device::sim::CostModel;
use crate::engine::plan_alone;
use crate::graph::{Graph, Input, Mode};
use crate::nn::{InputShape, Network};
use crate::spill::{Model, Plan, PlanOptions, Spread};
use std::sync::Arc;

/// Traces `network` for the options' microbatches, element type and device with the tensors of `inputs`: the training
/// graph with its gradient and the evaluation graph.
///
/// # Errors
/// As [`TrainOptions::check`]; and when the network does not take the inputs, or its graph reads other inputs or other
/// axes.
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
        graph.freeze(|name| options.freezes(name));
        if let Some(low_rank) = &options.low_rank {
            graph.adapt(low_rank, mode)?;
        }
        graph.inputs.iter().try_for_each(|input| check_traced(input, microbatch, inputs))?;
        Ok(graph)
    };
    Model::new(trace(Mode::Training)?, Some(trace(Mode::Evaluation)?), batch / microbatch)
}

/// Refuses an input of a graph that is not one of those asked for, or whose axes are not a microbatch of such samples:
/// otherwise the loss would be over other rows than the data's labels.
fn check_traced(input: &Input, microbatch: usize, asked: &[InputShape]) -> Result<()> {
    let name = &input.name;
    let Some(of) = asked.iter().find(|asked| asked.name == *name) else {
        return Err(Error::bad(format!("input {name}: the network reads it, the data do not bring it")));
    };
    let want = Shape(std::iter::once(microbatch).chain(of.axes.iter().copied()).collect());
    if input.shape != want {
        let found = &input.shape;
        return Err(Error::bad(format!("input {name}: the network reads {found} a microbatch, the data bring {want}")));
    }
    Ok(())
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
/// When the minibatch lacks an input, has floats where the graph wants integers or the reverse, or has samples with
/// other axes; when a tensor's type or shape is not that of its elements.
pub fn batch_inputs<'a>(graph: &Graph, batch: &'a Batch) -> Result<Vec<&'a [u8]>> {
    let of = |input: &Input| {
        let name = &input.name;
        let tensor = batch.get(name);
        let tensor = tensor.ok_or_else(|| Error::bad(format!("the batch lacks {name}, which the model reads")))?;
        tensor.check()?;
        if (tensor.dtype == DType::I32) != (input.dtype == DType::I32) {
            let (found, want) = (tensor.dtype, input.dtype);
            return Err(Error::bad(format!("{name}: is {found} in the batch, the model reads {want}")));
        }
        let (found, want) = (&tensor.shape, &input.shape);
        // The engine derives the number of samples from the bytes.
        if found.axes().is_empty() || found.axes()[1..] != want.axes()[want.axes().len().min(1)..] {
            return Err(Error::bad(format!("{name}: is {found} in the batch, the model reads {want} a microbatch")));
        }
        Ok(tensor.bytes())
    };
    graph.inputs.iter().map(of).collect()
}

/// Plans a traced model that has a device to itself, under `options`, with the rates of `cost`.
///
/// # Errors
/// As [`Plan::new`]; and when the options spread the plan over several devices.
pub fn plan_model(model: &Arc<Model>, options: &TrainOptions, cost: &CostModel) -> Result<Arc<Plan>> {
    if options.plan.spread != Spread::One {
        return Err(Error::bad("plan.spread: a model that has a device to itself spreads over no other"));
    }
    let wishes = PlanOptions { updates: options.updates(), ..options.plan.clone() };
    plan_alone(model, &wishes, cost)
}

/// Traces `network` for the tensors of `source` and plans it: all that [`Session::new`](super::Session::new) needs
/// besides weights and data.
///
/// # Errors
/// As [`trace_model`] and [`Plan::new`]; and when the source's minibatch size is not `options.batch`.
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
