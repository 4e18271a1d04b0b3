//! What a refusal names works, and nothing below it does: whatever rates were measured, whatever budget was given.

mod common;

use common::stated;
use hydra::base::{DType, Error, Result};
use hydra::data::names;
use hydra::device::sim::CostModel;
use hydra::engine::{SimulateOptions, plan_alone, predict, simulate};
use hydra::nn::{InputShape, from_config};
use hydra::spill::{
    Baseline, FleetDevice, FleetMap, FleetModel, Home, HomeBudgets, Model, Placed, Plan, PlanOptions, Recompute,
    Updates, place_baseline, plan_anywhere, plan_at_home, plan_fleet, plan_pipelined,
};
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

fn of_images(
    family: &str,
    config: Value,
    pixels: [usize; 3],
    (batch, microbatch): (usize, usize),
    frozen: &[&str],
) -> Arc<Model> {
    let inputs =
        [InputShape::new(names::PIXEL_VALUES, pixels, DType::F32), InputShape::new(names::LABELS, [], DType::I32)];
    let network = from_config(family, &config).expect("a network");
    let frozen = frozen.iter().map(|start| start.to_string()).collect();
    let options = TrainOptions { batch, microbatch, frozen, ..TrainOptions::new(1) };
    Arc::new(trace_model(network.as_ref(), &inputs, &options).expect("a model"))
}

/// Rates that have little in common.
fn rates() -> Vec<CostModel> {
    let slow_link = CostModel { op_secs: 1e-5, ..CostModel::stated(1e12, 1e12, 1e7) };
    let slow_arithmetic = CostModel { host_update_bytes_per_sec: 1e7, ..CostModel::stated(1e7, 1e11, 1e11) };
    let slow_memory = CostModel { run_secs: 1e-4, ..CostModel::stated(1e12, 1e7, 1e9) };
    vec![stated(), slow_link, slow_arithmetic, slow_memory]
}

/// The smallest budget that a refusal names.
#[track_caller]
fn named(what: &str, refused: Result<u64>) -> u64 {
    match refused {
        Err(Error::OutOfBudget { message, smallest_device_bytes }) => {
            assert!(message.contains(&format!("memory = {smallest_device_bytes}")), "{what}: {message}");
            smallest_device_bytes
        }
        other => panic!("{what}: not refused: {other:?}"),
    }
}

/// `smallest` plans for a budget and rates, and gives the smallest budget that would work.
#[track_caller]
fn check(what: &str, smallest: &dyn Fn(Option<u64>, &CostModel) -> Result<u64>) {
    let needs = named(what, smallest(Some(1), &stated()));
    for (i, cost) in rates().iter().enumerate() {
        let what = format!("{what}, rates {i}");
        for budget in (0..24).map(|part| needs * part / 24).chain([needs - 1]) {
            let what = format!("{what}, {budget} bytes");
            assert_eq!(named(&what, smallest(Some(budget), cost)), needs, "{what}");
        }
        for budget in [Some(needs), Some(needs + needs / 7), Some(3 * needs), None] {
            let what = format!("{what}, {budget:?} bytes");
            assert_eq!(smallest(budget, cost).expect("enough"), needs, "{what}");
        }
    }
}

#[test]
fn a_lone_model_fits_in_what_is_named_and_in_nothing_below() {
    let vit = json!({
        "hidden_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "image_size": 32,
        "patch_size": 22, "num_labels": 10,
    });
    let resnet = json!({
        "num_channels": 1, "embedding_size": 4, "hidden_sizes": [14, 1], "depths": [1, 2], "layer_type": "basic",
        "num_labels": 2, "downsample_in_first_stage": true,
    });
    for (what, model) in [
        ("gpt", gpt([12, 2, 3], 31, 8, 4, 2)),
        ("frozen embeddings", of_images("vit", vit, [3, 32, 32], (1, 1), &["vit.embeddings"])),
        ("a narrow end", of_images("resnet", resnet, [1, 5, 7], (6, 3), &[])),
    ] {
        for slots in [1, 2, 5] {
            check(&format!("{what}, {slots} slots"), &|device_budget, cost| {
                let options = PlanOptions { device_budget, slots, ..PlanOptions::default() };
                Plan::new(&model, &options, cost).map(|plan| plan.smallest_device_bytes)
            });
        }
    }
}

