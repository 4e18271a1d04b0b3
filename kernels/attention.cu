// Scaled dot-product attention and its gradient on the ordinary cores, for f32 and for bf16 of any width. The matrix of
// weights is never in memory (Dao et al. 2022, "FlashAttention", arXiv:2205.14135; Rabe & Staats 2021,
// arXiv:2112.05682).
//   out = M softmax(scale q k^T) v with M dropout's factors; lse = log of the softmax's denominator. A query without
//   keys gives 0 and -infinity.
//   delta = row sums of d_out out; with P = exp(scale q k^T - lse): d_v = (P M)^T d_out, d_s = P (M (d_out v^T) -
//   delta), d_q = scale d_s k, d_k = scale d_s^T q, summed over the heads that share k and v, in order.
//   q, k, v, out and gradients f32 or bf16; lse, delta (B, H, Tq) f32; mask (B, Tk) i32, 0 hides a key; sizes in
//   gpu/attention.cuh.
// Overwrites outputs. Deterministic: each sum is in the order of keys, or of heads and queries, and made by one thread.
// Gradients take two kernels that make the scores again, one with a block a tile of keys and one with a block a tile of
// queries, instead of atomics.
// A block of 256 threads has a tile of 64 x 64 scores, 4 x 4 a thread, and 64 columns of what it makes: heads wider
// than 64 take more blocks, which make the scores again. Operands are staged in shared memory as f32, 32 deep, by words
// of four where rows allow. A block has 35 KB and 128 registers a thread: two fit a multiprocessor. Per 16
// multiply-adds a thread reads 32 bytes of shared memory, 3 wavefronts a warp against 4 issue cycles of four warps. Of
// some 650 instructions for 32 of depth, staged and multiplied, 512 are multiply-adds. Measured on an H200 when they
// were 1,100, staged one by one: 16.6 TFLOP/s at width 64 and 1024 causal, 13.5 at width 128 and 4096. 25 are to be
// expected at width 64, for staging is not overlapped with arithmetic but by the other block, and two thirds of that at
// width 128.
#include "gpu.cuh"
#include "gpu/attention.cuh"

