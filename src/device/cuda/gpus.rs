//! Several GPUs as one driver: each with its own context, kernels and memory, and pinned memory of the host that all
//! copy from and to.
//!
//! A stream and a mark know their GPU, and every call enters that GPU's context first. Only waits go from one GPU to
//! another. Peer access is not asked for: nothing on one GPU reads another's memory.

use super::driver::{Driver, Facts, Loaded, Mark, Stream, one_gpu};
use super::gpu::Gpu;
use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use crate::base::{Error, Result};
use crate::graph::Kernels;
use cudarc::driver::sys::{self, CUtensorMapDataType_enum as Type};
use cudarc::driver::{DriverError, result};
use std::ffi::c_void;

/// The GPUs of one device, at least one.
pub(super) struct Gpus {
    gpus: Vec<Gpu>,
    custom: Loaded,
    host_memory: Vec<*mut c_void>,
}

// SAFETY: any thread may free host memory, and the one that drops this does, when no stream touches it; the GPUs may be
// sent.
unsafe impl Send for Gpus {}

impl Gpus {
    /// The GPUs of these numbers, each named once, in this order.
    ///
    /// # Errors
    /// When none is named, or one cannot be opened ([`Gpu::open`]).
    pub fn open(ordinals: &[usize]) -> Result<Gpus> {
        if ordinals.is_empty() {
            return Err(Error::bad("cuda: no GPU was asked for"));
        }
        let gpus = ordinals.iter().map(|&ordinal| Gpu::open(ordinal)).collect::<Result<_>>()?;
        Ok(Gpus { gpus, custom: Loaded::default(), host_memory: Vec::new() })
    }
}

impl Driver for Gpus {
    fn gpus(&self) -> usize {
        self.gpus.len()
    }

    fn facts(&self, gpu: usize) -> &Facts {
        self.gpus[gpu].facts()
    }

    fn load_once(&mut self, kernels: &Kernels) -> Result<()> {
        let (name, fatbin) = (kernels.name(), kernels.fatbin());
        if self.custom.has(name, fatbin)? {
            return Ok(());
        }
        self.gpus.iter_mut().try_for_each(|gpu| gpu.load(name, fatbin))?;
        self.custom.note(name, fatbin);
        Ok(())
    }

    fn alloc(&mut self, gpu: usize, bytes: u64) -> Result<Ptr> {
        self.gpus[gpu].alloc(bytes)
    }

    fn alloc_host(&mut self, bytes: u64) -> Result<*mut u8> {
        let memory = self.gpus[0].alloc_host(bytes)?;
        self.host_memory.push(memory);
        Ok(memory.cast())
    }

    fn stream(&mut self, gpu: usize) -> Result<Stream> {
        Ok(Stream { gpu, number: self.gpus[gpu].stream()? })
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<()> {
        self.gpus[stream.gpu].launch(stream.number, launch)
    }

    fn copy(&mut self, stream: Stream, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        self.gpus[stream.gpu].copy(stream.number, to, from, bytes)
    }

    fn fill(&mut self, stream: Stream, to: Ptr, byte: u8, bytes: u64) -> Result<()> {
        self.gpus[stream.gpu].fill(stream.number, to, byte, bytes)
    }

    fn mark(&mut self, gpu: usize) -> Result<Mark> {
        Ok(Mark { gpu, number: self.gpus[gpu].event()? })
    }

    fn record(&mut self, mark: Mark, stream: Stream) -> Result<()> {
        one_gpu(mark.gpu, stream.gpu)?;
        self.gpus[stream.gpu].record(mark.number, stream.number)
    }

    fn wait_for(&mut self, stream: Stream, mark: Mark) -> Result<()> {
        self.gpus[stream.gpu].wait_for(stream.number, &self.gpus[mark.gpu], mark.number)
    }

    fn passed(&mut self, mark: Mark) -> Result<bool> {
        self.gpus[mark.gpu].passed(mark.number)
    }

    fn wait_a_moment(&mut self, idle_secs: f64) -> Result<()> {
        super::back_off(idle_secs);
        Ok(())
    }

    fn secs_between(&mut self, from: Mark, to: Mark) -> Result<f64> {
        one_gpu(from.gpu, to.gpu)?;
        self.gpus[from.gpu].secs_between(from.number, to.number)
    }

    fn tensor_map(&mut self, gpu: usize, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.gpus[gpu].enter()?;
        let element = match spec.elem_bytes {
            2 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let (sizes, boxed) = ([spec.cols, spec.rows], [spec.box_cols, spec.box_rows]);
        encode_map(element, spec.base, sizes, &[spec.pitch_bytes], boxed, [1, 1])
            .map_err(|e| self.gpus[gpu].said(e, format_args!("a tensor map of {spec:?}")))
    }

    fn box_map(&mut self, gpu: usize, spec: &BoxMapSpec) -> Result<TensorMap> {
        self.gpus[gpu].enter()?;
        let element = Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        encode_map(element, spec.base, spec.sizes, &spec.pitch_bytes, spec.boxed, spec.apart)
            .map_err(|e| self.gpus[gpu].said(e, format_args!("a tensor map of {spec:?}")))
    }
}

const _: () = assert!(align_of::<TensorMap>() == align_of::<sys::CUtensorMap>());
const _: () = assert!(size_of::<TensorMap>() == size_of::<sys::CUtensorMap>());

/// A descriptor of a tensor of `AXES` axes, the innermost first; of all but that one `pitch_bytes` says how far
/// elements lie apart. Its boxes are swizzled over 128 bytes.
fn encode_map<const AXES: usize>(
    element: sys::CUtensorMapDataType,
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
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
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

impl Drop for Gpus {
    /// Waits until all have come to rest, since one may wait for another, and frees the host's memory while the context
    /// that it is of lives. Failures have nobody left to be told to. Where a kernel does not end nothing is freed (see
    /// `Gpu`).
    fn drop(&mut self) {
        if !self.gpus.iter().all(Gpu::comes_to_rest) {
            self.gpus.drain(..).for_each(std::mem::forget);
            return;
        }
        let _ = self.gpus[0].enter();
        for &memory in &self.host_memory {
            // SAFETY: allocated by this driver, freed once; nothing runs any more.
            let _ = unsafe { result::free_host(memory) };
        }
    }
}
