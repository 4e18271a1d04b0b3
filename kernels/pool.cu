// Maximum and average pooling over windows of images; one (image, channel) pair is a plane.
//   x, d_x (planes, H, W), out, d_out (planes, H', W') f32 or bf16; argmax (planes, H', W') i32: row times W plus
//   column of the maximum.
//   out = the greatest value of the window, or its sum divided by the window's size, padding counting as zeros.
//   Padding never is a maximum. The first of equal values in row-major order wins; a NaN beats every number, and a
//   later NaN an earlier one, as in PyTorch. A window with nothing inside the plane gives minus infinity and -1.
//   d_x: each position adds up what the windows that cover it give it, in row-major order: no atomics.
// Overwrites its outputs. These kernels take any shape, one thread an element of the output, for windows of 32 elements
// and more (large) one warp an average: pool_tile.cu is faster where a few rows of a plane fit into shared memory. An
// element costs them 100 instructions and more: 10 to 50 % of the copy rate.
#include "gpu.cuh"
#include "gpu/pool.cuh"

constexpr int THREADS = 256;

// Element `e` of planes of (height, width), taken apart.
struct Place {
  int64_t plane;
  int row, col;
  DEV Place(int64_t e, int height, int width) {
    int64_t line = e / width;
    col = (int)(e - line * width);
    plane = line / height;
    row = (int)(line - plane * height);
  }
};

template <class T> DEV void max_forward(T* out, int32_t* argmax, const T* x, int64_t elems, const Sizes& s) {
  int64_t e = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (e >= elems) return;
  Place at(e, s.out_height, s.out_width);
  Range rows = inside(at.row, s.stride, s.padding, s.kernel_h, s.height),
        cols = inside(at.col, s.stride, s.padding, s.kernel_w, s.width);
  const T* plane = x + at.plane * s.height * s.width;
  float best = -INFINITY;
  int place = rows.len() == 0 || cols.len() == 0 ? -1 : rows.first * s.width + cols.first;
  for (int row = rows.first; row < rows.end; row++)
    for (int col = cols.first; col < cols.end; col++) {
      int here = row * s.width + col;
      float v = to_float(plane[here]);
      if (v > best || v != v) best = v, place = here;
    }
  out[e] = from_float<T>(best);
  argmax[e] = place;
}

template <class T> DEV void max_grad(T* d_x, const T* d_out, const int32_t* argmax, int64_t elems, const Sizes& s) {
  int64_t e = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (e >= elems) return;
  Place at(e, s.height, s.width);
  Range rows = covering(at.row, s.stride, s.padding, s.kernel_h, s.out_height),
        cols = covering(at.col, s.stride, s.padding, s.kernel_w, s.out_width);
  int64_t plane = at.plane * s.out_height * s.out_width;
  int here = at.row * s.width + at.col;
  float sum = 0;
  for (int row = rows.first; row < rows.end; row++)
    for (int col = cols.first; col < cols.end; col++) {
      int64_t window = plane + row * s.out_width + col;
      if (argmax[window] == here) sum += to_float(d_out[window]);
    }
  d_x[e] = from_float<T>(sum);
}

template <class T> DEV void avg_forward(T* out, const T* x, int64_t elems, const Sizes& s) {
  int64_t e = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (e >= elems) return;
  Place at(e, s.out_height, s.out_width);
  Range rows = inside(at.row, s.stride, s.padding, s.kernel_h, s.height),
        cols = inside(at.col, s.stride, s.padding, s.kernel_w, s.width);
  const T* plane = x + at.plane * s.height * s.width;
  float sum = 0;
  for (int row = rows.first; row < rows.end; row++)
    for (int col = cols.first; col < cols.end; col++) sum += to_float(plane[(int64_t)row * s.width + col]);
  out[e] = from_float<T>(sum / ((float)s.kernel_h * s.kernel_w));
}

template <class T> DEV void avg_forward_large(T* out, const T* x, int64_t elems, const Sizes& s) {
  int64_t e = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (e >= elems) return;
  Place at(e, s.out_height, s.out_width);
  Range rows = inside(at.row, s.stride, s.padding, s.kernel_h, s.height),
        cols = inside(at.col, s.stride, s.padding, s.kernel_w, s.width);
  const T* plane = x + at.plane * s.height * s.width;
  int64_t count = (int64_t)rows.len() * cols.len();
  float sum = 0;
#pragma unroll 4
  for (int64_t i = lane; i < count; i += 32)
    sum += to_float(plane[(rows.first + i / cols.len()) * s.width + cols.first + i % cols.len()]);
  sum = warp_sum(sum);
  if (lane == 0) out[e] = from_float<T>(sum / ((float)s.kernel_h * s.kernel_w));
}

template <class T> DEV void avg_grad(T* d_x, const T* d_out, int64_t elems, const Sizes& s) {
  int64_t e = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (e >= elems) return;
  Place at(e, s.height, s.width);
  Range rows = covering(at.row, s.stride, s.padding, s.kernel_h, s.out_height),
        cols = covering(at.col, s.stride, s.padding, s.kernel_w, s.out_width);
  const T* plane = d_out + at.plane * s.out_height * s.out_width;
  float sum = 0;
  for (int row = rows.first; row < rows.end; row++)
    for (int col = cols.first; col < cols.end; col++) sum += to_float(plane[(int64_t)row * s.out_width + col]);
  d_x[e] = from_float<T>(sum / ((float)s.kernel_h * s.kernel_w));
}

// The entry points for element type T. `elems` is what output 0 has.
#define POOL_ENTRIES(T)                                                                                                \
  extern "C" __global__ __launch_bounds__(THREADS) void max_pool_forward_##T(T* out, int32_t* argmax, const T* x,      \
                                                                             int64_t elems, Sizes s) {                 \
    max_forward(out, argmax, x, elems, s);                                                                             \
  }                                                                                                                    \
  GPU_EXPORT(max_pool_forward_##T)                                                                                     \
  extern "C" __global__ __launch_bounds__(THREADS) void max_pool_grad_##T(                                             \
      T* d_x, const T* d_out, const int32_t* argmax, int64_t elems, Sizes s) {                                         \
    max_grad(d_x, d_out, argmax, elems, s);                                                                            \
  }                                                                                                                    \
  GPU_EXPORT(max_pool_grad_##T)                                                                                        \
  extern "C" __global__ __launch_bounds__(THREADS) void avg_pool_forward_##T(T* out, const T* x, int64_t elems,        \
                                                                             Sizes s) {                                \
    avg_forward(out, x, elems, s);                                                                                     \
  }                                                                                                                    \
  GPU_EXPORT(avg_pool_forward_##T)                                                                                     \
  extern "C" __global__ __launch_bounds__(THREADS) void avg_pool_forward_large_##T(T* out, const T* x, int64_t elems,  \
                                                                                   Sizes s) {                          \
    avg_forward_large(out, x, elems, s);                                                                               \
  }                                                                                                                    \
  GPU_EXPORT(avg_pool_forward_large_##T)                                                                               \
  extern "C" __global__ __launch_bounds__(THREADS) void avg_pool_grad_##T(T* d_x, const T* d_out, int64_t elems,       \
                                                                          Sizes s) {                                   \
    avg_grad(d_x, d_out, elems, s);                                                                                    \
  }                                                                                                                    \
  GPU_EXPORT(avg_pool_grad_##T)

using f32 = float;
POOL_ENTRIES(f32)
POOL_ENTRIES(bf16)
