//! How fast the executor simulates: 64 models of 100 shards for 100 steps on 64 devices, and what that takes of memory.
//!
//! `HYDRA_BENCH_QUICK=1` simulates ten steps.

#[path = "common/asked.rs"]
mod asked;
#[path = "../tests/overlap/models.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod models;

use hydra::device::CostModel;
use hydra::engine::{SimulateOptions, simulate};
use hydra::sched::by_name;
use hydra::spill::{FleetDevice, FleetModel, PlanOptions, Updates, plan_anywhere};
use models::Chain;
use std::time::Instant;

fn main() {
    let steps = if asked::quick() { 10 } else { 100 };
    let (models, shards, devices) = (64, 100, 64);
    let chain = Chain::equal(shards, 1024, 512).model();
    let mut cost = CostModel::stated(10e12, 900e9, 12e9);
    cost.host_update_bytes_per_sec = 1e12;
    let options = PlanOptions {
        updates: Updates::PLAIN,
        cut: Some((0..shards).map(|l| l..l + 1).collect()),
        ..PlanOptions::default()
    };
    let fleet: Vec<FleetModel> = (0..models)
        .map(|i| FleetModel { name: format!("model {i}"), model: chain.clone(), options: options.clone(), steps })
        .collect();
    let planned = Instant::now();
    let fleet_devices = vec![FleetDevice { budget: None, cost: cost.clone() }; devices];
    let placed = plan_anywhere(&fleet, &fleet_devices).expect("a plan").placed;
    println!("planned in {:.2} s", planned.elapsed().as_secs_f64());
    for policy in ["sharded-lrtf", "locality-lrtf"] {
        let began = Instant::now();
        let simulation = simulate(
            &placed,
            SimulateOptions {
                policy: by_name(policy, 1),
                ..SimulateOptions::new(vec![steps; models], vec![cost.clone(); devices])
            },
        )
        .expect("nothing fails");
        let secs = began.elapsed().as_secs_f64();
        let tasks: u64 = simulation.sums.iter().map(|s| s.tasks).sum();
        println!(
            "{policy}: {models} models x {shards} shards x {steps} steps on {devices} devices: {secs:.2} s, {:.1} million tasks, {:.0} ns a task; makespan {:.3} s, bound {:.3} s ({:?}), {:.1} % busy, most memory {} MiB",
            tasks as f64 / 1e6,
            secs / tasks as f64 * 1e9,
            simulation.makespan_secs,
            simulation.bounds.secs,
            simulation.bounds.greatest,
            100.0 * simulation.utilisation.iter().sum::<f64>() / devices as f64,
            most_memory_bytes() >> 20,
        );
    }
}

/// The most memory that this process has had, where the system says (Linux's VmHWM).
fn most_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
