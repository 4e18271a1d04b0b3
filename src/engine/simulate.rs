//! Models on simulated devices: the executor that trains, on a virtual clock, with no data and no losses.

use super::visit::any_rule;
use super::{Ended, Engine, EngineOptions, StepInput, TurnOptions};
use crate::base::{LaneKind, Result};
use crate::device::sim::{CostModel, SimDevice};
use crate::sched::{Bounds, DeviceRates, ModelWork, Policy};
use crate::spill::{FleetMap, Home, Placed};
use crate::trace::{LaneSum, Recorder};
use std::collections::VecDeque;

/// What is simulated.
pub struct SimulateOptions {
    /// Steps of each model.
    pub steps: Vec<u64>,
    /// Whether each model clips its gradients.
    pub clips: Vec<bool>,
    /// What each device costs.
    pub costs: Vec<CostModel>,
    /// Bytes per second that the devices' links share.
    pub shared_bytes_per_sec: Option<f64>,
    /// Chooses units, where models take turns.
    pub policy: Option<Box<dyn Policy>>,
    /// Units in a device's queue: 1 is no double buffering.
    pub units: usize,
    /// Models that run one after another; empty: all at once.
    pub lines: Vec<Vec<usize>>,
    /// Where events go.
    pub recorder: Option<Recorder>,
}

/// What a simulation came to.
pub struct Simulation {
    /// The end of the last unit.
    pub makespan_secs: f64,
    /// Compute lane busy over makespan, by device.
    pub utilisation: Vec<f64>,
    /// When each model's last step ended.
    pub end_secs: Vec<f64>,
    /// All that ran, by lane.
    pub sums: Vec<LaneSum>,
    /// What no schedule of these plans can beat.
    pub bounds: Bounds,
    /// The recorder, to be finished.
    pub recorder: Option<Recorder>,
}

/// Runs `placed` to their ends on simulated devices.
///
/// # Errors
/// When the policy chooses what it may not, or everything stalls because it chooses nothing.
pub fn simulate(placed: &[Placed], options: SimulateOptions) -> Result<Simulation> {
    let SimulateOptions { steps, clips, costs, shared_bytes_per_sec, policy, units, lines, recorder } = options;
    let bounds = bounds_of(placed, &steps, &costs, shared_bytes_per_sec);
    let devices = costs.len();
    let device = Box::new(SimDevice::new(costs.clone()).with_shared_link(shared_bytes_per_sec));
    let arena_bytes = FleetMap::new(placed, devices).arena_bytes;
    let turns = policy.map(|policy| TurnOptions { policy, units, costs, shared_bytes_per_sec, arena_bytes });
    let of = |(p, &steps): (&Placed, &u64)| EngineOptions { steps, ..EngineOptions::new(0, &p.model) };
    let engine_options = placed.iter().zip(&steps).map(of).collect();
    let mut engine = Engine::fleet(placed, engine_options, device, turns);
    recorder.into_iter().for_each(|recorder| engine.record(recorder));
    let mut lines: Vec<VecDeque<usize>> = match lines.is_empty() {
        true => (0..placed.len()).map(|m| VecDeque::from([m])).collect(),
        false => lines.into_iter().map(VecDeque::from).collect(),
    };
    let rules: Vec<_> = placed.iter().map(|p| any_rule(p.plan.moments)).collect();
    let inputs: Vec<Vec<&[u8]>> = placed.iter().map(|p| vec![&[][..]; p.model.train.inputs.len()]).collect();
    let mut begun = vec![0; placed.len()];
    let mut end_secs = vec![0.0; placed.len()];
    let mut running = 0;
    let mut fill = |engine: &mut Engine, m: usize, running: &mut usize| -> Result<()> {
        while begun[m] < steps[m] && engine.steps_in_flight(m) < 2 {
            let clip = clips[m].then_some(1.0);
            let (rule, inputs) = (rules[m], inputs[m].clone());
            engine.begin_step(m, &StepInput { step: begun[m], inputs, loss_scale: 1.0, rule, clip })?;
            begun[m] += 1;
            *running += 1;
        }
        Ok(())
    };
    for line in &mut lines {
        line.retain(|&m| steps[m] > 0);
        if let Some(&m) = line.front() {
            fill(&mut engine, m, &mut running)?;
        }
    }
    while running > 0 {
        match engine.wait_any()? {
            Ended::Step(m, result) => {
                running -= 1;
                end_secs[m] = engine.now_secs();
                fill(&mut engine, m, &mut running)?;
                if result.step + 1 == steps[m] {
                    let line = lines.iter_mut().find(|l| l.front() == Some(&m)).expect("a model is first in its line");
                    line.pop_front();
                    if let Some(&next) = line.front() {
                        fill(&mut engine, next, &mut running)?;
                    }
                }
            }
            Ended::Evaluation(..) => unreachable!("none was begun"),
            Ended::Model(_, error) => return Err(error),
        }
    }
    let makespan_secs = end_secs.iter().copied().fold(0.0, f64::max);
    let sums = engine.lane_sums().to_vec();
    let busy = |d: usize| {
        let of_device = |s: &&LaneSum| s.lane.kind == LaneKind::Compute && usize::from(s.lane.device) == d;
        sums.iter().find(of_device).map_or(0.0, |s| s.busy_secs)
    };
    let utilisation = (0..devices).map(|d| busy(d) / makespan_secs.max(f64::MIN_POSITIVE)).collect();
    Ok(Simulation { makespan_secs, utilisation, end_secs, bounds, recorder: engine.take_recorder(), sums })
}

