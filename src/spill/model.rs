//! A model ready to be planned: its graphs, its flat layout, and the numbers that do not depend on the cut.

use super::stand_in::StandInCache;
use crate::base::{DType, Error, Result};
use crate::device::Segment;
use crate::device::sim::CostModel;
use crate::graph::{Graph, ModelLayout, differentiate, split_loss};
use std::ops::Range;

/// Each is a task or several; a trace numbers them in 16 bits.
const MOST_MICROBATCHES: usize = 65_535;

/// A traced model with its gradient.
#[derive(Clone, Debug)]
pub struct Model {
    /// The training graph, differentiated.
    pub train: Graph,
    /// The same layers for evaluation, where wanted.
    pub eval: Option<Graph>,
    /// Where parameters and states lie.
    pub layout: ModelLayout,
    /// Microbatches in a minibatch.
    pub microbatches: usize,
    pub(super) stand_ins: StandInCache,
}

impl Model {
    /// Differentiates `train`, splits large losses into parts and lays the model out.
    ///
    /// # Errors
    /// When the graph has no loss, or its gradient already, is neither f32 nor bf16, or the evaluation graph's
    /// parameters are not the training graph's.
    pub fn new(mut train: Graph, mut eval: Option<Graph>, microbatches: usize) -> Result<Model> {
        differentiate(&mut train)?;
        std::iter::once(&mut train).chain(&mut eval).for_each(split_loss);
        if let Some(eval) = &eval {
            let parameters = |g: &Graph| {
                g.parameters.iter().map(|p| (p.name.clone(), p.shape.clone(), p.layers.clone())).collect::<Vec<_>>()
            };
            let states = |g: &Graph| g.states.iter().map(|s| (s.name.clone(), s.shape.clone())).collect::<Vec<_>>();
            let inputs =
                |g: &Graph| g.inputs.iter().map(|i| (i.name.clone(), i.shape.clone(), i.dtype)).collect::<Vec<_>>();
            if inputs(&train) != inputs(eval) {
                return Err(Error::bad("the evaluation graph reads other inputs than the training graph"));
            }
            if parameters(&train) != parameters(eval)
                || states(&train) != states(eval)
                || train.float != eval.float
                || train.layers.len() != eval.layers.len()
            {
                return Err(Error::bad("the evaluation graph has other layers or parameters than the training graph"));
            }
        }
        Model::laid_out(train, eval, microbatches)
    }

    /// A model that only evaluates.
    ///
    /// # Errors
    /// When the graph has no layer, or is neither f32 nor bf16.
    pub fn evaluation(graph: Graph) -> Result<Model> {
        Model::laid_out(graph.clone(), Some(graph), 1)
    }

    /// Bytes of memory traffic of the update of `own` bytes of weights, with so many moments, as
    /// [`Task::bytes`](crate::device::Task::bytes) counts them.
    pub fn update_bytes(&self, own: u64, moments: usize) -> u64 {
        let remainder = if self.has_remainders() { 2 * own } else { 0 };
        2 * own + remainder + (1 + 2 * moments as u64) * self.wide_bytes(own)
    }

    /// Bytes of the gradient of `own` bytes of weights, or of one of their moments.
    pub fn wide_bytes(&self, own: u64) -> u64 {
        own * self.layout.wide_ratio
    }

    /// Seconds in which a device sums the squares of the gradient of `own` bytes of weights and updates them.
    pub fn device_settle_secs(&self, own: u64, moments: usize, cost: &CostModel) -> f64 {
        cost.device_settle_secs(self.update_bytes(own, moments), self.wide_bytes(own))
    }

    /// Those in which the host does.
    pub fn host_settle_secs(&self, own: u64, moments: usize, cost: &CostModel) -> f64 {
        cost.host_settle_secs(self.update_bytes(own, moments), self.wide_bytes(own))
    }

    fn laid_out(train: Graph, eval: Option<Graph>, microbatches: usize) -> Result<Model> {
        if train.layers.is_empty() || microbatches == 0 {
            return Err(Error::bad("a model needs a layer, and a minibatch at least one microbatch"));
        }
        if !matches!(train.float, DType::F32 | DType::Bf16) {
            return Err(Error::bad(format!("a model is f32 or bf16, not {}", train.float)));
        }
        if microbatches > MOST_MICROBATCHES {
            return Err(Error::bad(format!(
                "a minibatch of {microbatches} microbatches; at most {MOST_MICROBATCHES} are taken"
            )));
        }
        let layout = ModelLayout::new(&train);
        Ok(Model { train, eval, layout, microbatches, stand_ins: StandInCache::default() })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.train.layers.len()
    }

