//! Random workloads: models, devices, links and budgets, repeated by their seed, with what each visit copies and
//! computes.
//!
//! Sizes are drawn by ratios, so nothing depends on what a second or a byte is: a device's arithmetic over its link,
//! rows for a wanted ratio of a shard's fetch to its forward, widths for the boundary tensors.

use super::models::{Chain, Random};
use hydra::device::sim::CostModel;
use hydra::engine::{SimulateOptions, Simulation, simulate};
use hydra::sched::{LocalityLrtf, Policy, by_name, rehearse};
use hydra::spill::{BoundaryTier, FleetDevice, FleetMap, FleetModel, Placed, PlanOptions, Updates, plan_anywhere};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A planned workload.
pub struct Workload {
    pub seed: u64,
    pub placed: Vec<Placed>,
    pub steps: Vec<u64>,
    pub costs: Vec<CostModel>,
    pub shared_bytes_per_sec: Option<f64>,
    pub budget: Option<u64>,
}

impl Workload {
    /// - 2 to 64 models of 1 to 4 kinds, on 1 to 16 devices, both evenly by their logarithms; 4 to 12 steps each.
    /// - A kind is a chain of 2 to 24 shards of 1 or 2 layers; widths of 256 to 4096 that differ within a chain by up
    ///   to 2; 1 to 3 microbatches; 0 to 2 moments; an input of 0.06 to 1 of the width. One kind in six has its cut
    ///   searched by the planner, from up to 12 layers.
    /// - A shard's fetch takes 0.03 to 0.6 of its forward in two of three workloads, 0.5 to 4 in the others.
    /// - One in four has unequal devices (arithmetic and links of 1 to 4 times the slowest's), one in four a host link
    ///   that all share, for a quarter to all of what their links carry together.
    /// - Half have all the memory that they want, the others a budget between the smallest that works and that.
    pub fn new(seed: u64) -> Workload {
        let mut random = Random(seed ^ 0x5eed_0000_0000);
        let devices = random.factor(1.0, 16.99) as usize;
        let models = random.factor(2.0, 64.99) as usize;
        let flops_per_sec = 10e12;
        // Flops in the time that a byte takes.
        let intensity = random.factor(50.0, 1000.0);
        let mut cost = CostModel::stated(flops_per_sec, 900e9, flops_per_sec / intensity);
        cost.host_update_bytes_per_sec = random.factor(8.0, 40.0) * devices as f64 * cost.h2d_bytes_per_sec;
        let unequal = random.whole(0, 3) == 0;
        let costs: Vec<CostModel> = (0..devices)
            .map(|_| {
                let factor = if unequal { random.factor(1.0, 4.0) } else { 1.0 };
                let mut faster = CostModel::stated(factor * 10e12, factor * 900e9, cost.h2d_bytes_per_sec * factor);
                faster.host_update_bytes_per_sec = cost.host_update_bytes_per_sec;
                faster
            })
            .collect();
        let links: f64 = costs.iter().map(|c| c.h2d_bytes_per_sec).sum();
        let shared_bytes_per_sec = (random.whole(0, 3) == 0).then(|| links * random.factor(0.25, 1.0));
        let few_copies = random.whole(0, 2) > 0;
        let kinds: Vec<FleetModel> =
            (0..random.whole(1, 4).min(models)).map(|i| kind(i, &mut random, intensity, few_copies)).collect();
        let fleet: Vec<FleetModel> = (0..models)
            .map(|i| FleetModel {
                steps: random.whole(4, 12) as u64,
                ..kinds[if i < kinds.len() { i } else { random.whole(0, kinds.len() - 1) }].clone()
            })
            .collect();
        let plan = |budget: Option<u64>| {
            let devices: Vec<FleetDevice> = costs.iter().map(|c| FleetDevice { budget, cost: c.clone() }).collect();
            plan_anywhere(&fleet, &devices).map(|plan| plan.placed)
        };
        let widest = plan(None).expect("no budget is too small");
        let bytes = FleetMap::new(&widest, 1).arena_bytes[0];
        let smallest = widest.iter().map(|p| p.plan.smallest_device_bytes).max().expect("two models at least");
        let budget = (random.whole(0, 1) == 0).then(|| smallest + (random.part() * (bytes - smallest) as f64) as u64);
        // Smallest plans of several kinds may need more together than the largest of them alone.
        let (budget, placed) = match budget.map(|b| (b, plan(Some(b)))) {
            Some((budget, Ok(placed))) => (Some(budget), placed),
            _ => (None, widest),
        };
        let steps = fleet.iter().map(|m| m.steps).collect();
        Workload { seed, placed, steps, costs, shared_bytes_per_sec, budget }
    }