namespace plain {
constexpr int THREADS = 256;
constexpr int TILE = 64;    // queries, keys and columns of a block
constexpr int DEPTH = 32;   // what is staged of a sum
constexpr int PITCH = 68;   // floats from a row of a tile to the next: rows stay 16-byte aligned, and 4 banks apart

// The tiles of a block, each with the axis that is summed over as its rows.
struct Shared { float a[DEPTH][PITCH], b[DEPTH][PITCH], weights[TILE][PITCH]; };

// Where element (i, j) of a tile lies, j being a multiple of 4 where four are read or written at once. By the xor, what
// stage_transposed scatters and what is read as whole rows both lie in distinct banks.
DEV int swizzled(int i, int j) { return j ^ (i / 4 % 8 * 4); }
DEV float* place(float (*tile)[PITCH], int i, int j) { return &tile[i][swizzled(i, j)]; }

// Four neighbours by one access, which is aligned.
DEV Pack<float> load_four(const float* p) { return load_pack(p); }
DEV Pack<float> load_four(const bf16* p) {
  uint2 words = *reinterpret_cast<const uint2*>(p);
  float2 low = unpack_bf16(words.x), high = unpack_bf16(words.y);
  return {{low.x, low.y, high.x, high.y}};
}

// Rows of a matrix in global memory, of which those from `rows` on read as 0, and so do columns from `cols` on.
template <class T> struct Rows {
  const T* first; int64_t pitch; int rows, cols;
  DEV bool by_fours() const { return ((reinterpret_cast<uintptr_t>(first) / sizeof(T)) | pitch) % 4 == 0; }
  // Columns col to col + 3 of a row; col is a multiple of 4.
  DEV Pack<float> at(int row, int col, bool by_fours) const {
    const T* from = first + row * pitch + col;
    if (row < rows && by_fours && col + 4 <= cols) return load_four(from);
    Pack<float> four;
#pragma unroll
    for (int e = 0; e < 4; e++) four.x[e] = row < rows && col + e < cols ? to_float(from[e]) : 0.0f;
    return four;
  }
};

// Element (i, row) of a tile becomes from(row, col + i).
template <class T> DEV void stage_transposed(float (&to)[DEPTH][PITCH], const Rows<T>& from, int col) {
  int i = threadIdx.x % (DEPTH / 4) * 4;
  bool by_fours = from.by_fours();
#pragma unroll
  for (int row = threadIdx.x / (DEPTH / 4), end = row + TILE; row < end; row += THREADS / (DEPTH / 4)) {
    Pack<float> four = from.at(row, col + i, by_fours);
#pragma unroll
    for (int e = 0; e < 4; e++) *place(to, i + e, row) = four.x[e];
  }
}
// Element (i, j) of a tile becomes from(row + i, col + j).
template <class T> DEV void stage(float (&to)[DEPTH][PITCH], const Rows<T>& from, int row, int col) {
  int j = threadIdx.x % (TILE / 4) * 4;
  bool by_fours = from.by_fours();
#pragma unroll
  for (int i = threadIdx.x / (TILE / 4), end = i + DEPTH; i < end; i += THREADS / (TILE / 4))
    store_pack(place(to, i, j), from.at(row + i, col + j, by_fours));
}

// acc[r][c] += sum over i of a(i, 4 y + r) b(i, 4 x + c)
DEV void multiply(float (&acc)[4][4], const float (*a)[PITCH], const float (*b)[PITCH], int x, int y) {
#pragma unroll
  for (int i = 0; i < DEPTH; i++) {
    Pack<float> left = load_pack(&a[i][swizzled(i, 4 * y)]), right = load_pack(&b[i][swizzled(i, 4 * x)]);
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) acc[r][c] = fmaf(left.x[r], right.x[c], acc[r][c]);
  }
}
// acc = rows cols^T, over the width of a head
template <class T>
DEV void products(float (&acc)[4][4], Shared& shared, const Rows<T>& rows, const Rows<T>& cols, int x, int y) {
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) acc[r][c] = 0;
  for (int col = 0; col < rows.cols; col += DEPTH) {
    __syncthreads();
    stage_transposed(shared.a, rows, col);
    stage_transposed(shared.b, cols, col);
    __syncthreads();
    multiply(acc, shared.a, shared.b, x, y);
  }
}
// acc += weights^T from, with weights (summed over, row) in shared memory and columns of `from` from `col` on
template <class T> DEV void gather(float (&acc)[4][4], Shared& shared, const Rows<T>& from, int col, int x, int y) {
  for (int half = 0; half < TILE; half += DEPTH) {
    __syncthreads();
    stage(shared.b, from, half, col);
    __syncthreads();
    multiply(acc, shared.weights + half, shared.b, x, y);
  }
}
// Element (column, row) of the weights: what `gather` sums over is a tile's columns.
DEV void keep_weights(Shared& shared, const float (&w)[4][4], int x, int y) {
#pragma unroll
  for (int c = 0; c < 4; c++)
    store_pack(place(shared.weights, 4 * x + c, 4 * y), Pack<float>{{w[0][c], w[1][c], w[2][c], w[3][c]}});
}
template <class T>
DEV void write_tile(T* to, int64_t pitch, int rows, int cols, const float (&acc)[4][4], float factor, int x, int y) {
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      if (4 * y + r < rows && 4 * x + c < cols) to[(4 * y + r) * pitch + 4 * x + c] = from_float<T>(acc[r][c] * factor);
}

