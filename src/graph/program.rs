//! Programs: what a unit runs, as ops on buffers with fixed offsets.
//!
//! A program is a slice of the model's one graph: the nodes of a shard's layers, forward or backward, with a place for
//! every tensor (see `slice`). Tensors that live within the unit share a workspace; the others lie in areas whose bases
//! are set when the program is submitted, so that one program serves every slot and microbatch.

use super::cost::Cost;
use super::op::Op;
use crate::base::{DType, Shape};

/// A range of memory that a program addresses from a base of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Area {
    /// Tensors that live only within the unit and microbatch.
    Workspace,
    /// The shard's weights.
    Weights,
    /// The shard's gradient accumulators.
    Gradients,
    /// The shard's running statistics.
    States,
    /// Activations that forward keeps for backward when nothing is recomputed.
    Saved,
    /// The boundary activation from the shard before.
    ActivationIn,
    /// The boundary activation for the shard after (or the logits).
    ActivationOut,
    /// The boundary gradient from the shard after.
    GradientIn,
    /// The boundary gradient for the shard before.
    GradientOut,
    /// The batch's tensors that this program reads.
    Inputs,
    /// The loss.
    Results,
}

/// How many areas there are.
pub const AREAS: usize = Area::Results as usize + 1;

/// A tensor in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// The area from whose base its offset counts.
    pub area: Area,
    /// First byte.
    pub offset: u64,
    /// Its shape.
    pub shape: Shape,
    /// Its element type.
    pub dtype: DType,
    /// Elements from the start of one row (of the last axis) to the next: a row's length, or in the workspace up to 7
    /// more, so that rows start at multiples of 16 bytes.
    pub pitch: usize,
}

impl Buffer {
    /// Makes a buffer whose rows are contiguous.
    pub fn new(area: Area, offset: u64, shape: Shape, dtype: DType) -> Buffer {
        let pitch = shape.cols();
        Buffer { area, offset, shape, dtype, pitch }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        (self.shape.rows() * self.pitch) as u64 * self.dtype.bytes()
    }
}

/// One op of a program.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it computes.
    pub op: Op,
    /// The layer it belongs to.
    pub layer: usize,
    /// Inputs, in the op's order.
    pub inputs: Vec<Buffer>,
    /// Outputs, in the op's order; `None` where an optional one is not needed.
    pub outputs: Vec<Option<Buffer>>,
    /// Scratch in the workspace for this step alone, where the graph asks for it (see [`super::scratch_bytes`]).
    pub scratch: Option<Buffer>,
    /// Its cost.
    pub cost: Cost,
    /// Whether this step computes its layer's output: where a check for finite values looks.
    pub ends_layer: bool,
}

/// An input of the batch that a program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedInput {
    /// Its index in the graph.
    pub input: usize,
    /// Start in the inputs area.
    pub offset: u64,
    /// Its size for one microbatch.
    pub bytes: u64,
}

/// Which slice of the graph a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Forward of a shard; with `keep`, the activations that backward needs are kept in the saved area. On the last
    /// shard of an evaluation graph it ends in the loss or the logits.
    Forward {
        /// Keep the activations that backward needs.
        keep: bool,
    },
    /// Backward of a shard that is not the last; without `kept` its forward is recomputed first.
    Backward {
        /// Forward kept the activations needed.
        kept: bool,
        /// Recompute all of the forward, not only what backward reads, so that the work does not depend on the cut.
        whole: bool,
    },
    /// Forward, loss and backward of the last shard; with `recompute`, the whole forward except the loss is computed a
    /// second time for the backward, as in the other shards.
    Last {
        /// Compute the forward twice.
        recompute: bool,
    },
}

/// A unit's ops for one microbatch, with fixed buffer offsets.
#[derive(Clone, Debug)]
pub struct Program {
    /// The ops, in order.
    pub steps: Vec<Step>,
    /// Bytes that the program addresses in each area: one past the highest byte of any buffer.
    pub area_bytes: [u64; AREAS],
    /// The batch's tensors that it reads.
    pub inputs: Vec<UsedInput>,
    /// Whether f32 products may round their factors to tf32, on a device that supports it.
    pub tf32: bool,
    /// Floating-point operations of all ops.
    pub flops: f64,
    /// Bytes of memory traffic of all ops.
    pub traffic_bytes: u64,
}

impl Program {
    /// Makes a program of these ops, whose operands have been placed.
    pub fn of_steps(steps: Vec<Step>, area_bytes: [u64; AREAS], inputs: Vec<UsedInput>, tf32: bool) -> Program {
        let flops = steps.iter().map(|s| s.cost.flops).sum();
        let traffic_bytes = steps.iter().map(|s| s.cost.bytes).sum();
        Program { steps, area_bytes, inputs, tf32, flops, traffic_bytes }
    }

    /// Bytes that it addresses in `area`.
    pub fn bytes(&self, area: Area) -> u64 {
        self.area_bytes[area as usize]
    }
}
