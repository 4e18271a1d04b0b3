// Mean squared error and its gradient.
//   x, d_x, targets (rows, cols) f32 or bf16, x being what is predicted; row_losses (rows) f32.
//   row_losses[r] = 1/cols sum over c of (x[r,c] - targets[r,c])^2, of which loss_sum.cu makes the loss;
//   d_x[r,c] = (x[r,c] - targets[r,c]) 2 loss_scale / cols.
// Rows of x and d_x are `pitch` apart, those of targets cols; between cols and pitch d_x is 0.
// Overwrites its outputs; d_x may lie over x. A warp has a row of up to 1024 columns, 8 rows a block; beyond, a block
// has a row. Rows at any address go in 16-byte packs, save what lies before the first multiple of 16 bytes and behind
// the last pack; where x and targets lie apart by other than a multiple of 16 bytes, as with a pitch, value by value.
// Every order depends on the shape alone.
// Bytes: forward reads x and targets once, the gradient writes d_x besides: 8 / 4 and 12 / 6 an element. Expected: 90 %
// of the copy rate from 256 columns of f32 on, 512 of bf16, with 4 loads of 16 bytes a thread on their way; below, too
// few bytes on their way; with a pitch, instructions.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int THREADS = 512;  // at most, a row
constexpr int AHEAD = 2;      // packs of each operand that a thread has on their way at once

template <class T>
DEV void forward(float* row_losses, const T* x, const T* targets, int64_t rows, int cols, int pitch, int threads) {
  constexpr int N = Pack<T>::N;
  GPU_SHARED(float, warps, [32]);
  int64_t row = (int64_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
  int thread = threadIdx.x % threads;
  if (row >= rows) return;
  x += row * pitch, targets += row * cols;
  float sum = 0;
  auto add = [&](T prediction, T target) {
    float apart = to_float(prediction) - to_float(target);
    sum = fmaf(apart, apart, sum);
  };
  Packs<T> at(x, targets, cols);
  for (int c = thread; c < at.head; c += threads) add(x[c], targets[c]);
  for (int c = at.tail + thread; c < cols; c += threads) add(x[c], targets[c]);
  for (int first = thread; first < at.packs; first += AHEAD * threads) {
    Pack<T> v[AHEAD], t[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs) {
        int64_t c = at.head + (int64_t)(first + a * threads) * N;
        v[a] = load_pack(x + c), t[a] = load_pack(targets + c);
      }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs)
#pragma unroll
        for (int j = 0; j < N; j++) add(v[a].x[j], t[a].x[j]);
  }
  sum = threads == 32 ? warp_sum(sum) : block_sum(sum, warps);
  if (thread == 0) row_losses[row] = sum / cols;
}

extern "C" __global__ __launch_bounds__(THREADS) void mean_squared_error_forward_f32(float* row_losses, const float* x,
                                                                                     const float* targets, int64_t rows,
                                                                                     int cols, int pitch, int threads) {
  forward(row_losses, x, targets, rows, cols, pitch, threads);
}
GPU_EXPORT(mean_squared_error_forward_f32)

extern "C" __global__ __launch_bounds__(THREADS) void mean_squared_error_forward_bf16(float* row_losses, const bf16* x,
                                                                                      const bf16* targets, int64_t rows,
                                                                                      int cols, int pitch,
                                                                                      int threads) {
  forward(row_losses, x, targets, rows, cols, pitch, threads);
}
GPU_EXPORT(mean_squared_error_forward_bf16)

template <class T>
DEV void grad(T* d_x, const T* x, const T* targets, int64_t rows, int cols, int pitch, int threads, const Now* now) {
  constexpr int N = Pack<T>::N;
  int64_t row = (int64_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
  int thread = threadIdx.x % threads;
  if (row >= rows) return;
  d_x += row * pitch, x += row * pitch, targets += row * cols;
  float factor = (float)(2 * now->loss_scale / cols);
  auto one = [=](T prediction, T target) { return from_float<T>((to_float(prediction) - to_float(target)) * factor); };
  Packs<T> at(x, targets, cols);
  for (int c = thread; c < at.head; c += threads) d_x[c] = one(x[c], targets[c]);
  for (int c = at.tail + thread; c < cols; c += threads) d_x[c] = one(x[c], targets[c]);
  for (int c = cols + thread; c < pitch; c += threads) d_x[c] = from_float<T>(0);
  for (int first = thread; first < at.packs; first += AHEAD * threads) {
    Pack<T> v[AHEAD], t[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs) {
        int64_t c = at.head + (int64_t)(first + a * threads) * N;
        v[a] = load_pack(x + c), t[a] = load_pack(targets + c);
      }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs) {
#pragma unroll
        for (int j = 0; j < N; j++) v[a].x[j] = one(v[a].x[j], t[a].x[j]);
        store_pack(d_x + at.head + (int64_t)(first + a * threads) * N, v[a]);
      }
  }
}

extern "C" __global__ __launch_bounds__(THREADS) void mean_squared_error_grad_f32(float* d_x, const float* x,
                                                                                  const float* targets, int64_t rows,
                                                                                  int cols, int pitch, int threads,
                                                                                  const Now* now) {
  grad(d_x, x, targets, rows, cols, pitch, threads, now);
}
GPU_EXPORT(mean_squared_error_grad_f32)

extern "C" __global__ __launch_bounds__(THREADS) void mean_squared_error_grad_bf16(bf16* d_x, const bf16* x,
                                                                                   const bf16* targets, int64_t rows,
                                                                                   int cols, int pitch, int threads,
                                                                                   const Now* now) {
  grad(d_x, x, targets, rows, cols, pitch, threads, now);
}
GPU_EXPORT(mean_squared_error_grad_bf16)
