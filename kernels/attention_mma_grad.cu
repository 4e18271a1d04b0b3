// The gradient of attention_mma.cu's attention, on tensor cores (Dao 2023, "FlashAttention-2", arXiv:2307.08691,
// algorithm 2, in two passes).
//   Formulas, shapes and what is overwritten are those of attention.cu, whose attention_grad_delta comes first; scale
//   is positive. Weights and their gradients are rounded to bf16 for the products that sum over them; scale is applied
//   to the f32 sums.
// grad_q: a block has 128 queries (64 from width 96 on), a warp 32 of them, and goes over tiles of 32 keys. grad_kv: a
// block has 128 keys (64), a warp 32 (16; always with dropout), and goes over tiles of 32 queries, of the heads that
// share the keys one after the other. Rows are keys there, so that weights are left operands from registers here too;
// those of keys that a mask hides become 0 at the end. The next tiles are copied while these are multiplied, and so is
// grad_q's part of a mask.
// Deterministic: two passes, which make 14 products a score and column where one pass with atomics makes 10; each sum
// is by one thread, in order. Shared memory of a block: 31 KB at width 32, 55 at 64, 53 at 96, 69 at 128. Up to 255
// registers a thread (docs/kernels.md has the table), so two blocks are on a multiprocessor (at width 96 and 128 three
// of grad_q, which have two warps).
// Loads of shared memory (ldmatrix x4) per product: 0.42 in grad_q; 0.38 in grad_kv, 0.63 from width 96 on, whose 16
// rows a warp is what registers hold; 0.4 is what an H200 gives at mma.sync's rate. Expected there: 260 TFLOP/s at
// width 64 and 8k, counting 10 products.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_mma.cuh"

namespace tensor {
constexpr int COLS = 32, N = COLS / 8;   // keys of a tile in grad_q, queries in grad_kv
template <int W> struct GradQ {
  static constexpr int M = 2, WARPS = W <= 64 ? 4 : 2, THREADS = 32 * WARPS, ROWS = 16 * M * WARPS;
};
template <int W, bool DROPOUT> struct GradKv {
  static constexpr int M = W <= 64 && !DROPOUT ? 2 : 1, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * M * WARPS;
};

template <int W, bool DROPOUT>
DEV void grad_q(bf16* d_q, const bf16* d_out, const float* lse, const float* delta, const bf16* q, const bf16* k,
                const bf16* v, const int32_t* mask, const Now* now, const AttentionSizes& s) {
  using G = GradQ<W>;
  constexpr int M = G::M, TILE = COLS * PITCH<W>, STAGE = 2 * TILE;
  GPU_DYNAMIC(bf16, tiles);
  Part<G::ROWS> part(s.heads, s.queries);
  Head head(s, part.batch, part.head);
  Lane at;
  int warp_row = threadIdx.x / 32 * 16 * M, first = part.first + warp_row;
  bf16 *queries = tiles + warp_row * PITCH<W>, *d_outs = queries + G::ROWS * PITCH<W>,
       *stages = tiles + 2 * G::ROWS * PITCH<W>;
  int64_t out_pitch = (int64_t)s.heads * s.width;
  int64_t own = head.key(s);
  int end = keys_seen(s, part.first + G::ROWS);
  auto load = [&](bf16* to, int key) {
    int64_t from = own + (int64_t)key * s.kv_pitch;
    load_tile<W, COLS, G::THREADS>(to, k + from, s.kv_pitch, s.keys - key, s.width);
    load_tile<W, COLS, G::THREADS>(to + TILE, v + from, s.kv_pitch, s.keys - key, s.width);
    cp_async_commit();
  };
  if (end > 0) {
    int left = s.queries - part.first;
    load_tile<W, G::ROWS, G::THREADS>(tiles, q + head.query(s) + (int64_t)part.first * s.q_pitch, s.q_pitch, left,
                                      s.width);
    load_tile<W, G::ROWS, G::THREADS>(tiles + G::ROWS * PITCH<W>, d_out + head.out(s) + part.first * out_pitch,
                                      out_pitch, left, s.width);
    load(stages, 0);
  }
  float acc[M][W / 8][4], top[M][2], dot[M][2], factors[M][2], scale = s.scale * LOG2_E;
  clear(acc);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int query = first + 16 * m + at.g + 8 * h;
      top[m][h] = query < s.queries ? log2_sum(lse[head.row + query]) : INFINITY;
      dot[m][h] = query < s.queries ? delta[head.row + query] : 0.0f;
      factors[m][h] = s.scale;
    }
  for (int key = 0, stage = 0; key < end; key += COLS, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (key + COLS < end) load(stages + (stage ^ 1) * STAGE, key + COLS);
    if (s.causal && key >= first + 16 * M) continue;
    const bf16* keys = stages + stage * STAGE;
    uint32_t kept[M];
    if (DROPOUT) draw_by_query<M, N>(kept, s, now, head.row + first, key, at);
    float w[M][N][4], d[M][N][4];
    Shown<COLS> shown;
    shown.load(mask ? mask + (int64_t)part.batch * s.keys : nullptr, key, s.keys, at.lane);
    products<W>(w, queries, keys, at);
    if (key + COLS > s.keys || (s.causal && key + COLS > first)) hide_by_query(w, s, first, key, at);
    if (mask) hide_masked(w, shown, at);
    products<W>(d, d_outs, keys + TILE, at);
    if (DROPOUT) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) d[m][n][i] = kept[m] >> (4 * n + i) & 1 ? d[m][n][i] * s.keep_scale : 0.0f;
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          w[m][n][i] = exp2_fast(fmaf(w[m][n][i], scale, -top[m][i / 2])) * (d[m][n][i] - dot[m][i / 2]);
    gather<W>(acc, w, keys, at);
  }
  part = part_again<G::ROWS>(s.heads, s.queries);
  first = part.first + warp_row;
  head = Head(s, part.batch, part.head);
  write_rows<W>(d_q + head.query(s) + first * (int64_t)s.q_pitch, s.q_pitch, s.queries - first, s.width, queries, acc,
                factors, at);
}

