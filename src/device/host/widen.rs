//! f32 copies of an op's bf16 operands: made before its body runs, rounded back after it.
//!
//! The copies lie end to end in memory of the device's own, inputs first, each at a multiple of [`ALIGNMENT`]; where
//! output 0 lies over an input, their copies are one. Behind them is room for an input that a product is written over.
//! That memory is the host device's way to compute in bf16 at all, and to run programs that were placed for other
//! devices; no budget counts it.

use super::memory::Block;
use super::operands::Operands;
use super::parallel::{CHUNK, simd};
use crate::base::{DType, align_up};
use crate::graph::{ALIGNMENT, Buffer, Op, Program, Step};
use half::bf16;
use rayon::prelude::*;

/// Bytes of copies that the hungriest op of `program` needs.
pub(super) fn program_bytes(program: &Program) -> u64 {
    program.steps.iter().map(|step| copies_bytes(step) + kept_bytes(step)).max().unwrap_or(0)
}

/// Bytes of the copies of a step's operands.
fn copies_bytes(step: &Step) -> u64 {
    step.inputs.iter().map(copy_bytes).sum::<u64>() + step.outputs.iter().flatten().map(copy_bytes).sum::<u64>()
}

/// Bytes of an input that a product is written over before it is read.
fn kept_bytes(step: &Step) -> u64 {
    let product = matches!(step.op, Op::Linear { .. } | Op::LinearGradInput { .. });
    let over = step.op.in_place_input(step.inputs.len()).filter(|_| product).map(|i| &step.inputs[i]);
    let out = step.outputs.first().and_then(Option::as_ref);
    let in_place = over.zip(out).filter(|(x, out)| (x.area, x.offset) == (out.area, out.offset));
    in_place.map_or(0, |(x, _)| x.shape.elems() as u64 * x.dtype.bytes().max(4))
}

/// A copy of input `x`, for a body that writes output 0 over it before it reads it.
pub(super) fn kept<'a, T: bytemuck::Pod>(o: &Operands<'a>, x: &[T]) -> &'a [T] {
    // SAFETY: it lies behind the copies of the op's operands, and is asked for once.
    let kept = bytemuck::cast_slice_mut(unsafe { o.wide.slice_mut(copies_bytes(o.step), size_of_val(x) as u64) });
    kept.copy_from_slice(x);
    kept
}

/// Bytes that the copy of `buffer` takes: none where it has no copy.
fn copy_bytes(buffer: &Buffer) -> u64 {
    if buffer.dtype == DType::Bf16 { align_up(4 * buffer.shape.elems() as u64, ALIGNMENT) } else { 0 }
}

/// Where the copy of input `i` begins.
pub(super) fn input_at(o: &Operands, i: usize) -> u64 {
    o.step.inputs[..i].iter().map(copy_bytes).sum()
}

/// Where the copy of output `i` begins.
pub(super) fn output_at(o: &Operands, i: usize) -> u64 {
    match o.step.op.in_place_input(o.step.inputs.len()) {
        Some(input) if i == 0 && o.is_in_place(input) => input_at(o, input),
        _ => input_at(o, o.step.inputs.len()) + o.step.outputs[..i].iter().flatten().map(copy_bytes).sum::<u64>(),
    }
}

/// Fills the copies of the inputs.
pub(super) fn inputs(o: &Operands) {
    for (i, buffer) in o.step.inputs.iter().enumerate().filter(|(_, b)| b.dtype == DType::Bf16) {
        // SAFETY: nobody writes an op's inputs while it runs.
        let narrow = bytemuck::cast_slice(unsafe { o.arena.slice(o.offset(buffer), buffer.bytes()) });
        widen(copy(o.wide, input_at(o, i), buffer), narrow);
    }
}

/// Rounds the copies of the outputs into their places, and in the copies too.
pub(super) fn outputs(o: &Operands) {
    for (i, buffer) in o.step.outputs.iter().enumerate() {
        let Some(buffer) = buffer.as_ref().filter(|b| b.dtype == DType::Bf16) else { continue };
        // SAFETY: the op is the only one that touches its outputs, and its body has ended.
        let narrow = bytemuck::cast_slice_mut(unsafe { o.arena.slice_mut(o.offset(buffer), buffer.bytes()) });
        round(narrow, copy(o.wide, output_at(o, i), buffer));
    }
}

#[expect(clippy::mut_from_ref, reason = "each copy is asked for once at a time")]
fn copy<'a>(wide: &'a Block, at: u64, buffer: &Buffer) -> &'a mut [f32] {
    // SAFETY: the copies are one op's at a time, which asks for each of them apart.
    bytemuck::cast_slice_mut(unsafe { wide.slice_mut(at, 4 * buffer.shape.elems() as u64) })
}

/// `wide[i] = narrow[i]`, exactly.
fn widen(wide: &mut [f32], narrow: &[u16]) {
    wide.par_chunks_mut(CHUNK).zip(narrow.par_chunks(CHUNK)).for_each(|(wide, narrow)| {
        simd(
            #[inline(always)]
            || wide.iter_mut().zip(narrow).for_each(|(wide, &x)| *wide = f32::from_bits(u32::from(x) << 16)),
        );
    });
}

/// `narrow[i]` is the bf16 nearest to `wide[i]`, ties to even, which then holds just that.
fn round(narrow: &mut [u16], wide: &mut [f32]) {
    narrow.par_chunks_mut(CHUNK).zip(wide.par_chunks_mut(CHUNK)).for_each(|(narrow, wide)| {
        for (narrow, wide) in narrow.iter_mut().zip(wide) {
            let x = bf16::from_f32(*wide);
            (*narrow, *wide) = (x.to_bits(), x.to_f32());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_survives_and_others_go_to_the_nearest() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let (mut wide, mut back) = (vec![0.0; all.len()], vec![0; all.len()]);
        widen(&mut wide, &all);
        round(&mut back, &mut wide);
        for (&x, &y) in all.iter().zip(&back) {
            let is_nan = x & 0x7FFF > 0x7F80;
            assert!(x == y || (is_nan && y & 0x7FFF > 0x7F80), "{x:#x} became {y:#x}");
        }
        // Below a tie, a tie to even below, a tie to even above, above a tie, beyond the greatest.
        let mut wide = [0x3F80_7FFF, 0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F7F_8000].map(f32::from_bits);
        let mut narrow = [0; 5];
        round(&mut narrow, &mut wide);
        assert_eq!(narrow, [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80]);
        assert_eq!(wide.map(f32::to_bits), narrow.map(|x| u32::from(x) << 16));
    }
}
