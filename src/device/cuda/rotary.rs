//! Launches of `kernels/rotary.cu`.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;
use crate::graph::Rotation;

/// Most threads of a block.
const MOST_THREADS: usize = 256;

/// x (B, T, cols) -> out, which may lie over x.
pub(super) fn turn(q: &mut Queue, o: &Operands, rotation: &Rotation) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    // 16 bytes of either half of a head a thread.
    let pack = 16 / o.in_dtype(0).bytes() as usize;
    let threads = (rotation.heads * rotation.width).div_ceil(2 * pack).next_multiple_of(32).clamp(32, MOST_THREADS);
    let [slowed, constant, slope] = rotation.scaling.blend();
    let kernel = pick(o.in_dtype(0), "rotary_f32", "rotary_bf16");
    let turn = Launch::new(kernel, [rows, 1, 1], threads as u32).ptr(o.output(0)).ptr(o.input(0));
    let turn = turn.int(o.in_axes(0)[1]).int(cols).int(rotation.heads).int(rotation.width).double(rotation.per_pair());
    let turn = turn.double(slowed).double(constant).double(slope);
    q.launch(turn.float(if rotation.back { -1.0 } else { 1.0 }))
}