// The sixteen threads of a row lie side by side in a warp.
DEV float row_max(float v) {
  for (int apart = 8; apart > 0; apart /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, apart));
  return v;
}
DEV float row_sum(float v) {
  for (int apart = 8; apart > 0; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
  return v;
}

// Whether a query sees key + c.
DEV bool sees(const AttentionSizes& s, uint32_t shown, int query, int key, int c) {
  return (shown >> c & 1) && (!s.causal || key + c <= query);
}

// Which weights of four queries with four keys dropout keeps: bit 4 i + j for query i and key j.
DEV uint32_t kept_keys(const AttentionSizes& s, const Now* now, const Head& head, int query, int key) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < 4; i++) kept |= kept_of_4(s, now, (head.row + query + i) * s.keys + key) << 4 * i;
  return kept;
}
DEV float factor_of(const AttentionSizes& s, uint32_t kept, int bit) {
  return !s.drop_below ? 1.0f : kept >> bit & 1 ? s.keep_scale : 0.0f;
}

// What a block makes: 64 columns of a tile of `positions`. Later tiles, which see the most keys when causal, come
// first.
struct Part {
  int batch, head, first, col;
  DEV Part(const AttentionSizes& s, int heads, int positions) {
    int cols = (s.width + TILE - 1) / TILE, tiles = (positions + TILE - 1) / TILE;
    int at = blockIdx.x;
    col = at % cols * TILE, at /= cols;
    first = (tiles - 1 - at % tiles) * TILE, at /= tiles;
    head = at % heads, batch = at / heads;
  }
};

template <class T> DEV Rows<T> query_rows(const T* q, int64_t pitch, const AttentionSizes& s, int first) {
  return {q + first * pitch, pitch, s.queries - first, s.width};
}
template <class T> DEV Rows<T> key_rows(const T* k, const AttentionSizes& s, int first) {
  return {k + first * (int64_t)s.kv_pitch, s.kv_pitch, s.keys - first, s.width};
}

template <class T>
DEV void forward(T* out, float* lse, const T* q, const T* k, const T* v, const int32_t* mask, const Now* now,
                 const AttentionSizes& s) {
  GPU_SHARED(Shared, shared, );
  Part part(s, s.heads, s.queries);
  Head head(s, part.batch, part.head);
  int x = threadIdx.x % 16, y = threadIdx.x / 16, first = part.first;
  q += head.query(s), k += head.key(s), v += head.key(s);
  if (mask) mask += (int64_t)part.batch * s.keys;
  float acc[4][4] = {}, max[4], sum[4] = {};
#pragma unroll
  for (int r = 0; r < 4; r++) max[r] = NOTHING;
  Rows<T> queries = query_rows(q, s.q_pitch, s, first);
  for (int key = 0, end = keys_seen(s, first + TILE); key < end; key += TILE) {
    float w[4][4];
    uint32_t shown = shown_of_4(s, mask, key + 4 * x);
    products(w, shared, queries, key_rows(k, s, key), x, y);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      int query = first + 4 * y + r;
      float top = NOTHING, partial = 0;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        w[r][c] = sees(s, shown, query, key + 4 * x, c) ? w[r][c] * (s.scale * LOG2_E) : NOTHING;
        top = fmaxf(top, w[r][c]);
      }
      top = fmaxf(max[r], row_max(top));
      float shift = shift_of(top), shrink = exp2f(max[r] - shift);
      max[r] = top;
#pragma unroll
      for (int c = 0; c < 4; c++) partial += w[r][c] = exp2f(w[r][c] - shift), acc[r][c] *= shrink;
      sum[r] = sum[r] * shrink + row_sum(partial);
    }
    if (s.drop_below) {
      uint32_t kept = kept_keys(s, now, head, first + 4 * y, key + 4 * x);
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) w[r][c] *= factor_of(s, kept, 4 * r + c);
    }
    keep_weights(shared, w, x, y);
    gather(acc, shared, key_rows(v, s, key), part.col, x, y);
  }
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float factor = sum[r] == 0 ? 0.0f : 1.0f / sum[r];
#pragma unroll
    for (int c = 0; c < 4; c++) acc[r][c] *= factor;
    int query = first + 4 * y + r;
    if (x == 0 && part.col == 0 && query < s.queries) lse[head.row + query] = max[r] * LN_2 + logf(sum[r]);
  }
  int64_t pitch = (int64_t)s.heads * s.width;
  write_tile(out + head.out(s) + first * pitch + part.col, pitch, s.queries - first, s.width - part.col, acc, 1.0f, x,
             y);
}

