//! cuBLAS on the products of linear layers, on the same GPU: memory, stream and events of its own.

use crate::shapes::Case;
use hydra::base::{DType, Error, Result};
use hydra::graph::{Op, WeightLayout};

/// A product in row-major terms: c (m, n) = a (m, k) b (k, n).
#[cfg_attr(not(feature = "peers"), allow(dead_code, reason = "cuBLAS alone reads it"))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Rows, columns and depth.
    pub sizes: [usize; 3],
    /// a lies as (k, m).
    pub a_transposed: bool,
    /// b lies as (n, k).
    pub b_transposed: bool,
    /// Of a and b.
    pub dtype: DType,
    /// Of c.
    pub out: DType,
}

impl Product {
    /// The product in a linear layer's op; `None` for any other. Bias and activation are not in it: cuBLAS computes
    /// less there.
    pub fn of(case: &Case) -> Option<Product> {
        let node = case.node();
        let shape = |value| &case.graph.info(value).shape;
        let (first, second) = (shape(*node.inputs.first()?), shape(*node.inputs.get(1)?));
        let out = case.graph.info(*node.outputs.first()?);
        let (a_transposed, b_transposed) = match node.op {
            Op::Linear { layout, .. } => (false, layout == WeightLayout::OutIn),
            Op::LinearGradInput { layout, .. } => (false, layout == WeightLayout::InOut),
            Op::LinearGradWeight { .. } => (true, false),
            _ => return None,
        };
        // The weight's gradient is x^T d_y, or its transpose d_y^T x.
        let sizes = match node.op {
            Op::LinearGradWeight { layout: WeightLayout::InOut, .. } => [first.cols(), second.cols(), first.rows()],
            Op::LinearGradWeight { layout: WeightLayout::OutIn, .. } => [second.cols(), first.cols(), first.rows()],
            _ => [first.rows(), out.shape.cols(), first.cols()],
        };
        Some(Product { sizes, a_transposed, b_transposed, dtype: case.dtype, out: out.dtype })
    }
}

/// cuBLAS, ready to compute.
#[cfg(feature = "peers")]
pub use cublas::Cublas;

/// Stands where cuBLAS is not built in: there is never one.
#[cfg(not(feature = "peers"))]
pub enum Cublas {}

#[cfg(not(feature = "peers"))]
impl Cublas {
    /// Never there.
    ///
    /// # Errors
    /// Always.
    pub fn open() -> Result<Cublas> {
        Err(Error::bad("built without the feature \"peers\""))
    }

    /// Never called.
    pub fn prepare(&mut self, _: &Product, _: usize) -> Result<()> {
        match *self {}
    }

    /// Never called.
    pub fn sample(&mut self, _: usize) -> Result<f64> {
        match *self {}
    }
}

#[cfg(feature = "peers")]
mod cublas {
    use super::{DType, Error, Product, Result};
    use cudarc::cublas::{result as blas, sys};
    use cudarc::driver::{DriverError, result, sys as cu};
    use half::bf16;
    use hydra::base::philox::Sequence;
    use std::ffi::{c_int, c_void};

    /// Numbers that operands are filled from.
    const PATTERN: usize = 1 << 20;
    /// What cuBLAS may use besides its operands; its documentation recommends 32 MiB for Hopper.
    const WORKSPACE_BYTES: usize = 32 << 20;

    /// A handle with a stream, and the operands of one product. It lives in the primary context that the device under
    /// test made current on this thread, so it is opened after that device and dropped before it.
    pub struct Cublas {
        handle: sys::cublasHandle_t,
        stream: cu::CUstream,
        marks: [cu::CUevent; 2],
        workspace: cu::CUdeviceptr,
        product: Option<Product>,
        /// a, b and c of each set.
        sets: Vec<[cu::CUdeviceptr; 3]>,
    }

    fn cuda(what: &'static str) -> impl Fn(DriverError) -> Error {
        move |e| Error::Device(format!("cuBLAS bench: {what}: {e:?}"))
    }

    fn cublas(what: &'static str) -> impl Fn(blas::CublasError) -> Error {
        move |e| Error::Device(format!("cuBLAS: {what}: {e:?}"))
    }

    impl Cublas {
        /// Loads the library and makes a handle.
        ///
        /// # Errors
        /// When the library is not on this machine.
        pub fn open() -> Result<Cublas> {
            // SAFETY: only tries to open the library.
            if !unsafe { sys::is_culib_present() } {
                return Err(Error::Device("libcublas was not found (LD_LIBRARY_PATH names its folder)".into()));
            }
            let handle = blas::create_handle().map_err(cublas("making a handle"))?;
            let stream =
                result::stream::create(result::stream::StreamKind::NonBlocking).map_err(cuda("making a stream"))?;
            // SAFETY: both were made just now.
            unsafe { blas::set_stream(handle, stream.cast()) }.map_err(cublas("taking the stream"))?;
            let mark = || result::event::create(cu::CUevent_flags::CU_EVENT_DEFAULT).map_err(cuda("making an event"));
            // SAFETY: the size is not 0.
            let workspace = unsafe { result::malloc_sync(WORKSPACE_BYTES) }.map_err(cuda("a workspace"))?;
            // SAFETY: the memory is as large as is said, and lives as long as the handle.
            unsafe { sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE_BYTES) }
                .result()
                .map_err(cublas("taking the workspace"))?;
            Ok(Cublas { handle, stream, marks: [mark()?, mark()?], workspace, product: None, sets: Vec::new() })
        }

