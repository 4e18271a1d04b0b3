//! Shards for a search over cuts, whose programs may be those of other shards that are alike.
//!
//! Invariant: a stand-in's own layout is right, and its programs have the bytes and the cost that its own would have;
//! what they compute is another shard's. None leaves planning ([`Plan::own`](super::plan::Plan)).

use super::model::Model;
use super::shard::ShardPrograms;
use crate::device::sim::CostModel;
use crate::graph::{ShardLayout, alike};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Shards of one cut, and how long they take.
#[derive(Clone, Debug, Default)]
pub struct Shards {
    /// In order; the programs may stand for others.
    pub programs: Vec<ShardPrograms>,
    /// Seconds of each shard's forward and backward for one microbatch.
    pub secs: Vec<[f64; 2]>,
}

/// What tells apart shards of which one cannot stand for another: the likeness of their layers, whether the last is the
/// model's, and how they are to be built.
type Key = (Vec<[usize; 2]>, bool, [bool; 2]);

/// The stand-ins of a model that searches have built so far. What they need depends on no budget, rate or policy, so
/// every plan of the model that is made while this is held ([`Model::stand_ins`]) finds those of the plans before it.
#[derive(Debug)]
pub struct StandIns {
    /// For each layer the first one like it, in training and in evaluation.
    alike: Vec<[usize; 2]>,
    built: Mutex<HashMap<Key, ShardPrograms>>,
}

/// Where a model finds its stand-ins, if anybody holds them.
#[derive(Debug, Default)]
pub(super) struct StandInCache(Mutex<Weak<StandIns>>);

impl Clone for StandInCache {
    /// Of a model that may be changed.
    fn clone(&self) -> Self {
        StandInCache::default()
    }
}

impl Model {
    /// Its stand-ins, to hold while several plans of it are made: the first of them takes about as long as all others
    /// together.
    pub fn stand_ins(&self) -> Arc<StandIns> {
        let mut held = self.stand_ins.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.upgrade().unwrap_or_else(|| {
            let train = alike(&self.train, &self.layout);
            let eval = self.eval.as_ref().map_or_else(|| vec![0; train.len()], |eval| alike(eval, &self.layout));
            let alike = train.into_iter().zip(eval).map(|(train, eval)| [train, eval]).collect();
            let new = Arc::new(StandIns { alike, built: Mutex::default() });
            *held = Arc::downgrade(&new);
            new
        })
    }
}

/// A search's own view of them, with what they cost.
pub struct Timed<'a> {
    model: &'a Model,
    cost: &'a CostModel,
    stand_ins: Arc<StandIns>,
    known: HashMap<Key, (ShardPrograms, [f64; 2])>,
}

impl<'a> Timed<'a> {
    /// For shards of `model`, timed by `cost`.
    pub fn new(model: &'a Model, cost: &'a CostModel) -> Self {
        Timed { model, cost, stand_ins: model.stand_ins(), known: HashMap::new() }
    }

