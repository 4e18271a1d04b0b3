//! One GPU, with what belongs to its context: kernels, memory, streams and events, through the CUDA driver API, loaded when the program runs.
//!
//! Everything goes through raw handles: streams, events and pinned memory are ours to order (see the project's DESIGN.md for why not
//! through a wrapper that tracks events by itself). Each call that can fail says what it was and on which GPU.

use super::MULTIPROCESSORS_VARIABLE;
use super::driver::{Facts, note_launch};
use super::launch::{Launch, Ptr};
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

/// The fatbins that `build.rs` made, by the stem of their source.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("HYDRA_FATBINS"), "/list.rs"));
/// The oldest driver that loads them, as the driver counts: CUDA 13.0.
const OLDEST_DRIVER: c_int = 13_000;
/// The oldest GPU that they run on.
const OLDEST_ARCH: u32 = 80;
/// How long the end waits for kernels that run.
const PATIENCE: Duration = Duration::from_secs(5);

/// A kernel, with the dynamic shared memory that was asked for. Up to 48 KiB less its static shared memory it could have without.
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: u32,
}

/// A GPU with its primary context, which every call makes its thread's.
pub struct Gpu {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Each with the name of the embedder's kernels that it holds; `None`: the crate's own.
    modules: Vec<(Option<&'static str>, sys::CUmodule)>,
    /// By whose they are and their names.
    kernels: HashMap<(Option<&'static str>, &'static str), Kernel>,
    streams: Vec<sys::CUstream>,
    events: Vec<sys::CUevent>,
    memory: Vec<sys::CUdeviceptr>,
}

// SAFETY: handles of the driver API may be used from any thread, here by one at a time since there is no `Sync`; what needs the context enters it.
unsafe impl Send for Gpu {}

/// Whether bytes are a fatbin or a cubin that ends where its header says.
fn is_whole(image: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let field = image.get(at..at + bytes)?;
        Some(field.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let end = || match image {
        // Magic, version, bytes of the header, bytes of what follows.
        [0x50, 0xED, 0x55, 0xBA, ..] => number(6, 2)?.checked_add(number(8, 8)?),
        // An ELF file of 64 bits ends with the table of sections: its start, bytes of a row, rows.
        [0x7F, b'E', b'L', b'F', 2, ..] => number(40, 8)?.checked_add(number(58, 2)? * number(60, 2)?),
        _ => None,
    };
    end().is_some_and(|end| end >= 64 && end <= image.len() as u64)
}

/// What a call was for, with the driver's own words.
fn said(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| {
        let words = e.error_string().map(|s| s.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("{e:?}"));
        Error::Device(format!("cuda: {what}: {words}"))
    }
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
    result::init().map_err(said("the driver does not start"))?;
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(said("asking for the driver's version"))?;
    if version < OLDEST_DRIVER {
        return Err(Error::Device(format!(
            "cuda: the driver is for CUDA {}.{}, this program needs 13.0 or later (driver 580)",
            version / 1000,
            version % 1000 / 10
        )));
    }
    result::device::get_count().map(|n| n as usize).map_err(said("counting devices"))
}

/// Name and bytes of memory of each GPU.
///
/// # Errors
/// As [`count`].
pub fn list() -> Result<Vec<(String, u64)>> {
    let describe = |ordinal| {
        let device = result::device::get(ordinal as c_int).map_err(said("opening the device"))?;
        let name = result::device::get_name(device).map_err(said("asking for the name"))?;
        // SAFETY: the device is one that `get` gave.
        let bytes = unsafe { result::device::total_mem(device) }.map_err(said("asking for its memory"))?;
        Ok((name, bytes as u64))
    };
    (0..count()?).map(describe).collect()
}

impl Gpu {
    /// The GPU of this number, its kernels loaded.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or it is older than the kernels; when a variable of the environment names what it does not have.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let gpus = count()?;
        if ordinal >= gpus {
            return Err(Error::Device(format!("cuda: GPU {ordinal} was asked for, this machine has {gpus}")));
        }
        let device = result::device::get(ordinal as c_int).map_err(said("opening the device"))?;
        let ask = |attribute| {
            // SAFETY: the device is one that `get` gave.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(said("asking for an attribute"))
        };
        let (major, minor) = (
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let facts = Facts {
            ordinal,
            name: result::device::get_name(device).map_err(said("asking for the name"))?,
            arch: (major * 10 + minor) as u32,
            multiprocessors: lowered(
                ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
                std::env::var_os(MULTIPROCESSORS_VARIABLE).as_deref(),
            )?,
            // SAFETY: the device is one that `get` gave.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(said("asking for its memory"))? as u64,
            shared_bytes: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        };
        if facts.arch < OLDEST_ARCH {
            return Err(Error::Device(format!(
                "cuda: {facts} has compute capability {major}.{minor}, the kernels need 8.0 or later"
            )));
        }
        // SAFETY: as above; released when the GPU is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(said("making a context"))?;
        let mut gpu = Gpu {
            facts,
            device,
            context,
            modules: Vec::new(),
            kernels: HashMap::new(),
            streams: Vec::new(),
            events: Vec::new(),
            memory: Vec::new(),
        };
        gpu.enter()?;
        match super::kernels_dir() {
            None => FATBINS.iter().try_for_each(|(name, image)| gpu.load(None, name, image))?,
            Some(dir) => {
                for (name, _) in FATBINS {
                    let path = dir.join(format!("{name}.fatbin"));
                    let image = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
                    gpu.load(None, name, &image)?;
                }
            }
        }
        Ok(gpu)
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What a call was for and on which GPU, with the driver's own words.
    pub(super) fn said(&self, error: DriverError, what: impl std::fmt::Display) -> Error {
        said(&format!("GPU {}: {what}", self.facts.ordinal))(error)
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
        let listing = |e| self.said(e, "listing the kernels");
        let mut names = Vec::new();
        for &(_, module) in self.modules.iter().filter(|(of, _)| of.is_none()) {
            let mut count = 0;
            // SAFETY: writes one number; modules stay loaded as long as the GPU lives.
            unsafe { sys::cuModuleGetFunctionCount(&raw mut count, module) }.result().map_err(listing)?;
            let mut functions = vec![std::ptr::null_mut(); count as usize];
            // SAFETY: there is room for so many.
            unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }
                .result()
                .map_err(listing)?;
            for function in functions {
                let mut name = std::ptr::null();
                // SAFETY: writes one address; the function is of a loaded module.
                unsafe { sys::cuFuncGetName(&raw mut name, function) }.result().map_err(listing)?;
                // SAFETY: a C string, which lives as long as the module.
                names.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }

    /// Loads a fatbin or a cubin, the crate's own or an embedder's. The driver loads each kernel of it when it is first asked for, unless CUDA_MODULE_LOADING says otherwise.
    ///
    /// # Errors
    /// When it holds nothing for this GPU.
    pub(super) fn load(&mut self, of: Option<&'static str>, name: &str, image: &[u8]) -> Result<()> {
        self.enter()?;
        // The driver would read on where there is nothing.
        if !is_whole(image) {
            let bytes = image.len();
            return Err(Error::bad(format!(
                "cuda: the kernels {name}: {bytes} bytes that are no whole fatbin or cubin"
            )));
        }
        // SAFETY: the image says how long it is, and is that long; the driver copies what it keeps.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(|e| self.said(e, format_args!("loading the kernels {name}")))?;
        self.modules.push((of, module));
        Ok(())
    }

    fn kernel(&mut self, launch: &Launch) -> Result<sys::CUfunction> {
        let Launch { kernel: name, of, shared_bytes, .. } = *launch;
        if !self.kernels.contains_key(&(of, name)) {
            let c_name = CString::new(name).map_err(|_| Error::bad(format!("kernel {name:?}: has a zero byte")))?;
            let mut found = None;
            for &(_, module) in self.modules.iter().filter(|m| m.0 == of) {
                // SAFETY: modules stay loaded as long as the GPU lives.
                match unsafe { result::module::get_function(module, c_name.clone()) } {
                    Ok(function) => {
                        found = Some(function);
                        break;
                    }
                    Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => {}
                    Err(e) => return Err(self.said(e, format_args!("loading the kernel {name}"))),
                }
            }
            let function = found.ok_or_else(|| Error::Device(format!("cuda: there is no kernel {name}")))?;
            note_launch(self.facts.arch, launch);
            self.kernels.insert((of, name), Kernel { function, shared_bytes: 0 });
        }
        let Kernel { function, shared_bytes: has } = self.kernels[&(of, name)];
        if shared_bytes > has {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as c_int) }
                .map_err(|e| self.said(e, format_args!("{name}: {shared_bytes} bytes of shared memory")))?;
            self.kernels.insert((of, name), Kernel { function, shared_bytes });
        }
        Ok(function)
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
        let function = self.kernel(launch)?;
        let ([x, y, z], stream) = (launch.grid, self.streams[stream]);
        // SAFETY: the arguments are in the kernel's order and of its types, which the parity tests check by running it, and an embedder of its own promises (`Kernels::new`); the memory that they
        // name stays allocated as long as the GPU lives, and its use is ordered by marks.
        let done = launch.with_arguments(|arguments| unsafe {
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), launch.shared_bytes, stream, arguments)
        });
        done.map_err(|e| self.said(e, launch.kernel))
    }

