//! Launches of `kernels/elementwise.cu`, and the grid of every elementwise kernel.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::philox::drop_below;
use crate::base::{DType, Error, Result};

/// Threads of a block of an elementwise kernel.
pub(super) const THREADS: u32 = 256;
/// Packs of 16 bytes that each of them moves.
const PACKS: usize = 4;
/// Sequences of a batch that one thread of `add_position_forward` takes.
const SEQUENCES: usize = 4;

/// Elements of a pack whose widest operand is of type `widest`.
fn pack(widest: DType) -> usize {
    16 / widest.bytes() as usize
}

/// A launch of an elementwise kernel over `elems` elements, the widest of whose operands is of type `widest`.
pub(super) fn pointwise(kernel: &'static str, elems: usize, widest: DType) -> Launch {
    let span = THREADS as usize * PACKS * pack(widest);
    Launch::new(kernel, [elems.div_ceil(span), 1, 1], THREADS)
}

/// `out = a + b`.
pub(super) fn add(q: &mut Queue, o: &Operands) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "add_f32", "add_bf16"), elems, dtype);
    q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1)).long(elems))
}

/// `out = by * x`.
pub(super) fn scale(q: &mut Queue, o: &Operands, by: f64) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "scale_f32", "scale_bf16"), elems, dtype);
    q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).long(elems).float(by as f32))
}

/// `out = x`, converted where the types differ, or `out += x` for an accumulator.
pub(super) fn copy(q: &mut Queue, o: &Operands) -> Result<()> {
    let (elems, to, from) = (o.out_elems(0), o.out_dtype(0), o.in_dtype(0));
    if to == from && o.accumulator(0) == 0 {
        return q.copy(o.output(0), o.input(0), elems as u64 * to.bytes());
    }
    let kernel = match (from, to) {
        (DType::F32, DType::F32) => "copy_f32",
        (DType::Bf16, DType::F32) => "copy_bf16_to_f32",
        (DType::F32, DType::Bf16) if o.accumulator(0) == 0 => {
            let launch = pointwise("copy_f32_to_bf16", elems, DType::F32);
            return q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).long(elems));
        }
        _ => return Err(Error::bad(format!("copy: no kernel adds {from} to an accumulator in {to}"))),
    };
    let launch = pointwise(kernel, elems, DType::F32).ptr(o.output(0)).ptr(o.input(0)).long(elems);
    q.launch(launch.int(o.accumulator(0)).ptr(q.now))
}

/// `out = 0`; an accumulator that already holds a sum is left alone.
pub(super) fn zero(q: &mut Queue, o: &Operands) -> Result<()> {
    let (elems, dtype) = (o.out_elems(0), o.out_dtype(0));
    if o.accumulator(0) == 0 {
        return q.fill(o.output(0), 0, elems as u64 * dtype.bytes());
    }
    q.launch(pointwise("zero_f32", elems, DType::F32).ptr(o.output(0)).long(elems).ptr(q.now))
}

/// `out = x * factor`, each factor 0 or 1/(1-p) by the word of its element.
pub(super) fn dropout(q: &mut Queue, o: &Operands, p: f64, stream: u32) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    // With p = 1 the one word that is never below the limit must not become infinity.
    let scale = if p < 1.0 { (1.0 / (1.0 - p)) as f32 } else { 0.0 };
    let launch = pointwise(pick(dtype, "dropout_f32", "dropout_bf16"), elems, dtype).ptr(o.output(0)).ptr(o.input(0));
    q.launch(launch.long(elems).word(drop_below(p)).float(scale).word(stream).ptr(q.now))
}

/// `out (B, T, C) = x (B, T, C) + table (P, C)[..T]`.
pub(super) fn add_position(q: &mut Queue, o: &Operands) -> Result<()> {
    let &[batch, positions, cols] = o.in_axes(0) else { unreachable!("checked by the builder") };
    let (dtype, plane) = (o.out_dtype(0), positions * cols);
    let blocks = plane.div_ceil(THREADS as usize * pack(dtype)) * batch.div_ceil(SEQUENCES);
    let kernel = pick(dtype, "add_position_forward_f32", "add_position_forward_bf16");
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1));
    q.launch(launch.long(batch).long(plane))
}

/// `d_table (P, C) f32 = ` the sum over b of `d_out (B, T, C)`, or `+=` for an accumulator; rows from T on get 0.
pub(super) fn add_position_grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let &[batch, positions, cols] = o.in_axes(0) else { unreachable!("checked by the builder") };
    let elems = o.out_elems(0);
    let blocks = elems.div_ceil(THREADS as usize * pack(DType::F32));
    let kernel = pick(o.in_dtype(0), "add_position_grad_f32", "add_position_grad_bf16");
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(o.output(0)).ptr(o.input(0));
    q.launch(launch.long(batch).long(positions * cols).long(elems).int(o.accumulator(0)).ptr(q.now))
}

/// `out (B, T', C)[b, t + by] = x (B, T, C)[b, t]`; rows that none comes to are 0.
pub(super) fn shift(q: &mut Queue, o: &Operands, by: isize) -> Result<()> {
    let (&[_, positions, cols], &[_, rows, _]) = (o.in_axes(0), o.out_axes(0)) else {
        unreachable!("checked by the builder")
    };
    // Beyond all rows it does not matter how far.
    let by = by.clamp(-(positions as isize), rows as isize) * cols as isize;
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "shift_f32", "shift_bf16"), elems, dtype).ptr(o.output(0)).ptr(o.input(0));
    // A number below 0 goes as its two's complement, which the kernel reads as it was.
    q.launch(launch.long(elems).long(positions * cols).long(rows * cols).long(by as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_blocks() {
        let header = include_str!("../../../kernels/gpu/pointwise.cuh");
        assert!(header.contains(&format!("constexpr int POINTWISE_THREADS = {THREADS};")));
        assert!(header.contains(&format!("constexpr int POINTWISE_PACKS = {PACKS};")));
        let source = include_str!("../../../kernels/elementwise.cu");
        assert!(source.contains(&format!("constexpr int SEQUENCES = {SEQUENCES};")));
    }
}
