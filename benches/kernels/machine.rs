//! One device with an arena, and programs of one op repeated over several sets of operands.
//!
//! A sample is one program: the op again and again, each time on the next set, so that what is read has left the L2 and
//! the cost of starting a program is spread. Its time is that between the two marks around it on the device's own
//! clock.

use crate::shapes::Case;
use half::bf16;
use hydra::base::philox::Sequence;
use hydra::base::{DType, Error, Result, Shape, align_up};
use hydra::device::{Completion, CopySpan, Device, DeviceMemory, DeviceSpec, Memory, Run, Scalars, Span, Task, Ticket};
use hydra::graph::{
    ALIGNMENT, AREAS, Area, Buffer, Cost, Graph, Input, Kind, Layer, ModelLayout, Node, Op, Program, ShardLayout,
    Source, Step, Value, ValueInfo,
};
use std::sync::Arc;

/// The device's lanes, in the order that every device of one has them.
pub const COMPUTE: u16 = 0;
/// Host to device.
pub const H2D: u16 = 1;
/// Device to host.
pub const D2H: u16 = 2;

/// Longer than any task here takes: on a GPU, where it tells a kernel that does not end, and on the emulator.
const GPU_PATIENCE_SECS: f64 = 20.0;
const PATIENCE_SECS: f64 = 300.0;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Samples that count, after the warm-up.
    pub samples: usize,
    /// Samples that do not.
    pub warm_up: usize,
    /// Least bytes that lie between two uses of a set: more than twice any L2 cache.
    pub rotate_bytes: u64,
    /// A program repeats its op until it takes as long as this.
    pub sample_secs: f64,
    /// Bytes of each host pattern that operands are filled from.
    pub pattern_bytes: u64,
    /// Bytes of the large copies.
    pub copy_bytes: u64,
}

impl Effort {
    /// For numbers that are to be told.
    pub const FULL: Effort = Effort {
        samples: 30,
        warm_up: 5,
        rotate_bytes: 256 << 20,
        sample_secs: 2e-3,
        pattern_bytes: 64 << 20,
        copy_bytes: 256 << 20,
    };
    /// To see that it runs; numbers are rough.
    pub const QUICK: Effort = Effort { samples: 5, warm_up: 1, sample_secs: 2e-4, ..Effort::FULL };
    /// For the emulator: shapes of a few elements.
    pub const TINY: Effort = Effort {
        samples: 2,
        warm_up: 1,
        rotate_bytes: 0,
        sample_secs: 0.0,
        pattern_bytes: 1 << 16,
        copy_bytes: 1 << 16,
    };
}

/// Most sets of operands, and most repetitions in a program.
const MOST_SETS: u64 = 64;
const MOST_REPEATS: usize = 512;

/// One op as a step on flat memory, and how many sets of its operands there are.
pub struct Prepared {
    step: Step,
    /// What it costs.
    pub cost: Cost,
    /// Bytes from one set to the next.
    set_bytes: u64,
    /// Sets.
    pub sets: u64,
    /// Inputs and how to fill them.
    fills: Vec<Fill>,
}