    pub(super) fn copy(&self, stream: usize, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: both lie in memory of this GPU or the host's, whose use is ordered by marks; with one address space the driver sees the direction.
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

    /// Makes `stream` wait for an event of `other`, which may be this GPU: the driver takes an event of another context here.
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
    /// Waits for what is queued, then frees. Failures have nobody left to be told to: the run has its result or its first error. Where a kernel does not
    /// end nothing is freed, since every call for that would wait for it, and the error that names it would never be heard: the end of the process
    /// frees all.
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
        for &(_, module) in &self.modules {
            // SAFETY: as above; nothing runs any more.
            let _ = unsafe { result::module::unload(module) };
        }
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

    #[test]
    fn images_are_whole_or_refused() {
        for (name, image) in FATBINS {
            assert!(is_whole(image), "{name}");
            assert!(!is_whole(&image[..image.len() - 8]) || image.len() < 72, "{name}: cut short");
        }
        let ptx = b".version 9.0\n.target sm_90a\n.address_size 64\n// and so on, for more than 64 bytes";
        for bad in [&b""[..], b"\x50\xED\x55\xBA", b"\x7FELF\x02", &[0; 100], ptx, &[0xFF; 200]] {
            assert!(!is_whole(bad), "{bad:?}");
        }
        let mut endless = FATBINS[0].1.to_vec();
        endless[8..16].fill(0xFF);
        assert!(!is_whole(&endless));
    }
}
