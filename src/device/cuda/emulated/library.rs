//! A shared object with kernels compiled for the CPU and the emulator that runs them: how it is loaded, and its C side.

use crate::base::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, OnceLock};

/// The kernels, as `build.rs` compiled them.
pub static KERNELS: &[u8] = include_bytes!(env!("HYDRA_EMULATED_KERNELS"));
/// Of files in [`crate::device::cuda::KERNELS_VARIABLE`]'s folder, the one that is loaded instead.
const FILE: &str = "kernels.so";

/// The emulator's `Launch` (kernels/emulator/launch.h).
#[repr(C)]
pub struct Settings {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub seed: u32,
}

/// The library that every driver uses, loaded once.
static LIBRARY: OnceLock<Library> = OnceLock::new();
/// Embedders' libraries, each loaded once, with the bytes that they were loaded from.
static CUSTOM: Mutex<Vec<(&'static [u8], &'static Library)>> = Mutex::new(Vec::new());

pub type Kernel = unsafe extern "C" fn(*const Settings, *mut *mut c_void) -> c_int;
type LastError = unsafe extern "C" fn() -> *const c_char;
type EncodeMap = unsafe extern "C" fn(*mut c_void, *const c_void, u32, u64, u64, u64, u32, u32, u32) -> c_int;
type EncodeBoxMap =
    unsafe extern "C" fn(*mut c_void, *const c_void, u32, *const u64, *const u64, *const u32, *const u32, u32) -> c_int;
type Track = unsafe extern "C" fn(*const c_void, usize);
type UntrackAll = unsafe extern "C" fn();
type KernelCount = unsafe extern "C" fn() -> c_int;
type KernelName = unsafe extern "C" fn(c_int) -> *const c_char;
type ChecksRaces = unsafe extern "C" fn() -> c_int;
/// AddressSanitizer's, where it is loaded.
type SetAccess = unsafe extern "C" fn(*const c_void, usize);

/// A shared object with kernels and the emulator that runs them; never unloaded.
pub struct Library {
    handle: *mut c_void,
    last_error: LastError,
    pub encode_map: EncodeMap,
    pub encode_box_map: EncodeBoxMap,
    pub track: Track,
    pub untrack_all: UntrackAll,
    kernel_count: KernelCount,
    kernel_name: KernelName,
    /// Whether these kernels were compiled for the race detector.
    pub checks_races: bool,
    /// AddressSanitizer's ways to forbid a stretch of memory and to allow it.
    pub sanitizer: Option<[SetAccess; 2]>,
}

