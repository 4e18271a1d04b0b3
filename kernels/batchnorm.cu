// Batch normalization over images and positions (Ioffe & Szegedy 2015, arXiv:1502.03167), one mean and variance a
// channel.
//   x, out (N, C, HW) f32 or bf16, weight, bias (C) of the same type; mean, var, rstd, running_mean, running_var (C) f32.
//   n is N HW.
//   mean, var over the n values of a channel, var with divisor n; rstd = 1/sqrt(var + epsilon); out = (x - mean) rstd
//   weight + bias.
// Overwrites its outputs. Three steps, divided as gpu/batchnorm.cuh says: partial results (parts, C width); a kernel
// that joins a channel's parts * width of them, one warp a channel; an elementwise pass, with 4 packs, or rows, of a
// thread on their way.
// A variance is joined from counts, means and squares of differences from them (Chan, Golub & LeVeque 1983, eq. 1.5),
// so that a large mean does not swallow it; a thread takes a batch of values in two passes over registers. Parts depend
// on the shape alone, orders are fixed.
// Bytes: x twice, out once; beside them 12 a partial result. Expected: 95 % of the copy rate by these bytes for large
// planes or batches, which is 63 % by those of reading everything once.
#include "gpu.cuh"
#include "gpu/row.cuh"
#include "gpu/batchnorm.cuh"

constexpr int FLAT_PIECE = 4096;  // elements of a plane that a warp takes at a time in the elementwise pass

// Count, mean, and sum of squared differences from the mean.
struct Moments {
  float count, mean, m2;
  DEV void join(const Moments& o) {
    if (o.count == 0) return;
    float total = count + o.count, apart = o.mean - mean, share = o.count / total;
    mean += apart * share;
    m2 += o.m2 + apart * apart * count * share;
    count = total;
  }
};

DEV Moments join_warp(Moments m) {
  for (int apart = 16; apart > 0; apart /= 2)
    m.join(
        {__shfl_xor_sync(~0u, m.count, apart), __shfl_xor_sync(~0u, m.mean, apart), __shfl_xor_sync(~0u, m.m2, apart)});
  return m;
}

template <class T>
DEV void stats_planes(float* partials, const T* x, int64_t images, int channels, int positions,
                      int64_t pieces_per_part) {
  constexpr int N = Pack<T>::N;
  GPU_SHARED(float, warps, [3][WARPS]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Moments m = {};
  each_piece(images, channels, positions, pieces_per_part, [&](int64_t first, int len) {
    const T* row = x + first;
    Packs<T> at(row, len);
    for (int i = lane; i < at.head; i += 32) m.join({1, to_float(row[i]), 0});
    for (int i = at.tail + lane; i < len; i += 32) m.join({1, to_float(row[i]), 0});
    for (int p = lane; p < at.packs; p += AHEAD * 32) {
      Pack<T> v[AHEAD];
      int count = 0;
      float sum = 0, m2 = 0;
#pragma unroll
      for (int a = 0; a < AHEAD; a++)
        if (p + a * 32 < at.packs) v[a] = load_pack(row + at.head + (p + a * 32) * N), count += N;
#pragma unroll
      for (int a = 0; a < AHEAD; a++)
        if (p + a * 32 < at.packs)
#pragma unroll
          for (int j = 0; j < N; j++) sum += to_float(v[a].x[j]);
      float mean = sum / count;
#pragma unroll
      for (int a = 0; a < AHEAD; a++)
        if (p + a * 32 < at.packs)
#pragma unroll
          for (int j = 0; j < N; j++) {
            float d = to_float(v[a].x[j]) - mean;
            m2 += d * d;
          }
      m.join({(float)count, mean, m2});
    }
  });
  m = join_warp(m);
  if (lane == 0) warps[0][warp] = m.count, warps[1][warp] = m.mean, warps[2][warp] = m.m2;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < WARPS; w++) m.join({warps[0][w], warps[1][w], warps[2][w]});
  int64_t to = (int64_t)blockIdx.y * channels + blockIdx.x, step = (int64_t)gridDim.y * channels;
  partials[to] = m.count, partials[step + to] = m.mean, partials[2 * step + to] = m.m2;
}

