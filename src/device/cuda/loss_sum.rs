//! Launch of `kernels/loss_sum.cu`: the last stage of every loss.

use super::launch::Launch;
use super::operands::Operands;
use super::queue::Queue;
use crate::base::Result;

/// Threads of its one block.
const THREADS: u32 = 1024;

/// row_losses (rows) -> loss (1): the step's loss scale times their sum.
pub(super) fn forward(q: &mut Queue, o: &Operands) -> Result<()> {
    let rows = o.in_axes(0)[0];
    q.launch(Launch::new("loss_sum", [1, 1, 1], THREADS).ptr(o.output(0)).ptr(o.input(0)).long(rows).ptr(q.now))
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
