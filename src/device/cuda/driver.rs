//! The seam: what the cuda device needs of the GPUs that it uses. Two things stand behind it: the driver API and the
//! emulator.
//!
//! Streams run in order; marks tie them together, those of one GPU and those of several. Memory, streams and marks
//! belong to a GPU, and what is queued on a stream touches that GPU's memory and the host's, never another's. Nothing
//! here waits for a device except where its name says so.

use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use crate::base::{Error, Result};
use crate::graph::Kernels;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The machine's number for it.
    pub ordinal: usize,
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

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "GPU {} ({})", self.ordinal, self.name)
    }
}

/// An ordered queue of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The GPU's place among the driver's.
    pub gpu: usize,
    /// Which of the GPU's streams.
    pub number: usize,
}

/// A place in the order of a stream, with the time at which it was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The GPU's place among the driver's.
    pub gpu: usize,
    /// Which of the GPU's marks.
    pub number: usize,
}

/// The GPUs that a device uses, or what stands for them. `gpu` is a place among them, from 0.
pub trait Driver: Send {
    /// How many GPUs it drives.
    fn gpus(&self) -> usize;

    /// What a GPU is.
    fn facts(&self, gpu: usize) -> &Facts;

    /// Loads an embedder's kernels on every GPU unless they are loaded already; launches then name them
    /// ([`Launch::of`]).
    ///
    /// # Errors
    /// When the bytes hold nothing for these GPUs, or others of that name are loaded.
    fn load_once(&mut self, kernels: &Kernels) -> Result<()>;

    /// Memory of a GPU, of exactly this size. Freed when the driver is dropped.
    ///
    /// # Errors
    /// When there is not enough.
    fn alloc(&mut self, gpu: usize, bytes: u64) -> Result<Ptr>;

    /// Pinned host memory of exactly this size, zeroed, that the streams of every GPU copy from and to. Freed when the
    /// driver is dropped.
    ///
    /// # Errors
    /// When there is not enough.
    fn alloc_host(&mut self, bytes: u64) -> Result<*mut u8>;

    /// A new stream of a GPU.
    ///
    /// # Errors
    /// When the device has failed.
    fn stream(&mut self, gpu: usize) -> Result<Stream>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// When there is no such kernel, or the device has failed.
    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<()>;

    /// Queues a copy between any two places of the host's memory and the stream's GPU's, given by address.
    ///
    /// # Errors
    /// When the device has failed.
    fn copy(&mut self, stream: Stream, to: Ptr, from: Ptr, bytes: u64) -> Result<()>;

    /// Queues filling with a byte.
    ///
    /// # Errors
    /// When the device has failed.
    fn fill(&mut self, stream: Stream, to: Ptr, byte: u8, bytes: u64) -> Result<()>;

    /// A new mark of a GPU, not yet passed.
    ///
    /// # Errors
    /// When the device has failed.
    fn mark(&mut self, gpu: usize) -> Result<Mark>;

    /// Puts a mark at the end of a stream of its GPU, again and again if need be.
    ///
    /// # Errors
    /// When they are not of one GPU, or the device has failed.
    fn record(&mut self, mark: Mark, stream: Stream) -> Result<()>;

    /// What is queued on `stream` from now on runs after `mark`, which may be another GPU's.
    ///
    /// # Errors
    /// When the device has failed.
    fn wait_for(&mut self, stream: Stream, mark: Mark) -> Result<()>;

    /// Whether a mark that was recorded has been passed. Does not wait.
    ///
    /// # Errors
    /// When something before it has failed.
    fn passed(&mut self, mark: Mark) -> Result<bool>;

    /// Tells which bytes the launches that follow on `stream` may touch, until the next call; none: any. A driver that
    /// checks holds them to it.
    ///
    /// # Errors
    /// When the device has failed.
    fn confine(&mut self, stream: Stream, regions: &mut dyn Iterator<Item = (Ptr, u64)>) -> Result<()> {
        let _ = (stream, regions);
        Ok(())
    }

    /// Gives the devices a moment: waits a little, longer the longer nothing has happened, or runs something where
    /// nothing runs by itself.
    ///
    /// # Errors
    /// When the device has failed.
    fn wait_a_moment(&mut self, idle_secs: f64) -> Result<()>;

    /// Seconds from one passed mark to another of the same GPU, less than 0 where the other came first. Good to a
    /// microsecond up to ten seconds.
    ///
    /// # Errors
    /// When they are not of one GPU, whose clocks have nothing in common, or the device has failed.
    fn secs_between(&mut self, from: Mark, to: Mark) -> Result<f64>;

    /// A descriptor of a matrix for a GPU's bulk copy engine.
    ///
    /// # Errors
    /// When the device does not take it.
    fn tensor_map(&mut self, gpu: usize, spec: &TensorMapSpec) -> Result<TensorMap>;

    /// A descriptor of a tensor of four axes for a GPU's bulk copy engine.
    ///
    /// # Errors
    /// When the device does not take it.
    fn box_map(&mut self, gpu: usize, spec: &BoxMapSpec) -> Result<TensorMap>;
}

/// Embedders' kernels that are loaded: their bytes, by name.
#[derive(Default)]
pub(super) struct Loaded(BTreeMap<&'static str, &'static [u8]>);

impl Loaded {
    /// Whether these are.
    ///
    /// # Errors
    /// When others of that name are.
    pub fn has(&self, name: &'static str, image: &'static [u8]) -> Result<bool> {
        match self.0.get(name) {
            None => Ok(false),
            // The first comparison is all that a launch costs.
            Some(&other) if std::ptr::eq(other, image) || other == image => Ok(true),
            Some(_) => Err(Error::bad(format!("{name}: other kernels of this name are loaded"))),
        }
    }

    /// Notes that they are now.
    pub fn note(&mut self, name: &'static str, image: &'static [u8]) {
        self.0.insert(name, image);
    }
}

/// Kernels that have been launched, each with the compute capability of the GPU.
static LAUNCHED: Mutex<BTreeSet<(u32, &'static str)>> = Mutex::new(BTreeSet::new());

/// For drivers: a kernel is launched, at least for the first time. The crate's own alone are noted.
pub(super) fn note_launch(arch: u32, launch: &Launch) {
    if launch.of.is_some() {
        return;
    }
    let kernel = launch.kernel;
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).insert((arch, kernel));
}

/// Kernels that this process has launched, on GPUs or emulated ones, each with the compute capability: what a test has
/// covered.
pub fn launched() -> BTreeSet<(u32, &'static str)> {
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Refuses what is of two GPUs where it must be of one.
pub(super) fn one_gpu(a: usize, b: usize) -> Result<()> {
    if a == b { Ok(()) } else { Err(Error::Device(format!("a mark of GPU {a} where one of GPU {b} belongs"))) }
}
