//! One GPU, with what belongs to its context: kernels, memory, streams and events, through the CUDA driver API, loaded
//! when the program runs.
//!
//! Everything goes through raw handles: streams, events and pinned memory are ours to order (see the project's
//! DESIGN.md for why not through a wrapper that tracks events by itself). Each call that can fail says what it was and
//! on which GPU.

use super::MULTIPROCESSORS_VARIABLE;
use super::driver::Facts;
use super::launch::{Launch, Ptr};
use super::modules::Modules;
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};
use rayon::prelude::*;
use std::ffi::{OsStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

/// The oldest driver that loads them, as the driver counts: CUDA 13.0.
const OLDEST_DRIVER: c_int = 13_000;
/// The oldest GPU that they run on.
const OLDEST_ARCH: u32 = 80;
/// Why there are modules.
const OPENED: &str = "a GPU that has been opened has its kernels";
/// How long the end waits for kernels that run.
const PATIENCE: Duration = Duration::from_secs(5);

/// A GPU with its primary context, which every call makes its thread's.
pub struct Gpu {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// None before they are loaded.
    modules: Option<Modules>,
    streams: Vec<sys::CUstream>,
    events: Vec<sys::CUevent>,
    memory: Vec<sys::CUdeviceptr>,
}

// SAFETY: handles of the driver API may be used from any thread, here by one at a time since there is no `Sync`; what
// needs the context enters it.
unsafe impl Send for Gpu {}

/// What a call was for, with the driver's own words.
fn told(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| {
        let words = e.error_string().map(|s| s.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("{e:?}"));
        Error::Device(format!("cuda: {what}: {words}"))
    }
}

/// What a call was for and on which GPU, by the machine's number, with the driver's own words.
pub(super) fn said(ordinal: usize, error: DriverError, what: impl std::fmt::Display) -> Error {
    told(&format!("GPU {ordinal}: {what}"))(error)
}

/// Of a GPU's multiprocessors as many as are asked for, where a number is.
fn lowered(all: u32, asked: Option<&OsStr>) -> Result<u32> {
    let Some(asked) = asked else { return Ok(all) };
    let number = asked.to_str().and_then(|text| text.parse().ok()).filter(|n| (1..=all).contains(n));
    number.ok_or_else(|| {
        Error::bad(format!("{MULTIPROCESSORS_VARIABLE} is {asked:?}, want a number from 1 to the GPU's own {all}"))
    })
}

/// How many GPUs there are.
///
/// # Errors
/// When there is no driver, or one that is too old: the message says which.
pub fn count() -> Result<usize> {
    // SAFETY: only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device("cuda: no NVIDIA driver on this machine (libcuda was not found)".into()));
    }
    result::init().map_err(told("the driver does not start"))?;
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(told("asking for the driver's version"))?;
    if version < OLDEST_DRIVER {
        return Err(Error::Device(format!(
            "cuda: the driver is for CUDA {}.{}, this program needs 13.0 or later (driver 580)",
            version / 1000,
            version % 1000 / 10
        )));
    }
    result::device::get_count().map(|n| n as usize).map_err(told("counting devices"))
}

/// Name and bytes of memory of each GPU.
///
/// # Errors
/// As [`count`].
pub fn list() -> Result<Vec<(String, u64)>> {
    let describe = |ordinal| {
        let device = result::device::get(ordinal as c_int).map_err(told("opening the device"))?;
        let name = result::device::get_name(device).map_err(told("asking for the name"))?;
        // SAFETY: the device is one that `get` gave.
        let bytes = unsafe { result::device::total_mem(device) }.map_err(told("asking for its memory"))?;
        Ok((name, bytes as u64))
    };
    (0..count()?).map(describe).collect()
}

