//! An op's operands as addresses in the arena.

use super::launch::Ptr;
use crate::base::DType;
use crate::graph::{AREAS, Area, Buffer, Op, Step};

/// An accumulator's number that makes kernels add to it whatever `Now` says.
pub(super) const ADD: usize = 2;

/// The operands of one op of a program.
pub struct Operands<'a> {
    /// The op and its buffers.
    pub step: &'a Step,
    pub(super) arena: Ptr,
    pub(super) bases: &'a [u64; AREAS],
}

impl Operands<'_> {
    fn at(&self, buffer: &Buffer) -> Ptr {
        self.arena.plus(self.bases[buffer.area as usize] + buffer.offset)
    }

    /// The bytes that the op may touch.
    pub(super) fn regions(&self) -> impl Iterator<Item = (Ptr, u64)> + '_ {
        let all = self.step.inputs.iter().chain(self.step.outputs.iter().flatten()).chain(&self.step.scratch);
        all.map(|buffer| (self.at(buffer), buffer.bytes()))
    }

    /// Input `i`.
    pub fn input(&self, i: usize) -> Ptr {
        self.at(&self.step.inputs[i])
    }

    /// Input `i`, or null where the op has fewer.
    pub fn optional_input(&self, i: usize) -> Ptr {
        self.step.inputs.get(i).map_or(Ptr::NULL, |b| self.at(b))
    }

    /// Output `i`. Output 0 of an op that may run in place can be the address of an input.
    pub fn output(&self, i: usize) -> Ptr {
        self.at(self.step.outputs[i].as_ref().expect("only optional outputs are left out"))
    }

    /// Output `i`, or null where nobody wants it.
    pub fn optional_output(&self, i: usize) -> Ptr {
        self.step.outputs.get(i).and_then(Option::as_ref).map_or(Ptr::NULL, |b| self.at(b))
    }

    /// The step's scratch; null where it has none.
    pub fn scratch(&self) -> Ptr {
        self.step.scratch.as_ref().map_or(Ptr::NULL, |b| self.at(b))
    }

    /// [`ADD`] where output `i` is added to what is there; else 1 where it is a gradient accumulator, to which kernels add when
    /// `Now::accumulate` says so; else 0: it is overwritten.
    pub fn accumulator(&self, i: usize) -> usize {
        if let Op::LinearGradWeight { adds: true, .. } = self.step.op {
            return ADD;
        }
        usize::from(self.step.outputs[i].as_ref().is_some_and(|b| b.area == Area::Gradients))
    }

    /// Axes of input `i`.
    pub fn in_axes(&self, i: usize) -> &[usize] {
        self.step.inputs[i].shape.axes()
    }

    /// Axes of output `i`.
    pub fn out_axes(&self, i: usize) -> &[usize] {
        self.step.outputs[i].as_ref().expect("only optional outputs are left out").shape.axes()
    }

    /// Input `i` as a matrix: the last axis is its columns.
    pub fn rows_cols(&self, i: usize) -> (usize, usize) {
        (self.step.inputs[i].shape.rows(), self.step.inputs[i].shape.cols())
    }

    /// Elements from one row of input `i` to the next.
    pub(super) fn pitch(&self, i: usize) -> usize {
        self.step.inputs[i].pitch
    }

    /// Elements from one row of output 0 to the next.
    pub(super) fn out_pitch(&self) -> usize {
        self.step.outputs[0].as_ref().expect("only optional outputs are left out").pitch
    }

    /// The last axis of output 0.
    pub fn out_cols(&self) -> usize {
        self.out_axes(0).last().copied().unwrap_or(1)
    }

    /// Elements of output `i`.
    pub fn out_elems(&self, i: usize) -> usize {
        self.step.outputs[i].as_ref().expect("only optional outputs are left out").shape.elems()
    }

    /// Element type of input `i`.
    pub fn in_dtype(&self, i: usize) -> DType {
        self.step.inputs[i].dtype
    }

    /// Element type of output `i`.
    pub fn out_dtype(&self, i: usize) -> DType {
        self.step.outputs[i].as_ref().expect("only optional outputs are left out").dtype
    }
}

/// The kernel for `dtype`: `f32` or `bf16`.
pub fn pick(dtype: DType, f32: &'static str, bf16: &'static str) -> &'static str {
    if dtype == DType::Bf16 { bf16 } else { f32 }
}
