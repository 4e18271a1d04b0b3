//! The stream on which a task's kernels are launched, with what they read of the step.

use super::blocks::Blocks;
use super::driver::{Driver, Facts, Stream};
use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::device::Scalars;

/// Bytes of `Now` in `gpu.cuh`.
const NOW_BYTES: u64 = 32;

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

    /// Begins a program: writes what its kernels read of the step; with `check`, clears the first layer that is not
    /// finite.
    pub(super) fn begin(&mut self, scalars: &Scalars, check: bool) -> Result<()> {
        self.resume(check);
        let mut now = [0; NOW_BYTES as usize];
        now[..8].copy_from_slice(&scalars.seed.to_ne_bytes());
        now[8..16].copy_from_slice(&scalars.loss_scale.to_ne_bytes());
        now[16..20].copy_from_slice(&scalars.step.to_ne_bytes());
        now[20..24].copy_from_slice(&scalars.microbatch.to_ne_bytes());
        now[24..28].copy_from_slice(&u32::from(scalars.accumulate).to_ne_bytes());
        self.launch(Launch::new("begin_program", [1, 1, 1], 32).ptr(self.now).ptr(self.layer).bytes(&now, 8))
    }

    /// Goes on with a program that has begun.
    pub(super) fn resume(&mut self, check: bool) {
        self.now = self.blocks.entry(self.number);
        self.layer = if check { self.blocks.layer(self.number) } else { Ptr::NULL };
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

    /// 192 bytes of device memory where one kernel of a task leaves what a later one reads.
    pub fn passed_on(&self) -> Ptr {
        self.blocks.passed_on(self.number)
    }

    /// A word of device memory by which blocks of one kernel share out its work. It is 0 where a program begins, and
    /// each kernel leaves it so.
    pub fn taken(&self) -> Ptr {
        self.now.plus(NOW_BYTES)
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
        self.driver.tensor_map(self.stream.gpu, spec)
    }

    /// A descriptor of a tensor of four axes for the bulk copy engine.
    ///
    /// # Errors
    /// When the device does not take it.
    pub fn box_map(&mut self, spec: &BoxMapSpec) -> Result<TensorMap> {
        self.driver.box_map(self.stream.gpu, spec)
    }

    fn facts(&self) -> &Facts {
        self.driver.facts(self.stream.gpu)
    }

    /// The GPU's compute capability: 90 for 9.0.
    pub fn arch(&self) -> u32 {
        self.facts().arch
    }

    /// Bytes of shared memory that a block may have.
    pub fn shared_bytes(&self) -> usize {
        self.facts().shared_bytes as usize
    }

    /// The GPU's multiprocessors. Grids may depend on it, results never.
    pub fn multiprocessors(&self) -> usize {
        self.facts().multiprocessors as usize
    }
}