        /// Makes operands of normal numbers for `product`, as many sets as ours has.
        ///
        /// # Errors
        /// When there is not enough memory.
        pub fn prepare(&mut self, product: &Product, sets: usize) -> Result<()> {
            self.free();
            let mut sequence = Sequence::new(3, 0);
            let numbers: Vec<f32> = (0..PATTERN).map(|_| sequence.normal() as f32).collect();
            let pattern: Vec<u8> = match product.dtype {
                DType::F32 => bytemuck::cast_slice(&numbers).to_vec(),
                _ => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            };
            let [m, n, k] = product.sizes;
            let bytes = [
                (m * k) * product.dtype.bytes() as usize,
                (k * n) * product.dtype.bytes() as usize,
                (m * n) * product.out.bytes() as usize,
            ];
            for _ in 0..sets {
                let mut set = [0; 3];
                for (at, &bytes) in set.iter_mut().zip(&bytes) {
                    // SAFETY: the size is made at least 1.
                    *at = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(cuda("memory for operands"))?;
                }
                self.sets.push(set);
                for (&at, &bytes) in set.iter().zip(&bytes).take(2) {
                    for start in (0..bytes).step_by(pattern.len()) {
                        let part = &pattern[..pattern.len().min(bytes - start)];
                        // SAFETY: the part ends within the allocation; the call waits for the copy.
                        unsafe { result::memcpy_htod_sync(at + start as u64, part) }
                            .map_err(cuda("filling operands"))?;
                    }
                }
            }
            self.product = Some(*product);
            Ok(())
        }

        /// Seconds of one product, as the mean of `repeats` that run through the sets.
        ///
        /// # Errors
        /// When it fails.
        pub fn sample(&mut self, repeats: usize) -> Result<f64> {
            let [start, end] = self.marks;
            // SAFETY: the event and the stream live as long as `self`.
            unsafe { result::event::record(start, self.stream) }.map_err(cuda("recording an event"))?;
            for r in 0..repeats {
                self.multiply(self.sets[r % self.sets.len()])?;
            }
            // SAFETY: as above.
            unsafe { result::event::record(end, self.stream) }.map_err(cuda("recording an event"))?;
            // SAFETY: as above.
            unsafe { result::event::synchronize(end) }.map_err(cuda("waiting"))?;
            // SAFETY: both events were recorded and passed.
            let ms = unsafe { result::event::elapsed(start, end) }.map_err(cuda("reading the time"))?;
            Ok(f64::from(ms) * 1e-3 / repeats as f64)
        }

        fn multiply(&self, [a, b, c]: [cu::CUdeviceptr; 3]) -> Result<()> {
            let product = self.product.as_ref().expect("prepared before it is sampled");
            let [m, n, k] = product.sizes.map(|size| size as c_int);
            let kind = |dtype| match dtype {
                DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
                _ => sys::cudaDataType_t::CUDA_R_16BF,
            };
            let operation = |transposed| match transposed {
                true => sys::cublasOperation_t::CUBLAS_OP_T,
                false => sys::cublasOperation_t::CUBLAS_OP_N,
            };
            let (one, zero) = (1f32, 0f32);
            // cuBLAS counts columns first, so it computes the transpose: c^T (n, m) = b^T a^T, on the same bytes.
            // SAFETY: the operands are as large as the sizes say; alpha and beta are read before the call returns.
            unsafe {
                sys::cublasGemmEx(
                    self.handle,
                    operation(product.b_transposed),
                    operation(product.a_transposed),
                    n,
                    m,
                    k,
                    (&raw const one).cast(),
                    b as *const c_void,
                    kind(product.dtype),
                    if product.b_transposed { k } else { n },
                    a as *const c_void,
                    kind(product.dtype),
                    if product.a_transposed { m } else { k },
                    (&raw const zero).cast(),
                    c as *mut c_void,
                    kind(product.out),
                    n,
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            }
            .result()
            .map_err(cublas("a product"))
        }

        fn free(&mut self) {
            for memory in self.sets.drain(..).flatten() {
                // SAFETY: allocated by `prepare`; `sample` has waited for what used it.
                let _ = unsafe { result::free_sync(memory) };
            }
        }
    }

    impl Drop for Cublas {
        fn drop(&mut self) {
            self.free();
            // SAFETY: made by `open`, destroyed once.
            let _ = unsafe { blas::destroy_handle(self.handle) };
            // SAFETY: as above.
            let _ = unsafe { result::free_sync(self.workspace) };
            for mark in self.marks {
                // SAFETY: as above.
                let _ = unsafe { result::event::destroy(mark) };
            }
            // SAFETY: as above.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}
