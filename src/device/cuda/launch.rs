//! A kernel launch as a value: a name, a grid, arguments in the kernel's order.

use super::blocks::Blocks;
use super::driver::{Driver, Stream};
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::device::Scalars;

/// An address in device memory, or in pinned host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// Stands for an operand that is not there; kernels see a null pointer.
    pub const NULL: Ptr = Ptr(0);

    /// `bytes` further on.
    pub fn plus(self, bytes: u64) -> Ptr {
        Ptr(self.0 + bytes)
    }
}

/// Bytes that a launch's arguments may take: what every driver since CUDA 1 passes.
const ARGUMENT_BYTES: usize = 4096;
/// Arguments that a launch may have.
const ARGUMENTS: usize = 40;
/// Where large arguments start; the largest alignment that one has (a tensor map's).
const ALIGNED: usize = 64;

/// Memory for arguments, aligned for the largest.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Bytes([u8; ARGUMENT_BYTES]);

/// A kernel launch. Built by chaining: `Launch::new("add_f32", grid, 256).ptr(out).ptr(a).ptr(b).long(elems)`.
#[derive(Clone, Copy)]
pub struct Launch {
    /// The entry point.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    bytes: Bytes,
    starts: [u16; ARGUMENTS],
    count: usize,
    end: usize,
    /// What does not fit, if anything does not.
    fault: Option<&'static str>,
}

impl Launch {
    /// A launch without arguments. A grid with an axis of 0 blocks launches nothing.
    pub fn new(kernel: &'static str, grid: [usize; 3], block: u32) -> Launch {
        let mut launch = Launch {
            kernel,
            grid: [0; 3],
            block,
            shared_bytes: 0,
            bytes: Bytes([0; ARGUMENT_BYTES]),
            starts: [0; ARGUMENTS],
            count: 0,
            end: 0,
            fault: None,
        };
        for (axis, (to, from)) in launch.grid.iter_mut().zip(grid).enumerate() {
            // The y and z axes of a grid take 16 bits.
            match u32::try_from(from) {
                Ok(n) if n <= if axis == 0 { i32::MAX as u32 } else { 65_535 } => *to = n,
                _ => launch.fault = Some("more blocks than a grid takes"),
            }
        }
        launch
    }

    /// With dynamic shared memory.
    pub fn shared(mut self, bytes: u32) -> Launch {
        self.shared_bytes = bytes;
        self
    }

    /// An argument by its bytes: a struct that a kernel takes by value. `align` is a power of two up to 64.
    pub fn bytes(mut self, bytes: &[u8], align: usize) -> Launch {
        debug_assert!(align.is_power_of_two() && align <= ALIGNED);
        let at = self.end.next_multiple_of(align);
        if self.count == ARGUMENTS || at + bytes.len() > ARGUMENT_BYTES {
            self.fault = Some("more arguments than a launch takes");
            return self;
        }
        self.bytes.0[at..at + bytes.len()].copy_from_slice(bytes);
        self.starts[self.count] = at as u16;
        self.count += 1;
        self.end = at + bytes.len();
        self
    }

    /// A pointer.
    pub fn ptr(self, ptr: Ptr) -> Launch {
        self.bytes(&ptr.0.to_ne_bytes(), 8)
    }

    /// An `int`: the size of an axis, a flag.
    pub fn int(mut self, value: usize) -> Launch {
        match i32::try_from(value) {
            Ok(value) => self.bytes(&value.to_ne_bytes(), 4),
            Err(_) => {
                self.fault = Some("an axis of 2^31 elements or more");
                self
            }
        }
    }

    /// An `int64_t`: a number of elements.
    pub fn long(self, value: usize) -> Launch {
        self.bytes(&(value as i64).to_ne_bytes(), 8)
    }

    /// A `float`.
    pub fn float(self, value: f32) -> Launch {
        self.bytes(&value.to_ne_bytes(), 4)
    }

    /// A `double`.
    pub fn double(self, value: f64) -> Launch {
        self.bytes(&value.to_ne_bytes(), 8)
    }

    /// A `uint32_t`.
    pub fn word(self, value: u32) -> Launch {
        self.bytes(&value.to_ne_bytes(), 4)
    }

    /// A `const __grid_constant__ CUtensorMap`.
    pub fn map(self, map: &TensorMap) -> Launch {
        self.bytes(&map.0, ALIGNED)
    }

    /// Addresses of the arguments, as `cuLaunchKernel` takes them, given to `call`.
    pub(super) fn with_arguments<T>(&self, call: impl FnOnce(&mut [*mut std::ffi::c_void]) -> T) -> T {
        let mut addresses = [std::ptr::null_mut(); ARGUMENTS];
        for (address, &start) in addresses.iter_mut().zip(&self.starts[..self.count]) {
            *address = self.bytes.0[start as usize..].as_ptr().cast_mut().cast();
        }
        call(&mut addresses[..self.count])
    }
}

/// A descriptor for the bulk copy engine (`CUtensorMap`); what is in it only the driver knows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u8; 128]);

/// How a shared-memory tile is permuted to spread over the banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// 16-byte pieces, over rows of 128 bytes.
    Bytes128,
}

/// A row-major matrix and the box of it that one bulk copy moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorMapSpec {
    /// Its first element; a multiple of 16 bytes.
    pub base: Ptr,
    /// Bytes of an element: 2 for bf16, 4 for f32.
    pub elem_bytes: u32,
    /// Rows and columns; what lies outside reads as 0 and is not written.
    pub rows: u64,
    /// As above.
    pub cols: u64,
    /// Bytes from a row to the next; a multiple of 16.
    pub pitch_bytes: u64,
    /// Rows and columns of the box.
    pub box_rows: u32,
    /// As above.
    pub box_cols: u32,
    /// How the box lies in shared memory.
    pub swizzle: Swizzle,
}

