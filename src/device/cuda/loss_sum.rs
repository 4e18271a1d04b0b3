//! Launch of `kernels/loss_sum.cu`: the last stage of every loss.

use super::launch::{Launch, Ptr};
use super::queue::Queue;
use crate::base::Result;

/// Threads of its one block.
const THREADS: u32 = 1024;

/// `loss (1) f32 = ` the step's loss scale times the sum of `row_losses` (rows) f32.
pub(super) fn launch(q: &mut Queue, loss: Ptr, row_losses: Ptr, rows: usize) -> Result<()> {
    q.launch(Launch::new("loss_sum", [1, 1, 1], THREADS).ptr(loss).ptr(row_losses).long(rows).ptr(q.now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_has_the_same_size() {
        let source = include_str!("../../../kernels/loss_sum.cu");
        assert!(source.contains(&format!("constexpr int THREADS = {THREADS};")));
    }
}
