//! Launches of `kernels/rotary.cu`.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;
use crate::graph::{Rotation, Slowing};

/// Most threads of a block.
const MOST_THREADS: usize = 256;
/// Angles that a block keeps at once.
const ANGLES: usize = 256;
/// Most rows of a block, which share the wait for its first store.
const MOST_ROWS: usize = 4;
/// Blocks of each multiprocessor below which blocks have fewer rows: nearly twice as many as it holds at once.
const BLOCKS: usize = 12;

/// x (B, T, cols) -> out, which may lie over x.
pub(super) fn turn(q: &mut Queue, o: &Operands, rotation: &Rotation) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let (batch, positions) = (o.in_axes(0)[0], o.in_axes(0)[1]);
    let (x, out, half) = (o.input(0), o.output(0), rotation.width / 2);
    // 16 bytes of either half of a head a thread, or twice 16 of what is copied.
    let pack = 16 / o.in_dtype(0).bytes() as usize;
    let copied = if out == x { 0 } else { cols - rotation.heads * rotation.width };
    let items = (rotation.heads * half).div_ceil(pack) + copied.div_ceil(2 * pack);
    let threads = items.next_multiple_of(32).clamp(32, MOST_THREADS);
    let [together, run] = share(batch, rows, half, q.multiprocessors());
    let blocks = batch.div_ceil(together) * positions.div_ceil(run);
    let Slowing { slowed, constant, slope, along } = rotation.slowing();
    let stretch = rotation.stretch() as f32;
    let kernel = pick(o.in_dtype(0), "rotary_f32", "rotary_bf16");
    let turn = Launch::new(kernel, [blocks, 1, 1], threads as u32).ptr(out).ptr(x).int(batch).int(positions).int(cols);
    let turn = turn.int(rotation.heads).int(rotation.width).int(together).int(run).double(rotation.per_pair());
    let turn = turn.double(slowed).double(constant).double(slope).double(along);
    q.launch(turn.float(stretch).float(if rotation.back { -stretch } else { stretch }))
}

/// Sequences and positions of a block: several sequences, since they share angles, and positions only where it has all
/// sequences.
fn share(batch: usize, rows: usize, half: usize, multiprocessors: usize) -> [usize; 2] {
    let most = (rows / (BLOCKS * multiprocessors)).clamp(1, MOST_ROWS);
    if batch >= most {
        // Groups of sequences as equal as can be.
        return [batch.div_ceil(batch.div_ceil(most)), 1];
    }
    let batch = batch.max(1);
    [batch, (most / batch).min(ANGLES / half.max(1)).max(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_rows_that_share_angles_where_there_are_enough() {
        for (batch, positions, half, want) in [
            (4, 2048, 32, [4, 1]),  // a model's
            (1, 1024, 32, [1, 1]),  // one short sequence: spread out
            (1, 8192, 32, [1, 4]),  // one long one
            (1, 8192, 128, [1, 2]), // no more angles than are kept
            (1, 8192, 516, [1, 1]),
            (3, 4096, 64, [3, 1]),
            (2, 4096, 64, [2, 2]),
            (5, 4096, 64, [3, 1]), // 3 and 2, not 4 and 1
            (512, 16, 32, [4, 1]), // many short ones
            (1 << 20, 1, 32, [4, 1]),
            (7, 0, 32, [1, 1]),
            (0, 7, 32, [1, 1]),
            (2, 4096, 0, [2, 2]),
        ] {
            assert_eq!(share(batch, batch * positions, half, 132), want, "{batch} x {positions}, {half} pairs");
        }
    }
}
