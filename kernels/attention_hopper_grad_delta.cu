// What the passes of attention_hopper_grad_q.cu and attention_hopper_grad_kv.cu need first.
//   delta[b,h,t] = sum over the width of d_out[b,t,h] out[b,t,h]; d_out, out (B, Tq, H, D) bf16, delta (B, H, Tq) f32.
//   Then the two numbers of parts that blocks of these passes have taken become 0; they follow delta, in B H Tq + 2
//   words of 4 bytes.
// Overwrites both. A row is 8 (width 64) or 16 threads with 16 bytes each, added up by halves. Reads 4 D bytes a row,
// writes 4; expected 85 % of the copy rate.
#include "gpu.cuh"
#include "gpu/attention.cuh"

namespace {
constexpr int THREADS = 256;

template <int W> DEV void row_dots(float* delta, const bf16* d_out, const bf16* out, const AttentionSizes& s) {
#if GPU_HOPPER
  constexpr int LANES = W / 8;
  int64_t row = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES,
          rows = (int64_t)s.batch * s.queries * s.heads;
  int piece = threadIdx.x % LANES;
  if (blockIdx.x == 0 && threadIdx.x < 2) delta[rows + threadIdx.x] = 0;
  float sum = 0;
  if (row < rows) {
    Pack<bf16> left = load_pack(d_out + row * W + piece * 8), right = load_pack(out + row * W + piece * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(to_float(left.x[i]), to_float(right.x[i]), sum);
  }
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
  int64_t position = row / s.heads, head = row % s.heads, batch = position / s.queries;
  if (row < rows && piece == 0) delta[(batch * s.heads + head) * s.queries + position % s.queries] = sum;
#endif
}
}  // namespace

// Grid: a block for each 32 (width 64) or 16 rows.
#define ATTENTION_GRAD_DELTA(width)                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_delta_hopper##width##_bf16(                 \
      float* delta, const bf16* d_out, const bf16* out, AttentionSizes s) {                                        \
    row_dots<width>(delta, d_out, out, s);                                                                         \
  }                                                                                                                \
  GPU_EXPORT(attention_grad_delta_hopper##width##_bf16)

ATTENTION_GRAD_DELTA(64)
ATTENTION_GRAD_DELTA(128)