    /// Adds the shard that holds `layers` to `shards`; see [`ShardPrograms::new`].
    pub fn add(&mut self, shards: &mut Shards, layers: Range<usize>, keep: bool, twice: bool) {
        let last = layers.end == self.model.layers();
        let key = (self.stand_ins.alike[layers.clone()].to_vec(), last, [keep, twice]);
        let (model, cost, stand_ins) = (self.model, self.cost, &self.stand_ins);
        let (programs, secs) = self.known.entry(key).or_insert_with_key(|key| {
            let mut built = stand_ins.built.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || ShardPrograms::new(model, layers.clone(), keep, twice);
            let shard = built.entry(key.clone()).or_insert_with(new).clone();
            let secs = [shard.forward_secs(cost), shard.backward_secs(cost)];
            (shard, secs)
        });
        let layout = ShardLayout::new(&self.model.train, &self.model.layout, layers);
        shards.programs.push(ShardPrograms { layout, ..programs.clone() });
        shards.secs.push(*secs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::DType;
    use crate::graph::{Area, Mode};
    use crate::nn::{InputShape, from_config};
    use serde_json::json;

    fn small(family: &str, mode: Mode, float: DType) -> crate::graph::Graph {
        let (config, inputs) = match family {
            "gpt2" => (
                json!({ "vocab_size": 31, "n_positions": 9, "n_embd": 6, "n_layer": 3, "n_head": 3 }),
                ["input_ids", "labels"].map(|name| InputShape::new(name, [7], DType::I32)),
            ),
            "bert" => (
                json!({ "vocab_size": 31, "max_position_embeddings": 9, "hidden_size": 6, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 5 }),
                ["input_ids", "labels"].map(|name| InputShape::new(name, [7], DType::I32)),
            ),
            "vit" => (
                json!({ "image_size": 7, "patch_size": 3, "hidden_size": 6, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 5, "num_labels": 3 }),
                [InputShape::new("pixel_values", [3, 7, 7], DType::F32), InputShape::new("labels", [], DType::I32)],
            ),
            _ => (
                json!({ "embedding_size": 5, "hidden_sizes": [8, 8], "depths": [3, 2], "layer_type": "basic", "num_labels": 3 }),
                [InputShape::new("pixel_values", [3, 33, 33], DType::F32), InputShape::new("labels", [], DType::I32)],
            ),
        };
        let network = from_config(family, &config).unwrap();
        let mut graph = network.trace(mode, float, 2, &inputs).unwrap();
        graph.scratch = float == DType::Bf16;
        graph
    }

    /// What a search asks of a shard.
    fn sizes(shard: &ShardPrograms) -> Vec<u64> {
        let programs = [&shard.forward, &shard.backward, &shard.eval];
        let mut sizes: Vec<u64> = vec![shard.boundary_bytes, shard.workspace_bytes(), u64::from(shard.kept)];
        for program in programs.into_iter().flatten() {
            let areas = [Area::Workspace, Area::Saved, Area::Weights, Area::Gradients, Area::States, Area::Inputs];
            sizes.extend(areas.map(|area| program.bytes(area)));
            sizes.extend(program.steps.iter().flat_map(|step| &step.inputs).map(|buffer| buffer.offset));
        }
        sizes
    }

    #[test]
    fn stand_ins_are_as_large_and_as_slow_as_the_shards_themselves() {
        let cost = CostModel::stated(1e11, 2e10, 1e10);
        for (family, alike) in [("gpt2", 4), ("bert", 4), ("vit", 4), ("resnet", 6)] {
            for float in [DType::F32, DType::Bf16] {
                let [train, eval] = [Mode::Training, Mode::Evaluation].map(|mode| small(family, mode, float));
                let model = Model::new(train, Some(eval), 1).unwrap();
                let mut stand_ins = Timed::new(&model, &cost);
                let mut kinds = stand_ins.stand_ins.alike.clone();
                kinds.sort_unstable();
                kinds.dedup();
                assert_eq!(kinds.len(), alike, "{family}: {:?}", stand_ins.stand_ins.alike);
                let n = model.layers();
                for layers in (0..n).flat_map(|start| (start + 1..=n).map(move |end| start..end)) {
                    for (keep, twice) in [(false, false), (true, false), (false, true)] {
                        let mut got = Shards::default();
                        stand_ins.add(&mut got, layers.clone(), keep, twice);
                        let own = ShardPrograms::new(&model, layers.clone(), keep, twice);
                        let what = format!("{family} {float} {layers:?} {keep} {twice}");
                        assert_eq!(got.programs[0].layout, own.layout, "{what}");
                        assert_eq!(sizes(&got.programs[0]), sizes(&own), "{what}");
                        assert_eq!(got.secs[0], [own.forward_secs(&cost), own.backward_secs(&cost)], "{what}");
                    }
                }
            }
        }
    }
}
