//! A model's initial weights, and how they are written to the host store.

use crate::base::{Error, Result, Shape};
use crate::engine::{Engine, Stored};
use crate::graph::adapted_layer;
use crate::nn::{Pretrained, init};
use std::fmt;
use std::sync::Arc;

/// How many of the model's names an error lists where none was given.
const SHOWN_NAMES: usize = 3;

/// Returns the elements of a tensor, row-major, by its name and shape in the graph; `None` where it has no such tensor.
pub type GiveTensor<'a> = dyn Fn(&str, &Shape) -> Result<Option<Vec<f32>>> + 'a;

/// Where a model's initial weights come from.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// A Hugging Face directory, or a saved network of one's own ([`open_own`](crate::nn::open_own)).
    Pretrained(&'a Pretrained),
    /// Drawn from the seed.
    Random,
    /// From anywhere, by name: another model, or the tensors of a file that fit a model with a new head
    /// ([`Pretrained::tensor`]). Tensors that it does not give are drawn from the seed, as by [`Weights::Random`]; it
    /// must give at least one of the model's tensors.
    Given(&'a GiveTensor<'a>),
    /// From a checkpoint, which the caller restores before the first step ([`super::Session::resume`],
    /// [`super::Fleet::start_at`]): until then they are 0, and a step is an error. Not for a model with frozen weights,
    /// since no checkpoint holds these.
    Later,
}

impl Weights<'_> {
    /// Writes the weights and the initial running statistics to their homes in `engine`'s store, before the first step
    /// of the model. A [`super::Session`] does this by itself.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape or cannot be read, when none at all is given, or a step has begun.
    pub fn write(&self, engine: &mut Engine, model: usize, seed: u64) -> Result<()> {
        if matches!(self, Weights::Later) {
            return Ok(());
        }
        let graph = &Arc::clone(engine.model(model)).train;
        let mut any_given = false;
        for (i, parameter) in graph.parameters.iter().enumerate() {
            let values = self.named(&parameter.name, &parameter.shape)?;
            any_given |= values.is_some();
            let values = values.unwrap_or_else(|| init::initial(parameter, i, seed));
            engine.write_parameter(model, Stored::Weight, i, &values)?;
        }
        for (i, state) in graph.states.iter().enumerate() {
            let values = self.named(&state.name, &state.shape)?;
            any_given |= values.is_some();
            let values = values.unwrap_or_else(|| init::initial_state(state));
            engine.write_state(model, i, &values)?;
        }
        // Wrong names everywhere would otherwise train from noise without a word.
        let names = graph.parameters.iter().map(|p| &p.name).chain(graph.states.iter().map(|s| &s.name));
        let names: Vec<&str> = names.map(String::as_str).collect();
        if matches!(self, Weights::Given(_)) && !any_given && !names.is_empty() {
            let some = names[..names.len().min(SHOWN_NAMES)].join(", ");
            let asked = names.len();
            return Err(Error::bad(format!(
                "weights: {asked} names were asked for and none was given, among them {some}"
            )));
        }
        Ok(())
    }

    /// A tensor by its name in the graph; `None` where the weights are drawn.
    pub(super) fn named(&self, name: &str, shape: &Shape) -> Result<Option<Vec<f32>>> {
        match self {
            // A directory has none of the adapters that are learned beside it.
            Weights::Pretrained(_) if adapted_layer(name).is_some() => Ok(None),
            Weights::Pretrained(pretrained) => pretrained.tensor(name, shape).map(Some),
            Weights::Random | Weights::Later => Ok(None),
            Weights::Given(give) => give(name, shape),
        }
    }
}

impl fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weights::Pretrained(pretrained) => f.debug_tuple("Pretrained").field(pretrained).finish(),
            Weights::Random => f.write_str("Random"),
            Weights::Given(_) => f.write_str("Given(..)"),
            Weights::Later => f.write_str("Later"),
        }
    }
}