    pub fn run(&self, policy: &str) -> Simulation {
        self.run_by(by_name(policy, 1))
    }

    /// The makespan of locality-LRTF as a rehearsal that simulates so many visits finds it best.
    pub fn rehearse(&self, visits: u64, may_pipeline: bool) -> f64 {
        let units: Vec<usize> = self.placed.iter().map(|p| 2 * p.plan.shards.len() - 1).collect();
        let each: u64 = units.iter().zip(&self.steps).map(|(&units, steps)| units as u64 * steps).sum();
        let secs = |policy: &LocalityLrtf| Ok::<_, ()>(self.run_by(Some(Box::new(policy.clone()))).makespan_secs);
        let found = rehearse(&LocalityLrtf::default(), may_pipeline, &units, (visits / each) as usize, secs);
        found.expect("nothing fails").makespan_secs
    }

    fn run_by(&self, policy: Option<Box<dyn Policy>>) -> Simulation {
        let budgets = vec![self.budget; self.costs.len()];
        let options = SimulateOptions {
            shared_bytes_per_sec: self.shared_bytes_per_sec,
            arena_bytes: FleetMap::within(&self.placed, &budgets).arena_bytes,
            policy,
            ..SimulateOptions::new(self.steps.clone(), self.costs.clone())
        };
        simulate(&self.placed, options).expect("nothing fails")
    }

    /// Whether every plan has slots and entries to copy beside the arithmetic.
    pub fn is_deep(&self) -> bool {
        let deep = |p: &Placed| {
            let choice = &p.plan.choice;
            choice.gradient_slots > 1 && choice.activations != BoundaryTier::Host { entries: 2 }
        };
        self.placed.iter().all(deep)
    }

    /// The greatest ratio of copies to arithmetic of any visit on any device.
    pub fn greatest_ratio(&self) -> f64 {
        self.visits().map(|v| (v.h2d_secs + v.d2h_secs) / v.secs).fold(0.0, f64::max)
    }

    /// Copies of all visits in the direction that takes longer, over all arithmetic.
    pub fn whole_ratio(&self) -> f64 {
        let sum = |of: &dyn Fn(&Visit) -> f64| self.visits().map(|v| v.steps * of(&v)).sum::<f64>();
        sum(&|v| v.h2d_secs).max(sum(&|v| v.d2h_secs)) / sum(&|v| v.secs)
    }

    fn visits(&self) -> impl Iterator<Item = Visit> {
        let share = self.shared_bytes_per_sec.map_or(f64::INFINITY, |rate| rate / self.costs.len() as f64);
        let of = move |(p, &steps)| self.costs.iter().flat_map(move |cost| visits(p, steps as f64, cost, share));
        self.placed.iter().zip(&self.steps).flat_map(of)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut shards: Vec<usize> = self.placed.iter().map(|p| p.plan.shards.len()).collect();
        shards.sort_unstable();
        shards.dedup();
        let choice = &self.placed[0].plan.choice;
        let unequal = self.costs.iter().any(|c| *c != self.costs[0]);
        write!(
            f,
            "seed {}: {} models of {shards:?} shards on {}{} devices{}{}, copies {:.2} of arithmetic, up to {:.2} in a visit; gradient slots {}, {:?}, on device {}",
            self.seed,
            self.placed.len(),
            self.costs.len(),
            if unequal { " unequal" } else { "" },
            if self.shared_bytes_per_sec.is_some() { ", shared link" } else { "" },
            if self.budget.is_some() { ", budget" } else { "" },
            self.whole_ratio(),
            self.greatest_ratio(),
            choice.gradient_slots,
            choice.activations,
            choice.visiting_updates > 0,
        )
    }
}

