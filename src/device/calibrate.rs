//! Measures a device in about a second, so that plans are predicted in its own seconds.
//!
//! Networks of usual shapes (see `networks`), small ones for the host and for a GPU such as fill it, are traced and placed like any model; their programs run on the device op by op, each
//! op as a task of its own, so that an op is measured with the operands, the caches and the threads that it has in a model. The first
//! pass is thrown away. Of the others the lower quartile counts: what else runs on the machine only ever adds to a time, and on an idle
//! machine the quartile is the median within a percent or two.

mod networks;

use super::sim::{CostModel, Rate};
use super::{
    AdamwRule, CopySpan, Device, DeviceMemory, DeviceSpec, Memory, Run, Scalars, Segment, Span, Task, Ticket, Update,
    UpdateRule,
};
use crate::base::{DType, Error, Result, Shape, align_up};
use crate::graph::{
    ALIGNMENT, AREAS, Area, Buffer, Cost, Family, Graph, Kind, ModelLayout, Op, Program, ShardLayout, Step,
    differentiate,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Passes over each network that are timed: as many as fit its share of the second, within these bounds.
const PASSES: std::ops::RangeInclusive<usize> = 3..=9;
/// A network's share.
const NETWORK_SECS: f64 = 0.07;
/// Times that a copy or an update is timed.
const TIMES: usize = 5;
/// Elements of the update that is timed, on the host and on a GPU: four arrays of this are larger than most last-level caches.
const UPDATE_ELEMS: [u64; 2] = [1 << 21, 1 << 25];
/// The large copy that is timed.
const LARGE_COPY_BYTES: u64 = 16 << 20;
/// The small one: mostly what starting a copy costs.
const SMALL_COPY_BYTES: u64 = 4096;
/// The device's lanes, in the order that every device of one has them.
const COMPUTE: u16 = 0;
const H2D: u16 = 1;
const D2H: u16 = 2;
const HOST_MATH: u16 = 3;

/// What an emulated device is taken to do, without measuring: its seconds serve no plan, and a second of it computes little.
const EMULATED: (f64, f64, f64) = (1e9, 1e9, 1e10);

/// Measures a device. Waits about a second.
///
/// # Errors
/// When the device cannot be started, or a task fails on it.
pub fn calibrate(spec: &DeviceSpec) -> Result<CostModel> {
    if let DeviceSpec::Emulated { .. } = spec {
        return Ok(CostModel::stated(EMULATED.0, EMULATED.1, EMULATED.2));
    }
    let is_gpu = matches!(spec, DeviceSpec::Cuda { .. });
    let graphs = if is_gpu { networks::large()? } else { networks::all()? };
    let mut networks = Vec::new();
    for mut graph in graphs {
        graph.scratch = spec.wants_scratch();
        networks.push(Network::new(graph)?);
    }
    let update_elems = UPDATE_ELEMS[usize::from(is_gpu)];
    let arena_bytes =
        networks.iter().map(|n| n.arena_bytes).max().unwrap_or(0).max(16 * update_elems + 4096).max(LARGE_COPY_BYTES);
    let id_bytes = networks.iter().flat_map(|n| &n.integers).map(|s| s.bytes).max().unwrap_or(0);
    // Poison touches every page, so that no page fault is timed.
    let device = spec.start(DeviceMemory { arena_bytes, host_bytes: arena_bytes + id_bytes, poison: true })?;
    let mut bench = Bench { device };
    bench.fill_host(arena_bytes, id_bytes);
    let (run_secs, op_secs) = bench.starts()?;
    let mut rates = Rates::default();
    for network in &networks {
        rates.add(network, &bench.walk(network, arena_bytes)?, run_secs + op_secs);
    }
    let (small, h2d) = bench.copies(H2D)?;
    let (_, d2h) = bench.copies(D2H)?;
    let update_bytes = 28.0 * update_elems as f64;
    Ok(CostModel {
        memory_bytes_per_sec: rates.fastest_bytes_per_sec,
        rates: rates.all(),
        op_secs,
        run_secs,
        h2d_bytes_per_sec: h2d,
        d2h_bytes_per_sec: d2h,
        copy_secs: small,
        device_update_bytes_per_sec: update_bytes / bench.update(COMPUTE, update_elems)?,
        host_update_bytes_per_sec: update_bytes / bench.update(HOST_MATH, update_elems)?,
        hand_over_secs: bench.hand_over()?,
    })
}

/// A network's one program, and where its areas lie in the arena.
struct Network {
    program: Program,
    bases: [u64; AREAS],
    arena_bytes: u64,
    /// Stretches of the arena that hold ids and labels, which must be below [`networks::CLASSES`].
    integers: Vec<Span>,
}

impl Network {
    fn new(mut graph: Graph) -> Result<Network> {
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
            .map(|used| {
                let offset = bases[Area::Inputs as usize] + used.offset;
                Span { memory: Memory::Device(0), offset, bytes: used.bytes }
            })
            .collect();
        Ok(Network { program, bases, arena_bytes: end, integers })
    }

    /// Each op as a program of its own, in its place.
    fn steps(&self) -> impl Iterator<Item = Task> + '_ {
        self.program.steps.iter().map(|step| {
            run(Program::of_steps(vec![step.clone()], self.program.area_bytes, Vec::new(), false), self.bases)
        })
    }
}

