//! A GPU as a driver: the CUDA driver API, loaded when the program runs.
//!
//! Everything goes through raw handles: streams, events and pinned memory are ours to order (see the project's DESIGN.md for why not
//! through a wrapper that tracks events by itself). Each call that can fail says what it was.

use super::driver::{Driver, Facts, Mark, Stream};
use super::launch::{BoxMapSpec, Launch, Ptr, Swizzle, TensorMap, TensorMapSpec};
use crate::base::{Error, Result};
use crate::graph::Kernels;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_int};

/// The fatbins that `build.rs` made, by the stem of their source.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("HYDRA_FATBINS"), "/list.rs"));
/// The oldest driver that loads them, as the driver counts: CUDA 13.0.
const OLDEST_DRIVER: c_int = 13_000;
/// The oldest GPU that they run on.
const OLDEST_ARCH: u32 = 80;
/// A kernel, with the dynamic shared memory that was asked for. Up to 48 KiB less its static shared memory it could have without.
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: u32,
}

/// A GPU with its primary context.
pub struct Gpu {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<&'static str, Kernel>,
    /// Embedders' kernels that are loaded.
    custom: HashSet<&'static str>,
    streams: Vec<sys::CUstream>,
    events: Vec<sys::CUevent>,
    device_memory: Vec<sys::CUdeviceptr>,
    host_memory: Vec<*mut std::ffi::c_void>,
}

// SAFETY: handles of the driver API may be used from any thread; `&mut self` keeps it to one at a time, and what needs the context enters it.
unsafe impl Send for Gpu {}

/// What a call was for, with the driver's own words.
fn said(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| {
        let words = e.error_string().map(|s| s.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("{e:?}"));
        Error::Device(format!("cuda: {what}: {words}"))
    }
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
    /// When there is no driver, no such GPU, or it is older than the kernels.
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
            name: result::device::get_name(device).map_err(said("asking for the name"))?,
            arch: (major * 10 + minor) as u32,
            multiprocessors: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            // SAFETY: the device is one that `get` gave.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(said("asking for its memory"))? as u64,
            shared_bytes: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        };
        if facts.arch < OLDEST_ARCH {
            return Err(Error::Device(format!(
                "cuda: {} has compute capability {major}.{minor}, the kernels need 8.0 or later",
                facts.name
            )));
        }
        // SAFETY: as above; released when the driver is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(said("making a context"))?;
        let mut gpu = Gpu {
            facts,
            device,
            context,
            modules: Vec::new(),
            kernels: HashMap::new(),
            custom: HashSet::new(),
            streams: Vec::new(),
            events: Vec::new(),
            device_memory: Vec::new(),
            host_memory: Vec::new(),
        };
        gpu.enter()?;
        match super::kernels_dir() {
            None => FATBINS.iter().try_for_each(|(name, image)| gpu.load(name, image))?,
            Some(dir) => {
                for (name, _) in FATBINS {
                    let path = dir.join(format!("{name}.fatbin"));
                    let image = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
                    gpu.load(name, &image)?;
                }
            }
        }
        Ok(gpu)
    }

    /// Makes the context this thread's: the last call may have come from another thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: retained until the driver is dropped.
        unsafe { result::ctx::set_current(self.context) }.map_err(said("entering the context"))
    }

    /// Bytes of memory that are free now.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn free_bytes(&self) -> Result<u64> {
        self.enter()?;
        result::mem_get_info().map(|(free, _)| free as u64).map_err(said("asking for free memory"))
    }

    fn load(&mut self, name: &str, image: &[u8]) -> Result<()> {
        self.enter()?;
        // The driver would read on where there is nothing.
        if image.len() < 64 {
            return Err(Error::bad(format!("cuda: the kernels {name} are {} bytes, no fatbin", image.len())));
        }
        // SAFETY: the image is a fatbin or a cubin, which begin with their own length; the driver copies what it keeps.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        self.modules.push(module.map_err(said(&format!("loading the kernels {name}")))?);
        Ok(())
    }

    fn kernel(&mut self, name: &'static str, shared_bytes: u32) -> Result<sys::CUfunction> {
        if !self.kernels.contains_key(name) {
            let c_name = CString::new(name).map_err(|_| Error::bad(format!("kernel {name:?}: has a zero byte")))?;
            // SAFETY: modules stay loaded as long as the driver lives.
            let find = |&module| unsafe { result::module::get_function(module, c_name.clone()) }.ok();
            let function = self.modules.iter().find_map(find);
            let function = function.ok_or_else(|| Error::Device(format!("cuda: there is no kernel {name}")))?;
            self.kernels.insert(name, Kernel { function, shared_bytes: 0 });
        }
        let kernel = self.kernels.get_mut(name).expect("just inserted");
        if shared_bytes > kernel.shared_bytes {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(kernel.function, attribute, shared_bytes as c_int) }
                .map_err(said(&format!("{name}: {shared_bytes} bytes of shared memory")))?;
            kernel.shared_bytes = shared_bytes;
        }
        Ok(kernel.function)
    }
}