impl Gpu {
    /// The GPU of this number, its kernels loaded.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or it is older than the kernels; when a variable of the environment names
    /// what it does not have.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let gpus = count()?;
        if ordinal >= gpus {
            return Err(Error::Device(format!("cuda: GPU {ordinal} was asked for, this machine has {gpus}")));
        }
        let device = result::device::get(ordinal as c_int).map_err(told("opening the device"))?;
        let ask = |attribute| {
            // SAFETY: the device is one that `get` gave.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(told("asking for an attribute"))
        };
        let (major, minor) = (
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let facts = Facts {
            ordinal,
            name: result::device::get_name(device).map_err(told("asking for the name"))?,
            arch: (major * 10 + minor) as u32,
            multiprocessors: lowered(
                ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
                std::env::var_os(MULTIPROCESSORS_VARIABLE).as_deref(),
            )?,
            // SAFETY: the device is one that `get` gave.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(told("asking for its memory"))? as u64,
            shared_bytes: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        };
        if facts.arch < OLDEST_ARCH {
            return Err(Error::Device(format!(
                "cuda: {facts} has compute capability {major}.{minor}, the kernels need 8.0 or later"
            )));
        }
        // SAFETY: as above; released when the GPU is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(told("making a context"))?;
        let mut gpu =
            Gpu { facts, device, context, modules: None, streams: Vec::new(), events: Vec::new(), memory: Vec::new() };
        gpu.enter()?;
        gpu.modules = Some(Modules::own(ordinal, gpu.facts.arch)?);
        Ok(gpu)
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What a call was for and on this GPU, with the driver's own words.
    pub(super) fn said(&self, error: DriverError, what: impl std::fmt::Display) -> Error {
        said(self.facts.ordinal, error, what)
    }

    /// Makes the context this thread's: the last call may have come from another thread, or have been for another GPU.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: retained until the GPU is dropped.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| self.said(e, "entering the context"))
    }

