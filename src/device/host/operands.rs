//! The operands of an op: where they lie in the arena, the f32 copies that bf16 ones have, and what else an op has
//! beside the arena.

use super::memory::Block;
use super::parallel::SharedScratch;
use super::real::Real;
use super::widen;
use crate::base::{DType, Result};
use crate::device::Scalars;
use crate::graph::{AREAS, Area, Buffer, Step};

/// What a device's ops use one after another, beside the arena. It grows in the first step of a model that wants it; no
/// budget counts it.
pub(super) struct OpMemory {
    /// f32 copies of bf16 operands.
    pub wide: Block,
    pub scratch: SharedScratch,
}

impl OpMemory {
    pub fn new() -> Result<Self> {
        Ok(OpMemory { wide: Block::new(0, "no operands yet")?, scratch: SharedScratch::default() })
    }
}

/// An op's operands in the arena, or their f32 copies.
pub(super) struct Operands<'a> {
    pub step: &'a Step,
    pub arena: &'a Block,
    pub bases: &'a [u64; AREAS],
    /// Room for the f32 copies of bf16 operands.
    pub wide: &'a Block,
}

impl<'a> Operands<'a> {
    pub fn offset(&self, buffer: &Buffer) -> u64 {
        self.bases[buffer.area as usize] + buffer.offset
    }

    /// Where the values of `buffer` are for the body: in the arena, or for bf16 at `wide_at` in the f32 copies.
    fn place(&self, buffer: &Buffer, wide_at: impl FnOnce() -> u64) -> (&'a Block, u64, u64) {
        match buffer.dtype {
            DType::Bf16 => (self.wide, wide_at(), 4 * buffer.shape.elems() as u64),
            _ => (self.arena, self.offset(buffer), buffer.bytes()),
        }
    }

    /// Input `i`.
    pub fn input<T: bytemuck::Pod>(&self, i: usize) -> &'a [T] {
        let (block, offset, bytes) = self.place(&self.step.inputs[i], || widen::input_at(self, i));
        // SAFETY: placement keeps an op's inputs apart from its outputs (save for `unless_in_place`), the copies are
        // laid end to end, and tickets keep other tasks away.
        bytemuck::cast_slice(unsafe { block.slice(offset, bytes) })
    }

    /// Input `i`, or `None` where the output lies over it.
    pub fn unless_in_place<T: bytemuck::Pod>(&self, i: usize) -> Option<&'a [T]> {
        (!self.is_in_place(i)).then(|| self.input(i))
    }

    /// Input `i`, for a body that writes output 0 before it reads it: a copy where that lies over it.
    pub fn input_to_the_end<T: bytemuck::Pod>(&self, i: usize) -> &'a [T] {
        let x = self.input(i);
        if self.is_in_place(i) { widen::kept(self, x) } else { x }
    }

    /// Whether output 0 lies over input `i`.
    pub fn is_in_place(&self, i: usize) -> bool {
        let out = self.step.outputs[0].as_ref().expect("only optional outputs are left out, and the first never is");
        self.offset(&self.step.inputs[i]) == self.offset(out)
    }

    /// Output `i`, exclusively.
    pub fn output<T: bytemuck::Pod>(&self, i: usize) -> &'a mut [T] {
        self.optional_output(i).expect("only optional outputs are left out")
    }

    pub fn optional_output<T: bytemuck::Pod>(&self, i: usize) -> Option<&'a mut [T]> {
        let buffer = self.step.outputs.get(i)?.as_ref()?;
        let (block, offset, bytes) = self.place(buffer, || widen::output_at(self, i));
        // SAFETY: placement keeps outputs apart from each other and from inputs, and so are the copies; each is asked
        // for once, and tickets keep other tasks away.
        Some(bytemuck::cast_slice_mut(unsafe { block.slice_mut(offset, bytes) }))
    }

    /// Whether output `i` is to be added to what is there. Only a gradient accumulator is: the same op may also write a
    /// part of a gradient into the workspace, where it must overwrite.
    pub fn adds_to(&self, i: usize, scalars: &Scalars) -> bool {
        scalars.accumulate && self.step.outputs[i].as_ref().is_some_and(|b| b.area == Area::Gradients)
    }

    /// [`Operands::adds_to`] for outputs 1 and 2, which an op treats alike. Where only one is an accumulator, the other
    /// is cleared, so that adding to it writes it.
    pub fn adds_to_both<T: Real>(&self, scalars: &Scalars) -> bool {
        let adds = [1, 2].map(|i| self.adds_to(i, scalars));
        if adds[0] != adds[1] {
            self.output::<T>(if adds[0] { 2 } else { 1 }).fill(T::ZERO);
        }
        adds[0] || adds[1]
    }

    pub fn in_axes(&self, i: usize) -> &'a [usize] {
        self.step.inputs[i].shape.axes()
    }

    pub fn out_axes(&self, i: usize) -> &'a [usize] {
        self.step.outputs[i].as_ref().expect("only optional outputs are left out").shape.axes()
    }

    pub fn rows_cols(&self, i: usize) -> (usize, usize) {
        (self.step.inputs[i].shape.rows(), self.step.inputs[i].shape.cols())
    }

    pub fn out_cols(&self) -> usize {
        self.out_axes(0).last().copied().unwrap_or(1)
    }
}