template <int W, bool DROPOUT>
DEV void grad_kv(bf16* d_k, bf16* d_v, const bf16* d_out, const float* lse, const float* delta, const bf16* q,
                 const bf16* k, const bf16* v, const int32_t* mask, const Now* now, const AttentionSizes& s) {
  using G = GradKv<W, DROPOUT>;
  constexpr int M = G::M, TILE = COLS * PITCH<W>;
  // The tiles of a stage: queries, gradients of out; then of each query the logarithm of its sum, and its delta.
  constexpr int STAGE = 2 * TILE + 2 * COLS * 2;
  GPU_DYNAMIC(bf16, tiles);
  Part<G::ROWS> part(s.kv_heads, s.keys);
  Lane at;
  int group = s.heads / s.kv_heads, warp_row = threadIdx.x / 32 * 16 * M, first = part.first + warp_row;
  bf16 *keys = tiles + warp_row * PITCH<W>, *values = keys + G::ROWS * PITCH<W>,
       *stages = tiles + 2 * G::ROWS * PITCH<W>;
  int64_t out_pitch = (int64_t)s.heads * s.width,
          own = Head(s, part.batch, part.head * group).key(s) + part.first * (int64_t)s.kv_pitch;
  // Queries before the first key see none of the tile when causal.
  int begin = s.causal ? part.first / COLS : 0, tiles_of_head = (s.queries + COLS - 1) / COLS - begin;
  int count = tiles_of_head > 0 ? tiles_of_head * group : 0;
  auto load = [&](bf16* to, int tile) {
    Head head(s, part.batch, part.head * group + tile / tiles_of_head);
    int query = (begin + tile % tiles_of_head) * COLS, left = s.queries - query;
    load_tile<W, COLS, G::THREADS>(to, q + head.query(s) + (int64_t)query * s.q_pitch, s.q_pitch, left, s.width);
    load_tile<W, COLS, G::THREADS>(to + TILE, d_out + head.out(s) + query * out_pitch, out_pitch, left, s.width);
    if (threadIdx.x < 2 * COLS) {
      // Queries that are not there have an lse of 0: their weights are finite, and multiply rows of 0.
      int i = threadIdx.x % COLS;
      const float* from = threadIdx.x < COLS ? lse : delta;
      cp_async4_zfill(reinterpret_cast<float*>(to + 2 * TILE) + threadIdx.x,
                      i < left ? from + head.row + query + i : from, i < left ? 4 : 0);
    }
    cp_async_commit();
  };
  if (count > 0) {
    load_tile<W, G::ROWS, G::THREADS>(tiles, k + own, s.kv_pitch, s.keys - part.first, s.width);
    load_tile<W, G::ROWS, G::THREADS>(tiles + G::ROWS * PITCH<W>, v + own, s.kv_pitch, s.keys - part.first, s.width);
    load(stages, 0);
  }
  float acc_k[M][W / 8][4], acc_v[M][W / 8][4], scale = s.scale * LOG2_E;
  clear(acc_k);
  clear(acc_v);
  for (int tile = 0; tile < count; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < count) load(stages + (tile + 1) % 2 * STAGE, tile + 1);
    const bf16 *queries = stages + tile % 2 * STAGE, *d_outs = queries + TILE;
    const float* numbers = reinterpret_cast<const float*>(d_outs + TILE);
    int query = (begin + tile % tiles_of_head) * COLS;
    if (s.causal && query + COLS <= first) continue;
    float w[M][N][4], d[M][N][4];
    products<W>(w, keys, queries, at);
    if (s.causal && query < first + 16 * M) hide_by_key(w, query, first, at);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float top = log2_sum(numbers[8 * n + 2 * at.t + e]);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = e; i < 4; i += 2) w[m][n][i] = exp2_fast(fmaf(w[m][n][i], scale, -top));
      }
    products<W>(d, values, d_outs, at);
    uint32_t kept[M];
    if (DROPOUT) {
      int64_t row = ((int64_t)part.batch * s.heads + part.head * group + tile / tiles_of_head) * s.queries + query;
      draw_by_key<M, N>(kept, s, now, row, first, at);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float dot = numbers[COLS + 8 * n + 2 * at.t + e];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = e; i < 4; i += 2) {
            float p = w[m][n][i], factor = !DROPOUT ? 1.0f : kept[m] >> (4 * n + i) & 1 ? s.keep_scale : 0.0f;
            w[m][n][i] = p * factor;
            d[m][n][i] = p * fmaf(d[m][n][i], factor, -dot);
          }
      }
    gather<W>(acc_v, w, d_outs, at);
    gather<W>(acc_k, d, queries, at);
  }
  float scales[M][2], ones[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) scales[m][h] = s.scale, ones[m][h] = 1;
  part = part_again<G::ROWS>(s.kv_heads, s.keys);
  first = part.first + warp_row;
  own = Head(s, part.batch, part.head * group).key(s) + first * (int64_t)s.kv_pitch;
  // A hidden key's weights are in its own rows alone.
  if (mask) {
    mask += (int64_t)part.batch * s.keys;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int key = first + 16 * m + at.g + 8 * h;
        bool hidden = key < s.keys && mask[key] == 0;
#pragma unroll
        for (int n = 0; n < W / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (hidden) acc_k[m][n][2 * h + e] = acc_v[m][n][2 * h + e] = 0;
      }
  }
  write_rows<W>(d_k + own, s.kv_pitch, s.keys - first, s.width, keys, acc_k, scales, at);
  write_rows<W>(d_v + own, s.kv_pitch, s.keys - first, s.width, values, acc_v, ones, at);
}
}  // namespace tensor

