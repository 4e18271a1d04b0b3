// The end of a matrix product that was cut along k: the parts are added and become the output.
//   partials (parts, m, n) f32; out (m, n) = act(sum of parts + bias (n)), pre (m, n) what act is given, or out += sum for accumulators.
// Overwrites out (or adds to it, when `accumulator` and now->accumulate) and pre. Deterministic: parts are added from the first to the last.
// Launch: ceil(m ceil(n / 8) / 256) blocks of 256 threads, a thread 8 neighbours of a row; fewer than 2^31 of those. Bound by memory: 4 bytes a part
// and element, most of them still in the L2.
#include "gpu.cuh"
#include "gpu/gemm.cuh"

namespace {

constexpr int THREADS = 256;

template <class Out> DEV void finish(const GemmEnd<Out>& end, const float* partials, int parts, int m, int n) {
  int octets = (n + 7) / 8, at = blockIdx.x * THREADS + threadIdx.x, row = at / octets, col = at % octets * 8;
  if (row >= m) return;
  float sums[8] = {}, biases[8];
#pragma unroll 4
  for (int part = 0; part < parts; part++) {
    float next[8];
    load_octet(next, partials + ((int64_t)part * m + row) * n + col, n - col, end.whole());
    for (int i = 0; i < 8; i++) sums[i] += next[i];
  }
  end.bias_octet(biases, col);
  end.put_octet(row, col, sums, biases);
}

}  // namespace

#define GEMM_FINISH(name, Out)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                         \
      name(Out* out, Out* pre, const float* partials, const Out* bias, const Now* now, int accumulator, int activation,         \
           int parts, int m, int n) {                                                                                           \
    finish(gemm_end<Out>(out, pre, nullptr, bias, now, accumulator, activation, m, n), partials, parts, m, n);                    \
  }                                                                                                                             \
  GPU_EXPORT(name)

GEMM_FINISH(gemm_finish_f32, float)
GEMM_FINISH(gemm_finish_bf16, bf16)