impl Prepared {
    /// Places the operands of `case`.
    pub fn new(case: &Case, effort: &Effort) -> Prepared {
        let graph = alone(&case.graph, case.node());
        let layout = ModelLayout::new(&graph);
        let shard = ShardLayout::new(&graph, &layout, 0..1);
        let mut program = Program::new(&graph, &layout, &shard, Kind::Forward { keep: false });
        let mut step = program.steps.swap_remove(0);
        // What training keeps for the backward is written here too.
        for (output, buffer) in step.outputs.iter_mut().enumerate() {
            if buffer.is_none() {
                let info = graph.info(graph.nodes[0].outputs[output]);
                let kept = Buffer::new(Area::Saved, 0, info.shape.clone(), info.dtype);
                program.area_bytes[Area::Saved as usize] = kept.bytes();
                *buffer = Some(kept);
            }
        }
        let mut set_bytes = 0;
        let bases = program.area_bytes.map(|bytes| {
            let base = set_bytes;
            set_bytes = align_up(base + bytes, ALIGNMENT);
            base
        });
        let Step { inputs, outputs, scratch, .. } = &mut step;
        for buffer in inputs.iter_mut().chain(outputs.iter_mut().flatten()).chain(scratch) {
            buffer.offset += bases[buffer.area as usize];
            buffer.area = Area::Workspace;
        }
        let fills = (0..step.inputs.len()).map(|i| Fill::of(&step, i)).collect();
        let sets = effort.rotate_bytes.div_ceil(set_bytes.max(1)).clamp(2, MOST_SETS);
        Prepared { cost: step.cost, step, set_bytes, sets, fills }
    }

    /// Bytes of all sets.
    pub fn bytes(&self) -> u64 {
        self.sets * self.set_bytes
    }

    /// The op `repeats` times, each on the next set.
    fn program(&self, repeats: usize) -> Task {
        let steps = (0..repeats).map(|r| {
            let mut step = self.step.clone();
            let Step { inputs, outputs, scratch, .. } = &mut step;
            for buffer in inputs.iter_mut().chain(outputs.iter_mut().flatten()).chain(scratch) {
                buffer.offset += r as u64 % self.sets * self.set_bytes;
            }
            step
        });
        let mut area_bytes = [0; AREAS];
        area_bytes[Area::Workspace as usize] = self.bytes();
        run(Program::of_steps(steps.collect(), area_bytes, Vec::new(), false))
    }
}

fn run(program: Program) -> Task {
    let scalars = Scalars { seed: 1, step: 0, microbatch: 0, loss_scale: 1e-4, accumulate: false };
    Task::Run(Box::new(Run { program: Arc::new(program), device: 0, bases: [0; AREAS], scalars, check: false }))
}

/// A graph of one node, whose operands are inputs of the batch.
fn alone(of: &Graph, node: &Node) -> Graph {
    let mut graph = Graph { float: of.float, scratch: of.scratch, forward_nodes: 1, ..Graph::default() };
    let value = |graph: &mut Graph, like: Value, source| {
        let ValueInfo { shape, dtype, .. } = of.info(like).clone();
        graph.values.push(ValueInfo { shape, dtype, source });
        Value(graph.values.len() as u32 - 1)
    };
    let mut inputs = Vec::new();
    for (i, &like) in node.inputs.iter().enumerate() {
        let own = value(&mut graph, like, Source::Input(i));
        let ValueInfo { shape, dtype, .. } = graph.info(own).clone();
        graph.inputs.push(Input { name: format!("operand {i}"), value: own, shape, dtype });
        inputs.push(own);
    }
    let outputs: Vec<Value> = (0..node.outputs.len())
        .map(|output| value(&mut graph, node.outputs[output], Source::Node { node: 0, output }))
        .collect();
    graph.layers.push(Layer { name: "op".into(), input: None, output: outputs.first().copied() });
    graph.nodes.push(Node { op: node.op.clone(), inputs, outputs, layer: 0 });
    graph
}

/// What an operand is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    /// Normal numbers.
    Normal,
    /// Integers from 0 to below this.
    Below(u64),
    /// One number.
    Constant(f32),
}

