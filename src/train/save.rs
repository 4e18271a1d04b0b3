//! Saves a model that was trained.

use super::weights::Weights;
use crate::base::{DType, Error, Result};
use crate::engine::{Engine, Stored};
use crate::nn::{self, Form};
use std::path::Path;

/// Writes the Hugging Face directory `dir`, tensor by tensor, of the engine's model number `model` after `steps` steps,
/// which have come home ([`Engine::wait_home`]). `form` says how it looks: [`Form::of`] its network, or that of the
/// directory it came from ([`Pretrained::form`](crate::nn::Pretrained::form)), whose counts of batches go on by these
/// steps'. What is frozen of a bf16 model, which the engine has rounded, is taken from `first`, the weights that it
/// began with.
///
/// # Errors
/// As [`nn::save`]; and when `form` names a tensor that the model has not, steps were begun since it came home, or it
/// has ended in the middle of one.
pub fn save_model(
    dir: &Path,
    form: &Form,
    (engine, model): (&Engine, usize),
    first: Weights,
    steps: u64,
) -> Result<()> {
    let traced = engine.model(model);
    let batches = i64::try_from(steps.saturating_mul(traced.microbatches as u64)).unwrap_or(i64::MAX);
    let mut form = form.clone();
    form.counters.values_mut().for_each(|count| *count = count.saturating_add(batches));
    let graph = &traced.train;
    nn::save(dir, &form, &mut |name| {
        if let Some(i) = graph.parameters.iter().position(|p| p.name == name) {
            let parameter = &graph.parameters[i];
            let is_rounded = parameter.frozen && graph.float == DType::Bf16;
            let kept = if is_rounded { first.named(name, &parameter.shape)? } else { None };
            return kept.map_or_else(|| engine.read_parameter(model, Stored::Weight, i), Ok);
        }
        match graph.states.iter().position(|s| s.name == name) {
            Some(state) => engine.read_state(model, state),
            None => Err(Error::bad(format!("tensor {name}: the model has no such tensor"))),
        }
    })
}
