//! The cuda device: our kernels on GPUs, or the same kernels on the emulator.
//!
//! One launch file an op family, with the stem of its kernels; `launch` is what a launch is, `queue` where it goes,
//! `driver` the seam under which a GPU or the emulator stands.

mod activation;
mod attention;
mod batchnorm;
mod blocks;
mod clock;
mod column_sum;
mod conv;
mod cross_entropy;
mod custom;
mod device;
mod driver;
mod elementwise;
mod embedding;
#[cfg(feature = "emulator")]
mod emulated;
mod gemm;
mod glu;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod gpus;
mod lane;
mod launch;
mod linear;
mod loss_sum;
mod mean_squared_error;
mod memory;
#[cfg(feature = "cuda")]
mod modules;
mod norm;
mod operands;
mod ops;
mod optimizer;
mod pool;
mod queue;
mod rotary;
#[cfg(test)]
mod stand;
mod transpose;

pub use device::{CudaConfig, CudaDevice};
pub use driver::{Facts, launched};
#[cfg(feature = "emulator")]
pub use emulated::Emulated;
#[cfg(feature = "cuda")]
pub use gpu::{Gpu, count, list};
pub use memory::LogicalDevice;

/// The environment variable that names a folder of kernels to load instead of those that were built in: `<stem>.fatbin`
/// for a GPU, `kernels.so` for the emulator.
pub const KERNELS_VARIABLE: &str = "HYDRA_KERNELS";

/// The folder that [`KERNELS_VARIABLE`] names.
fn kernels_dir() -> Option<std::path::PathBuf> {
    std::env::var_os(KERNELS_VARIABLE).map(Into::into)
}

/// The environment variable that lowers the number of a GPU's multiprocessors by which grids and kernels are chosen, to
/// 1 or more. No result depends on it; with the emulator's 4, tests reach with small shapes what 132 leave to large
/// ones. An emulated GPU has as many as it says.
pub const MULTIPROCESSORS_VARIABLE: &str = "HYDRA_MULTIPROCESSORS";

/// Waits the longer the longer nothing has happened: first not at all, then for as long as another thread wants this
/// core, and after a millisecond, in which no copy of a step's that is worth a copy's start would have ended, asleep. A
/// sleep of 50 microseconds takes up to three times as long.
fn back_off(idle_secs: f64) {
    match idle_secs {
        ..50e-6 => std::hint::spin_loop(),
        ..1e-3 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}
