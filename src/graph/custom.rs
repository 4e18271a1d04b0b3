//! Custom ops from outside the crate: everything that the crate needs of an op, behind one trait.
//!
//! An op states its shape rule, its cost, its host implementation, its kernel, and its gradient, which is itself such
//! an op. Placement, recomputation, spilling and the same bits under any cut follow as for built-in ops.

use crate::base::{DType, Result, Shape};
use std::fmt;
use std::sync::Arc;

/// Most inputs, and most outputs, of a custom op.
pub const CUSTOM_OPERANDS: usize = 8;

/// An op that the crate does not know.
///
/// It must be a function of its inputs alone and always sum in the same order; otherwise the same bits are not
/// guaranteed.
pub trait CustomOp: fmt::Debug + Send + Sync {
    /// Its name in messages and tables.
    fn name(&self) -> &'static str;

    /// The shape rule: the outputs' shapes for inputs of these shapes.
    ///
    /// # Errors
    /// When it does not accept such inputs; the message should state the shapes.
    fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>>;

    /// Floating-point operations for inputs of these shapes. Bytes are counted as those of the operands, once each.
    fn flops(&self, inputs: &[&Shape]) -> f64 {
        inputs.iter().map(|s| s.elems() as f64).sum()
    }

    /// Computes the op on the host. Overwrites all of `outputs`. In a bf16 model the slices are f32 copies, and results
    /// are rounded afterwards.
    fn host(&self, outputs: &mut [&mut [f32]], inputs: &[&[f32]], shapes: &[&Shape]);

    /// The kernels, for a GPU or the emulator; `None` where the op runs only on the host. Must always return the same.
    fn kernels(&self) -> Option<Kernels> {
        None
    }

    /// Passes `launch` the launch for elements of `dtype` (f32 or bf16) and inputs of these shapes.
    ///
    /// The kernel's arguments are the outputs' addresses, then the inputs', then `numbers`.
    fn launch(&self, dtype: DType, shapes: &[&Shape], launch: &mut dyn FnMut(&KernelCall)) {
        let _ = (dtype, shapes, launch);
    }

    /// The gradient, as an op: its inputs are the gradient of output 0, then this op's inputs, then its outputs; its
    /// outputs are the gradients of this op's inputs, in order. `None` where there is none.
    fn gradient(&self) -> Option<Arc<dyn CustomOp>> {
        None
    }
}

/// Compiled kernels of custom ops, as a program holds them. Entry points of different `Kernels` may have the same name.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    // Private, so that the caller of `new` has vouched for every value.
    name: &'static str,
    fatbin: &'static [u8],
    emulated: &'static [u8],
}

impl Kernels {
    /// Makes kernels with a unique name: a fatbin or a cubin, and a shared object that `kernels/emulator/build.sh`
    /// built from the same sources, which is empty where there is none.
    ///
    /// # Safety
    /// They are native code: in every launch that [`CustomOp::launch`] asks for, the entry point must accept the
    /// arguments that it is given, read no elements beyond each input's shape, overwrite exactly the elements of each
    /// output's shape, and touch nothing else.
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
    /// The arguments after the addresses.
    pub numbers: &'a [Number],
}

/// An argument that is not an address.
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
