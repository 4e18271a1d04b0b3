//! Ops of an embedder's own: everything that the crate asks of an op, behind one trait.
//!
//! An op says its shape rule, its cost, its body on the host, its kernel, and its gradient, which is an op like itself.
//! Placement, recomputation, spilling and the same bits under any cut follow as for any other.

use crate::base::{DType, Result, Shape};
use std::fmt;
use std::sync::Arc;

/// Most inputs, and most outputs, of a custom op.
pub const CUSTOM_OPERANDS: usize = 8;

/// An op that the crate does not know.
///
/// It must be a function of its inputs alone, always summing in the same order, or the promise of equal bits is gone.
pub trait CustomOp: fmt::Debug + Send + Sync {
    /// Its name in messages and tables.
    fn name(&self) -> &'static str;

    /// The shape rule: the outputs' shapes for inputs of these shapes.
    ///
    /// # Errors
    /// When it does not take such inputs; the message has the shapes.
    fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>>;

    /// Floating-point operations for inputs of these shapes. Bytes are those of the operands, once each.
    fn flops(&self, inputs: &[&Shape]) -> f64 {
        inputs.iter().map(|s| s.elems() as f64).sum()
    }

    /// The body on the host. Overwrites all of `outputs`. In a bf16 model the slices are f32 copies, rounded
    /// afterwards.
    fn host(&self, outputs: &mut [&mut [f32]], inputs: &[&[f32]], shapes: &[&Shape]);

    /// The kernels, for a GPU or the emulator; `None` where the op runs on the host alone. Always the same.
    fn kernels(&self) -> Option<Kernels> {
        None
    }

    /// The launch for elements of `dtype` (f32 or bf16) and inputs of these shapes, given to `launch`.
    ///
    /// The kernel gets the outputs' addresses, then the inputs', then `numbers`.
    fn launch(&self, dtype: DType, shapes: &[&Shape], launch: &mut dyn FnMut(&KernelCall)) {
        let _ = (dtype, shapes, launch);
    }

    /// The gradient, as an op: its inputs are the gradient of output 0, then this op's inputs, then its outputs; its
    /// outputs are the gradients of this op's inputs, in order. `None` where there is none.
    fn gradient(&self) -> Option<Arc<dyn CustomOp>> {
        None
    }
}

/// Compiled kernels of custom ops, as they go into a program. Entry points of different kernels may have one name.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    // Private, so that they are those of which `new` was promised something.
    name: &'static str,
    fatbin: &'static [u8],
    emulated: &'static [u8],
}

impl Kernels {
    /// Kernels under a name that no others have: a fatbin or a cubin, and a shared object that
    /// `kernels/emulator/build.sh` made of the same sources; empty where there is none.
    ///
    /// # Safety
    /// They are native code: in every launch that [`CustomOp::launch`] asks for, the entry point takes the arguments
    /// that it is given, reads of the inputs and overwrites of the outputs as many elements as their shapes have, and
    /// touches nothing else.
    pub const unsafe fn new(name: &'static str, fatbin: &'static [u8], emulated: &'static [u8]) -> Kernels {
        Kernels { name, fatbin, emulated }
    }

    /// Their name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// A fatbin or a cubin.
    pub fn fatbin(&self) -> &'static [u8] {
        self.fatbin
    }

    /// A shared object for the emulator; empty where there is none.
    pub fn emulated(&self) -> &'static [u8] {
        self.emulated
    }
}

/// One launch of a custom op's kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelCall<'a> {
    /// The entry point.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// What follows the addresses.
    pub numbers: &'a [Number],
}

/// An argument that is no address.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// An `int`.
    Int(i32),
    /// An `int64_t`.
    Long(i64),
    /// A `float`.
    Float(f32),
}

/// A custom op in a graph. Two are equal when they are the same object.
#[derive(Clone)]
pub struct Custom(pub Arc<dyn CustomOp>);

impl PartialEq for Custom {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
