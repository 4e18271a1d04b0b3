//! Whether every kernel has been launched, on the emulator or on a GPU that chooses kernels as the emulated one does.

use crate::device::{Asked, asked};
use crate::{Extent, FAMILIES, extent};
use hydra::device::DeviceSpec;
use hydra::device::cuda::launched;
use std::collections::BTreeSet;
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

/// The emulated GPU's multiprocessors: with as many, small shapes reach every kernel.
const MULTIPROCESSORS: u32 = 4;

/// Parts of the names of kernels that are for Hopper alone.
const HOPPER: [&str; 5] = ["hopper", "_128_bf16", "_192_bf16", "_256_bf16", "_shifted_bf16"];
/// Kernels that Hopper has others for; products of these two forms would run there as sums of nothing.
const NOT_HOPPER: [&str; 8] = [
    "attention_forward_mma64_bf16",
    "attention_forward_mma128_bf16",
    "attention_grad_q_mma64_bf16",
    "attention_grad_q_mma128_bf16",
    "attention_grad_kv_mma64_bf16",
    "attention_grad_kv_mma128_bf16",
    "gemm_nn_bf16",
    "gemm_tn_bf16",
];

/// Whether GPUs of this compute capability launch a kernel in none of the cases.
fn is_for_others(name: &str, arch: u32) -> bool {
    if arch == 90 { NOT_HOPPER.contains(&name) } else { HOPPER.iter().any(|part| name.contains(part)) }
}

/// All kernels, and the compute capabilities each of which has to have launched its own.
fn expected() -> (Vec<String>, Vec<u32>) {
    match asked(Some(if cfg!(feature = "emulator") { "emulated" } else { "cuda" })) {
        #[cfg(feature = "emulator")]
        Asked::Device(DeviceSpec::Emulated { .. }) => {
            use hydra::device::cuda::Emulated;
            let alike = Emulated::facts_of(0, 90).multiprocessors == MULTIPROCESSORS;
            assert!(alike || std::env::var_os(hydra::device::cuda::MULTIPROCESSORS_VARIABLE).is_some());
            (Emulated::kernels().expect("kernels"), if alike { vec![80, 90] } else { Vec::new() })
        }
        #[cfg(feature = "cuda")]
        Asked::Device(DeviceSpec::Cuda { ordinal, .. }) => {
            let gpu = hydra::device::cuda::Gpu::open(ordinal).expect("the GPU opens");
            let facts = gpu.facts();
            let alike = facts.multiprocessors == MULTIPROCESSORS;
            (gpu.kernels().expect("kernels"), if alike { vec![facts.arch] } else { Vec::new() })
        }
        _ => (Vec::new(), Vec::new()),
    }
}

/// To be called by each test that runs kernels, when it is done. The last of a run of all of them sees that no kernel
/// was left out, unless the run is a brief one, which leaves some out. On a GPU it does where `HYDRA_MULTIPROCESSORS`
/// makes that choose as the emulated one.
pub fn note() {
    // All families, and the optimizer.
    static LEFT: AtomicUsize = AtomicUsize::new(FAMILIES.len() + 1);
    if LEFT.fetch_sub(1, Ordering::AcqRel) > 1 || extent() == Extent::Brief {
        return;
    }
    let (kernels, expected) = expected();
    for arch in expected {
        let run: BTreeSet<_> = launched().into_iter().filter(|(of, _)| *of == arch).map(|(_, name)| name).collect();
        let elsewhere = |name: &str| ELSEWHERE.iter().any(|(other, _)| *other == name);
        let wanted = |name: &str| !elsewhere(name) && !is_for_others(name, arch);
        let left_out: Vec<_> = kernels.iter().filter(|name| wanted(name) && !run.contains(name.as_str())).collect();
        assert!(left_out.is_empty(), "no case runs {left_out:?} on compute capability {arch}");
        let twice: Vec<_> = kernels.iter().filter(|name| !wanted(name) && run.contains(name.as_str())).collect();
        assert!(
            twice.is_empty(),
            "a case runs {twice:?} on compute capability {arch}; take it off the lists of others"
        );
    }
}
