// The embedding: rows of a table picked by token ids, and the gradient that adds rows back.
//   forward  out[t,:] = table[ids[t],:]; ids (tokens) i32; table (V, C), out (tokens, C), f32 or bf16.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

constexpr int ROWS = 8;        // rows of a block, one warp each
constexpr int IN_FLIGHT = 4;   // packs that a lane has on their way at once

// One warp a row. The rows are copied bit by bit, so T may be any type of the element's size. A row whose id is outside the table,
// which the loader rules out, becomes 0.
template <class T> DEV void pick_rows(T* out, const int* ids, const T* table, int64_t tokens, int table_rows, int cols) {
  constexpr int N = FEW<T>;
  int64_t t = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (t >= tokens) return;
  int id = ids[t];
  bool inside = (unsigned)id < (unsigned)table_rows;
  const T* from = table + (int64_t)(inside ? id : 0) * cols;
  T* to = out + t * cols;
  if (cols % N == 0 && aligned_few<N>(table) && aligned_few<N>(out)) {
#pragma unroll 1
    for (int c = lane * N; c < cols; c += IN_FLIGHT * 32 * N) {
      Few<T, N> v[IN_FLIGHT];
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++) {
        v[j] = {};
        if (inside && c + j * 32 * N < cols) v[j] = load_few<N>(from + c + j * 32 * N);
      }
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++)
        if (c + j * 32 * N < cols) store_few<N>(to + c + j * 32 * N, v[j]);
    }
    return;
  }
#pragma unroll 4
  for (int c = lane; c < cols; c += 32) to[c] = inside ? from[c] : from_float<T>(0);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_forward_f32(float* out, const int* ids, const float* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_forward_bf16(bf16* out, const int* ids, const bf16* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
GPU_EXPORT(embedding_forward_f32)
GPU_EXPORT(embedding_forward_bf16)
