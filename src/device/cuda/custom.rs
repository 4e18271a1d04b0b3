//! Launches an embedder's own kernel, after loading it the first time.

use super::launch::Launch;
use super::operands::Operands;
use super::queue::Queue;
use crate::base::{Error, Result, Shape};
use crate::graph::{CUSTOM_OPERANDS, CustomOp, Number};

/// Queues the kernel of `op`.
pub(super) fn launch(q: &mut Queue, o: &Operands, op: &dyn CustomOp) -> Result<()> {
    let kernels = op.kernels().ok_or_else(|| Error::bad(format!("{}: has no kernel, only a host body", op.name())))?;
    q.driver.load_once(&kernels)?;
    let ins = o.step.inputs.len();
    let nothing = Shape::default();
    let shapes: [&Shape; CUSTOM_OPERANDS] =
        std::array::from_fn(|i| if i < ins { &o.step.inputs[i].shape } else { &nothing });
    let mut done = Ok(());
    op.launch(o.out_dtype(0), &shapes[..ins], &mut |call| {
        let mut launch = Launch::new(call.kernel, call.grid, call.block).of(kernels.name()).shared(call.shared_bytes);
        for i in 0..o.step.outputs.len() {
            launch = launch.ptr(o.output(i));
        }
        for i in 0..ins {
            launch = launch.ptr(o.input(i));
        }
        for number in call.numbers {
            launch = match *number {
                Number::Int(value) => launch.bytes(&value.to_ne_bytes(), 4),
                Number::Long(value) => launch.bytes(&value.to_ne_bytes(), 8),
                Number::Float(value) => launch.float(value),
            };
        }
        if done.is_ok() {
            done = q.launch(launch);
        }
    });
    done
}