fn run(program: Program, bases: [u64; AREAS]) -> Task {
    let scalars = Scalars { seed: 1, step: 0, microbatch: 0, loss_scale: 1e-3, accumulate: false };
    Task::Run(Box::new(Run { program: Arc::new(program), device: 0, bases, scalars, check: false }))
}

/// Rates by family and size, while they are gathered.
#[derive(Default)]
struct Rates {
    /// Work and seconds of all ops of one family and size.
    sums: BTreeMap<(Family, DType, [usize; 3]), (f64, f64)>,
    fastest_bytes_per_sec: f64,
}

impl Rates {
    fn add(&mut self, network: &Network, secs: &[f64], start_secs: f64) {
        for (Step { cost, .. }, &secs) in network.program.steps.iter().zip(secs) {
            // What is below the clock's and the start's own spread tells nothing of a rate.
            let secs = (secs - start_secs).max(0.05 * start_secs).max(1e-7);
            self.fastest_bytes_per_sec = self.fastest_bytes_per_sec.max(cost.bytes as f64 / secs);
            if cost.work() > 0.0 {
                let sum = self.sums.entry((cost.family, cost.float, cost.sizes)).or_default();
                *sum = (sum.0 + cost.work(), sum.1 + secs);
            }
        }
    }

    fn all(self) -> Vec<Rate> {
        let all = self.sums.into_iter();
        all.map(|((family, float, sizes), (work, secs))| Rate { family, float, sizes, work_per_sec: work / secs })
            .collect()
    }
}

struct Bench {
    device: Box<dyn Device>,
}

impl Bench {
    /// Submits tasks one after another on a lane and gives the seconds of each.
    fn time(&mut self, lane: u16, tasks: impl Iterator<Item = Task>) -> Result<Vec<f64>> {
        let submitted = tasks.map(|task| self.device.submit(lane, task, &[])).count();
        (0..submitted).map(|_| self.wait().map(|(start, end)| end - start)).collect()
    }

    /// Start and end of the next task that completes.
    fn wait(&mut self) -> Result<(f64, f64)> {
        let done = self.device.next_completion(60.0);
        let done = done.ok_or_else(|| Error::Device("calibration: a small task did not end within a minute".into()))?;
        done.result?;
        Ok((done.start_secs, done.end_secs))
    }

