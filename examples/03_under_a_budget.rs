//! Training under a budget: a small GPT learns this repository's own text on a device smaller than its state, and ends
//! with the same bits as a run with all the memory it wants.

use hydra::base::{Result, format_bytes};
use hydra::data::{Text, TextOptions, TextSource, Tokenizer};
use hydra::device::CostModel;
use hydra::device::{DeviceSpec, calibrate};
use hydra::engine::Stored;
use hydra::nn::{Network, from_config};
use hydra::spill::PlanOptions;
use hydra::train::{Session, StepReport, TrainOptions, Weights, prepare};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Trains `gpt` and returns the bits of every weight and of every loss. Prints the plan.
fn train(gpt: &dyn Network, options: &TrainOptions, cost: &CostModel) -> Result<(Vec<u32>, Vec<u32>)> {
    let text = Text::read(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("src/graph")], &Tokenizer::Bytes)?;
    let windows = TextOptions { context: 32, batch: options.batch, seed: options.seed, valid_fraction: 0.0 };
    let source = TextSource::open(&text, &windows)?.train;
    let (model, plan) = prepare(gpt, &source, options, cost)?;
    println!("\n{} shards, {} on the device:", plan.shards.len(), format_bytes(plan.arena.bytes));
    for (shard, programs) in plan.shards.iter().enumerate() {
        let layers = plan.layer_names(&model, shard);
        println!(
            "  {:<18} {:>10}  {}",
            format!("shard {shard}"),
            format_bytes(programs.layout.weight_bytes),
            layers.join(" ")
        );
    }
    for (what, bytes) in plan.arena_table() {
        println!("  {what:<18} {:>10}", format_bytes(bytes));
    }

    let mut session = Session::new(Weights::Random, (model, plan), Box::new(source), None, options.clone())?;
    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.result.loss.to_bits());
        Ok(())
    };
    session.run(&mut watch, &AtomicBool::new(false))?;
    let engine = session.engine();
    assert_eq!(engine.high_water_bytes(0), engine.plan(0).arena.bytes, "the plan knows the peak to the byte");
    let parameters = 0..engine.model(0).train.parameters.len();
    let mut weights = Vec::new();
    for i in parameters {
        weights.extend(engine.read_parameter(0, Stored::Weight, i)?.into_iter().map(f32::to_bits));
    }
    Ok((weights, losses))
}

/// Trains twice and compares the bits.
pub fn main() -> Result<()> {
    let config = serde_json::json!({ "n_layer": 3, "n_embd": 64, "n_head": 2, "n_positions": 32, "vocab_size": 256 });
    let gpt = from_config("gpt2", &config)?;
    let cost = calibrate(&DeviceSpec::default())?;

    let stays = PlanOptions { resident: Some(true), ..PlanOptions::default() };
    let resident =
        TrainOptions { plan: stays, seed: 1, batch: 4, microbatch: 2, clip: Some(1.0), ..TrainOptions::new(6) };
    let (weights, losses) = train(gpt.as_ref(), &resident, &cost)?;
    // Weights, gradients and AdamW's two moments, 4 bytes each.
    let state_bytes = 16 * weights.len() as u64;

    let budget = state_bytes / 2;
    let plan = PlanOptions { device_budget: Some(budget), ..PlanOptions::default() };
    let spilled = TrainOptions { plan, ..resident };
    let (spilled_weights, spilled_losses) = train(gpt.as_ref(), &spilled, &cost)?;

    println!("\nstate {}, budget {}", format_bytes(state_bytes), format_bytes(budget));
    println!("loss {:.4} -> {:.4}", f32::from_bits(losses[0]), f32::from_bits(losses[losses.len() - 1]));
    assert!(weights == spilled_weights && losses == spilled_losses, "a budget must not change a bit");
    println!("the same bits with and without a budget");
    Ok(())
}
