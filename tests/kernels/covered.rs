//! Whether every kernel has run on the emulator.

use crate::FAMILIES;
use crate::device::{Asked, asked};
use hydra::device::DeviceSpec;
use hydra::device::cuda::Emulated;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Kernels that no case here runs, and what does.
const ELSEWHERE: [(&str, &str); 8] = [
    ("finite_check_f32", TRAINING),
    ("finite_check_bf16", TRAINING),
    ("gemm_nn_tf32", TRAINING),
    ("gemm_nt_tf32", TRAINING),
    ("gemm_tn_tf32", TRAINING),
    ("gemm_nn_192_bf16", TILES),
    ("gemm_nt_192_bf16", TILES),
    ("gemm_tn_192_bf16", TILES),
];
const TRAINING: &str = "tests/emulated.rs: a NaN is looked for, and a GPT trains in tf32";
const TILES: &str = "src/device/cuda/gemm/tests.rs: every tile, on shapes for which none would be chosen";

/// To be called by each test that runs kernels, when it is done. The last of a run of all of them sees that no kernel was left out.
pub fn note() {
    // All families, and the optimizer.
    static LEFT: AtomicUsize = AtomicUsize::new(FAMILIES.len() + 1);
    let emulated = matches!(asked(Some("emulated")), Asked::Device(DeviceSpec::Emulated { .. }));
    if LEFT.fetch_sub(1, Ordering::AcqRel) > 1 || !emulated {
        return;
    }
    let kernels = Emulated::kernels().expect("kernels");
    let elsewhere = |name: &str| ELSEWHERE.iter().any(|(other, _)| *other == name);
    let left_out: Vec<_> = kernels.iter().filter(|(name, run)| !run && !elsewhere(name)).collect();
    assert!(left_out.is_empty(), "no case runs {left_out:?}");
    let twice: Vec<_> = kernels.iter().filter(|(name, run)| *run && elsewhere(name)).collect();
    assert!(twice.is_empty(), "a case runs {twice:?}; take it off the list of others");
}
