//! What would help: predictions of the same job with more of one thing, the best first.
//!
//! Everything is planned anew for that, so that what is promised is what a job with that thing would be told.

use crate::job::{Job, Pipeline};
use crate::machine::Machine;
use crate::plan::placing::{Placing, fleet_model, may_fill, predict_turn};
use crate::plan::planned::{Planned, PlannedJob};
use crate::print::table;
use hydra::base::format_bytes;
use hydra::device::sim::CostModel;
use hydra::engine::predict;
use hydra::spill::{FleetMap, FleetModel, OnDisk, Recompute};
use hydra::train::{TrainOptions, plan_model, trace_model};
use std::panic::resume_unwind;
use std::sync::Arc;

/// Gains below this are not worth a line.
const WORTH_SAYING: f64 = 1.03;

/// Predictions of the same model with more of one thing, the best first.
pub fn what_would_help(model: &Planned, planned: &PlannedJob) -> String {
    let _held = model.model().stand_ins();
    let (first, mut options) = (planned.machine.first(), model.prepared.options.clone());
    options.plan.device_budget = first.budget;
    (options.plan.host_budget, options.plan.disk_budget) = (planned.machine.homes.host, planned.machine.homes.disk);
    let cost = &first.cost;
    let mut tries: Vec<(String, TrainOptions, CostModel)> = Vec::new();
    if let Some(budget) = options.plan.device_budget {
        for (what, bytes) in [("twice the device memory", Some(2 * budget)), ("all the device memory it wants", None)] {
            let mut more = options.clone();
            more.plan.device_budget = bytes;
            tries.push((what.to_string(), more, cost.clone()));
        }
    }
    if !model.plan().choice.resident {
        let (h2d, d2h) = (2.0 * cost.h2d_bytes_per_sec, 2.0 * cost.d2h_bytes_per_sec);
        let faster = CostModel { h2d_bytes_per_sec: h2d, d2h_bytes_per_sec: d2h, ..cost.clone() };
        tries.push(("a link twice as fast".into(), options.clone(), faster));
        let mut more = options.clone();
        more.plan.slots += 1;
        tries.push((format!("slots = {}", more.plan.slots), more, cost.clone()));
    }
    if model.plan().device_updates() < model.plan().shards.len() {
        let update = 2.0 * cost.host_update_bytes_per_sec;
        let norm = cost.host_norm_bytes_per_sec.map(|rate| 2.0 * rate);
        let faster = CostModel { host_update_bytes_per_sec: update, host_norm_bytes_per_sec: norm, ..cost.clone() };
        tries.push(("a host that updates twice as fast".into(), options.clone(), faster));
    }
    if model.plan().choice.on_disk > OnDisk::Nothing {
        let faster = CostModel { disk_bytes_per_sec: Some(2.0 * cost.disk_bytes_per_sec()), ..cost.clone() };
        tries.push(("a disk twice as fast".into(), options.clone(), faster));
        let mut more = options.clone();
        more.plan.host_budget = more.plan.host_budget.map(|bytes| 2 * bytes);
        tries.push(("twice the host memory".into(), more, cost.clone()));
    }
    if options.plan.recompute == Recompute::Always {
        let mut less = options.clone();
        less.plan.recompute = Recompute::Auto;
        tries.push(("recompute = \"auto\"".into(), less, cost.clone()));
    }
    let mut more = options.clone();
    more.batch *= 2;
    tries.push(("twice the batch, so more work per visit".into(), more, cost.clone()));
    let gains = tries.into_iter().filter_map(|(what, options, cost)| {
        let (secs, bytes) = predicted(model, &options, &cost)?;
        let share = options.batch as f64 / model.prepared.options.batch as f64;
        Some((model.prediction.step_secs * share / secs, what, bytes))
    });
    best_first(gains.collect(), "on the device")
}

/// Seconds of a step and device bytes under other options; `None` where there is no such plan.
fn predicted(model: &Planned, options: &TrainOptions, cost: &CostModel) -> Option<(f64, u64)> {
    let prepared = &model.prepared;
    let traced = if options.batch == prepared.options.batch {
        Arc::clone(model.model())
    } else {
        Arc::new(trace_model(prepared.network(), &prepared.inputs, options).ok()?)
    };
    let plan = plan_model(&traced, options, cost).ok()?;
    let prediction = predict(&traced, &plan, cost, options.clip.is_some()).ok()?;
    Some((prediction.step_secs, plan.arena.bytes))
}

/// A job that has more of one thing.
struct Try {
    what: String,
    job: Job,
    machine: Machine,
    fleet: Vec<FleetModel>,
}

