//! A policy of one's own: the model with the smallest fraction of its work done goes first, so that all models of a
//! search can be compared at any time.
//!
//! A policy is a pure function from a view of models and devices to a choice. It is tried here on two simulated
//! devices; `TurnOptions` takes the same object where models are trained.

use hydra::base::{DType, Result};
use hydra::device::CostModel;
use hydra::engine::{SimulateOptions, simulate};
use hydra::nn::{self, InputShape};
use hydra::sched::{ModelId, ModelView, Policy, ShardedLrtf, View};
use hydra::spill::{FleetDevice, FleetModel, PlanOptions, Updates, plan_anywhere};
use hydra::train::{TrainOptions, trace_model};
use serde_json::json;
use std::sync::Arc;

/// Keeps all models at equal progress; holds each model's total seconds, before its first unit.
struct EvenProgress {
    total_secs: Vec<f64>,
}

impl Policy for EvenProgress {
    fn name(&self) -> &str {
        "even-progress"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let left = |model: &ModelView| model.remaining_secs / self.total_secs[usize::from(model.id)];
        // max_by takes the last of equals, so ids are reversed to let the lowest win.
        let first = view.candidates().max_by(|a, b| left(a).total_cmp(&left(b)).then(b.id.cmp(&a.id)));
        first.map(|model| model.id)
    }
}

/// Three GPTs of 2, 4 and 8 layers for ten steps each.
pub fn main() -> Result<()> {
    let cost = CostModel::stated(10e12, 900e9, 12e9);
    let devices = vec![FleetDevice { budget: Some(9 << 20), cost: cost.clone() }; 2];
    let mut models = Vec::new();
    for layers in [2, 4, 8] {
        let config = json!({ "n_layer": layers, "n_embd": 256, "n_head": 4, "n_positions": 64, "vocab_size": 256 });
        let network = nn::from_config("gpt2", &config)?;
        let inputs = ["input_ids", "labels"].map(|name| InputShape::new(name, [64], DType::I32));
        let model = Arc::new(trace_model(network.as_ref(), &inputs, &TrainOptions::new(10))?);
        let options = PlanOptions { updates: Updates::PLAIN, ..PlanOptions::default() };
        models.push(FleetModel { name: format!("gpt-{layers}"), model, options, steps: 10 });
    }
    let placed = plan_anywhere(&models, &devices)?.placed;
    let total_secs = placed.iter().map(|p| p.plan.shards.iter().map(|s| s.step_secs(&cost)).sum()).collect();
    let policies: [Box<dyn Policy>; 2] = [Box::new(EvenProgress { total_secs }), Box::new(ShardedLrtf)];
    for policy in policies {
        let name = policy.name().to_string();
        let simulation = simulate(
            &placed,
            SimulateOptions {
                policy: Some(policy),
                ..SimulateOptions::new(vec![10; models.len()], vec![cost.clone(); 2])
            },
        )?;
        let ends: Vec<String> = simulation.end_secs.iter().map(|secs| format!("{:.1} ms", 1e3 * secs)).collect();
        println!(
            "{name}: models end after {}; no schedule ends before {:.1} ms",
            ends.join(", "),
            1e3 * simulation.bounds.secs
        );
        assert!(simulation.makespan_secs >= simulation.bounds.secs);
    }
    Ok(())
}
