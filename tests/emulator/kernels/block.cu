// Barriers, cp.async, and what goes wrong with them: each kernel has its mistakes, by number.
#include "gpu.cuh"

// sums (rows) = sum of x (rows, cols), one block of 256 threads for two rows, one after the other.
//   1 no barrier before the partial sums are read, 2 none before they are written again, 3 a store past the last row,
//   4 a store past a shared array, 5 warps at different barriers, 6 a barrier that never fills
extern "C" __global__ void test_row_sums(float* sums, const float* x, int rows, int cols, int bug) {
  GPU_SHARED(float, partial, [8]);
  const int t = threadIdx.x;
  for (int i = 0; i < 2; i++) {
    const int row = 2 * blockIdx.x + i;
    float sum = 0;
    if (row < rows)
      for (int c = t; c < cols; c += 256) sum += x[(int64_t)row * cols + c];
    sum = warp_sum(sum);
    if (t % 32 == 0) partial[t / 32] = sum;
    if (bug == 4 && t == 7) partial[blockDim.x / 32] = 0;
    if (bug == 5) {
      if (t < 64) __syncthreads();
      else __syncthreads();
    } else if (bug == 6) {
      if (t >= 64) bar_sync(1, 256);
    } else if (bug != 1) {
      __syncthreads();
    }
    if (t == 0 && (row < rows || bug == 3)) {
      float all = 0;
      for (int w = 0; w < 8; w++) all += partial[w];
      sums[row] = all;
    }
    if (bug != 2) __syncthreads();
  }
}
GPU_EXPORT(test_row_sums)

// out (cols) = in (cols) reversed within 64, through shared memory, by cp.async of 4, 8 and 16 bytes; what lies past
// `cols` is 0. out is (64 * blocks). 64 threads a block. 1 no wait, 2 no barrier after the wait, 3 not waited for at
// exit, 4 misaligned.
extern "C" __global__ void test_copies(float* out, const float* in, int cols, int width, int bug) {
  GPU_SHARED(float, tile, [2][64]);
  const int t = threadIdx.x, each = width / 4;  // elements of a copy
  const int first = blockIdx.x * 64 + t * each;
  if (t < 64 / each) {
    float* dst = tile[0] + t * each + (bug == 4 && t == 1);
    const int left = cols - first, bytes = left < 0 ? 0 : left < each ? left * 4 : width;
    const float* src = in + (bytes ? first : 0);
    if (width == 16) bytes == 16 ? cp_async16(dst, src) : cp_async16_zfill(dst, src, bytes);
    else if (width == 8) bytes == 8 ? cp_async8(dst, src) : cp_async8_zfill(dst, src, bytes);
    else bytes == 4 ? cp_async4(dst, src) : cp_async4_zfill(dst, src, bytes);
  }
  cp_async_commit();
  // A second group, of the same elements, is on its way while the first one is used.
  if (t < 16) cp_async16_zfill(tile[1] + 4 * t, in, 0);
  cp_async_commit();
  if (bug != 1 && bug != 3) cp_async_wait<1>();
  if (bug != 2) __syncthreads();
  if (bug != 3) out[blockIdx.x * 64 + t] = tile[0][63 - t];
  if (bug == 3) return;
  cp_async_wait<0>();
  __syncthreads();
  out[blockIdx.x * 64 + t] += tile[1][t];
}
GPU_EXPORT(test_copies)

// out (steps, 32): a warp makes values, another uses them, through one shared slot and two named barriers. 64 threads.
// 1 the producer does not wait until the slot is free, 2 it still writes after it has said that the slot is full.
extern "C" __global__ void test_named_barriers(float* out, int steps, int bug) {
  GPU_SHARED(float, slot, [32]);
  const int lane = threadIdx.x % 32;
  enum { FULL = 1, FREE = 2 };
  if (threadIdx.x < 32) {
    for (int i = 0; i < steps; i++) {
      if (i > 0 && bug != 1) bar_sync(FREE, 64);
      slot[lane] = (float)(100 * i + lane);
      bar_arrive(FULL, 64);
      if (bug == 2) slot[lane] = (float)(100 * i + lane);
    }
    return;
  }
  for (int i = 0; i < steps; i++) {
    bar_sync(FULL, 64);
    out[32 * i + lane] = slot[31 - lane];
    if (i + 1 < steps && bug != 1) bar_arrive(FREE, 64);
  }
}
GPU_EXPORT(test_named_barriers)

// out (1) = 1, written once all of 5 warps have read a number. 160 threads. 1 to 4: the read of that warp is not waited
// for.
extern "C" __global__ void test_readers(float* out, int bug) {
  GPU_SHARED(float, number, [1]);
  const int warp = threadIdx.x / 32, readers = bug ? 128 : 160;
  enum { READ = 1 };
  if (threadIdx.x == 0) number[0] = 0;
  __syncthreads();
  const float seen = number[0];
  if (warp == 0) {
    bar_sync(READ, readers);
    if (threadIdx.x == 0) number[0] = seen + 1, out[0] = number[0];
  } else if (bug != warp) {
    bar_arrive(READ, readers);
  }
}
GPU_EXPORT(test_readers)

// out (n, 4) = in (n, 4), by vectors. 1 these begin one element late.
extern "C" __global__ void test_vectors(float4* out, const float* in, int n, int bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = *reinterpret_cast<const float4*>(in + 4 * i + (bug == 1));
}
GPU_EXPORT(test_vectors)

// out (blocks) = block: a kernel that says how many threads a block of it has at most.
extern "C" __global__ void __launch_bounds__(64, 2) test_bounded(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x;
}
GPU_EXPORT(test_bounded)

// out (32 * blocks) = block * 32 + thread. 1 blocks write the same elements, 2 a block reads another's, 3 threads of a
// block write the same element of global memory.
extern "C" __global__ void test_blocks(int* out, int bug) {
  const int t = threadIdx.x, b = bug == 1 ? 0 : blockIdx.x;
  if (t >= 28 && t < 30) return;  // threads that exit do not hold up a barrier
  __syncthreads();
  out[32 * b + (bug == 3 && t == 1 ? 0 : t)] = 32 * blockIdx.x + t;
  if (bug == 2 && blockIdx.x == 1 && t == 0) out[32] = out[0];
}
GPU_EXPORT(test_blocks)