/// What no schedule of these plans can beat: arithmetic as planned, and the bytes that must cross however shards are spread. A step fetches every
/// shard once, since an update makes copies stale, and again for its backward where all devices' slots together cannot have kept it.
pub fn bounds_of(placed: &[Placed], steps: &[u64], costs: &[CostModel], shared: Option<f64>) -> Bounds {
    let total =
        |cost: &CostModel| placed.iter().zip(steps).map(|(p, &n)| n as f64 * arithmetic_secs(p, cost)).sum::<f64>();
    let first = total(&costs[0]);
    let devices: Vec<DeviceRates> = costs
        .iter()
        .map(|cost| DeviceRates {
            speed: if *cost == costs[0] { 1.0 } else { first / total(cost) },
            h2d_bytes_per_sec: cost.h2d_bytes_per_sec,
            d2h_bytes_per_sec: cost.d2h_bytes_per_sec,
        })
        .collect();
    let work = |(p, &steps): (&Placed, &u64)| {
        let (down, up) = least_bytes(p, costs.len());
        ModelWork {
            arithmetic_secs: steps as f64 * arithmetic_secs(p, &costs[0]),
            h2d_bytes: steps * down,
            d2h_bytes: steps * up,
            pinned: match &p.home {
                Home::On(devices) if devices.iter().all(|d| *d == devices[0]) => Some(devices[0]),
                _ => None,
            },
        }
    };
    Bounds::new(&placed.iter().zip(steps).map(work).collect::<Vec<_>>(), &devices, shared)
}

/// Seconds of a step's arithmetic on a device.
fn arithmetic_secs(placed: &Placed, cost: &CostModel) -> f64 {
    let plan = &placed.plan;
    plan.shards.iter().map(|s| s.step_secs(cost)).sum::<f64>() * placed.model.microbatches as f64
}

/// Least bytes of a step to devices, and from them.
fn least_bytes(placed: &Placed, devices: usize) -> (u64, u64) {
    let plan = &placed.plan;
    if plan.choice.resident {
        return (0, 0);
    }
    let all: u64 = plan.shards.iter().map(|s| s.fetch_bytes()).sum();
    let mut sizes: Vec<u64> = plan.shards.iter().map(|s| s.fetch_bytes()).collect();
    // Kept at best: as many shards as there are slots, the largest.
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let again: u64 = sizes.iter().skip(plan.choice.slots * devices).sum();
    let up = plan.shards.iter().map(|s| s.own_bytes()).sum::<u64>();
    (all + again, up)
}