// SAFETY: the emulator keeps its state by thread or behind mutexes; the handle is only asked for symbols.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The kernels that were built in, or those of the folder that the environment names.
    pub fn built_in() -> Result<&'static Library> {
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = match super::super::kernels_dir() {
            None => Library::new("kernels", KERNELS)?,
            Some(dir) => {
                let path = dir.join(FILE);
                Library::new("kernels", &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?
            }
        };
        // Where two threads were here at once the second library is left alone: both are the same.
        Ok(LIBRARY.get_or_init(|| library))
    }

    /// An embedder's kernels.
    pub fn custom(name: &'static str, image: &'static [u8]) -> Result<&'static Library> {
        let mut loaded = CUSTOM.lock().expect("no thread panics while it holds this");
        if let Some((_, library)) = loaded.iter().find(|(bytes, _)| *bytes == image) {
            return Ok(library);
        }
        let library: &'static Library = Box::leak(Box::new(Library::new(name, image)?));
        loaded.push((image, library));
        Ok(library)
    }

    /// Loads a shared object from its bytes.
    fn new(name: &str, image: &[u8]) -> Result<Library> {
        let failed = |what: &str| Error::Device(format!("emulated kernels {name}: cannot {what}"));
        let c_name = CString::new(name).map_err(|_| failed("be named so"))?;
        // SAFETY: the name is a C string.
        let file = unsafe { libc::memfd_create(c_name.as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(failed("have a file in memory"));
        }
        let mut written = 0;
        while written < image.len() {
            let rest = &image[written..];
            // SAFETY: the descriptor was opened above, and `rest` is as long as said.
            match unsafe { libc::write(file, rest.as_ptr().cast(), rest.len()) } {
                n if n > 0 => written += n as usize,
                _ => return Err(failed("be copied into memory")),
            }
        }
        // The descriptor stays open, like the library: the loader takes a path that it has seen for the library that it
        // was then.
        let path = CString::new(format!("/proc/self/fd/{file}")).expect("a number has no zero byte");
        // SAFETY: kernels that `kernels/emulator/build.sh` made, whose initialisers register names and nothing else:
        // the crate's own, those of the folder that the environment names, or an embedder's, who promises it
        // (`Kernels::new`).
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: asks for this thread's last failure.
            let why = unsafe { libc::dlerror() };
            // SAFETY: a C string after a failure, kept until the next call.
            let why = unsafe { CStr::from_ptr(why) }.to_string_lossy().into_owned();
            return Err(Error::Device(format!("emulated kernels {name}: {why}")));
        }
        let symbol = |symbol: &CStr| {
            // SAFETY: the handle is open.
            let found = unsafe { libc::dlsym(handle, symbol.as_ptr()) };
            if found.is_null() { Err(failed(&format!("find {}", symbol.to_string_lossy()))) } else { Ok(found) }
        };
        Ok(Library {
            handle,
            // SAFETY: the emulator's own functions, with the types of kernels/emulator/launch.h.
            last_error: unsafe { std::mem::transmute::<*mut c_void, LastError>(symbol(c"sim_last_error")?) },
            // SAFETY: as above.
            encode_map: unsafe { std::mem::transmute::<*mut c_void, EncodeMap>(symbol(c"sim_tensor_map")?) },
            // SAFETY: as above.
            encode_box_map: unsafe { std::mem::transmute::<*mut c_void, EncodeBoxMap>(symbol(c"sim_tensor_map_4d")?) },
            // SAFETY: as above.
            track: unsafe { std::mem::transmute::<*mut c_void, Track>(symbol(c"sim_track")?) },
            // SAFETY: as above.
            untrack_all: unsafe { std::mem::transmute::<*mut c_void, UntrackAll>(symbol(c"sim_untrack_all")?) },
            // SAFETY: as above.
            kernel_count: unsafe { std::mem::transmute::<*mut c_void, KernelCount>(symbol(c"sim_kernel_count")?) },
            // SAFETY: as above.
            kernel_name: unsafe { std::mem::transmute::<*mut c_void, KernelName>(symbol(c"sim_kernel_name")?) },
            checks_races: {
                // SAFETY: as above.
                let ask = unsafe { std::mem::transmute::<*mut c_void, ChecksRaces>(symbol(c"sim_checks_races")?) };
                // SAFETY: only reads a flag.
                (unsafe { ask() }) != 0
            },
            sanitizer: sanitizer(),
        })
    }

    /// A kernel's entry point.
    pub fn kernel(&self, name: &str) -> Option<Kernel> {
        let symbol = CString::new(format!("{name}_sim")).ok()?;
        // SAFETY: the handle is open as long as the library lives.
        let found = unsafe { libc::dlsym(self.handle, symbol.as_ptr()) };
        // SAFETY: GPU_EXPORT gives every such symbol this type, in whosever sources.
        (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Kernel>(found) })
    }

    /// Of all its kernels.
    pub fn names(&self) -> Vec<String> {
        // SAFETY: only reads a number.
        let count = unsafe { (self.kernel_count)() };
        let name = |i: c_int| {
            // SAFETY: only gives an address.
            let text = unsafe { (self.kernel_name)(i) };
            // SAFETY: a C string for every number below the count, as long as the library lives.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        (0..count).map(name).collect()
    }

    /// Why this thread's last launch failed.
    pub fn error(&self) -> String {
        // SAFETY: only gives an address.
        let text = unsafe { (self.last_error)() };
        // SAFETY: a C string, which the emulator keeps for this thread until its next launch.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }
}

/// Where AddressSanitizer is loaded, its functions.
fn sanitizer() -> Option<[SetAccess; 2]> {
    let find = |symbol: &CStr| {
        // SAFETY: looks among the libraries that are loaded.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) };
        // SAFETY: the two have this type in every version of it (sanitizer/asan_interface.h).
        (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, SetAccess>(found) })
    };
    Some([find(c"__asan_poison_memory_region")?, find(c"__asan_unpoison_memory_region")?])
}