template <class T, bool PACKED>
DEV void stats_tile(float* partials, const T* x, int64_t images, int64_t cols, int64_t rows_per_part) {
  GPU_SHARED(float, sums, [2][WARPS][TILE]);
  GPU_SHARED(float, counts, [WARPS]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = (int64_t)blockIdx.x * TILE, row = blockIdx.y * rows_per_part,
          end = row + rows_per_part < images ? row + rows_per_part : images;
  float count = 0, mean[PER_LANE] = {}, m2[PER_LANE] = {};
  for (row += warp; row < end; row += WARPS * AHEAD) {
    Part<T, PER_LANE> v[AHEAD];
    int rows = 0;
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (row + a * WARPS < end)
        v[a].template load<PACKED>(x + (row + a * WARPS) * cols + first, cols - first, lane, 32), rows++;
    float per_row = 1.0f / rows, share = rows / (count + rows), both = count * share;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int a = 0; a < AHEAD; a++) sum += a < rows ? v[a].at(i) : 0.0f;
      float here = sum * per_row, apart = here - mean[i];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        float d = a < rows ? v[a].at(i) - here : 0.0f;
        squares += d * d;
      }
      mean[i] += apart * share;
      m2[i] += squares + apart * apart * both;
    }
    count += rows;
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = column_of<T, PACKED>(i, lane, 32);
    sums[0][warp][c] = mean[i], sums[1][warp][c] = m2[i];
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int c = threadIdx.x;
  if (c >= cols - first) return;
  Moments m = {};
  for (int w = 0; w < WARPS; w++) m.join({counts[w], sums[0][w][c], sums[1][w][c]});
  int64_t to = blockIdx.y * cols + first + c, step = gridDim.y * cols;
  partials[to] = m.count, partials[step + to] = m.mean, partials[2 * step + to] = m.m2;
}

template <class T>
DEV void stats_columns(float* partials, const T* x, int64_t images, int64_t cols, int64_t rows_per_part) {
  if (cols % Pack<T>::N == 0 && aligned16(x)) stats_tile<T, true>(partials, x, images, cols, rows_per_part);
  else stats_tile<T, false>(partials, x, images, cols, rows_per_part);
}

// One warp a channel.
extern "C" __global__ __launch_bounds__(THREADS) void batchnorm_stats_finish(
    float* mean, float* rstd, float* var, const float* partials, int parts, int channels, int width, float epsilon) {
  int channel = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (channel >= channels) return;
  int64_t cols = (int64_t)channels * width, step = parts * cols;
  Moments m = {};
#pragma unroll 4
  for (int i = lane; i < parts * width; i += 32) {
    const float* at = partials + i / width * cols + (int64_t)channel * width + i % width;
    m.join({at[0], at[step], at[2 * step]});
  }
  m = join_warp(m);
  if (lane > 0) return;
  float v = m.count > 0 ? m.m2 / m.count : 0.0f;
  mean[channel] = m.mean, var[channel] = v, rstd[channel] = 1 / sqrtf(v + epsilon);
}
GPU_EXPORT(batchnorm_stats_finish)

// count values a channel; in f64, since the momentum is often small.
extern "C" __global__ __launch_bounds__(THREADS) void batchnorm_update_running(float* running_mean, float* running_var,
                                                                               const float* mean, const float* var,
                                                                               int channels, double unbiased,
                                                                               double momentum) {
  int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  running_mean[c] = (float)((1 - momentum) * running_mean[c] + momentum * mean[c]);
  running_var[c] = (float)((1 - momentum) * running_var[c] + momentum * (var[c] * unbiased));
}
GPU_EXPORT(batchnorm_update_running)

// `spread` is rstd, or a variance whose rstd is taken with epsilon where is_var.
template <class T> struct Scale {
  const float *mean, *spread;
  const T *weight, *bias;
  float epsilon;
  int is_var;
  float m, scale, offset;
  DEV void at(int c) {
    float rstd = is_var ? 1 / sqrtf(spread[c] + epsilon) : spread[c];
    m = mean[c], scale = rstd * to_float(weight[c]), offset = to_float(bias[c]);
  }
  DEV float of(float x) const { return (x - m) * scale + offset; }
};

// One warp a piece of a plane.
template <class T>
DEV void normalize_planes(T* out, const T* x, Scale<T> s, int64_t planes, int channels, int positions) {
  constexpr int N = Pack<T>::N;
  int pieces = (positions + FLAT_PIECE - 1) / FLAT_PIECE, len = piece_len(positions, pieces), lane = threadIdx.x % 32;
  int64_t number = planes * pieces - 1 - ((int64_t)blockIdx.x * WARPS + threadIdx.x / 32), plane = number / pieces;
  if (number < 0) return;
  int from = (int)(number - plane * pieces) * len, left = positions - from;
  if (left < len) len = left;
  s.at((int)(plane % channels));
  x += plane * positions + from, out += plane * positions + from;
  Packs<T> at(out, x, len);
  for (int i = lane; i < at.head; i += 32) out[i] = from_float<T>(s.of(to_float(x[i])));
  for (int i = at.tail + lane; i < len; i += 32) out[i] = from_float<T>(s.of(to_float(x[i])));
  x += at.head, out += at.head;
#pragma unroll 1
  for (int p = lane; p < at.packs; p += AHEAD * 32) {
    uint4 v[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (p + a * 32 < at.packs) v[a] = load16(x + (p + a * 32) * N);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      float y[N];
#pragma unroll
      for (int j = 0; j < N; j++) y[j] = s.of(of_pack<T>(v[a], j));
      if (p + a * 32 < at.packs) store16(out + (p + a * 32) * N, to_pack<T>(y));
    }
  }
}

