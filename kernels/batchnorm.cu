// Batch normalization over images and positions (Ioffe & Szegedy 2015, arXiv:1502.03167), one mean and variance a
// channel.
//   x, out, d_out, d_x (N, C, HW) f32 or bf16, weight, bias (C) of the same type; mean, var, rstd, running_mean,
//   running_var, d_weight, d_bias (C) f32. n is N HW.
//   mean, var over the n values of a channel, var with divisor n; rstd = 1/sqrt(var + epsilon); out = (x - mean) rstd
//   weight + bias.
//   d_bias = sum of d_out, d_weight = sum of d_out (x - mean) rstd; d_x = rstd weight (d_out - d_bias/n - (x - mean)
//   rstd d_weight/n).
// Overwrites its outputs; d_weight and d_bias are added to where they are accumulators and Now::accumulate is set.
// Three steps: partial results (parts, C width); a kernel that joins a channel's parts * width of them, one warp a
// channel; an elementwise pass. Partial results come in two ways. Where a plane is large, width is 1: one block a
// channel and part, one warp at a time on a piece of a plane. Else width is HW: x is a matrix (N, C HW), 256 columns a
// block, one warp a row, 8 columns a lane. The elementwise pass goes from the end to the beginning, since L2 still has
// what was read last; forward it is divided in the same two ways, with 4 packs, or rows, of a thread on their way, back
// a thread has a pack.
// A variance is joined from counts, means and squares of differences from them (Chan, Golub & LeVeque 1983, eq. 1.5),
// so that a large mean does not swallow it; a thread takes a batch of values in two passes over registers. Parts depend
// on the shape alone, orders are fixed.
// Bytes: forward reads x twice and writes out; the gradient reads d_out and x twice and writes d_x; beside them 12 and
// 8 a partial result. Expected: 95 % of the copy rate by these bytes for large planes or batches, which is 63 % and 58
// % by those of reading everything once.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int WARPS = 8;
constexpr int TILE = 256;        // columns a block; graph::COLUMN_TILE
constexpr int PIECE = 8192;      // elements of a plane that a warp takes at a time; graph::PLANE_PIECE
constexpr int FLAT_PIECE = 4096; // and in the elementwise pass forward
constexpr int AHEAD = 4;         // packs, or rows, that a thread has on their way at once
constexpr int PER_LANE = TILE / 32;
constexpr int THREADS = WARPS * 32;

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

// Elements of each of so many pieces of a plane: even, and their first elements at the same place in a 16-byte word.
DEV int piece_len(int positions, int pieces) { return ((positions + pieces - 1) / pieces + 7) / 8 * 8; }

// The part of channel blockIdx.x that blockIdx.y has, piece by piece: calls `piece(first element, elements)`, one warp
// a piece.
template <class F> DEV void each_piece(int64_t images, int channels, int positions, int64_t pieces_per_part, F piece) {
  int pieces = (positions + PIECE - 1) / PIECE, len = piece_len(positions, pieces);
  int64_t begin = blockIdx.y * pieces_per_part, end = begin + pieces_per_part;
  if (end > images * pieces) end = images * pieces;
  for (int64_t at = begin + threadIdx.x / 32; at < end; at += WARPS) {
    int64_t image = at / pieces;
    int from = (int)(at % pieces) * len, left = positions - from;
    if (left > 0) piece((image * channels + blockIdx.x) * positions + from, left < len ? left : len);
  }
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
  GPU_EXPORT(batchnorm_normalize_columns_##T)                                                                          \
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
BATCHNORM_ENTRIES(f32)
BATCHNORM_ENTRIES(bf16)
