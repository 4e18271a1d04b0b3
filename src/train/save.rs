//! Saves a model that was trained.

use super::weights::Weights;
use crate::base::{DType, Error, Result, Shape};
use crate::engine::{Engine, Stored};
use crate::graph::{AttentionKind, Graph, LowRank, Op, WeightLayout, adapted_layer, adapter_names};
use crate::nn::{self, Form};
use rayon::prelude::*;
use serde_json::json;
use std::path::Path;

/// Writes the Hugging Face directory `dir`, tensor by tensor, from the state of the engine's model number `model` after
/// `steps` steps, which must be in the host's store ([`Engine::wait_home`]). `form` describes the directory:
/// [`Form::of`] the network, or the form of the directory it came from
/// ([`Pretrained::form`](crate::nn::Pretrained::form)), whose batch counts are advanced by these steps. A bf16 model's
/// frozen weights, which the engine has rounded, are taken from `first`, the weights that training began with. Weights
/// with adapters (`low_rank`) are saved with the adapters merged, W + alpha / r (A B).
///
/// # Errors
/// As [`nn::save`]; and when `form` names a tensor that the model does not have, steps were begun since its state came
/// home, or it ended in the middle of a step.
pub fn save_model(
    dir: &Path,
    form: &Form,
    (engine, model): (&Engine, usize),
    first: Weights,
    low_rank: Option<&LowRank>,
    steps: u64,
) -> Result<()> {
    let traced = engine.model(model);
    let batches = i64::try_from(steps.saturating_mul(traced.microbatches as u64)).unwrap_or(i64::MAX);
    let mut form = form.clone();
    form.counters.values_mut().for_each(|count| *count = count.saturating_add(batches));
    nn::save(dir, &form, &mut |name| trained(name, None, (engine, model), first, low_rank))
}

/// The trained value of a weight, with adapters merged, or of a running statistic, by its name in the graph.
///
/// # Errors
/// When the model has no such tensor, or one with another shape than `shape`; and as [`Engine::read_parameter`] and
/// [`Engine::read_state`].
pub(super) fn trained(
    name: &str,
    shape: Option<&Shape>,
    (engine, model): (&Engine, usize),
    first: Weights,
    low_rank: Option<&LowRank>,
) -> Result<Vec<f32>> {
    let graph = &engine.model(model).train;
    let check = |found: &Shape| match shape {
        Some(want) if want != found => Err(Error::bad(format!("tensor {name}: is {found} in the model, want {want}"))),
        _ => Ok(()),
    };
    if let Some(i) = graph.parameters.iter().position(|p| p.name == name) {
        let parameter = &graph.parameters[i];
        check(&parameter.shape)?;
        let is_rounded = parameter.frozen && graph.float == DType::Bf16;
        let kept = if is_rounded { first.named(name, &parameter.shape)? } else { None };
        let mut weight = kept.map_or_else(|| engine.read_parameter(model, Stored::Weight, i), Ok)?;
        if let Some(low_rank) = low_rank {
            merge(&mut weight, (engine, model), i, low_rank)?;
        }
        return Ok(weight);
    }
    match graph.states.iter().position(|s| s.name == name) {
        Some(state) => check(&graph.states[state].shape).and_then(|()| engine.read_state(model, state)),
        None => Err(Error::bad(format!("tensor {name}: the model has no such tensor"))),
    }
}

/// Writes the adapters that the engine's model number `model` has learned to the directory `dir`, in the form of
/// Hugging Face's peft: `adapter_config.json` and `adapter_model.safetensors`, in f32. `base` is the directory of the
/// base model, if it came from one. Call [`Engine::wait_home`] first.
///
/// # Errors
/// As [`nn::save`]; and when steps were begun since the model's state came home.
pub fn save_adapters(
    dir: &Path,
    (engine, model): (&Engine, usize),
    low_rank: &LowRank,
    base: Option<&Path>,
) -> Result<()> {
    let graph = &engine.model(model).train;
    let in_out = |op: &Op| matches!(op, Op::Linear { layout: WeightLayout::InOut, .. });
    let mut config = json!({
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": low_rank.rank,
        "lora_alpha": low_rank.alpha,
        "lora_dropout": low_rank.dropout,
        "target_modules": low_rank.targets,
        "bias": "none",
        // GPT-2's weights are transposed.
        "fan_in_fan_out": graph.nodes.iter().any(|node| in_out(&node.op)),
        "inference_mode": true,
    });
    if graph.nodes.iter().any(|node| matches!(node.op, Op::Attention(AttentionKind { causal: true, .. }))) {
        config["task_type"] = "CAUSAL_LM".into();
    }
    let adapters = graph.parameters.iter().filter(|p| adapted_layer(&p.name).is_some());
    let tensors: Vec<_> = adapters.map(|p| (p.name.clone(), p.shape.clone())).collect();
    nn::save_adapters(dir, &format!("{config:#}\n"), &tensors, &mut |name| {
        let i = graph.parameters.iter().position(|p| p.name == name).expect("named just above");
        engine.read_parameter(model, Stored::Weight, i)
    })
}

/// Merges its adapters, if it has any, into the weight numbered `parameter`.
fn merge(weight: &mut [f32], (engine, model): (&Engine, usize), parameter: usize, low_rank: &LowRank) -> Result<()> {
    let graph = &engine.model(model).train;
    let Some(layer) = graph.parameters[parameter].name.strip_suffix(".weight") else { return Ok(()) };
    let adapters = adapter_names(layer).map(|name| graph.parameters.iter().position(|p| p.name == name));
    let [Some(a), Some(b)] = adapters else { return Ok(()) };
    let read = |i| engine.read_parameter(model, Stored::Weight, i);
    let (a, b) = (read(a)?, read(b)?);
    let (scale, rank) = (low_rank.scale() as f32, low_rank.rank);
    match layout_of(graph, parameter) {
        // Row n of the weight gets row n of B times A.
        WeightLayout::OutIn => add_product(weight, &b, &a, rank, scale),
        // Row k gets column k of A times B's transpose.
        WeightLayout::InOut => add_product(weight, &transposed(&a, rank), &transposed(&b, b.len() / rank), rank, scale),
    }
    Ok(())
}

/// The memory layout of a linear layer's weight.
fn layout_of(graph: &Graph, parameter: usize) -> WeightLayout {
    let weight = graph.parameters[parameter].value;
    let of = |op: &Op| if let Op::Linear { layout, .. } = op { Some(*layout) } else { None };
    let found = graph.nodes.iter().find_map(|node| of(&node.op).filter(|_| node.inputs[1] == weight));
    found.expect("only linear layers have adapters")
}

/// `out (n, k) += scale * x (n, rank) y (rank, k)`.
fn add_product(out: &mut [f32], x: &[f32], y: &[f32], rank: usize, scale: f32) {
    let k = y.len() / rank;
    out.par_chunks_mut(k).zip(x.par_chunks(rank)).for_each(|(out, x)| {
        let mut sum = vec![0.0; k];
        for (&x, y) in x.iter().zip(y.chunks(k)) {
            sum.iter_mut().zip(y).for_each(|(sum, &y)| *sum += x * y);
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out += scale * sum);
    });
}

/// The transpose of `x`, which has `rows` rows.
fn transposed(x: &[f32], rows: usize) -> Vec<f32> {
    let cols = x.len() / rows;
    (0..x.len()).map(|i| x[i % rows * cols + i / rows]).collect()
}