// The block's columns and rows of x as a matrix (N, C HW), as stats_tile has them.
template <class T, bool PACKED>
DEV void normalize_tile(T* out, const T* x, Scale<T> s, int64_t images, int64_t cols, int positions,
                        int64_t rows_per_part) {
  constexpr int N = Pack<T>::N, ROWS = AHEAD * 2 / sizeof(T);   // rows of a lane on their way: 64 bytes
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = (int64_t)(gridDim.x - 1 - blockIdx.x) * TILE, row = (gridDim.y - 1 - blockIdx.y) * rows_per_part;
  int64_t end = row + rows_per_part < images ? row + rows_per_part : images;
  float m[PER_LANE] = {}, scale[PER_LANE] = {}, offset[PER_LANE] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int64_t c = first + column_of<T, PACKED>(i, lane, 32);
    if (c < cols) s.at((int)(c / positions)), m[i] = s.m, scale[i] = s.scale, offset[i] = s.offset;
  }
  x += first, out += first;
#pragma unroll 1
  for (row += warp; row < end; row += WARPS * ROWS) {
    Part<T, PER_LANE> v[ROWS];
#pragma unroll
    for (int a = 0; a < ROWS; a++)
      if (row + a * WARPS < end) v[a].template load<PACKED>(x + (row + a * WARPS) * cols, cols - first, lane, 32);
#pragma unroll
    for (int a = 0; a < ROWS; a++) {
      if (row + a * WARPS >= end) break;
#pragma unroll
      for (int p = 0; p < PER_LANE / N; p++) {
        float y[N];
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = (v[a].at(p * N + j) - m[p * N + j]) * scale[p * N + j] + offset[p * N + j];
        store_words<PACKED>(out + (row + a * WARPS) * cols, y, p, cols - first, lane, 32);
      }
    }
  }
}

template <class T>
DEV void normalize_columns(T* out, const T* x, Scale<T> s, int64_t images, int64_t cols, int positions,
                           int64_t rows_per_part) {
  if (cols % Pack<T>::N == 0 && aligned16(out) && aligned16(x))
    normalize_tile<T, true>(out, x, s, images, cols, positions, rows_per_part);
  else normalize_tile<T, false>(out, x, s, images, cols, positions, rows_per_part);
}

// The entry points for element type T.
#define BATCHNORM_ENTRIES(T)                                                                                           \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(3)) void batchnorm_stats_planes_##T(                     \
      float* partials, const T* x, int64_t images, int channels, int positions, int64_t pieces_per_part) {             \
    stats_planes(partials, x, images, channels, positions, pieces_per_part);                                           \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_stats_planes_##T)                                                                               \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(3)) void batchnorm_stats_columns_##T(                    \
      float* partials, const T* x, int64_t images, int64_t cols, int64_t rows_per_part) {                              \
    stats_columns(partials, x, images, cols, rows_per_part);                                                           \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_stats_columns_##T)                                                                              \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(6)) void batchnorm_normalize_planes_##T(                 \
      T* out, const T* x, const T* weight, const T* bias, const float* mean, const float* spread, int64_t planes,      \
      int channels, int positions, float epsilon, int is_var) {                                                        \
    normalize_planes(out, x, Scale<T>{mean, spread, weight, bias, epsilon, is_var, 0, 0, 0}, planes, channels,         \
                     positions);                                                                                       \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_normalize_planes_##T)                                                                           \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(3)) void batchnorm_normalize_columns_##T(                \
      T* out, const T* x, const T* weight, const T* bias, const float* mean, const float* spread, int64_t images,      \
      int64_t cols, int positions, int64_t rows_per_part, float epsilon, int is_var) {                                 \
    normalize_columns(out, x, Scale<T>{mean, spread, weight, bias, epsilon, is_var, 0, 0, 0}, images, cols, positions, \
                      rows_per_part);                                                                                  \
  }                                                                                                                    \
  GPU_EXPORT(batchnorm_normalize_columns_##T)

using f32 = float;
BATCHNORM_ENTRIES(f32)
BATCHNORM_ENTRIES(bf16)