/// A bf16 tensor of four axes, the innermost first, and the box of it that one bulk copy moves, swizzled over 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoxMapSpec {
    /// Its first element; a multiple of 16 bytes.
    pub base: Ptr,
    /// Elements along each axis; what lies outside reads as 0.
    pub sizes: [u64; 4],
    /// Bytes from an element to the next along each axis but the innermost; multiples of 16.
    pub pitch_bytes: [u64; 3],
    /// Elements of the tensor that the box spans along each axis, at most 256.
    pub boxed: [u32; 4],
    /// How far those lie apart that are moved, at most 8; 1 for the innermost axis.
    pub apart: [u32; 4],
}

/// The compute stream of one task, as launch code sees it.
pub struct Queue<'a> {
    pub(super) driver: &'a mut dyn Driver,
    pub(super) stream: Stream,
    pub(super) blocks: &'a Blocks,
    /// The task's number on its lane.
    pub(super) number: u64,
    /// Whether products of f32 may round their factors to tf32.
    pub tf32: bool,
    /// What a program's kernels read of the step: `Now` in `gpu.cuh`.
    pub now: Ptr,
    /// Where a checking program's kernels put the first layer whose output is not finite, as an `int`.
    pub layer: Ptr,
}

impl<'a> Queue<'a> {
    pub(super) fn new(driver: &'a mut dyn Driver, stream: Stream, blocks: &'a Blocks, number: u64) -> Self {
        Queue { driver, stream, blocks, number, tf32: false, now: Ptr::NULL, layer: Ptr::NULL }
    }

    /// Sends what a program's kernels read of the step; with `check`, clears the first layer that is not finite.
    pub(super) fn begin(&mut self, scalars: &Scalars, check: bool) -> Result<()> {
        let mut now = [0; 32];
        now[..8].copy_from_slice(&scalars.seed.to_ne_bytes());
        now[8..16].copy_from_slice(&scalars.loss_scale.to_ne_bytes());
        now[16..20].copy_from_slice(&scalars.step.to_ne_bytes());
        now[20..24].copy_from_slice(&scalars.microbatch.to_ne_bytes());
        now[24..28].copy_from_slice(&u32::from(scalars.accumulate).to_ne_bytes());
        self.now = self.upload(&now)?;
        if check {
            self.layer = self.blocks.layer(self.driver, self.stream, self.number)?;
        }
        Ok(())
    }

    /// Brings the first layer that is not finite back to the host.
    pub(super) fn end_check(&mut self) -> Result<()> {
        self.blocks.download_layer(self.driver, self.stream, self.number)
    }

    /// Holds the launches that follow to the bytes of one op's operands, on drivers that check.
    pub(super) fn confine(&mut self, operands: &Operands) -> Result<()> {
        let block = (self.blocks.entry(self.number), Blocks::ENTRY_BYTES);
        self.driver.confine(self.stream, &mut operands.regions().chain([block]))
    }

    /// Ends what [`Queue::confine`] began.
    pub(super) fn release(&mut self) -> Result<()> {
        self.driver.confine(self.stream, &mut std::iter::empty())
    }

    /// Sends at most 256 bytes to the task's own block of device memory; once a task.
    ///
    /// # Errors
    /// When there are more, or the device has failed.
    pub fn upload(&mut self, bytes: &[u8]) -> Result<Ptr> {
        self.blocks.upload(self.driver, self.stream, self.number, bytes)
    }

    /// 192 bytes of device memory where one kernel of a task leaves what a later one reads.
    pub fn passed_on(&self) -> Ptr {
        self.blocks.passed_on(self.number)
    }

    /// Queues a launch.
    ///
    /// # Errors
    /// When a size is beyond what kernels take, or the device has failed.
    pub fn launch(&mut self, launch: Launch) -> Result<()> {
        if let Some(fault) = launch.fault {
            return Err(Error::bad(format!("{}: {fault}", launch.kernel)));
        }
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.driver.launch(self.stream, &launch)
    }

    /// Queues a copy within the device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn copy(&mut self, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        if bytes == 0 { Ok(()) } else { self.driver.copy(self.stream, to, from, bytes) }
    }

    /// Queues filling with a byte.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn fill(&mut self, to: Ptr, byte: u8, bytes: u64) -> Result<()> {
        if bytes == 0 { Ok(()) } else { self.driver.fill(self.stream, to, byte, bytes) }
    }

    /// A descriptor for the bulk copy engine.
    ///
    /// # Errors
    /// When the device does not take it.
    pub fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.driver.tensor_map(spec)
    }

    /// The same for boxes of four axes.
    ///
    /// # Errors
    /// When the device does not take it.
    pub fn box_map(&mut self, spec: &BoxMapSpec) -> Result<TensorMap> {
        self.driver.box_map(spec)
    }

    /// The GPU's compute capability: 90 for 9.0.
    pub fn arch(&self) -> u32 {
        self.driver.facts().arch
    }

    /// Bytes of shared memory that a block may have.
    pub fn shared_bytes(&self) -> usize {
        self.driver.facts().shared_bytes as usize
    }

    /// The GPU's multiprocessors. Grids may depend on it, results never.
    pub fn multiprocessors(&self) -> usize {
        self.driver.facts().multiprocessors as usize
    }
}
