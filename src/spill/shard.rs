//! A shard's programs, and what they cost.

use super::model::Model;
use crate::base::align_up;
use crate::device::sim::CostModel;
use crate::graph::{ALIGNMENT, Area, Kind, Program, ShardLayout};
use std::ops::Range;
use std::sync::Arc;

/// The programs of one shard.
#[derive(Clone, Debug)]
pub struct ShardPrograms {
    /// Its layers and how its state lies.
    pub layout: ShardLayout,
    /// Forward; `None` for the last shard, whose forward is in `backward`.
    pub forward: Option<Arc<Program>>,
    /// Backward; for the last shard forward, loss and backward. `None` where the model only evaluates.
    pub backward: Option<Arc<Program>>,
    /// Forward for evaluation.
    pub eval: Option<Arc<Program>>,
    /// Forward leaves what backward needs; nothing is recomputed.
    pub kept: bool,
    /// Bytes of the boundary activation of one microbatch that it hands on; 0 for the last shard.
    pub boundary_bytes: u64,
}

impl ShardPrograms {
    /// The programs of the shard that holds `layers`. `keep`: leave forward's tensors for backward. `twice`: recompute
    /// all of the forward, even in the last shard.
    pub fn new(model: &Model, layers: Range<usize>, keep: bool, twice: bool) -> ShardPrograms {
        let graph = &model.train;
        let layout = ShardLayout::new(graph, &model.layout, layers.clone());
        let program = |kind| Arc::new(Program::new(graph, &model.layout, &layout, kind));
        let last = layers.end == model.layers();
        let trains = graph.loss.is_some() && !graph.input_gradients.is_empty();
        let backward =
            if last { Kind::Last { recompute: twice } } else { Kind::Backward { kept: keep, whole: twice && !keep } };
        ShardPrograms {
            forward: (!last && trains).then(|| program(Kind::Forward { keep })),
            backward: trains.then(|| program(backward)),
            eval: model
                .eval
                .as_ref()
                .map(|eval| Arc::new(Program::new(eval, &model.layout, &layout, Kind::Forward { keep: false }))),
            kept: keep && !last,
            boundary_bytes: graph.layers[layers.end - 1].output.filter(|_| !last).map_or(0, |v| graph.bytes(v)),
            layout,
        }
    }

    fn programs(&self) -> impl Iterator<Item = &Arc<Program>> {
        self.forward.iter().chain(&self.backward).chain(&self.eval)
    }

    /// Bytes of workspace of the program that needs most. The logits of an evaluation lie behind the workspace.
    pub fn workspace_bytes(&self) -> u64 {
        let logits = |p: &Arc<Program>| match self.forward.is_none()
            && p.bytes(Area::ActivationOut) > 0
            && self.boundary_bytes == 0
        {
            true => align_up(p.bytes(Area::Workspace), ALIGNMENT) + p.bytes(Area::ActivationOut),
            false => p.bytes(Area::Workspace),
        };
        self.programs().map(logits).max().unwrap_or(0)
    }

    /// Bytes of the batch's tensors of the program that reads most.
    pub fn input_bytes(&self) -> u64 {
        self.programs().map(|p| p.bytes(Area::Inputs)).max().unwrap_or(0)
    }

    /// Where the states begin in a weight slot, after the weights.
    pub fn states_at(&self) -> u64 {
        align_up(self.layout.weight_bytes, ALIGNMENT)
    }

    /// Bytes of a weight slot that it fills, states included.
    pub fn slot_bytes(&self) -> u64 {
        match self.layout.states.end - self.layout.states.start {
            0 => self.layout.weight_bytes,
            states => self.states_at() + states,
        }
    }

    /// Bytes of its own part of the flat order.
    pub fn own_bytes(&self) -> u64 {
        self.layout.own.end - self.layout.own.start
    }

    /// Bytes that a fetch of the shard's weights and states moves.
    pub fn fetch_bytes(&self) -> u64 {
        self.layout.weight_bytes + self.layout.states.end - self.layout.states.start
    }

    /// Whether its backward has nothing to do: neither it nor a shard before it has anything to train. Then nothing is
    /// fetched for it.
    pub fn idles_back(&self) -> bool {
        self.backward.as_ref().is_some_and(|p| p.steps.is_empty())
    }

    /// Whether its backward computes its forward again, before it.
    pub fn recomputes(&self) -> bool {
        self.forward.is_some() && !self.kept && !self.idles_back()
    }

    /// Seconds of forward for one microbatch; 0 for the last shard.
    pub fn forward_secs(&self, cost: &CostModel) -> f64 {
        self.forward.as_ref().map_or(0.0, |p| cost.program_secs(p))
    }

    /// Seconds of both for one microbatch.
    pub fn step_secs(&self, cost: &CostModel) -> f64 {
        self.forward_secs(cost) + self.backward_secs(cost)
    }

    /// Seconds of backward, recomputation included, for one microbatch.
    pub fn backward_secs(&self, cost: &CostModel) -> f64 {
        self.backward.as_ref().map_or(0.0, |p| cost.program_secs(p))
    }
}
