//! A model's first weights, and how they come into the host's store.

use crate::base::{Result, Shape};
use crate::engine::{Engine, Stored};
use crate::nn::{Pretrained, init};
use std::fmt;
use std::sync::Arc;

/// Gives the elements of a tensor, row-major, by its name and shape in the graph, where it has them.
pub type GiveTensor<'a> = dyn Fn(&str, &Shape) -> Result<Option<Vec<f32>>> + 'a;

/// Where a model's first weights come from.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// A Hugging Face directory.
    Pretrained(&'a Pretrained),
    /// Drawn from the seed.
    Random,
    /// From anywhere, by name: a file of one's own, another model. What it does not give is drawn from the seed, as
    /// [`Weights::Random`] would.
    Given(&'a GiveTensor<'a>),
    /// From a checkpoint, which the caller restores before the first step; until then they are 0.
    Later,
}

impl Weights<'_> {
    /// Writes them, and the first running statistics, to where a model of `engine` has them at home; no step of it has
    /// begun. A [`super::Session`] does it by itself.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, cannot be read, or a step has begun.
    pub fn write(&self, engine: &mut Engine, model: usize, seed: u64) -> Result<()> {
        if matches!(self, Weights::Later) {
            return Ok(());
        }
        let graph = &Arc::clone(engine.model(model)).train;
        for (i, parameter) in graph.parameters.iter().enumerate() {
            let values = self.named(&parameter.name, &parameter.shape)?;
            let values = values.unwrap_or_else(|| init::initial(parameter, i, seed));
            engine.write_parameter(model, Stored::Weight, i, &values)?;
        }
        for (i, state) in graph.states.iter().enumerate() {
            let values = self.named(&state.name, &state.shape)?.unwrap_or_else(|| init::initial_state(state));
            engine.write_state(model, i, &values)?;
        }
        Ok(())
    }

    /// A tensor by its name in the graph, where they are not drawn.
    pub(super) fn named(&self, name: &str, shape: &Shape) -> Result<Option<Vec<f32>>> {
        match self {
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