/// The same for models that share devices, and for one that runs on several: by a step of every model.
pub fn what_would_help_all(planned: &PlannedJob) -> String {
    let models = &planned.models;
    let _held: Vec<_> = models.iter().map(|m| m.model().stand_ins()).collect();
    let as_it_is = || {
        let mut job = planned.job.clone();
        // What is compared is of one kind: a job that would be better off with the other has been given that.
        job.run.pipeline = if planned.sharing.pipelines() { Pipeline::Always } else { Pipeline::Never };
        let fleet = models.iter().map(|m| fleet_model(&m.prepared, m.model())).collect();
        Try { what: String::new(), job, machine: planned.machine.clone(), fleet }
    };
    let mut tries = Vec::new();
    let mut add = |what: String, change: &dyn Fn(&mut Try)| {
        let mut one = Try { what, ..as_it_is() };
        change(&mut one);
        tries.push(one);
    };
    if planned.machine.devices.iter().any(|d| d.budget.is_some()) {
        add("twice the device memory".into(), &|t| {
            t.machine.devices.iter_mut().for_each(|d| d.budget = d.budget.map(|bytes| 2 * bytes));
        });
        add("all the device memory they want".into(), &|t| t.machine.devices.iter_mut().for_each(|d| d.budget = None));
    }
    if models.iter().any(|m| !m.plan().choice.resident) {
        add("links twice as fast".into(), &|t| {
            t.machine.shared_bytes_per_sec = t.machine.shared_bytes_per_sec.map(|rate| 2.0 * rate);
            for device in &mut t.machine.devices {
                device.cost.h2d_bytes_per_sec *= 2.0;
                device.cost.d2h_bytes_per_sec *= 2.0;
            }
        });
        let slots = 1 + models.iter().map(|m| m.prepared.options.plan.slots).max().unwrap_or(0);
        add(format!("slots = {slots}"), &|t| {
            t.job.run.slots = Some(slots);
            t.fleet.iter_mut().for_each(|m| m.options.slots = slots);
        });
    }
    if models.iter().any(|m| m.plan().choice.on_disk > OnDisk::Nothing) {
        add("a disk twice as fast".into(), &|t| {
            for device in &mut t.machine.devices {
                device.cost.disk_bytes_per_sec = Some(2.0 * device.cost.disk_bytes_per_sec());
            }
        });
        add("twice the host memory".into(), &|t| t.machine.homes.host = t.machine.homes.host.map(|bytes| 2 * bytes));
    }
    add("one device more".into(), &|t| t.machine.devices.push(t.machine.first().clone()));
    if models.iter().any(|m| m.prepared.options.plan.recompute == Recompute::Always) {
        add("recompute = \"auto\"".into(), &|t| {
            t.fleet.iter_mut().for_each(|m| m.options.recompute = Recompute::Auto);
        });
    }
    // Each is a job to plan; together they take hardly longer than the longest.
    let found: Vec<_> = std::thread::scope(|scope| {
        let begun: Vec<_> = tries.into_iter().map(|one| scope.spawn(|| tried(one))).collect();
        begun.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let gain = |(secs, what, bytes): (f64, String, u64)| (planned.step_secs / secs, what, bytes);
    best_first(found.into_iter().flatten().map(gain).collect(), "on a device")
}

/// Seconds of a step of every model, what makes it so, and the bytes of the largest arena; `None` where there is no
/// such plan.
fn tried(Try { what, job, machine, fleet }: Try) -> Option<(f64, String, u64)> {
    let placing = Placing::new(&job, &machine, &fleet).ok()?;
    let clips = fleet.iter().map(|m| m.options.clips).collect();
    let (secs, _) = predict_turn(&placing.placed, &placing.sharing, &job.run, &machine, clips).ok()?;
    let bytes = FleetMap::within(&placing.placed, &may_fill(&machine)).arena_bytes.into_iter().max()?;
    Some((secs, what, bytes))
}

/// The lines of gains with what they need.
fn best_first(mut gains: Vec<(f64, String, u64)>, place: &str) -> String {
    gains.retain(|(gain, _, _)| *gain >= WORTH_SAYING);
    gains.sort_by(|a, b| b.0.total_cmp(&a.0));
    if gains.is_empty() {
        return "  nothing that can be asked for here: faster arithmetic alone\n".into();
    }
    let row = |(gain, what, bytes): (f64, String, u64)| {
        vec![what, format!("{gain:.2} times as fast"), format!("{} {place}", format_bytes(bytes))]
    };
    table(&gains.into_iter().map(row).collect::<Vec<_>>())
}
