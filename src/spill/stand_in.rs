//! Shards for a search over cuts, whose programs may be those of other shards that are alike.
//!
//! Invariant: a stand-in's own layout is right, and its programs have the bytes and the cost that its own would have; what they compute is another
//! shard's. None leaves the search.

use super::model::Model;
use super::shard::ShardPrograms;
use crate::device::sim::CostModel;
use crate::graph::{ShardLayout, alike};
use std::collections::HashMap;
use std::ops::Range;

/// Shards of one cut, and how long they take.
#[derive(Clone, Debug, Default)]
pub struct Shards {
    /// In order; the programs may stand for others.
    pub programs: Vec<ShardPrograms>,
    /// Seconds of each shard's forward and backward for one microbatch.
    pub secs: Vec<[f64; 2]>,
}

/// What tells apart shards of which one cannot stand for another: the likeness of their layers, whether the last is the model's, and how they
/// are to be built.
type Key = (Vec<[usize; 2]>, bool, [bool; 2]);

/// The shards that were built so far.
pub struct StandIns<'a> {
    model: &'a Model,
    cost: &'a CostModel,
    /// For each layer the first one like it, in training and in evaluation.
    alike: Vec<[usize; 2]>,
    known: HashMap<Key, (ShardPrograms, [f64; 2])>,
}

impl<'a> StandIns<'a> {
    /// For shards of `model`, timed by `cost`.
    pub fn new(model: &'a Model, cost: &'a CostModel) -> Self {
        let train = alike(&model.train, &model.layout);
        let eval = model.eval.as_ref().map_or_else(|| vec![0; train.len()], |eval| alike(eval, &model.layout));
        let alike = train.into_iter().zip(eval).map(|(train, eval)| [train, eval]).collect();
        StandIns { model, cost, alike, known: HashMap::new() }
    }

    /// Adds the shard that holds `layers` to `shards`; see [`ShardPrograms::new`].
    pub fn add(&mut self, shards: &mut Shards, layers: Range<usize>, keep: bool, twice: bool) {
        let last = layers.end == self.model.layers();
        let key = (self.alike[layers.clone()].to_vec(), last, [keep, twice]);
        let (programs, secs) = self.known.entry(key).or_insert_with(|| {
            let shard = ShardPrograms::new(self.model, layers.clone(), keep, twice);
            let secs = [shard.forward_secs(self.cost), shard.backward_secs(self.cost)];
            (shard, secs)
        });
        let layout = ShardLayout::new(&self.model.train, &self.model.layout, layers);
        shards.programs.push(ShardPrograms { layout, ..programs.clone() });
        shards.secs.push(*secs);
    }
}
