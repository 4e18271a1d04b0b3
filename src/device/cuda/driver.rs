//! The seam: what the cuda device needs of a GPU. Two things stand behind it: the driver API and the emulator.
//!
//! Streams run in order; events tie them together. Nothing here waits for the device except where its name says so.

use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use crate::base::Result;
use crate::graph::Kernels;

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Compute capability: 90 for 9.0.
    pub arch: u32,
    /// Multiprocessors. Grids may depend on it, results never.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of shared memory that a block may have.
    pub shared_bytes: u32,
}

/// An ordered queue of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub u32);

/// A place in a stream's order, with the time at which it was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u32);

/// A GPU, or what stands for one.
pub trait Driver: Send {
    /// What it is.
    fn facts(&self) -> &Facts;

    /// Loads an embedder's kernels unless they are loaded already; they are then known by their names.
    ///
    /// # Errors
    /// When the bytes hold nothing for this device.
    fn load_once(&mut self, kernels: &Kernels) -> Result<()>;

    /// Memory of the device, of exactly this size. Freed when the driver is dropped.
    ///
    /// # Errors
    /// When there is not enough.
    fn alloc(&mut self, bytes: u64) -> Result<Ptr>;

    /// Pinned host memory of exactly this size, zeroed, that streams copy from and to. Freed when the driver is dropped.
    ///
    /// # Errors
    /// When there is not enough.
    fn alloc_host(&mut self, bytes: u64) -> Result<*mut u8>;

    /// A new stream.
    ///
    /// # Errors
    /// When the device has failed.
    fn stream(&mut self) -> Result<Stream>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// When there is no such kernel, or the device has failed.
    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<()>;

    /// Queues a copy between any two places, given by address.
    ///
    /// # Errors
    /// When the device has failed.
    fn copy(&mut self, stream: Stream, to: Ptr, from: Ptr, bytes: u64) -> Result<()>;

    /// Queues filling with a byte.
    ///
    /// # Errors
    /// When the device has failed.
    fn fill(&mut self, stream: Stream, to: Ptr, byte: u8, bytes: u64) -> Result<()>;

    /// A new mark, not yet passed.
    ///
    /// # Errors
    /// When the device has failed.
    fn mark(&mut self) -> Result<Mark>;

    /// Puts a mark at the end of a stream, again and again if need be.
    ///
    /// # Errors
    /// When the device has failed.
    fn record(&mut self, mark: Mark, stream: Stream) -> Result<()>;

    /// What is queued on `stream` from now on runs after `mark`.
    ///
    /// # Errors
    /// When the device has failed.
    fn wait_for(&mut self, stream: Stream, mark: Mark) -> Result<()>;

    /// Whether a mark that was recorded has been passed. Does not wait.
    ///
    /// # Errors
    /// When something before it has failed.
    fn passed(&mut self, mark: Mark) -> Result<bool>;

    /// Tells which bytes the launches that follow on `stream` may touch, until the next call; none: any. A driver that checks holds them
    /// to it.
    ///
    /// # Errors
    /// When the device has failed.
    fn confine(&mut self, stream: Stream, regions: &mut dyn Iterator<Item = (Ptr, u64)>) -> Result<()> {
        let _ = (stream, regions);
        Ok(())
    }

    /// Gives the device a moment: waits a little, longer the longer nothing has happened, or runs something where nothing runs by itself.
    ///
    /// # Errors
    /// When the device has failed.
    fn wait_a_moment(&mut self, idle_secs: f64) -> Result<()>;

    /// Seconds from one passed mark to another, less than 0 where the other came first. Good to a microsecond up to ten seconds.
    ///
    /// # Errors
    /// When the device has failed.
    fn secs_between(&mut self, from: Mark, to: Mark) -> Result<f64>;

    /// A descriptor of a matrix for the bulk copy engine.
    ///
    /// # Errors
    /// When the device does not take it.
    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap>;

    /// The same for boxes of four axes.
    ///
    /// # Errors
    /// When the device does not take it.
    fn box_map(&mut self, spec: &BoxMapSpec) -> Result<TensorMap>;
}