// One warp a row of (B, Tq, H).
template <class T> DEV void row_dots(float* delta, const T* d_out, const T* out, const AttentionSizes& s) {
  int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= (int64_t)s.batch * s.queries * s.heads) return;
  float sum = 0;
  for (int64_t col = lane; col < s.width; col += 32)
    sum = fmaf(to_float(d_out[row * s.width + col]), to_float(out[row * s.width + col]), sum);
  sum = warp_sum(sum);
  int64_t position = row / s.heads, head = row % s.heads, batch = position / s.queries;
  if (lane == 0) delta[(batch * s.heads + head) * s.queries + position % s.queries] = sum;
}

template <class T>
DEV void grad_q(T* d_q, const T* d_out, const float* lse, const float* delta, const T* q, const T* k, const T* v,
                const int32_t* mask, const Now* now, const AttentionSizes& s) {
  GPU_SHARED(Shared, shared, );
  Part part(s, s.heads, s.queries);
  Head head(s, part.batch, part.head);
  int x = threadIdx.x % 16, y = threadIdx.x / 16, first = part.first;
  int64_t out_pitch = (int64_t)s.heads * s.width;
  k += head.key(s), v += head.key(s);
  if (mask) mask += (int64_t)part.batch * s.keys;
  float acc[4][4] = {}, top[4], dot[4];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int query = first + 4 * y + r;
    top[r] = query < s.queries ? log2_sum(lse[head.row + query]) : INFINITY;
    dot[r] = query < s.queries ? delta[head.row + query] : 0.0f;
  }
  Rows<T> queries = query_rows(q + head.query(s), s.q_pitch, s, first),
          d_outs = query_rows(d_out + head.out(s), out_pitch, s, first);
  for (int key = 0, end = keys_seen(s, first + TILE); key < end; key += TILE) {
    float w[4][4], d[4][4];
    uint32_t shown = shown_of_4(s, mask, key + 4 * x);
    products(w, shared, queries, key_rows(k, s, key), x, y);
    products(d, shared, d_outs, key_rows(v, s, key), x, y);
    uint32_t kept = s.drop_below ? kept_keys(s, now, head, first + 4 * y, key + 4 * x) : 0;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      int query = first + 4 * y + r;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float p = sees(s, shown, query, key + 4 * x, c) ? exp2f(fmaf(w[r][c], s.scale * LOG2_E, -top[r])) : 0.0f;
        w[r][c] = p * fmaf(d[r][c], factor_of(s, kept, 4 * r + c), -dot[r]);
      }
    }
    keep_weights(shared, w, x, y);
    gather(acc, shared, key_rows(k, s, key), part.col, x, y);
  }
  write_tile(d_q + head.query(s) + first * (int64_t)s.q_pitch + part.col, s.q_pitch, s.queries - first,
             s.width - part.col, acc, s.scale, x, y);
}