    /// Bytes of memory that are free now.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn free_bytes(&self) -> Result<u64> {
        self.enter()?;
        result::mem_get_info().map(|(free, _)| free as u64).map_err(|e| self.said(e, "asking for free memory"))
    }

    /// The names of the crate's own kernels that are loaded.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn kernels(&self) -> Result<Vec<String>> {
        self.enter()?;
        self.modules.as_ref().expect(OPENED).names()
    }

    /// Loads an embedder's kernels, which launches name by `of`.
    ///
    /// # Errors
    /// When they hold nothing for this GPU.
    pub(super) fn load(&mut self, of: &'static str, image: &[u8]) -> Result<()> {
        self.enter()?;
        self.modules_mut().load(Some(of), of, image)
    }

    fn modules_mut(&mut self) -> &mut Modules {
        self.modules.as_mut().expect(OPENED)
    }

    pub(super) fn alloc(&mut self, bytes: u64) -> Result<Ptr> {
        if bytes == 0 {
            return Ok(Ptr::NULL);
        }
        self.enter()?;
        // SAFETY: the size is not 0; freed when the GPU is dropped.
        let memory = unsafe { result::malloc_sync(bytes as usize) };
        let memory = memory.map_err(|e| self.said(e, format_args!("{bytes} bytes of device memory")))?;
        self.memory.push(memory);
        Ok(Ptr(memory))
    }

    /// Zeroed memory of the host that every context takes for pinned; the caller frees it while this one lives.
    pub(super) fn alloc_host(&self, bytes: u64) -> Result<*mut c_void> {
        self.enter()?;
        // Not write-combined, which is slow for the host to read.
        // SAFETY: the size is not 0; freed by the caller.
        let memory = unsafe { result::malloc_host(bytes.max(1) as usize, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let memory = memory.map_err(|e| self.said(e, format_args!("{bytes} bytes of pinned host memory")))?;
        // SAFETY: just allocated with at least this size; every byte is one thread's alone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<MaybeUninit<u8>>(), bytes as usize) };
        bytes.par_chunks_mut(64 << 20).for_each(|chunk| chunk.fill(MaybeUninit::zeroed()));
        Ok(memory)
    }

    pub(super) fn stream(&mut self) -> Result<usize> {
        self.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        self.streams.push(stream.map_err(|e| self.said(e, "making a stream"))?);
        Ok(self.streams.len() - 1)
    }

    pub(super) fn launch(&mut self, stream: usize, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.modules_mut().kernel(launch)?;
        let ([x, y, z], stream) = (launch.grid, self.streams[stream]);
        // SAFETY: the arguments are in the kernel's order and of its types, which the parity tests check by running it,
        // and an embedder of its own promises (`Kernels::new`); the memory that they name stays allocated as long as
        // the GPU lives, and its use is ordered by marks.
        let done = launch.with_arguments(|arguments| unsafe {
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), launch.shared_bytes, stream, arguments)
        });
        done.map_err(|e| self.said(e, launch.kernel))
    }

    pub(super) fn copy(&self, stream: usize, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: both lie in memory of this GPU or the host's, whose use is ordered by marks; with one address space
        // the driver sees the direction.
        unsafe { sys::cuMemcpyAsync(to.0, from.0, bytes as usize, self.streams[stream]) }
            .result()
            .map_err(|e| self.said(e, format_args!("a copy of {bytes} bytes")))
    }

    pub(super) fn fill(&self, stream: usize, to: Ptr, byte: u8, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: it lies in memory of this GPU, whose use is ordered by marks.
        unsafe { result::memset_d8_async(to.0, byte, bytes as usize, self.streams[stream]) }
            .map_err(|e| self.said(e, format_args!("filling {bytes} bytes")))
    }

    pub(super) fn event(&mut self) -> Result<usize> {
        self.enter()?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|e| self.said(e, "making an event"))?;
        self.events.push(event);
        Ok(self.events.len() - 1)
    }

    pub(super) fn record(&self, event: usize, stream: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: both handles live as long as the GPU.
        unsafe { result::event::record(self.events[event], self.streams[stream]) }
            .map_err(|e| self.said(e, "recording an event"))
    }

    /// Makes `stream` wait for an event of `other`, which may be this GPU: the driver takes an event of another context
    /// here.
    pub(super) fn wait_for(&self, stream: usize, other: &Gpu, event: usize) -> Result<()> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both handles live as long as their GPUs, which are dropped after all have come to rest.
        unsafe { result::stream::wait_event(self.streams[stream], other.events[event], flags) }
            .map_err(|e| self.said(e, "a wait between streams"))
    }

    pub(super) fn passed(&self, event: usize) -> Result<bool> {
        self.enter()?;
        // SAFETY: the handle lives as long as the GPU.
        match unsafe { result::event::query(self.events[event]) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(self.said(e, "running")),
        }
    }

    pub(super) fn secs_between(&self, from: usize, to: usize) -> Result<f64> {
        self.enter()?;
        let (from, to) = (self.events[from], self.events[to]);
        // SAFETY: the handles live as long as the GPU.
        let ms = unsafe { result::event::elapsed(from, to) }.map_err(|e| self.said(e, "reading the time"))?;
        Ok(f64::from(ms) * 1e-3)
    }

    /// Waits until nothing runs any more, but not for ever: false where a kernel does not end.
    pub(super) fn comes_to_rest(&self) -> bool {
        let began = Instant::now();
        let busy = |stream: &&sys::CUstream| {
            // SAFETY: the handle lives as long as the GPU.
            let asked = unsafe { sys::cuStreamQuery(**stream) };
            asked == sys::CUresult::CUDA_ERROR_NOT_READY
        };
        while self.enter().is_ok() && self.streams.iter().any(|stream| busy(&stream)) {
            if began.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Gpu {
    /// Waits for what is queued, then frees. Failures have nobody left to be told to: the run has its result or its
    /// first error. Where a kernel does not end nothing is freed, since every call for that would wait for it, and the
    /// error that names it would never be heard: the end of the process frees all.
    fn drop(&mut self) {
        if !self.comes_to_rest() {
            return;
        }
        for &event in &self.events {
            // SAFETY: created by this GPU, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
        for &stream in &self.streams {
            // SAFETY: as above.
            let _ = unsafe { result::stream::destroy(stream) };
        }
        self.modules.iter_mut().for_each(Modules::unload);
        for &memory in &self.memory {
            // SAFETY: as above.
            let _ = unsafe { result::free_sync(memory) };
        }
        // What this thread does next is not to find a context that may be gone.
        if matches!(result::ctx::get_current(), Ok(Some(current)) if current == self.context) {
            // SAFETY: no context at all may be current.
            let _ = unsafe { result::ctx::set_current(std::ptr::null_mut()) };
        }
        // SAFETY: retained once by `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiprocessors_are_lowered_or_what_is_asked_for_is_refused() {
        assert_eq!(lowered(132, None).expect("all"), 132);
        for (asked, want) in [("1", 1), ("4", 4), ("132", 132)] {
            assert_eq!(lowered(132, Some(OsStr::new(asked))).expect("fewer"), want);
        }
        for bad in ["", "0", "133", "-4", "4 ", "four", "99999999999"] {
            let error = lowered(132, Some(OsStr::new(bad))).expect_err("refused").to_string();
            assert!(error.contains("HYDRA_MULTIPROCESSORS") && error.contains("132"), "{error}");
        }
    }
}