// Grids: a block for each tile of queries (grad_q) or of keys (grad_kv) of each head and sequence.
#define ATTENTION_GRAD(width, dropout, infix)                                                                          \
  extern "C" __global__ void __launch_bounds__(tensor::GradQ<width>::THREADS, 2)                                       \
      attention_grad_q_##infix##width##_bf16(bf16* d_q, const bf16* d_out, const float* lse, const float* delta,       \
                                             const bf16* q, const bf16* k, const bf16* v, const int32_t* mask,         \
                                             const Now* now, AttentionSizes s) {                                       \
    tensor::grad_q<width, dropout>(d_q, d_out, lse, delta, q, k, v, mask, now, s);                                     \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_q_##infix##width##_bf16)                                                                   \
  extern "C" __global__ void __launch_bounds__(tensor::GradKv<width, dropout>::THREADS, 2)                             \
      attention_grad_kv_##infix##width##_bf16(bf16* d_k, bf16* d_v, const bf16* d_out, const float* lse,               \
                                              const float* delta, const bf16* q, const bf16* k, const bf16* v,         \
                                              const int32_t* mask, const Now* now, AttentionSizes s) {                 \
    tensor::grad_kv<width, dropout>(d_k, d_v, d_out, lse, delta, q, k, v, mask, now, s);                               \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_kv_##infix##width##_bf16)

ATTENTION_GRAD(32, false, mma)
ATTENTION_GRAD(64, false, mma)
ATTENTION_GRAD(96, false, mma)
ATTENTION_GRAD(128, false, mma)
ATTENTION_GRAD(32, true, dropout_mma)
ATTENTION_GRAD(64, true, dropout_mma)
ATTENTION_GRAD(96, true, dropout_mma)
ATTENTION_GRAD(128, true, dropout_mma)