template <class T>
DEV void grad_kv(T* d_k, T* d_v, const T* d_out, const float* lse, const float* delta, const T* q, const T* k,
                 const T* v, const int32_t* mask, const Now* now, const AttentionSizes& s) {
  GPU_SHARED(Shared, shared, );
  Part part(s, s.kv_heads, s.keys);
  int group = s.heads / s.kv_heads, x = threadIdx.x % 16, y = threadIdx.x / 16, first = part.first;
  int64_t at = Head(s, part.batch, part.head * group).key(s), out_pitch = (int64_t)s.heads * s.width;
  float acc_k[4][4] = {}, acc_v[4][4] = {};
  Rows<T> keys = key_rows(k + at, s, first), values = key_rows(v + at, s, first);
  for (int h = part.head * group; h < (part.head + 1) * group; h++) {
    Head head(s, part.batch, h);
    // Queries before the first key see none of the tile when causal.
    for (int query = s.causal ? first : 0; query < s.queries; query += TILE) {
      Rows<T> queries = query_rows(q + head.query(s), s.q_pitch, s, query),
              d_outs = query_rows(d_out + head.out(s), out_pitch, s, query);
      // Rows are keys here, and columns queries.
      float w[4][4], d[4][4];
      products(w, shared, keys, queries, x, y);
      products(d, shared, values, d_outs, x, y);
      uint32_t drawn = s.drop_below ? kept_keys(s, now, head, query + 4 * x, first + 4 * y) : 0;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        int i = query + 4 * x + c;
        float top = i < s.queries ? log2_sum(lse[head.row + i]) : INFINITY,
              dot = i < s.queries ? delta[head.row + i] : 0.0f;
        Pack<float> kept;
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float p = !s.causal || first + 4 * y + r <= i ? exp2f(fmaf(w[r][c], s.scale * LOG2_E, -top)) : 0.0f;
          float factor = factor_of(s, drawn, 4 * c + r);
          kept.x[r] = p * factor;
          w[r][c] = p * fmaf(d[r][c], factor, -dot);
        }
        store_pack(place(shared.weights, 4 * x + c, 4 * y), kept);
      }
      gather(acc_v, shared, d_outs, part.col, x, y);
      __syncthreads();
      keep_weights(shared, w, x, y);
      gather(acc_k, shared, queries, part.col, x, y);
    }
  }
  // A hidden key's weights are in its own rows alone.
  if (mask) {
    uint32_t shown = shown_of_4(s, mask + (int64_t)part.batch * s.keys, first + 4 * y);
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (!(shown >> r & 1)) acc_k[r][c] = acc_v[r][c] = 0;
  }
  at += first * (int64_t)s.kv_pitch + part.col;
  write_tile(d_k + at, s.kv_pitch, s.keys - first, s.width - part.col, acc_k, s.scale, x, y);
  write_tile(d_v + at, s.kv_pitch, s.keys - first, s.width - part.col, acc_v, 1.0f, x, y);
}
}  // namespace plain

// Grids: a block for each 64 columns of each 64 queries (forward, grad_q) or keys (grad_kv) of each head and sequence;
// grad_delta a warp a row.
#define ATTENTION_KERNELS(T, dtype)                                                                                    \
  extern "C" __global__ void __launch_bounds__(plain::THREADS, 2) attention_forward_##dtype(                           \
      T* out, float* lse, const T* q, const T* k, const T* v, const int32_t* mask, const Now* now, AttentionSizes s) { \
    plain::forward(out, lse, q, k, v, mask, now, s);                                                                   \
  }                                                                                                                    \
  GPU_EXPORT(attention_forward_##dtype)                                                                                \
  extern "C" __global__ void __launch_bounds__(plain::THREADS)                                                         \
      attention_grad_delta_##dtype(float* delta, const T* d_out, const T* out, AttentionSizes s) {                     \
    plain::row_dots(delta, d_out, out, s);                                                                             \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_delta_##dtype)                                                                             \
  extern "C" __global__ void __launch_bounds__(plain::THREADS, 2)                                                      \
      attention_grad_q_##dtype(T* d_q, const T* d_out, const float* lse, const float* delta, const T* q, const T* k,   \
                               const T* v, const int32_t* mask, const Now* now, AttentionSizes s) {                    \
    plain::grad_q(d_q, d_out, lse, delta, q, k, v, mask, now, s);                                                      \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_q_##dtype)                                                                                 \
  extern "C" __global__ void __launch_bounds__(plain::THREADS, 2)                                                      \
      attention_grad_kv_##dtype(T* d_k, T* d_v, const T* d_out, const float* lse, const float* delta, const T* q,      \
                                const T* k, const T* v, const int32_t* mask, const Now* now, AttentionSizes s) {       \
    plain::grad_kv(d_k, d_v, d_out, lse, delta, q, k, v, mask, now, s);                                                \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_kv_##dtype)

ATTENTION_KERNELS(float, f32)
ATTENTION_KERNELS(bf16, bf16)