fn kind(i: usize, random: &mut Random, intensity: f64, few_copies: bool) -> FleetModel {
    let searched = random.whole(0, 5) == 0;
    let shards = if searched { random.whole(3, 12) } else { random.factor(2.0, 24.99) as usize };
    let layers_each = if searched { 1 } else { random.whole(1, 2) };
    let width = random.factor(256.0, 4096.0);
    let ratio = if few_copies { random.factor(0.03, 0.6) } else { random.factor(0.5, 4.0) };
    let microbatches = random.whole(1, 3);
    // A fetch of 4 bytes a weight takes `ratio` of 2 flops a row and weight.
    let rows = (2.0 * intensity / ratio / microbatches as f64).ceil() as usize;
    let spread = random.factor(1.0, 2.0);
    let widths = |random: &mut Random| vec![(width * random.factor(1.0, spread)) as usize];
    let layers: Vec<Vec<usize>> = (0..shards * layers_each).map(|_| widths(random)).collect();
    let input = (width * random.factor(0.06, 1.0)) as usize;
    let chain = Chain { rows, input, layers, microbatches };
    let cut: Vec<Range<usize>> = (0..shards).map(|s| s * layers_each..(s + 1) * layers_each).collect();
    let options = PlanOptions {
        updates: Updates { moments: random.whole(0, 2), clips: false },
        cut: (!searched).then_some(cut),
        ..PlanOptions::default()
    };
    FleetModel { name: format!("kind {i}"), model: Arc::clone(&chain.model()), options, steps: 0 }
}

/// What a visit takes on a device, and how often it comes.
struct Visit {
    secs: f64,
    h2d_secs: f64,
    d2h_secs: f64,
    steps: f64,
}

/// The visits of a step, with all that they may have to copy: weights that no slot holds, boundary tensors from and to
/// other devices.
fn visits(p: &Placed, steps: f64, cost: &CostModel, share: f64) -> Vec<Visit> {
    let (shards, choice, m) = (&p.plan.shards, &p.plan.choice, p.model.microbatches as f64);
    let before = |s: usize| if s == 0 { 0.0 } else { m * shards[s - 1].boundary_bytes as f64 };
    let inputs = |s: usize| m * shards[s].input_bytes() as f64;
    let after = |s: usize| m * shards[s].boundary_bytes as f64;
    let visit = |secs: f64, h2d: f64, d2h: f64| Visit {
        secs,
        h2d_secs: h2d / cost.h2d_bytes_per_sec.min(share),
        d2h_secs: d2h / cost.d2h_bytes_per_sec.min(share),
        steps,
    };
    let forward = |s: usize| {
        let fetch = shards[s].fetch_bytes() as f64;
        visit(m * shards[s].forward_secs(cost), fetch + before(s) + inputs(s), after(s))
    };
    let backward = |s: usize| {
        let (fetch, own) = (shards[s].fetch_bytes() as f64, shards[s].own_bytes() as f64);
        let moments = p.plan.updates.moments as f64 * own;
        let (state, leaves) = if choice.updates_on_device(s) { (moments, own + moments) } else { (0.0, own) };
        visit(m * shards[s].backward_secs(cost), fetch + before(s) + after(s) + inputs(s) + state, before(s) + leaves)
    };
    let n = shards.len();
    (0..n - 1).map(forward).chain((0..n).rev().map(backward)).collect()
}
