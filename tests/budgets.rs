//! What a refusal names works, and nothing below it does: whatever rates were measured, whatever budget was given.

mod common;

use common::stated;
use hydra::base::DType;
use hydra::data::names;
use hydra::device::sim::CostModel;
use hydra::nn::{InputShape, from_config};
use hydra::spill::{FleetDevice, FleetMap, FleetModel, Model, PlanOptions, plan_anywhere};
use hydra::train::{TrainOptions, trace_model};
use serde_json::{Value, json};
use std::sync::Arc;

fn of_text(family: &str, config: Value, context: usize, (batch, microbatch): (usize, usize)) -> Arc<Model> {
    let ids = |name: &str| InputShape::new(name, [context], DType::I32);
    let inputs = [names::INPUT_IDS, names::LABELS].map(ids);
    let network = from_config(family, &config).expect("a network");
    let options = TrainOptions { batch, microbatch, ..TrainOptions::new(1) };
    Arc::new(trace_model(network.as_ref(), &inputs, &options).expect("a model"))
}

fn gpt(
    [width, heads, layers]: [usize; 3],
    vocab: usize,
    context: usize,
    batch: usize,
    microbatch: usize,
) -> Arc<Model> {
    let config = json!({
        "n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": context, "vocab_size": vocab,
    });
    of_text("gpt2", config, context, (batch, microbatch))
}

fn fleet_models(models: &[(&Arc<Model>, usize)], options: &PlanOptions) -> Vec<FleetModel> {
    let of = |(i, &(model, moments)): (usize, &(&Arc<Model>, usize))| FleetModel {
        name: format!("m{i}"),
        model: Arc::clone(model),
        options: PlanOptions { moments, ..options.clone() },
        steps: 3 + i as u64,
    };
    models.iter().enumerate().map(of).collect()
}

fn devices(count: usize, budget: Option<u64>, cost: &CostModel) -> Vec<FleetDevice> {
    vec![FleetDevice { budget, cost: cost.clone() }; count]
}

#[test]
fn models_share_no_more_slots_than_they_have_shards() {
    let model = gpt([8, 2, 1], 9, 6, 1, 1);
    let with_slots = |slots: usize| {
        let options = PlanOptions { slots, ..PlanOptions::default() };
        let models = fleet_models(&[(&model, 2), (&model, 0)], &options);
        let plan = plan_anywhere(&models, &devices(2, None, &stated())).expect("no budget");
        let arenas = FleetMap::within(&plan.placed, &[None, None]).arena_bytes;
        (plan.smallest_device_bytes, arenas, plan.placed[0].plan.choice.slots)
    };
    let layers = 2 * model.layers();
    let as_many = with_slots(layers);
    for slots in [1000, 1 << 16] {
        assert_eq!(with_slots(slots), as_many, "{slots} slots");
    }
}