    /// Fills the host's store: the first `arena_bytes` with small numbers, the rest with ids.
    fn fill_host(&mut self, arena_bytes: u64, id_bytes: u64) {
        let numbers: Vec<f32> = (0..1 << 16).map(|i| (i * 7919 % 4099) as f32 / 4e4 - 0.05).collect();
        let ids: Vec<i32> = (0..1 << 16).map(|i| i * 7919 % networks::CLASSES as i32).collect();
        let stretches = [
            (0, arena_bytes, bytemuck::cast_slice(&numbers)),
            (arena_bytes, arena_bytes + id_bytes, bytemuck::cast_slice(&ids)),
        ];
        for (start, end, pattern) in stretches {
            for at in (start..end).step_by(pattern.len()) {
                self.device.write_host(at, &pattern[..(end - at).min(pattern.len() as u64) as usize]);
            }
        }
    }

    /// Seconds of each op of `network`.
    fn walk(&mut self, network: &Network, ids_at: u64) -> Result<Vec<f64>> {
        let mut spans = copy(Memory::Host, Memory::Device(0), network.arena_bytes);
        for &to in &network.integers {
            spans.push(CopySpan { from: Span { memory: Memory::Host, offset: ids_at, ..to }, to });
        }
        self.time(H2D, [Task::Copy(spans)].into_iter())?;
        self.time(COMPUTE, network.steps())?;
        let mut passes = Vec::new();
        let begin = self.device.now_secs();
        while passes.len() < *PASSES.start()
            || (passes.len() < *PASSES.end() && self.device.now_secs() - begin < NETWORK_SECS)
        {
            passes.push(self.time(COMPUTE, network.steps())?);
        }
        Ok((0..network.program.steps.len()).map(|i| lower_quartile(passes.iter().map(|p| p[i]).collect())).collect())
    }

    /// Seconds that starting a program costs, and each op in it.
    fn starts(&mut self) -> Result<(f64, f64)> {
        const OPS: usize = 64;
        const ROUNDS: usize = 50;
        let out = Buffer::new(Area::Workspace, 0, Shape::from([16]), DType::F32);
        let cost =
            Cost { flops: 0.0, bytes: 64, family: Family::Memory, float: DType::F32, elems: 16, sizes: [64, 16, 1] };
        let step = Step {
            op: Op::Zero,
            layer: 0,
            inputs: Vec::new(),
            outputs: vec![Some(out)],
            scratch: None,
            cost,
            ends_layer: false,
        };
        let tasks = |ops: usize| {
            let steps = vec![step.clone(); ops];
            (0..ROUNDS).map(move |_| run(Program::of_steps(steps.clone(), [0; AREAS], Vec::new(), false), [0; AREAS]))
        };
        let empty = lower_quartile(self.time(COMPUTE, tasks(0))?);
        let full = lower_quartile(self.time(COMPUTE, tasks(OPS))?);
        Ok((empty, (full - empty).max(0.0) / OPS as f64))
    }

    /// Seconds that starting a copy on `lane` costs, and bytes per second of a large one.
    fn copies(&mut self, lane: u16) -> Result<(f64, f64)> {
        let (from, to) =
            if lane == H2D { (Memory::Host, Memory::Device(0)) } else { (Memory::Device(0), Memory::Host) };
        let tasks = |bytes| std::iter::repeat_n(Task::Copy(copy(from, to, bytes)), TIMES + 1);
        let small = lower_quartile(self.time(lane, tasks(SMALL_COPY_BYTES))?.split_off(1));
        let large = lower_quartile(self.time(lane, tasks(LARGE_COPY_BYTES))?.split_off(1));
        Ok((small, (LARGE_COPY_BYTES - SMALL_COPY_BYTES) as f64 / (large - small).max(1e-9)))
    }

