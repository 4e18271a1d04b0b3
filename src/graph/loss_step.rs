//! Joins a program's loss and its gradient into one step where one follows the other: logits are the largest tensor,
//! and a row of them is still in cache when its loss is known.

use super::op::Op;
use super::program::Step;

/// Removes each cross-entropy step that its gradient's step follows, and makes the latter compute the rows' losses too.
pub(super) fn join_loss_steps(steps: &mut Vec<Step>) {
    let follows = |pair: &[Step]| {
        let [loss, grad] = pair else { return false };
        loss.op == Op::CrossEntropy && grad.op == Op::CrossEntropyGrad && loss.inputs == grad.inputs
    };
    for i in (1..steps.len()).rev() {
        if follows(&steps[i - 1..=i]) {
            let loss = steps.remove(i - 1);
            let grad = &mut steps[i - 1];
            grad.outputs.truncate(1);
            grad.outputs.extend(loss.outputs);
        }
    }
}
