// The gradient of batch normalization, batchnorm.cu's.
//   d_out, x, d_x (N, C, HW) f32 or bf16, weight (C) of the same type; mean, rstd, d_weight, d_bias (C) f32. n is N HW.
//   d_bias = sum of d_out, d_weight = sum of d_out (x - mean) rstd; d_x = rstd weight (d_out - d_bias/n - (x - mean)
//   rstd d_weight/n).
// Overwrites d_x; d_weight and d_bias too, or adds to them, as adds_to says. Three steps, divided as gpu/batchnorm.cuh
// says: partial sums (2, parts, C width); a kernel that joins a channel's parts * width of them, one warp a channel; an
// elementwise pass, a pack a thread. Parts depend on the shape alone, orders are fixed.
// Bytes: d_out and x twice, d_x once; beside them 8 a partial result. Expected: 95 % of the copy rate by these bytes for
// large planes or batches, which is 58 % by those of reading everything once.
#include "gpu.cuh"
#include "gpu/row.cuh"
#include "gpu/batchnorm.cuh"

// The channels of the elements from `element` on.
struct Walk {
  int channel, position;
  DEV Walk(int64_t element, int channels, int positions) {
    int64_t plane = element / positions;
    channel = (int)(plane % channels), position = (int)(element - plane * positions);
  }
  // On to the next element; whether that is in another channel.
  DEV bool step(int channels, int positions) {
    if (++position < positions) return false;
    position = 0, channel = channel + 1 < channels ? channel + 1 : 0;
    return true;
  }
};

