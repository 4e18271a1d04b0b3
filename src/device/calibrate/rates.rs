//! Networks as calibration runs them, op by op, and the rates derived from their seconds.

use crate::base::{DType, Result, align_up};
use crate::device::sim::Rate;
use crate::device::{Memory, Run, Scalars, Span, Task};
use crate::graph::{
    ALIGNMENT, AREAS, Area, Cost, Family, Graph, Kind, ModelLayout, Program, ShardLayout, Step, differentiate,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A network's one program, and where its areas lie in its part of the arena.
pub(super) struct Network {
    /// The ops that are timed: all of the program's, without tf32, and where the graph allows tf32, its products once
    /// more in tf32.
    pub steps: Vec<Step>,
    area_bytes: [u64; AREAS],
    pub bases: [u64; AREAS],
    pub arena_bytes: u64,
    /// Offsets and lengths, in its part, of ids and labels, which must be below [`super::networks::CLASSES`].
    integers: Vec<(u64, u64)>,
}

impl Network {
    pub fn new(mut graph: Graph) -> Result<Network> {
        differentiate(&mut graph)?;
        let layout = ModelLayout::new(&graph);
        let shard = ShardLayout::new(&graph, &layout, 0..graph.layers.len());
        let program = Program::new(&graph, &layout, &shard, Kind::Last { recompute: false });
        let mut bases = [0; AREAS];
        let mut end = 0;
        for (base, bytes) in bases.iter_mut().zip(program.area_bytes) {
            *base = align_up(end, ALIGNMENT);
            end = *base + bytes;
        }
        let integers = program
            .inputs
            .iter()
            .filter(|used| graph.inputs[used.input].dtype == DType::I32)
            .map(|used| (bases[Area::Inputs as usize] + used.offset, used.bytes))
            .collect();
        let of_precision = |step: &Step, tf32| Step { cost: Cost { tf32, ..step.cost }, ..step.clone() };
        let again = program.steps.iter().filter(|step| step.cost.tf32).cloned();
        let steps = program.steps.iter().map(|step| of_precision(step, false)).chain(again).collect();
        Ok(Network { steps, area_bytes: program.area_bytes, bases, arena_bytes: align_up(end, ALIGNMENT), integers })
    }

    /// Where ids and labels lie on `device` when its part of the arena begins at `start`.
    pub fn integers(&self, device: u16, start: u64) -> impl Iterator<Item = Span> + '_ {
        self.integers.iter().map(move |&(at, bytes)| Span { memory: Memory::Device(device), offset: start + at, bytes })
    }

    /// The ops that are timed, each as a program of its own, in its place on `device`.
    pub fn tasks(&self, device: u16, start: u64) -> impl Iterator<Item = Task> + '_ {
        self.steps.iter().map(move |step| {
            let one = Program::of_steps(vec![step.clone()], self.area_bytes, Vec::new(), step.cost.tf32);
            run(one, device, self.bases.map(|base| start + base))
        })
    }
}

/// A task that runs `program` on `device`.
pub(super) fn run(program: Program, device: u16, bases: [u64; AREAS]) -> Task {
    let scalars = Scalars { seed: 1, step: 0, microbatch: 0, loss_scale: 1e-3, accumulate: false };
    Task::Run(Box::new(Run { program: Arc::new(program), device, bases, scalars, check: false }))
}

/// The key of a rate: a family, an element type, whether in tf32, and a size.
type Measured = (Family, DType, bool, [usize; 3]);

/// Rates while they are being gathered.
#[derive(Default)]
pub(super) struct Rates {
    /// Total work and seconds of all ops that share a rate.
    sums: BTreeMap<Measured, (f64, f64)>,
    pub fastest_bytes_per_sec: f64,
}

impl Rates {
    /// Adds the ops of a network, whose seconds `secs` each include a start-up time of `start_secs`.
    pub fn add(&mut self, network: &Network, secs: &[f64], start_secs: f64) {
        for (Step { cost, .. }, &secs) in network.steps.iter().zip(secs) {
            // A time below the noise of the clock and of the start-up time says nothing about a rate.
            let secs = (secs - start_secs).max(0.05 * start_secs).max(1e-7);
            self.fastest_bytes_per_sec = self.fastest_bytes_per_sec.max(cost.bytes as f64 / secs);
            if cost.work() > 0.0 {
                let sum = self.sums.entry((cost.family, cost.float, cost.tf32, cost.sizes)).or_default();
                *sum = (sum.0 + cost.work(), sum.1 + secs);
            }
        }
    }

    pub fn all(self) -> Vec<Rate> {
        let rate = |((family, float, tf32, sizes), (work, secs)): (Measured, (f64, f64))| Rate {
            family,
            float,
            tf32,
            sizes,
            work_per_sec: work / secs,
        };
        self.sums.into_iter().map(rate).collect()
    }
}
