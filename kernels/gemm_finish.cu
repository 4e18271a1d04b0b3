// The end of a matrix product that was cut along k: the parts are added and become the output.
//   partials (parts, m, n) f32; out (m, n) = act(sum of parts + bias (n)), pre (m, n) what act is given, or out += sum
//   for accumulators, or with a residual or ACTIVATION_GRAD as in the product's own kernel; rows `pitch` apart.
// Overwrites out (or adds to it, as adds_to says), and a pre that is not read. Deterministic:
// parts are added from the first to the last. Launch: ceil(m n / 256) blocks of 256 threads, a thread an element; m n <
// 2^31. Bound by memory: 4 bytes a part and element, most of them still in the L2.
#include "gpu.cuh"
#include "gpu/gemm.cuh"

namespace {

constexpr int THREADS = 256;

template <class Out> DEV void finish(const GemmEnd<Out>& end, const float* partials, int parts, int m, int n) {
  int count = m * n, at = blockIdx.x * THREADS + threadIdx.x, row = at / n, col = at % n;
  if (at >= count) return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; part++) sum += partials[(int64_t)part * count + at];
  end.put(row, col, sum + end.bias_at(col));
}

}  // namespace

#define GEMM_FINISH(name, Out)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(Out* out, Out* pre, const float* partials, const Out* bias, const Out* residual, const Now* now,            \
           int accumulator, int activation, int parts, int m, int n, int pitch) {                                      \
    finish(gemm_end<Out>(out, pre, nullptr, bias, residual, now, accumulator, activation, m, n, pitch), partials,      \
           parts, m, n);                                                                                               \
  }                                                                                                                    \
  GPU_EXPORT(name)

GEMM_FINISH(gemm_finish_f32, float)
GEMM_FINISH(gemm_finish_bf16, bf16)
