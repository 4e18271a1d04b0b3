//! The kernels that are loaded on one GPU: modules of machine code, the crate's own and embedders', and the functions
//! in them.
//!
//! Every call is made in the GPU's context, and modules stay loaded as long as that lives.

use super::driver::note_launch;
use super::gpu::said;
use super::launch::Launch;
use crate::base::{Error, Result};
use cudarc::driver::sys;
use cudarc::driver::{DriverError, result};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int};

/// The fatbins that `build.rs` made, by the stem of their source.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("HYDRA_FATBINS"), "/list.rs"));

/// A kernel, with the dynamic shared memory that was asked for. Up to 48 KiB less its static shared memory it could
/// have without.
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: u32,
}

/// A GPU's modules and functions.
pub(super) struct Modules {
    /// The machine's number of the GPU.
    ordinal: usize,
    arch: u32,
    /// Each with the name of the embedder's kernels that it holds; `None`: the crate's own.
    modules: Vec<(Option<&'static str>, sys::CUmodule)>,
    /// By whose they are and their names.
    kernels: HashMap<(Option<&'static str>, &'static str), Kernel>,
}

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

impl Modules {
    /// The crate's own: those that were built in, or those of the folder that the environment names.
    ///
    /// # Errors
    /// When a file cannot be read, or holds nothing for this GPU.
    pub fn own(ordinal: usize, arch: u32) -> Result<Modules> {
        let mut modules = Modules { ordinal, arch, modules: Vec::new(), kernels: HashMap::new() };
        for (name, image) in FATBINS {
            match super::kernels_dir() {
                None => modules.load(None, name, image)?,
                Some(dir) => {
                    let path = dir.join(format!("{name}.fatbin"));
                    modules.load(None, name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?;
                }
            }
        }
        Ok(modules)
    }

    /// The names of the crate's own kernels that are loaded.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn names(&self) -> Result<Vec<String>> {
        let listing = |e| said(self.ordinal, e, "listing the kernels");
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

    /// Loads a fatbin or a cubin, the crate's own or an embedder's. The driver loads each kernel of it when it is first
    /// asked for, unless CUDA_MODULE_LOADING says otherwise.
    ///
    /// # Errors
    /// When it holds nothing for this GPU.
    pub fn load(&mut self, of: Option<&'static str>, name: &str, image: &[u8]) -> Result<()> {
        // The driver would read on where there is nothing.
        if !is_whole(image) {
            let bytes = image.len();
            return Err(Error::bad(format!(
                "cuda: the kernels {name}: {bytes} bytes that are no whole fatbin or cubin"
            )));
        }
        // SAFETY: the image says how long it is, and is that long; the driver copies what it keeps.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(|e| said(self.ordinal, e, format_args!("loading the kernels {name}")))?;
        self.modules.push((of, module));
        Ok(())
    }

    /// The function of a launch, with as much shared memory as that asks for. It is loaded the first time.
    ///
    /// # Errors
    /// When there is none, or the GPU has no such room.
    pub fn kernel(&mut self, launch: &Launch) -> Result<sys::CUfunction> {
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
                    Err(e) => return Err(said(self.ordinal, e, format_args!("loading the kernel {name}"))),
                }
            }
            let function = found.ok_or_else(|| Error::Device(format!("cuda: there is no kernel {name}")))?;
            note_launch(self.arch, launch);
            self.kernels.insert((of, name), Kernel { function, shared_bytes: 0 });
        }
        let Kernel { function, shared_bytes: has } = self.kernels[&(of, name)];
        if shared_bytes > has {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as c_int) }
                .map_err(|e| said(self.ordinal, e, format_args!("{name}: {shared_bytes} bytes of shared memory")))?;
            self.kernels.insert((of, name), Kernel { function, shared_bytes });
        }
        Ok(function)
    }

    /// Unloads all; nothing runs any more.
    pub fn unload(&mut self) {
        for (_, module) in self.modules.drain(..) {
            // SAFETY: loaded by this, unloaded once.
            let _ = unsafe { result::module::unload(module) };
        }
        self.kernels.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
