// A microbatch's loss from the losses of its rows, whichever loss it is: the second kernel of cross_entropy and
// mean_squared_error.
//   row_losses (rows) f32; loss (1) f32. loss = loss_scale sum over r of row_losses[r].
// Overwrites loss. One block, in f64: each thread's rows in order, then by halves, so the bits depend on the shape
// alone.
// Bytes: 4 a row. Expected: the launch, 2 us, and 1 us more for every 8,192 rows.
#include "gpu.cuh"

constexpr int THREADS = 1024;

extern "C" __global__ __launch_bounds__(THREADS) void loss_sum(float* loss, const float* row_losses, int64_t rows,
                                                               const Now* now) {
  GPU_SHARED(double, sums, [THREADS]);
  double sum = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += THREADS) sum += row_losses[row];
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = (float)(sums[0] * now->loss_scale);
}
GPU_EXPORT(loss_sum)
