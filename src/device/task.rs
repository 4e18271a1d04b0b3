//! Tasks: what a lane can do. Plain values; memory is named by offset, never by address.

use super::host::optimizer::SUM_BLOCK;
use crate::base::philox::Stream;
use crate::graph::{AREAS, Program};
use std::sync::Arc;

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Memory {
    /// The host's store.
    Host,
    /// The disk tier's file.
    Disk,
    /// A device's arena.
    Device(u16),
}

/// A range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Whose memory it is in.
    pub memory: Memory,
    /// First byte.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl Span {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// A copy of one range to another of the same size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopySpan {
    /// What is read.
    pub from: Span,
    /// What is overwritten.
    pub to: Span,
}

/// What changes from step to step and microbatch to microbatch while a program stays the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalars {
    /// The run's seed.
    pub seed: u64,
    /// Step, from 0.
    pub step: u32,
    /// Microbatch within the step, from 0.
    pub microbatch: u32,
    /// Multiplies the sum of the rows' losses: 1 divided by the number of the minibatch's labelled positions.
    pub loss_scale: f64,
    /// Whether to add to the gradient accumulators instead of overwriting them: in every microbatch but the first.
    pub accumulate: bool,
}

impl Scalars {
    /// The random numbers of one op.
    pub fn stream(&self, op: u32) -> Stream {
        Stream { seed: self.seed, step: self.step, microbatch: self.microbatch, op }
    }
}

/// A program for one microbatch.
#[derive(Clone, Debug)]
pub struct Run {
    /// The ops.
    pub program: Arc<Program>,
    /// The device whose arena it runs in.
    pub device: u16,
    /// Start of each [`crate::graph::Area`] in the arena.
    pub bases: [u64; AREAS],
    /// The step's numbers.
    pub scalars: Scalars,
    /// Whether to check each layer's output and report the first that is not finite.
    pub check: bool,
}

/// One tensor of a shard's flat state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Start within the flat range, in elements.
    pub offset: u64,
    /// Length in elements.
    pub elems: u64,
    /// Whether weight decay applies to it.
    pub decay: bool,
    /// The tensor's number in the model's flat order.
    pub index: u32,
}

/// Sums the squares of gradients, one f64 per tensor.
#[derive(Clone, Debug)]
pub struct Norm {
    /// The flat gradients.
    pub gradient: Span,
    /// The tensors in them.
    pub segments: Arc<[Segment]>,
    /// The whole model's table of sums, one f64 per tensor; only this shard's entries are written.
    pub table: Span,
    /// Room for [`norm_scratch_bytes`], for devices that ask for scratch.
    pub scratch: Option<Span>,
}

/// Bytes of partial sums for the squares of `segments`: one f64 for each block of [`SUM_BLOCK`] elements of a tensor.
pub fn norm_scratch_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| 8 * s.elems.div_ceil(SUM_BLOCK as u64)).sum()
}

/// Clipping by the global norm (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063), as `torch.nn.utils.clip_grad_norm_`:
/// gradients are multiplied by min(1, max_norm / (norm + 1e-6)).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// The largest norm that is not scaled down.
    pub max_norm: f64,
    /// The whole model's table of sums of squares, complete by then.
    pub table: Span,
}

/// AdamW's numbers for one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwRule {
    /// The update's number, from 1.
    pub update: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decays of the moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// SGD's numbers for one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdRule {
    /// The update's number, from 1.
    pub update: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum buffer.
    pub momentum: f64,
    /// Nesterov's variant.
    pub nesterov: bool,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
}

/// How weights change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UpdateRule {
    /// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
    Adamw(AdamwRule),
    /// SGD with momentum.
    Sgd(SgdRule),
}

/// Updates a shard's flat state.
#[derive(Clone, Debug)]
pub struct Update {
    /// The numbers.
    pub rule: UpdateRule,
    /// The tensors in the range.
    pub segments: Arc<[Segment]>,
    /// Weights, changed in place: f32, or with a `remainder` bf16.
    pub weight: Span,
    /// For bf16 weights, the lower halves of their f32 masters, changed in place (see [`super::host::master`]).
    pub remainder: Option<Span>,
    /// Moments, changed in place: two for AdamW, one for SGD with momentum, none for SGD without.
    pub moments: [Option<Span>; 2],
    /// Gradients.
    pub gradient: Span,
    /// Clipping, if any.
    pub clip: Option<Clip>,
    /// The step's losses; if one is not finite, nothing is updated.
    pub gate: Span,
}

/// What a lane does.
#[derive(Clone, Debug)]
pub enum Task {
    /// A program, on a compute lane.
    Run(Box<Run>),
    /// Copies, on a copy lane; copies between the disk and the host's store, on a disk lane.
    Copy(Vec<CopySpan>),
    /// `acc[i] += x[i]` over ranges of f32: joins shared parameters' accumulators.
    Add(Vec<CopySpan>),
    /// Sums of squares.
    Norm(Box<Norm>),
    /// An optimizer's update.
    Update(Box<Update>),
}

impl Task {
    /// Bytes that it moves over a link, for copies; bytes of memory traffic for the rest.
    pub fn bytes(&self) -> u64 {
        match self {
            Task::Run(run) => run.program.traffic_bytes,
            Task::Copy(spans) => spans.iter().map(|s| s.from.bytes).sum(),
            Task::Add(spans) => spans.iter().map(|s| 3 * s.from.bytes).sum(),
            Task::Norm(norm) => norm.gradient.bytes,
            Task::Update(update) => {
                let moments = update.moments.iter().flatten().map(|m| 2 * m.bytes).sum::<u64>();
                let remainder = update.remainder.map_or(0, |r| 2 * r.bytes);
                2 * update.weight.bytes + remainder + update.gradient.bytes + moments
            }
        }
    }

    /// Floating-point operations, for programs.
    pub fn flops(&self) -> f64 {
        match self {
            Task::Run(run) => run.program.flops,
            _ => 0.0,
        }
    }
}