// Calls `pack(first element)` for every whole pack, one a thread, and `single(element)` for the rest, or for all where
// packs do not fit. The first blocks have the last elements.
template <int N, class P, class S> DEV void each_element(int64_t elems, bool packed, P pack, S single) {
  int64_t packs = packed ? elems / N : 0, threads = (int64_t)gridDim.x * THREADS,
          thread = threads - THREADS - (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (thread < packs) pack(thread * N);
  for (int64_t e = packs * N + thread; e < elems; e += threads) single(e);
}

// Sums of d_out and of d_out (x - mean) over a part of a channel.
template <class T>
DEV void grad_planes(float* partials, const T* d_out, const T* x, const float* mean, int64_t images, int channels,
                     int positions, int64_t pieces_per_part) {
  constexpr int N = Pack<T>::N;
  GPU_SHARED(float, warps, [2][32]);
  int lane = threadIdx.x % 32;
  float m = mean[blockIdx.x], sum = 0, dot = 0;
  each_piece(images, channels, positions, pieces_per_part, [&](int64_t first, int len) {
    const T *d = d_out + first, *row = x + first;
    Packs<T> at(d, row, len);
    auto single = [&](int i) { sum += to_float(d[i]), dot += to_float(d[i]) * (to_float(row[i]) - m); };
    for (int i = lane; i < at.head; i += 32) single(i);
    for (int i = at.tail + lane; i < len; i += 32) single(i);
    for (int p = lane; p < at.packs; p += AHEAD / 2 * 32) {
      Pack<T> dv[AHEAD / 2], xv[AHEAD / 2];
#pragma unroll
      for (int a = 0; a < AHEAD / 2; a++) {
        int64_t i = at.head + (int64_t)(p + a * 32) * N;
        if (p + a * 32 < at.packs) dv[a] = load_pack(d + i), xv[a] = load_pack(row + i);
      }
#pragma unroll
      for (int a = 0; a < AHEAD / 2; a++)
        if (p + a * 32 < at.packs)
#pragma unroll
          for (int j = 0; j < N; j++) {
            float g = to_float(dv[a].x[j]);
            sum += g;
            dot += g * (to_float(xv[a].x[j]) - m);
          }
    }
  });
  sum = block_sum(sum, warps[0]);
  dot = block_sum(dot, warps[1]);
  int64_t to = (int64_t)blockIdx.y * channels + blockIdx.x;
  if (threadIdx.x == 0) partials[to] = sum, partials[(int64_t)gridDim.y * channels + to] = dot;
}

template <class T, bool PACKED>
DEV void grad_tile(float* partials, const T* d_out, const T* x, const float* mean, int64_t images, int64_t cols,
                   int positions, int64_t rows_per_part) {
  GPU_SHARED(float, sums, [2][WARPS][TILE]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = (int64_t)blockIdx.x * TILE, row = blockIdx.y * rows_per_part,
          end = row + rows_per_part < images ? row + rows_per_part : images;
  float m[PER_LANE], sum[PER_LANE] = {}, dot[PER_LANE] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int64_t c = first + column_of<T, PACKED>(i, lane, 32);
    m[i] = c < cols ? mean[c / positions] : 0.0f;
  }
#pragma unroll 2
  for (row += warp; row < end; row += WARPS) {
    Part<T, PER_LANE> d, v;
    d.template load<PACKED>(d_out + row * cols + first, cols - first, lane, 32);
    v.template load<PACKED>(x + row * cols + first, cols - first, lane, 32);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      sum[i] += d.at(i);
      dot[i] += d.at(i) * (v.at(i) - m[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = column_of<T, PACKED>(i, lane, 32);
    sums[0][warp][c] = sum[i], sums[1][warp][c] = dot[i];
  }
  __syncthreads();
  int c = threadIdx.x;
  if (c >= cols - first) return;
  float total = 0, total_dot = 0;
  for (int w = 0; w < WARPS; w++) total += sums[0][w][c], total_dot += sums[1][w][c];
  int64_t to = blockIdx.y * cols + first + c;
  partials[to] = total, partials[gridDim.y * cols + to] = total_dot;
}

template <class T>
DEV void grad_columns(float* partials, const T* d_out, const T* x, const float* mean, int64_t images, int64_t cols,
                      int positions, int64_t rows_per_part) {
  if (cols % Pack<T>::N == 0 && aligned16(x) && aligned16(d_out))
    grad_tile<T, true>(partials, d_out, x, mean, images, cols, positions, rows_per_part);
  else grad_tile<T, false>(partials, d_out, x, mean, images, cols, positions, rows_per_part);
}

// One warp a channel. d_x = scale d_out + slope (x - mean) + offset, with slopes (3, C): scale, slope, offset of every
// channel.
template <class T>
DEV void grad_finish(float* d_weight, float* d_bias, float* slopes, const float* partials, const T* weight,
                     const float* rstd, int parts, int channels, int width, double count, int accumulator_weight,
                     int accumulator_bias, const Now* now) {
  int channel = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (channel >= channels) return;
  int64_t cols = (int64_t)channels * width, step = parts * cols;
  float sum = 0, dot = 0;
#pragma unroll 4
  for (int i = lane; i < parts * width; i += 32) {
    const float* at = partials + i / width * cols + (int64_t)channel * width + i % width;
    sum += at[0], dot += at[step];
  }
  sum = warp_sum(sum);
  dot = warp_sum(dot) * rstd[channel];
  if (lane > 0) return;
  d_weight[channel] = adds_to(accumulator_weight, now) ? d_weight[channel] + dot : dot;
  d_bias[channel] = adds_to(accumulator_bias, now) ? d_bias[channel] + sum : sum;
  float scale = rstd[channel] * to_float(weight[channel]), per_value = count > 0 ? (float)(1 / count) : 0.0f;
  slopes[channel] = scale;
  slopes[channels + channel] = -scale * rstd[channel] * dot * per_value;
  slopes[2 * (int64_t)channels + channel] = -scale * sum * per_value;
}

template <class T>
DEV void grad_input(T* d_x, const T* d_out, const T* x, const float* mean, const float* slopes, int64_t elems,
                    int channels, int positions) {
  constexpr int N = Pack<T>::N;
  float m, scale, slope, offset;
  auto at_channel = [&](int c) {
    m = mean[c], scale = slopes[c], slope = slopes[channels + c], offset = slopes[2 * (int64_t)channels + c];
  };
  each_element<N>(elems, aligned16(d_x) && aligned16(d_out) && aligned16(x), [&](int64_t e) {
    Pack<T> d = load_pack(d_out + e), v = load_pack(x + e);
    Walk at(e, channels, positions);
    at_channel(at.channel);
#pragma unroll
    for (int j = 0; j < N; j++) {
      d.x[j] = from_float<T>(scale * to_float(d.x[j]) + (slope * (to_float(v.x[j]) - m) + offset));
      if (at.step(channels, positions)) at_channel(at.channel);
    }
    store_pack(d_x + e, d);
  }, [&](int64_t e) {
    at_channel(Walk(e, channels, positions).channel);
    d_x[e] = from_float<T>(scale * to_float(d_out[e]) + (slope * (to_float(x[e]) - m) + offset));
  });
}

// The entry points for element type T.
#define BATCHNORM_GRAD_ENTRIES(T)                                                                                      \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(3)) void batchnorm_grad_planes_##T(                      \
      float* partials, const T* d_out, const T* x, const float* mean, int64_t images, int channels, int positions,     \
      int64_t pieces_per_part) {                                                                                       \
    grad_planes(partials, d_out, x, mean, images, channels, positions, pieces_per_part);                               \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_grad_planes_##T)                                                                                \
  extern "C" __global__ __launch_bounds__(THREADS) void batchnorm_grad_columns_##T(                                    \
      float* partials, const T* d_out, const T* x, const float* mean, int64_t images, int64_t cols, int positions,     \
      int64_t rows_per_part) {                                                                                         \
    grad_columns(partials, d_out, x, mean, images, cols, positions, rows_per_part);                                    \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_grad_columns_##T)                                                                               \
  extern "C" __global__ __launch_bounds__(THREADS) void batchnorm_grad_finish_##T(                                     \
      float* d_weight, float* d_bias, float* slopes, const float* partials, const T* weight, const float* rstd,        \
      int parts, int channels, int width, double count, int accumulator_weight, int accumulator_bias,                  \
      const Now* now) {                                                                                                \
    grad_finish(d_weight, d_bias, slopes, partials, weight, rstd, parts, channels, width, count, accumulator_weight,   \
                accumulator_bias, now);                                                                                \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_grad_finish_##T)                                                                                \
  extern "C" __global__ __launch_bounds__(THREADS) void batchnorm_grad_input_##T(                                      \
      T* d_x, const T* d_out, const T* x, const float* mean, const float* slopes, int64_t elems, int channels,         \
      int positions) {                                                                                                 \
    grad_input(d_x, d_out, x, mean, slopes, elems, channels, positions);                                               \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_grad_input_##T)

using f32 = float;
BATCHNORM_GRAD_ENTRIES(f32)
BATCHNORM_GRAD_ENTRIES(bf16)