impl Driver for Gpu {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn load_once(&mut self, kernels: &Kernels) -> Result<()> {
        if self.custom.insert(kernels.name) { self.load(kernels.name, kernels.fatbin) } else { Ok(()) }
    }

    fn alloc(&mut self, bytes: u64) -> Result<Ptr> {
        if bytes == 0 {
            return Ok(Ptr::NULL);
        }
        self.enter()?;
        // SAFETY: the size is not 0; freed when the driver is dropped.
        let memory = unsafe { result::malloc_sync(bytes as usize) };
        let memory = memory.map_err(said(&format!("{bytes} bytes of device memory")))?;
        self.device_memory.push(memory);
        Ok(Ptr(memory))
    }

    fn alloc_host(&mut self, bytes: u64) -> Result<*mut u8> {
        self.enter()?;
        // SAFETY: the size is not 0; freed when the driver is dropped. Flags 0: the host reads it too, which write-combined memory is slow for.
        let memory = unsafe { result::malloc_host(bytes.max(1) as usize, 0) };
        let memory = memory.map_err(said(&format!("{bytes} bytes of pinned host memory")))?;
        self.host_memory.push(memory);
        let memory = memory.cast::<u8>();
        // SAFETY: just allocated with at least this size.
        unsafe { memory.write_bytes(0, bytes as usize) };
        Ok(memory)
    }