impl Fill {
    /// What input `i` of a step holds in training, roughly: ids in range, statistics of normal numbers.
    fn of(step: &Step, i: usize) -> Fill {
        let axis = |buffer: &Buffer, at: usize| buffer.shape.axes()[at] as u64;
        let out = || step.outputs[0].as_ref().expect("every op has a first output");
        // Of n normal scores the logarithm of the summed exponentials is near ln n + 1/2.
        let lse = |n: usize| Fill::Constant((n.max(1) as f32).ln() + 0.5);
        match (&step.op, i) {
            (Op::Embedding { .. }, 0) => Fill::Below(axis(&step.inputs[1], 0)),
            (Op::EmbeddingGrad { .. }, 1) => Fill::Below(axis(out(), 0)),
            (Op::CrossEntropy | Op::CrossEntropyGrad, 1) => Fill::Below(step.inputs[0].shape.cols() as u64),
            (Op::CrossEntropyGrad, 2) => lse(step.inputs[0].shape.cols()),
            (Op::AttentionGrad(_), 2) => lse(step.inputs[3].shape.axes()[1]),
            (Op::LayerNormGrad | Op::BatchNormGrad, 3) => Fill::Constant(0.0),
            (Op::LayerNormGrad | Op::BatchNormGrad, 4) | (Op::RmsNormGrad, 3) => Fill::Constant(1.0),
            (Op::MaxPoolGrad(_), 1) => Fill::Below(axis(out(), 2) * axis(out(), 3)),
            _ => Fill::Normal,
        }
    }
}

/// A device with memory of a fixed size.
pub struct Machine {
    patience_secs: f64,
    effort: Effort,
    device: Box<dyn Device>,
}