    /// Whether it has a gradient to train by: what [`Model::evaluation`] makes has none.
    pub(crate) fn trains(&self) -> bool {
        !self.train.input_gradients.is_empty()
    }

    /// Whether weights are bf16, with the lower halves of their f32 masters beside them.
    pub fn has_remainders(&self) -> bool {
        self.train.float == DType::Bf16
    }

    /// Whether a parameter's weight has such a half beside it: what is never updated has none.
    pub fn has_remainder(&self, parameter: usize) -> bool {
        self.has_remainders() && !self.train.parameters[parameter].frozen
    }

    /// Whether its evaluation ends in a loss.
    pub fn eval_has_loss(&self) -> bool {
        self.eval.as_ref().is_some_and(|graph| graph.loss.is_some())
    }

    /// Bytes of a parameter's gradient accumulator.
    pub fn gradient_bytes(&self, parameter: usize) -> u64 {
        self.train.bytes(self.train.parameters[parameter].value) * self.layout.wide_ratio
    }

    /// The tensors in a stretch of the flat order, with offsets from its start. `decays` tells whether weight decay
    /// applies.
    pub fn segments(&self, stretch: &Range<u64>, decays: impl Fn(usize) -> bool) -> Vec<Segment> {
        let mut segments = Vec::new();
        for (index, &parameter) in self.layout.order.iter().enumerate() {
            let at = self.layout.parameter[parameter];
            if stretch.contains(&at) {
                let shape = &self.train.parameters[parameter].shape;
                segments.push(Segment {
                    offset: (at - stretch.start) / self.train.float.bytes(),
                    elems: shape.elems() as u64,
                    decay: decays(parameter),
                    index: index as u32,
                });
            }
        }
        segments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Activation, Builder, Init, Mode, WeightLayout};

    /// Rows of `wide` numbers, to classes.
    fn graph(mode: Mode, wide: usize, layout: WeightLayout) -> Graph {
        graph_of(DType::F32, mode, wide, layout)
    }

    fn graph_of(float: DType, mode: Mode, wide: usize, layout: WeightLayout) -> Graph {
        let mut b = Builder::new(mode, float);
        let x = b.input("x", [3, wide], float).unwrap();
        let labels = b.input("labels", [3], DType::I32).unwrap();
        let logits = b.layer("layer", |b, _| {
            let shape = if layout == WeightLayout::InOut { [wide, 4] } else { [4, wide] };
            let weight = b.parameter("weight", shape, Init::Constant(0.0))?;
            b.linear(x, weight, None, Activation::None, layout)
        });
        b.cross_entropy(logits.unwrap(), labels).unwrap();
        b.finish().unwrap()
    }

    #[test]
    fn an_evaluation_of_other_parameters_is_refused() {
        use WeightLayout::{InOut, OutIn};
        let train = || graph(Mode::Training, 6, InOut);
        assert!(Model::new(train(), Some(graph(Mode::Evaluation, 6, InOut)), 1).is_ok());
        let refused = |eval| Model::new(train(), Some(eval), 1).expect_err("refused").to_string();
        assert!(refused(graph(Mode::Evaluation, 6, OutIn)).contains("other layers or parameters"));
        assert!(refused(graph(Mode::Evaluation, 7, InOut)).contains("other inputs"));
    }

    #[test]
    fn a_graph_that_no_engine_runs_is_refused() {
        let of = |float| graph_of(float, Mode::Training, 6, WeightLayout::InOut);
        assert!(Model::new(of(DType::Bf16), None, 1).is_ok());
        let refused = |model: Result<Model>| model.expect_err("refused").to_string();
        assert_eq!(refused(Model::new(of(DType::F64), None, 1)), "a model is f32 or bf16, not f64");
        assert_eq!(refused(Model::evaluation(of(DType::F64))), "a model is f32 or bf16, not f64");
        let mut twice = of(DType::F32);
        differentiate(&mut twice).expect("once");
        assert_eq!(refused(Model::new(twice, None, 1)), "differentiate: the graph has its gradient already");
    }
}
