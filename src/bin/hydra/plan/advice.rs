//! What would help: predictions for the same job with more of one resource, the best first.
//!
//! Each variant is planned anew, so that the promised figures are those that a job with that resource would get.

use crate::job::{DeviceKind, Job, Pipeline};
use crate::machine::Machine;
use crate::plan::placing::{Placing, Sharing, fleet_model, may_fill};
use crate::plan::planned::{Planned, PlannedJob, predict_alone};
use crate::print::table;
use hydra::base::format_bytes;
use hydra::device::sim::CostModel;
use hydra::spill::{FleetMap, FleetModel, OnDisk, Recompute};
use hydra::train::{TrainOptions, trace_model};
use std::panic::resume_unwind;
use std::rc::Rc;
use std::sync::Arc;

/// Gains below this are not worth a line.
const WORTH_SAYING: f64 = 1.03;

/// A job that has more of one resource.
#[derive(Clone)]
struct Try {
    what: String,
    job: Job,
    machine: Machine,
    fleet: Vec<FleetModel>,
    /// The work of a step, relative to the job as it is.
    work: f64,
}

impl Try {
    fn every_cost(&mut self, change: impl Fn(&mut CostModel)) {
        self.machine.devices.iter_mut().for_each(|d| change(&mut d.cost));
    }

    /// Seconds for the work of a step of every model, what was changed, and the bytes of the largest arena; `None`
    /// where there is no such plan. `alone` means that a single model has its device to itself.
    fn predicted(self, alone: bool) -> Option<(f64, String, u64)> {
        let Try { what, job, machine, fleet, work } = self;
        let placing = Placing::new(&job, &machine, &fleet).ok()?;
        let step_secs = match &placing.placed[..] {
            [model] if alone => predict_alone(model, &placing.sharing, &machine, &[]).ok()?.step_secs,
            _ => placing.scenario(&job, &machine).predict_step().ok()?.0,
        };
        let bytes = FleetMap::within(&placing.placed, &may_fill(&machine)).arena_bytes.into_iter().max()?;
        Some((step_secs / work, what, bytes))
    }
}

/// Predictions of a step of every model for the same job with more of one resource, the best first.
pub fn what_would_help(planned: &PlannedJob) -> String {
    let models = &planned.models;
    let _held: Vec<_> = models.iter().map(|m| m.model().stand_ins()).collect();
    let mut job = planned.job.clone();
    // Only jobs that pipeline alike are compared: this job already has the better choice.
    job.run.pipeline = if planned.sharing.pipelines() { Pipeline::Always } else { Pipeline::Never };
    let fleet = models.iter().map(|m| fleet_model(&m.prepared, m.model())).collect();
    let alone = planned.sharing == Sharing::Alone;
    let as_it_is = Try { what: String::new(), job, machine: planned.machine.clone(), fleet, work: 1.0 };
    let mut tries = Vec::new();
    let mut add = |what: &str, change: &dyn Fn(&mut Try)| {
        let mut one = Try { what: what.into(), ..as_it_is.clone() };
        change(&mut one);
        tries.push(one);
    };
    if planned.machine.devices.iter().any(|d| d.budget.is_some()) {
        add("twice the device memory", &|t| {
            t.machine.devices.iter_mut().for_each(|d| d.budget = d.budget.map(|bytes| 2 * bytes));
        });
        let all = if alone { "all the device memory it wants" } else { "all the device memory they want" };
        add(all, &|t| t.machine.devices.iter_mut().for_each(|d| d.budget = None));
    }
    if models.iter().any(|m| !m.plan().choice.resident) {
        add(if alone { "a link twice as fast" } else { "links twice as fast" }, &|t| {
            t.machine.shared_bytes_per_sec = t.machine.shared_bytes_per_sec.map(|rate| 2.0 * rate);
            t.every_cost(|cost| {
                cost.h2d_bytes_per_sec *= 2.0;
                cost.d2h_bytes_per_sec *= 2.0;
            });
        });
        let slots = 1 + models.iter().map(|m| m.prepared.options.plan.slots).max().unwrap_or(0);
        add(&format!("slots = {slots}"), &|t| {
            t.job.run.slots = Some(slots);
            t.fleet.iter_mut().for_each(|m| m.options.slots = slots);
        });
    }
    if alone && models.iter().any(|m| m.plan().device_updates() < m.plan().shards.len()) {
        add("a host that updates twice as fast", &|t| {
            t.every_cost(|cost| {
                cost.host_update_bytes_per_sec *= 2.0;
                cost.host_norm_bytes_per_sec = cost.host_norm_bytes_per_sec.map(|rate| 2.0 * rate);
            });
        });
    }
    if models.iter().any(|m| m.plan().choice.on_disk > OnDisk::Nothing) {
        add("a disk twice as fast", &|t| {
            t.every_cost(|cost| cost.disk_bytes_per_sec = Some(2.0 * cost.disk_bytes_per_sec()));
        });
        add("twice the host memory", &|t| t.machine.homes.host = t.machine.homes.host.map(|bytes| 2 * bytes));
    }
    if !alone {
        // Of cores that are shared already another device has none.
        let unlike = planned.machine.devices.iter().any(|d| d.budget != planned.machine.first().budget);
        let what = match (unlike, planned.machine.first().kind) {
            (true, _) => "one device more, like the first",
            (false, DeviceKind::Host) => "one device more, with cores of its own",
            (false, _) => "one device more",
        };
        add(what, &|t| t.machine.devices.push(t.machine.first().clone()));
    }
    if models.iter().any(|m| m.prepared.options.plan.recompute == Recompute::Always) {
        add("recompute = \"auto\"", &|t| t.fleet.iter_mut().for_each(|m| m.options.recompute = Recompute::Auto));
    }
    if alone && let Some(fleet) = with_twice_the_batch(planned) {
        add("twice the batch, so more work per visit", &|t| (t.fleet, t.work) = (fleet.clone(), 2.0));
    }
    // Each is a job to plan; in parallel they take little longer than the longest.
    let found: Vec<_> = std::thread::scope(|scope| {
        let begun: Vec<_> = tries.into_iter().map(|one| scope.spawn(move || one.predicted(alone))).collect();
        begun.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let gain = |(secs, what, bytes): (f64, String, u64)| (planned.step_secs / secs, what, bytes);
    best_first(found.into_iter().flatten().map(gain).collect(), if alone { "on the device" } else { "on a device" })
}

/// The same models with twice as many samples per step.
fn with_twice_the_batch(planned: &PlannedJob) -> Option<Vec<FleetModel>> {
    let twice = |m: &Rc<Planned>| {
        let options = TrainOptions { batch: 2 * m.prepared.options.batch, ..m.prepared.options.clone() };
        let model = trace_model(m.prepared.network(), &m.prepared.inputs, &options).ok()?;
        Some(fleet_model(&m.prepared, &Arc::new(model)))
    };
    planned.models.iter().map(twice).collect()
}

/// The lines of gains, each with what it needs.
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