impl Machine {
    /// Starts a device with an arena of `arena_bytes`.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn start(spec: DeviceSpec, arena_bytes: u64, effort: Effort) -> Result<Machine> {
        // Normal numbers in two types; a place for what one operand needs; and both ends of the copies that are timed.
        let host_bytes = (3 * effort.pattern_bytes).max(2 * effort.copy_bytes);
        let memory = DeviceMemory { arena_bytes, host_bytes, poison: true };
        let patience_secs = if let DeviceSpec::Cuda { .. } = spec { GPU_PATIENCE_SECS } else { PATIENCE_SECS };
        let device = spec.start(memory)?;
        let mut machine = Machine { patience_secs, effort, device };
        machine.fill_host();
        Ok(machine)
    }

    /// Two patterns of normal numbers: f32, then bf16.
    fn fill_host(&mut self) {
        let bytes = self.effort.pattern_bytes as usize;
        let mut sequence = Sequence::new(1, 0);
        // As many as are drawn in a moment, then again with another beginning: what matters is that bits look like
        // those of real numbers.
        let drawn: Vec<f32> = (0..(bytes / 4).min(1 << 20)).map(|_| sequence.normal() as f32).collect();
        let at = |i: usize| drawn[(i + i / drawn.len() * 7919) % drawn.len()];
        let wide: Vec<f32> = (0..bytes / 4).map(at).collect();
        let narrow: Vec<bf16> = (0..bytes / 2).map(|i| bf16::from_f32(at(i))).collect();
        self.write(0, bytemuck::cast_slice(&wide));
        let narrow: Vec<u8> = narrow.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.write(bytes as u64, &narrow);
    }

    /// Fills all sets' inputs.
    ///
    /// # Errors
    /// When a copy fails.
    pub fn fill(&mut self, prepared: &Prepared) -> Result<()> {
        for (i, &fill) in prepared.fills.iter().enumerate() {
            let buffer = &prepared.step.inputs[i];
            let offsets = (0..prepared.sets).map(|set| buffer.offset + set * prepared.set_bytes);
            self.fill_spans(fill, buffer.dtype, buffer.bytes(), offsets)?;
        }
        Ok(())
    }

    /// Fills stretches of the arena, each of `bytes`, from patterns in host memory; each begins elsewhere in its
    /// pattern.
    ///
    /// # Errors
    /// When a copy fails.
    pub fn fill_spans(
        &mut self,
        fill: Fill,
        dtype: DType,
        bytes: u64,
        offsets: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let pattern_bytes = self.effort.pattern_bytes;
        let from = match (fill, dtype) {
            (Fill::Normal, DType::F32) => 0,
            (Fill::Normal, _) => pattern_bytes,
            _ => 2 * pattern_bytes,
        };
        if fill != Fill::Normal {
            let mut sequence = Sequence::new(2, bytes);
            let words: Vec<u32> = (0..bytes.min(pattern_bytes) / 4)
                .map(|_| match fill {
                    Fill::Below(n) => sequence.below(n) as u32,
                    Fill::Constant(x) => x.to_bits(),
                    Fill::Normal => unreachable!("normal numbers lie ready"),
                })
                .collect();
            self.write(from, bytemuck::cast_slice(&words));
        }
        let whole = if fill == Fill::Normal { pattern_bytes } else { bytes.min(pattern_bytes).max(4) / 4 * 4 };
        let mut spans = Vec::new();
        for (set, to) in offsets.enumerate() {
            let mut start = if fill == Fill::Normal { set as u64 * 65_536 % whole } else { 0 };
            let mut done = 0;
            while done < bytes {
                let part = (bytes - done).min(whole - start);
                spans.push(CopySpan {
                    from: Span { memory: Memory::Host, offset: from + start, bytes: part },
                    to: Span { memory: Memory::Device(0), offset: to + done, bytes: part },
                });
                (start, done) = (0, done + part);
            }
        }
        self.time(H2D, Task::Copy(spans)).map(drop)
    }

    /// The program that is sampled, and how often it repeats its op: whole rounds of the sets, as many as fill a
    /// sample.
    ///
    /// # Errors
    /// When the op fails.
    pub fn sized(&mut self, prepared: &Prepared) -> Result<(Task, usize)> {
        let sets = prepared.sets as usize;
        let round = prepared.program(sets);
        self.time(COMPUTE, round.clone())?;
        let secs = self.time(COMPUTE, round.clone())?;
        let rounds =
            ((self.effort.sample_secs / secs.max(1e-7)).ceil() as usize).clamp(1, (MOST_REPEATS / sets).max(1));
        Ok(if rounds == 1 { (round, sets) } else { (prepared.program(rounds * sets), rounds * sets) })
    }

    /// A small op for the time between two tasks.
    pub fn small(&self) -> Task {
        let buffer = |offset| Buffer::new(Area::Workspace, offset, Shape::from([1024]), DType::F32);
        let family = hydra::graph::Family::Memory;
        let step = Step {
            op: Op::Add,
            layer: 0,
            inputs: vec![buffer(0), buffer(4096)],
            outputs: vec![Some(buffer(8192))],
            scratch: None,
            cost: Cost {
                flops: 0.0,
                bytes: 12_288,
                family,
                float: DType::F32,
                tf32: false,
                elems: 1024,
                sizes: [12_288, 1024, 1],
            },
            ends_layer: false,
        };
        run(Program::of_steps(vec![step], [0; AREAS], Vec::new(), false))
    }

    /// Queues a task.
    pub fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        // SAFETY: tasks that are timed at once have memory of their own, the others are waited for one by one; each
        // bench lays out what its tasks touch.
        unsafe { self.device.submit(lane, task, after) }
    }

    /// Writes patterns into the host's store, between the tasks that are timed.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: nothing is in flight.
        unsafe { self.device.write_host(offset, bytes) }
    }

    /// Waits for the next completion.
    ///
    /// # Errors
    /// When the task failed, or none ended in time.
    pub fn wait(&mut self) -> Result<Completion> {
        let patience_secs = self.patience_secs;
        let done = self.device.next_completion(patience_secs);
        let mut done = done.ok_or_else(|| Error::Device(format!("a task did not end within {patience_secs} s")))?;
        std::mem::replace(&mut done.result, Ok(()))?;
        Ok(done)
    }

    /// Waits for a task's end and gives its seconds.
    ///
    /// # Errors
    /// When it fails.
    pub fn time(&mut self, lane: u16, task: Task) -> Result<f64> {
        self.submit(lane, task, &[]);
        self.wait().map(|done| done.end_secs - done.start_secs)
    }
}