fn fleet_models(models: &[(&Arc<Model>, usize)], options: &PlanOptions) -> Vec<FleetModel> {
    let of = |(i, &(model, moments)): (usize, &(&Arc<Model>, usize))| FleetModel {
        name: format!("m{i}"),
        model: Arc::clone(model),
        options: PlanOptions { updates: Updates { moments, ..options.updates }, ..options.clone() },
        steps: 3 + i as u64,
    };
    models.iter().enumerate().map(of).collect()
}

fn devices(count: usize, budget: Option<u64>, cost: &CostModel) -> Vec<FleetDevice> {
    vec![FleetDevice { budget, cost: cost.clone() }; count]
}

#[test]
fn models_fit_together_in_what_is_named_and_in_nothing_below() {
    let (big, small) = (gpt([28, 4, 4], 256, 2, 1, 1), gpt([8, 2, 1], 16, 2, 1, 1));
    let middle = gpt([24, 3, 2], 44, 11, 1, 1);
    for (what, models) in [
        ("unlike", &[(&big, 0), (&small, 2)][..]),
        ("alike", &[(&middle, 2), (&middle, 2)]),
        ("small", &[(&small, 2), (&small, 1)]),
        ("three", &[(&small, 2), (&middle, 2), (&small, 1)]),
    ] {
        for (count, slots, recompute) in
            [(1, 2, Recompute::Never), (1, 7, Recompute::Auto), (1, 7, Recompute::Never), (2, 7, Recompute::Auto)]
        {
            let what = format!("{what}, {count} devices, {slots} slots, {recompute:?}");
            let models = fleet_models(models, &PlanOptions { slots, recompute, ..PlanOptions::default() });
            check(&what, &|budget, cost| {
                let plan = plan_fleet(&models, &devices(count, budget, cost), HomeBudgets::default())?;
                let most = FleetMap::new(&plan.placed, count).arena_bytes.into_iter().max().unwrap_or(0);
                assert!(budget.is_none_or(|budget| most <= budget), "{what}: {most} bytes of {budget:?}");
                Ok(plan.smallest_device_bytes)
            });
        }
    }
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

#[test]
fn what_a_lone_models_backward_is_to_keep_is_recomputed_anywhere() {
    let model = gpt([8, 2, 1], 9, 6, 1, 1);
    let with = |kept| {
        let options = PlanOptions { kept, ..PlanOptions::default() };
        let models = fleet_models(&[(&model, 2)], &options);
        plan_anywhere(&models, &devices(2, None, &stated())).expect("no budget").placed[0].plan.arena.clone()
    };
    assert_eq!(with(Some(vec![true; model.layers()])), with(None));
}

#[test]
fn stages_fit_in_what_is_named_and_in_nothing_below() {
    let llama = json!({
        "hidden_size": 23, "num_attention_heads": 2, "head_dim": 2, "intermediate_size": 36, "num_hidden_layers": 1,
        "max_position_embeddings": 2, "vocab_size": 256,
    });
    let llama = of_text("llama", llama, 2, (1, 1));
    let deep = gpt([5, 1, 4], 256, 18, 12, 6);
    for (what, model) in [("llama", &llama), ("deep", &deep)] {
        for baseline in [Baseline::Gpipe, Baseline::ModelParallel] {
            for (count, slots) in [(1, 7), (2, 2), (3, 1)] {
                let models = fleet_models(&[(model, 2)], &PlanOptions { slots, ..PlanOptions::default() });
                check(&format!("{what}, {baseline:?}, {count} devices, {slots} slots"), &|budget, cost| {
                    let lined = place_baseline(baseline, &models, &devices(count, budget, cost), plan_alone)?;
                    Ok(lined.smallest_device_bytes)
                });
            }
        }
    }
}

/// The number after `before` in a message.
fn advised(message: &str, before: &str) -> Option<u64> {
    let (_, after) = message.split_once(before)?;
    after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
}

const HOST: &str = "[host] memory = ";
const DISK: &str = "disk = { path = \"spill\", memory = ";

#[test]
fn the_host_memory_and_the_disk_that_are_advised_do() {
    let model = gpt([32, 2, 5], 61, 16, 8, 2);
    let cost = stated();
    let mut with_disk = 0;
    for (clips, device_bytes) in [(false, 200_000), (true, 200_000), (true, 400_000), (false, 700_000)] {
        let plan = |host: u64, disk: u64| {
            let (device_budget, homes) = (Some(device_bytes), HomeBudgets { host: Some(host), disk });
            let updates = Updates { clips, ..Updates::default() };
            let options = PlanOptions { device_budget, homes, updates, ..PlanOptions::default() };
            Plan::new(&model, &options, &cost).map_err(|error| error.to_string())
        };
        let most = plan(u64::MAX, 0).expect("no budget").host.bytes;
        for host in (0..12).map(|part| most * part / 12) {
            let what = format!("clips {clips}, {device_bytes} bytes, {host} bytes of the host");
            let Err(error) = plan(host, 0) else { continue };
            let bytes = advised(&error, HOST).expect("the host's memory");
            plan(bytes, 0).expect(&what);
            plan(bytes - 1, 0).expect_err(&what);
            let disk = advised(&error, DISK);
            assert_eq!(disk.is_some(), plan(host, u64::MAX).is_ok(), "{what}: {error}");
            let Some(disk) = disk else { continue };
            with_disk += 1;
            plan(host, disk).expect(&what);
            let error = plan(host, disk - 1).expect_err(&what);
            assert!(error.contains("the disk tier needs") && error.contains(&disk.to_string()), "{error}");
            // With a disk that is too small for this much host memory.
            let error = plan(0, disk).expect_err(&what);
            if let Some(bytes) = advised(&error, HOST) {
                plan(bytes, disk).expect(&what);
            }
        }
    }
    assert!(with_disk > 5, "{with_disk}");
}

#[test]
fn models_fit_in_the_host_memory_that_is_named_and_in_nothing_below_whatever_rates_were_measured() {
    let bert = json!({
        "hidden_size": 6, "num_hidden_layers": 8, "num_attention_heads": 1, "intermediate_size": 21,
        "max_position_embeddings": 15, "vocab_size": 14,
    });
    let bert = of_text("bert", bert, 13, (10, 5));
    let gpt = gpt([12, 2, 4], 64, 6, 4, 1);
    let host_bytes = |placed: &[Placed]| FleetMap::new(placed, 3).host_bytes;
    for (what, models) in [("unlike", [(&bert, 0), (&gpt, 2)]), ("alike", [(&gpt, 1), (&gpt, 1)])] {
        let models = fleet_models(&models, &PlanOptions::default());
        for (count, device_bytes) in [(1, Some(40_000)), (2, Some(60_000)), (2, Some(200_000)), (3, None)] {
            for disk in [0, 20_000, u64::MAX] {
                let what = format!("{what}, {count} devices of {device_bytes:?} bytes, {disk} bytes of disk");
                let plan = |host: Option<u64>, cost: &CostModel| {
                    let budgets = HomeBudgets { host, disk };
                    plan_fleet(&models, &devices(count, device_bytes, cost), budgets).map(|plan| plan.placed)
                };
                let refusal = |host: u64, cost: &CostModel| match plan(Some(host), cost) {
                    Ok(_) => panic!("{what}: {host} bytes are enough"),
                    Err(error) => error.to_string(),
                };
                let bytes = advised(&refusal(1, &stated()), HOST).expect("the host's memory");
                for cost in rates() {
                    let devices = devices(count, device_bytes, &cost);
                    assert_eq!(advised(&refusal(1, &cost), HOST), Some(bytes), "{what}");
                    // A byte less may be enough with a larger disk, and then that is what is told.
                    let told = refusal(bytes - 1, &cost);
                    assert!(advised(&told, HOST).is_none_or(|told| told == bytes), "{what}: {told}");
                    assert!(advised(&told, HOST).is_some() || disk == 20_000, "{what}: {told}");
                    let placed = plan(Some(bytes), &cost).expect(&what);
                    assert!(host_bytes(&placed) <= bytes, "{what}");
                    // None of the ways there are needs less.
                    let staying = plan_at_home(&models, &devices).expect("a plan").map(|(placed, _)| placed);
                    let moving = plan_anywhere(&models, &devices).expect("a plan").placed;
                    for placed in staying.iter().chain([&moving]) {
                        assert!(bytes <= host_bytes(placed), "{what}: {bytes}, not {}", host_bytes(placed));
                    }
                    // What is enough for the plan that is best without a limit gets that one.
                    let best = plan(None, &cost).expect(&what);
                    let same = plan(Some(host_bytes(&best)), &cost).expect(&what);
                    let homes = |placed: &[Placed]| placed.iter().map(|p| p.home.clone()).collect::<Vec<_>>();
                    assert_eq!((homes(&same), host_bytes(&same)), (homes(&best), host_bytes(&best)), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_pipeline_that_memory_allows_is_one_in_what_is_named_too() {
    let vit = json!({
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 16,
        "patch_size": 8, "num_labels": 7, "num_channels": 1,
    });
    let vit = of_images("vit", vit, [1, 16, 16], (6, 6), &["vit.encoder.layer.0."]);
    let resnet = json!({
        "num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5,
        "layer_type": "bottleneck",
    });
    let resnet = of_images("resnet", resnet, [1, 32, 32], (2, 1), &[]);
    let gpt = gpt([48, 2, 3], 70, 16, 2, 1);
    // In little memory each takes another part of the time, and none so much of it.
    let mut models =
        fleet_models(&[(&vit, 1), (&gpt, 1), (&resnet, 1)], &PlanOptions { slots: 4, ..PlanOptions::default() });
    models.iter_mut().zip([20, 11, 7]).for_each(|(m, steps)| m.steps = steps);
    let plan = |budget| plan_pipelined(&models, &devices(2, budget, &stated()));
    let needs = plan(None).expect("no budget").expect("a model that bounds the makespan").smallest_device_bytes;
    assert_eq!(named("a byte less", plan(Some(needs - 1)).map(|_| 0)), needs);
    for budget in [needs, needs + needs / 5, 2 * needs] {
        let fine = plan(Some(budget)).expect("enough").expect("a model that bounds the makespan");
        assert_eq!(fine.smallest_device_bytes, needs, "{budget} bytes");
    }
}

/// What is predicted of a step is what a long run comes to, with updates that wait for the norm and go on beside the next
/// step too, and never below the work of one lane.
#[test]
fn a_predicted_step_is_that_of_a_long_run() {
    for clips in [false, true] {
        for (slots, visiting_updates) in [(2, 0), (2, 3), (3, 8), (1, 0)] {
            let cost = CostModel { host_update_bytes_per_sec: 5e9, ..CostModel::stated(1e12, 1e11, 2e9) };
            let options = PlanOptions {
                slots,
                updates: Updates { moments: 2, clips },
                resident: Some(false),
                visiting_updates: Some(visiting_updates),
                ..PlanOptions::default()
            };
            let model = gpt([64, 4, 6], 300, 32, 8, 2);
            let plan = plan_alone(&model, &options, &cost).expect("a plan");
            let predicted = predict(&model, &plan, &cost).expect("a prediction");
            let home = Home::On(vec![0; plan.shards.len()]);
            let placed = [Placed { model, plan, home, line: 0 }];
            let secs = |steps: u64| {
                let options = SimulateOptions { units: slots, ..SimulateOptions::new(vec![steps], vec![cost.clone()]) };
                simulate(&placed, options).expect("nothing fails").makespan_secs
            };
            let (steady, what) = ((secs(40) - secs(20)) / 20.0, format!("{clips} {slots} {visiting_updates}"));
            let apart = predicted.step_secs / steady - 1.0;
            assert!(apart.abs() < 0.01, "{what}: {predicted:?}, {steady}");
            assert!(predicted.bound_secs <= 1.001 * predicted.step_secs, "{what}: {predicted:?}");
        }
    }
}