    fn stream(&mut self) -> Result<Stream> {
        self.enter()?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(said("making a stream"))?;
        self.streams.push(stream);
        Ok(Stream(self.streams.len() as u32 - 1))
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.kernel(launch.kernel, launch.shared_bytes)?;
        let ([x, y, z], stream) = (launch.grid, self.streams[stream.0 as usize]);
        // SAFETY: the arguments are in the kernel's order and of its types, which the parity tests check by running it; the memory that they
        // name stays allocated as long as the driver lives, and its use is ordered by marks.
        let done = launch.with_arguments(|arguments| unsafe {
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), launch.shared_bytes, stream, arguments)
        });
        done.map_err(said(launch.kernel))
    }

    fn copy(&mut self, stream: Stream, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: both lie in memory of this driver, whose use is ordered by marks; with one address space the driver sees the direction.
        unsafe { sys::cuMemcpyAsync(to.0, from.0, bytes as usize, self.streams[stream.0 as usize]) }
            .result()
            .map_err(said(&format!("a copy of {bytes} bytes")))
    }

    fn fill(&mut self, stream: Stream, to: Ptr, byte: u8, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: it lies in memory of this driver, whose use is ordered by marks.
        unsafe { result::memset_d8_async(to.0, byte, bytes as usize, self.streams[stream.0 as usize]) }
            .map_err(said(&format!("filling {bytes} bytes")))
    }

    fn mark(&mut self) -> Result<Mark> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(said("making an event"))?;
        self.events.push(event);
        Ok(Mark(self.events.len() as u32 - 1))
    }

    fn record(&mut self, mark: Mark, stream: Stream) -> Result<()> {
        self.enter()?;
        // SAFETY: both handles live as long as the driver.
        unsafe { result::event::record(self.events[mark.0 as usize], self.streams[stream.0 as usize]) }
            .map_err(said("recording an event"))
    }

    fn wait_for(&mut self, stream: Stream, mark: Mark) -> Result<()> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both handles live as long as the driver.
        unsafe { result::stream::wait_event(self.streams[stream.0 as usize], self.events[mark.0 as usize], flags) }
            .map_err(said("a wait between streams"))
    }

    fn passed(&mut self, mark: Mark) -> Result<bool> {
        // SAFETY: the handle lives as long as the driver.
        match unsafe { result::event::query(self.events[mark.0 as usize]) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(said("running")(e)),
        }
    }

    fn wait_a_moment(&mut self, idle_secs: f64) -> Result<()> {
        super::nap(idle_secs);
        Ok(())
    }

    fn secs_between(&mut self, from: Mark, to: Mark) -> Result<f64> {
        let (from, to) = (self.events[from.0 as usize], self.events[to.0 as usize]);
        // SAFETY: the handles live as long as the driver.
        let ms = unsafe { result::event::elapsed(from, to) }.map_err(said("reading the time"))?;
        Ok(f64::from(ms) * 1e-3)
    }

    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        use sys::CUtensorMapDataType_enum as Type;
        use sys::CUtensorMapSwizzle_enum as Permutation;
        let element = match spec.elem_bytes {
            2 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match spec.swizzle {
            Swizzle::None => Permutation::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes128 => Permutation::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let (sizes, boxed) = ([spec.cols, spec.rows], [spec.box_cols, spec.box_rows]);
        encode_map(element, swizzle, spec.base, sizes, &[spec.pitch_bytes], boxed, [1, 1])
            .map_err(said(&format!("a tensor map of {spec:?}")))
    }

    fn box_map(&mut self, spec: &BoxMapSpec) -> Result<TensorMap> {
        let element = sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        let swizzle = sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B;
        encode_map(element, swizzle, spec.base, spec.sizes, &spec.pitch_bytes, spec.boxed, spec.apart)
            .map_err(said(&format!("a tensor map of {spec:?}")))
    }
}

/// A descriptor of a tensor of `AXES` axes, the innermost first; of all but that one `pitch_bytes` says how far elements lie apart.
fn encode_map<const AXES: usize>(
    element: sys::CUtensorMapDataType,
    swizzle: sys::CUtensorMapSwizzle,
    base: Ptr,
    sizes: [u64; AXES],
    pitch_bytes: &[u64],
    boxed: [u32; AXES],
    apart: [u32; AXES],
) -> std::result::Result<TensorMap, DriverError> {
    use sys::CUtensorMapFloatOOBfill_enum as Fill;
    use sys::{CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion};
    assert_eq!(pitch_bytes.len() + 1, AXES, "the innermost axis has no pitch");
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays have as many axes as the rank says, pitches one less, and the map is written whole.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            element,
            AXES as u32,
            base.0 as *mut _,
            sizes.as_ptr(),
            pitch_bytes.as_ptr(),
            boxed.as_ptr(),
            apart.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    let mut bytes = [0; 128];
    for (to, word) in bytes.chunks_exact_mut(8).zip(map.opaque) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(TensorMap(bytes))
}

impl Drop for Gpu {
    /// Waits for what is queued, then frees. Failures have nobody left to be told to: the run has its result or its first error.
    fn drop(&mut self) {
        let _ = self.enter();
        let _ = result::ctx::synchronize();
        for &event in &self.events {
            // SAFETY: created by this driver, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
        for &stream in &self.streams {
            // SAFETY: as above.
            let _ = unsafe { result::stream::destroy(stream) };
        }
        for &module in &self.modules {
            // SAFETY: as above; nothing runs any more.
            let _ = unsafe { result::module::unload(module) };
        }
        for &memory in &self.device_memory {
            // SAFETY: as above.
            let _ = unsafe { result::free_sync(memory) };
        }
        for &memory in &self.host_memory {
            // SAFETY: as above.
            let _ = unsafe { result::free_host(memory) };
        }
        // SAFETY: retained once by `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}
