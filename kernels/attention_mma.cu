// Attention in bf16 on tensor cores, for widths that are multiples of 8 up to 128 (Dao 2023, "FlashAttention-2",
// arXiv:2307.08691).
//   Formulas, shapes and what is overwritten are those of attention.cu; scale is positive. q, k, v, out start at
//   multiples of 16 bytes and pitches are multiples of 8. Weights are rounded to bf16 for the second product; the
//   running softmax is f32.
// A warp has 32 queries of a block's 128 and goes over tiles of keys; k and v of the next tile are copied while this
// one is multiplied.
// Deterministic: a sum is made by one thread in the order of keys. Tiles that causality hides are skipped, by warp on
// the diagonal; hidden keys are looked for in tiles that have some alone, and a tile's part of the mask is on its way
// while scores are made. Dropout has kernels of its own, as drawing costs registers. Widths between 32, 64, 96 and 128
// take the next, with columns of 0 in shared memory.
//   width  keys a tile  shared memory   where q is
//   32     64           30 KB           registers
//   64     64           54 KB           registers
//   96     32           52 KB           shared memory
//   128    32           68 KB           shared memory
// Up to 255 registers a thread (docs/kernels.md has the table), so two blocks are on a multiprocessor.
// Each 16-byte-row load of k or v (ldmatrix x4) feeds 4 products, so shared memory is read at 0.25 loads a product (0.5
// from width 96 on, where q is read again) against 0.4 that it gives at the rate of mma.sync on an H200, which is 0.62
// of the card's. Expected there: 330 TFLOP/s at width 64 full and 8k long (0.33 of the rate): exponentials take as many
// cycles as a quarter of the products, and overlap only across warps.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_mma.cuh"

namespace tensor {
template <int W> struct Forward {
  static constexpr int M = 2, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * M * WARPS;
  static constexpr int KEYS = W <= 64 ? 64 : 32;
  static constexpr bool ROWS_IN_REGISTERS = W <= 64;
};

template <int W, bool DROPOUT>
DEV void forward(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, const int32_t* mask,
                 const Now* now, const AttentionSizes& s) {
  using F = Forward<W>;
  constexpr int M = F::M, N = F::KEYS / 8, KEYS = F::KEYS, THREADS = F::THREADS, STAGE = 2 * KEYS * PITCH<W>;
  GPU_DYNAMIC(bf16, tiles);
  Part<F::ROWS> part(s.heads, s.queries);
  Head head(s, part.batch, part.head);
  Lane at;
  int warp_row = threadIdx.x / 32 * 16 * M, first = part.first + warp_row;
  bf16 *rows = tiles + warp_row * PITCH<W>, *stages = tiles + F::ROWS * PITCH<W>;
  int64_t own = head.key(s);
  int end = keys_seen(s, part.first + F::ROWS);
  auto load = [&](bf16* to, int key) {
    int64_t from = own + (int64_t)key * s.kv_pitch;
    load_tile<W, KEYS, THREADS>(to, k + from, s.kv_pitch, s.keys - key, s.width);
    load_tile<W, KEYS, THREADS>(to + STAGE / 2, v + from, s.kv_pitch, s.keys - key, s.width);
    cp_async_commit();
  };
  if (end > 0) {
    load_tile<W, F::ROWS, THREADS>(tiles, q + head.query(s) + (int64_t)part.first * s.q_pitch, s.q_pitch,
                                   s.queries - part.first, s.width);
    load(stages, 0);
  }
  float acc[M][W / 8][4], max[M][2], sum[M][2], scale = s.scale * LOG2_E;
  clear(acc);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) max[m][h] = NOTHING, sum[m][h] = 0;
  RowFragments<W, M> fragments;
  for (int key = 0; key < end; key += KEYS) {
    int stage = key / KEYS % 2;
    cp_async_wait<0>();
    __syncthreads();
    if (key + KEYS < end) load(stages + (stage ^ 1) * STAGE, key + KEYS);
    if (F::ROWS_IN_REGISTERS && key == 0) fragments.load(rows, at);
    if (s.causal && key >= first + 16 * M) continue;
    const bf16* keys = stages + stage * STAGE;
    float w[M][N][4];
    Shown<KEYS> shown;
    shown.load(mask ? mask + (int64_t)part.batch * s.keys : nullptr, key, s.keys, at.lane);
    if constexpr (F::ROWS_IN_REGISTERS) products<W>(w, fragments, keys, at);
    else products<W>(w, rows, keys, at);
    if (key + KEYS > s.keys || (s.causal && key + KEYS > first)) hide_by_query(w, s, first, key, at);
    if (mask) hide_masked(w, shown, at);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = max[m][h], partial = 0;
#pragma unroll
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(w[m][n][2 * h], w[m][n][2 * h + 1]));
        top = quad_max(top);
        float shift = shift_of(top) * scale, shrink = exp2_fast(fmaf(max[m][h], scale, -shift));
        max[m][h] = top;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            partial += w[m][n][2 * h + e] = exp2_fast(fmaf(w[m][n][2 * h + e], scale, -shift));
        // Each lane sums its own columns; the four of a row add up at the end.
        sum[m][h] = fmaf(sum[m][h], shrink, partial);
#pragma unroll
        for (int n = 0; n < W / 8; n++) acc[m][n][2 * h] *= shrink, acc[m][n][2 * h + 1] *= shrink;
      }
    if (DROPOUT) {
      uint32_t kept[M];
      draw_by_query<M, N>(kept, s, now, head.row + first, key, at);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) w[m][n][i] = kept[m] >> (4 * n + i) & 1 ? w[m][n][i] * s.keep_scale : 0.0f;
    }
    gather<W>(acc, w, keys + STAGE / 2, at);
  }
  part = part_again<F::ROWS>(s.heads, s.queries);
  head = Head(s, part.batch, part.head);
  first = part.first + warp_row;
  float factors[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float total = quad_sum(sum[m][h]);
      int query = first + 16 * m + at.g + 8 * h;
      factors[m][h] = total == 0 ? 0.0f : 1.0f / total;
      if (at.t == 0 && query < s.queries) lse[head.row + query] = fmaf(max[m][h], s.scale, logf(total));
    }
  int64_t pitch = (int64_t)s.heads * s.width;
  write_rows<W>(out + head.out(s) + first * pitch, pitch, s.queries - first, s.width, rows, acc, factors, at);
}
}  // namespace tensor

// Grid: a block for each 128 queries of each head and sequence.
#define ATTENTION_FORWARD(name, width, dropout)                                                                        \
  extern "C" __global__ void __launch_bounds__(tensor::Forward<width>::THREADS, 2)                                     \
      name(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, const int32_t* mask, const Now* now,    \
           AttentionSizes s) {                                                                                         \
    tensor::forward<width, dropout>(out, lse, q, k, v, mask, now, s);                                                  \
  }                                                                                                                    \
  GPU_EXPORT(name)

ATTENTION_FORWARD(attention_forward_mma32_bf16, 32, false)
ATTENTION_FORWARD(attention_forward_mma64_bf16, 64, false)
ATTENTION_FORWARD(attention_forward_mma96_bf16, 96, false)
ATTENTION_FORWARD(attention_forward_mma128_bf16, 128, false)
ATTENTION_FORWARD(attention_forward_dropout_mma32_bf16, 32, true)
ATTENTION_FORWARD(attention_forward_dropout_mma64_bf16, 64, true)
ATTENTION_FORWARD(attention_forward_dropout_mma96_bf16, 96, true)
ATTENTION_FORWARD(attention_forward_dropout_mma128_bf16, 128, true)
