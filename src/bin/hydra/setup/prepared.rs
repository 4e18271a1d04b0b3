//! A model that is ready to be planned: its network, its options, and its data, opened once to check it.

use crate::job::model::{Data, Tokenizer};
use crate::setup::recipe::{Recipe, Sources};
use crate::text::Texts;
use crate::text::companions::{self, Files, PREPROCESSOR};
use hydra::base::Result;
use hydra::data::names;
use hydra::graph::{Graph, Parameter, adapted_layer};
use hydra::nn::{Form, InputShape, Network, Pretrained};
use hydra::train::{TrainOptions, Weights};
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

/// A model that is ready to be planned.
pub struct Prepared {
    /// Its name.
    pub name: String,
    /// Its network, with or without weights.
    pub origin: Origin,
    /// How to train it; the options about the device are filled in by the planner.
    pub options: TrainOptions,
    /// The tensors of a sample.
    pub inputs: Vec<InputShape>,
    /// Its data, opened once to check it.
    pub(super) opened: RefCell<Option<Sources>>,
    pub(super) recipe: Recipe,
    /// The other files in the model's directory.
    pub(super) companions: Arc<Files>,
}

/// Where a network and its initial weights come from.
pub enum Origin {
    /// A Hugging Face directory.
    Pretrained(Box<Pretrained>),
    /// Sizes from the job; weights drawn from the seed.
    Family(Box<dyn Network>),
}

impl Origin {
    pub(super) fn network(&self) -> &dyn Network {
        match self {
            Origin::Pretrained(pretrained) => pretrained.network.as_ref(),
            Origin::Family(network) => network.as_ref(),
        }
    }
}

impl Prepared {
    /// The network.
    pub fn network(&self) -> &dyn Network {
        self.origin.network()
    }

    fn pretrained(&self) -> Option<&Pretrained> {
        if let Origin::Pretrained(pretrained) = &self.origin { Some(pretrained) } else { None }
    }

    /// Where the initial weights come from.
    pub fn weights(&self) -> Weights<'_> {
        self.pretrained().map_or(Weights::Random, Weights::Pretrained)
    }

    /// The directory that it comes from, if any.
    pub fn base(&self) -> Option<&Path> {
        self.pretrained().map(Pretrained::dir)
    }

    /// Reads the weights of `graph` once, so that damaged ones are reported before they are used.
    ///
    /// # Errors
    /// When one is missing, has another shape, or is not finite.
    pub fn check_weights(&self, graph: &Graph) -> Result<()> {
        let Some(pretrained) = self.pretrained() else { return Ok(()) };
        let in_files = |p: &&Parameter| adapted_layer(&p.name).is_none();
        graph.parameters.iter().filter(in_files).try_for_each(|p| pretrained.tensor(&p.name, &p.shape).map(drop))?;
        graph.states.iter().try_for_each(|s| pretrained.tensor(&s.name, &s.shape).map(drop))
    }

    /// The form in which it is saved, with the batch counts that it began with.
    ///
    /// # Errors
    /// When the network does not trace with its default inputs.
    pub fn form(&self) -> Result<Form> {
        let form = match &self.origin {
            Origin::Pretrained(pretrained) => pretrained.form.clone(),
            Origin::Family(network) => Form::of(network.as_ref())?,
        };
        let mut files = self.recipe.tokenizer.as_ref().map_or_else(Vec::new, |tokenizer| tokenizer.files.clone());
        // The tokenizer of the training text replaces any other.
        let cut_by_own = match &self.recipe.data {
            Data::Text { tokenizer, .. } => *tokenizer == Tokenizer::OfModel,
            _ => true,
        };
        companions::complete(&mut files, &self.companions, cut_by_own);
        let pixels = self.inputs.iter().find(|input| input.name == names::PIXEL_VALUES);
        if let (Data::Images { .. }, Some([c, h, w])) = (&self.recipe.data, pixels.map(|input| &input.axes[..]))
            && files.iter().all(|(name, _)| name != PREPROCESSOR)
        {
            files.push(companions::preprocessor([*c, *h, *w]));
        }
        Ok(Form { files, ..form })
    }

    /// Its data, from the start.
    ///
    /// # Errors
    /// When a file is missing or faulty.
    pub fn sources(&self, texts: &Texts) -> Result<Sources> {
        match self.opened.take() {
            Some(sources) => Ok(sources),
            None => self.recipe.open(self.network(), texts),
        }
    }

    /// Closes its data, since it will not be trained.
    pub fn close(&self) {
        self.opened.take();
    }

    /// Tokens of a step; `None` for images.
    pub fn step_tokens(&self) -> Option<u64> {
        let ids = self.inputs.iter().find(|input| input.name == names::INPUT_IDS)?;
        Some(self.options.batch as u64 * ids.axes.iter().product::<usize>() as u64)
    }
}
