//! Runs an embedder's own op: hands it its operands as f32 slices.

use super::lanes::words_of;
use super::operands::Operands;
use crate::base::Shape;
use crate::graph::{CUSTOM_OPERANDS, CustomOp};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Runs the body of `op`. Where it panics, the words say which it was.
pub(super) fn run(op: &dyn CustomOp, o: &Operands) {
    let (ins, outs) = (o.step.inputs.len(), o.step.outputs.len());
    let inputs: [&[f32]; CUSTOM_OPERANDS] = std::array::from_fn(|i| if i < ins { o.input(i) } else { &[] });
    let mut outputs: [&mut [f32]; CUSTOM_OPERANDS] =
        std::array::from_fn(|i| if i < outs { o.output(i) } else { &mut [] });
    let nothing = Shape::default();
    let shapes: [&Shape; CUSTOM_OPERANDS] =
        std::array::from_fn(|i| if i < ins { &o.step.inputs[i].shape } else { &nothing });
    let body = AssertUnwindSafe(|| op.host(&mut outputs[..outs], &inputs[..ins], &shapes[..ins]));
    if let Err(panic) = catch_unwind(body) {
        let (name, layer, words) = (op.name(), o.step.layer, words_of(panic.as_ref()));
        resume_unwind(Box::new(format!("{name} of layer {layer}: {words}")));
    }
}
