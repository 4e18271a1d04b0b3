// The kernels' only include: the names that they use beside CUDA C++ itself.
//
// Two compilers read it. For nvcc the names are thin wrappers over PTX, in gpu/*.cuh. For a C++ compiler they stand on
// the emulator, in emulator/gpu_*.h, which runs the same kernels on the CPU and checks what a GPU would not tell. Hence
// the rules for kernels:
// no inline assembly outside of gpu/; shared memory through GPU_SHARED and GPU_DYNAMIC; lanes and threads meet through
// these names alone; GPU_EXPORT(kernel) after each kernel. What only sm_90a has stands under `#if GPU_HOPPER`, here and
// in the kernels.
#pragma once
#include <stdint.h>

// What changes from microbatch to microbatch while a launch stays the same. `device/cuda/launch.rs` writes it.
struct Now { uint64_t seed; double loss_scale; uint32_t step, microbatch, accumulate, unused; };

// Blocks that a multiprocessor shall have room for, in __launch_bounds__. Not on the latest chips, for which the
// compiler needs more registers for the same code and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define GPU_BLOCKS(n) 1
#else
#define GPU_BLOCKS(n) n
#endif

#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GPU_HOPPER 1
#else
#define GPU_HOPPER 0
#endif
#include "gpu/device.cuh"
#include "gpu/warp.cuh"
#include "gpu/copies.cuh"
#if GPU_HOPPER
#include "gpu/bulk.cuh"
#include "gpu/descriptor.cuh"
#include "gpu/wgmma.cuh"
#endif
#else
#define GPU_HOPPER 1
#include "emulator/gpu_host.h"
#include "gpu/descriptor.cuh"
#endif

// How the warpgroups of a block of THREADS share its registers: the first one is content with FIRST a thread, so that
// the others may have OTHERS. Were it more in all than the block is launched with, one of them would wait for registers
// without end. A kernel has THREADS and 1 in its __launch_bounds__, and is compiled for AT_LAUNCH
// (tests/kernel_build.rs).
template <int THREADS, int FIRST, int OTHERS> struct RegisterShares {
#if GPU_HOPPER
  static constexpr int AT_LAUNCH = 65536 / THREADS / 8 * 8;
  static_assert(THREADS % 128 == 0 && 128 * FIRST + (THREADS - 128) * OTHERS <= THREADS * AT_LAUNCH,
                "more registers than the block has");
  static DEV void first() { setmaxnreg_dec<FIRST>(); }
  static DEV void others() { setmaxnreg_inc<OTHERS>(); }
#endif
};

#include "gpu/math.cuh"

// Whether a gradient is added to what is there: where `accumulator` is 2, and where it is 1 as now->accumulate says.
// Where it is 0 it is overwritten, and `now` may be null.
DEV bool adds_to(int accumulator, const Now* now) { return accumulator == 2 || (accumulator == 1 && now->accumulate); }
