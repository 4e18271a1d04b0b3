// Sums down the columns of a matrix: gradients of biases that are not summed beside a product, and the last stage of
// every kernel that leaves partial column sums.
//   x (rows, cols) f32 or bf16, rows `pitch` apart; out (cols) f32; partials (parts, cols) f32, scratch.
//   out[c] = sum over r of x[r,c]; added to out[c] instead where adds_to says so.
// Two kernels. column_sum: block (tile, part) adds rows part * rows_per_part.. of 256 columns. One warp a row, 8
// columns a lane, and 128 bytes of a lane on their way: 131 KB a multiprocessor at 4 blocks, which is how many parts
// there are for (graph::row_parts), so that all blocks run at once. column_sum_finish: 32 columns a block, 16 warps
// that share out the parts, 16 of each on their way. Parts depend on the shape alone and both orders are fixed, so the
// bits are the same on every GPU.
// Bytes: x once, and 8 a partial, at most a sixteenth of a bf16 x with 64 rows a part. Expected: 93 % of the copy rate,
// less 7 us for two launches: 45 % at 8192 x 768, 70 % at 8192 x 3072.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int WARPS = 8;
constexpr int TILE = 256;         // columns a block; graph::COLUMN_TILE
constexpr int PER_LANE = TILE / 32;
constexpr int FINISH_WARPS = 16;
constexpr int FINISH_AHEAD = 16;  // partial sums that a thread has on their way at once: all of 256 parts

template <class T, bool PACKED>
DEV void add_rows(float* partials, const T* x, int64_t rows, int cols, int pitch, int64_t rows_per_part) {
  constexpr int AHEAD = 16 / sizeof(T);   // rows that a warp has on their way at once
  GPU_SHARED(float, sums, [WARPS][TILE]);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t first_column = (int64_t)blockIdx.x * TILE;
  int here = cols - first_column < TILE ? (int)(cols - first_column) : TILE;
  int64_t row = blockIdx.y * rows_per_part, end = row + rows_per_part < rows ? row + rows_per_part : rows;
  float sum[PER_LANE] = {};
#pragma unroll 1
  for (row += warp; row < end; row += WARPS * AHEAD) {
    Part<T, PER_LANE> v[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      int64_t r = row + a * WARPS;
      v[a].template load<PACKED>(x + (r < end ? r : row) * pitch + first_column, r < end ? here : 0, lane, 32);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) sum[i] += v[a].at(i);
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) sums[warp][column_of<T, PACKED>(i, lane, 32)] = sum[i];
  __syncthreads();
  int c = threadIdx.x;
  if (c >= here) return;
  float total = 0;
  for (int w = 0; w < WARPS; w++) total += sums[w][c];
  partials[(int64_t)blockIdx.y * cols + first_column + c] = total;
}

template <class T>
DEV void column_sum(float* partials, const T* x, int64_t rows, int cols, int pitch, int64_t rows_per_part) {
  if (pitch % Pack<T>::N == 0 && aligned16(x)) add_rows<T, true>(partials, x, rows, cols, pitch, rows_per_part);
  else add_rows<T, false>(partials, x, rows, cols, pitch, rows_per_part);
}

extern "C" __global__ __launch_bounds__(WARPS * 32, GPU_BLOCKS(4)) void column_sum_f32(float* partials, const float* x,
                                                                                       int64_t rows, int cols,
                                                                                       int pitch,
                                                                                       int64_t rows_per_part) {
  column_sum(partials, x, rows, cols, pitch, rows_per_part);
}
GPU_EXPORT(column_sum_f32)

extern "C" __global__ __launch_bounds__(WARPS * 32, GPU_BLOCKS(4)) void column_sum_bf16(float* partials, const bf16* x,
                                                                                        int64_t rows, int cols,
                                                                                        int pitch,
                                                                                        int64_t rows_per_part) {
  column_sum(partials, x, rows, cols, pitch, rows_per_part);
}
GPU_EXPORT(column_sum_bf16)

// Block (tile, which) finishes 32 columns of out `which`, whose partials follow those of the outs before it. With no
// parts the sums are 0.
extern "C" __global__ __launch_bounds__(FINISH_WARPS * 32) void column_sum_finish(float* out0, float* out1,
                                                                                  const float* partials, int parts,
                                                                                  int cols, int accumulator0,
                                                                                  int accumulator1, const Now* now) {
  GPU_SHARED(float, sums, [FINISH_WARPS][32]);
  float* out = blockIdx.y == 0 ? out0 : out1;
  int accumulate = adds_to(blockIdx.y == 0 ? accumulator0 : accumulator1, now);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t c = (int64_t)blockIdx.x * 32 + lane;
  partials += (int64_t)blockIdx.y * parts * cols;
  float sum = 0, before = 0;   // what an accumulator has is read along with the first partials
  if (warp == 0 && c < cols && accumulate) before = out[c];
  if (c < cols) {
    for (int part = warp; part < parts; part += FINISH_AHEAD * FINISH_WARPS) {
      float v[FINISH_AHEAD];
#pragma unroll
      for (int a = 0; a < FINISH_AHEAD; a++) {
        int p = part + a * FINISH_WARPS;
        v[a] = p < parts ? partials[(int64_t)p * cols + c] : 0.0f;
      }
#pragma unroll
      for (int a = 0; a < FINISH_AHEAD; a++) sum += v[a];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= cols) return;
  for (int w = 1; w < FINISH_WARPS; w++) sum += sums[w][lane];
  out[c] = accumulate ? before + sum : sum;
}
GPU_EXPORT(column_sum_finish)