    /// Seconds of an AdamW update of `elems` on `lane`.
    fn update(&mut self, lane: u16, elems: u64) -> Result<f64> {
        let memory = if lane == HOST_MATH { Memory::Host } else { Memory::Device(0) };
        let bytes = 4 * elems;
        let array = |i: u64| Span { memory, offset: i * bytes, bytes };
        // Second moments must not be negative, and the arena holds whatever ran last: gradients and moments start at 0.
        let zero = vec![0; 3 * bytes as usize + 64];
        self.device.write_host(bytes, &zero);
        self.time(H2D, [Task::Copy(copy(Memory::Host, Memory::Device(0), 4 * bytes + 64))].into_iter())?;
        let rule = AdamwRule { update: 10, lr: 1e-3, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.1 };
        let update = Update {
            rule: UpdateRule::Adamw(rule),
            segments: vec![Segment { offset: 0, elems, decay: true, index: 0 }].into(),
            weight: array(0),
            remainder: None,
            moments: [Some(array(1)), Some(array(2))],
            gradient: array(3),
            clip: None,
            gate: Span { memory, offset: 4 * bytes, bytes: 4 },
        };
        let tasks = std::iter::repeat_n(Task::Update(Box::new(update)), TIMES + 1);
        Ok(lower_quartile(self.time(lane, tasks)?.split_off(1)))
    }

    /// Seconds between the end of a task and the start of one on another lane that waited for it.
    fn hand_over(&mut self) -> Result<f64> {
        const ROUNDS: usize = 50;
        let mut before: Option<Ticket> = None;
        for i in 0..ROUNDS {
            let (lane, from, to) = if i % 2 == 0 {
                (H2D, Memory::Host, Memory::Device(0))
            } else {
                (D2H, Memory::Device(0), Memory::Host)
            };
            let ticket = self.device.submit(lane, Task::Copy(copy(from, to, 64)), before.as_slice());
            before = Some(ticket);
        }
        let times = (0..ROUNDS).map(|_| self.wait()).collect::<Result<Vec<_>>>()?;
        Ok(lower_quartile(times.windows(2).map(|w| (w[1].0 - w[0].1).max(0.0)).collect()))
    }
}

/// The first `bytes` of one memory to the first of another.
fn copy(from: Memory, to: Memory, bytes: u64) -> Vec<CopySpan> {
    let span = |memory| Span { memory, offset: 0, bytes };
    vec![CopySpan { from: span(from), to: span(to) }]
}

/// The value that a quarter of the others is below.
fn lower_quartile(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 4]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Work;

    /// Every family has a rate, and every number is one that a plan can be made with. How fast is for `benches/prediction.rs` to say.
    #[test]
    fn measures_every_family() {
        let spec = super::super::host::HostSpec { threads: Some(1), ..Default::default() };
        let model = calibrate(&spec.into()).unwrap();
        for family in Family::ALL {
            let mut rates = model.rates.iter().filter(|r| r.family == family).peekable();
            assert!(rates.peek().is_some(), "{family:?} was not measured");
            assert!(rates.all(|r| r.work_per_sec.is_finite() && r.work_per_sec > 0.0), "{family:?}");
        }
        let rates = [
            model.memory_bytes_per_sec,
            model.h2d_bytes_per_sec,
            model.d2h_bytes_per_sec,
            model.device_update_bytes_per_sec,
            model.host_update_bytes_per_sec,
        ];
        assert!(rates.iter().all(|r| r.is_finite() && *r > 0.0), "{model:?}");
        let secs = [model.op_secs, model.run_secs, model.copy_secs, model.hand_over_secs];
        assert!(secs.iter().all(|s| s.is_finite() && *s >= 0.0), "{model:?}");
        assert!(model.rates.iter().any(|r| r.family.work() == Work::Flops && r.sizes.iter().all(|&n| n >= 64)));
    }

    #[test]
    fn quartiles() {
        assert_eq!(lower_quartile(vec![3.0, 1.0, 2.0]), 1.0);
        assert_eq!(lower_quartile(vec![1.0]), 1.0);
        assert_eq!(lower_quartile(vec![5.0, 4.0, 3.0, 2.0, 1.0]), 2.0);
    }
}
