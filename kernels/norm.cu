// Layer normalization over the last axis (Ba, Kiros & Hinton 2016, arXiv:1607.06450) and the same without a mean and a bias, by the root mean
// square (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; its epsilon is 0).
//   x, out, d_out, d_x (rows, cols), weight, bias (cols), all f32 or all bf16; mean, rstd (rows) f32, kept for the gradient.
//   layernorm: n = (x - mean) rstd, out = n weight + bias, rstd = 1/sqrt(var + epsilon);
//   rmsnorm:   n = x rstd,          out = n weight,        rstd = 1/sqrt(mean(x^2) + epsilon).
//   With g = d_out weight: d_x = rstd (g - mean(g) - n mean(g n)), means over the row, rmsnorm without mean(g);
//   d_weight = sum over rows of d_out n, d_bias of d_out.
// Overwrites out, mean, rstd, d_x and partials (which, parts, cols) f32: d_weight's column sums, then d_bias's, one row for each part of
// rows_per_part rows. column_sum_finish adds them up. Orders are fixed and parts depend on the shape alone: the same bits everywhere.
// Forward: one warp a row up to 1024 columns, beyond (wide) one block a row, 64 bytes a thread; rows beyond that are read three times.
// Gradient: one warp a row up to 768 columns, beyond (wide) as many warps as it takes at 2 packs a thread; for rows beyond that a kernel
// before it leaves the two means in row_sums (rows, 2), and blocks divide the columns. Rows that do not fit 16-byte accesses go the wide way.
// Bytes: forward reads x and writes out, once; the gradient reads d_out and x and writes d_x, once, plus 16 a column and part (8 for
// rmsnorm), 2 % at 16384 x 768. Expected: 92 % of the copy rate forward, 85 % for the gradient.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int FORWARD_WARPS = 4;
constexpr int FORWARD_THREADS = 640;  // at most, where a block takes a row, 4 packs each: 96 registers
constexpr int GRAD_WARPS = 8;
constexpr int GRAD_NARROW = 768;      // columns up to which a warp takes a row of the gradient: 24 a lane, each with two sums to keep
constexpr int GRAD_THREADS = 512;     // at most, where several warps take a row, 2 packs each: 128 registers
constexpr int SINGLE = 8;             // columns a thread where 16-byte accesses do not fit
constexpr int ROOMS = 128;            // floats that warps leave for each other in a sum over a row

template <bool WIDE> DEV float row_sum(float x, float* warps) { return WIDE ? block_sum(x, warps) : warp_sum(x); }

// One row by `threads` threads: a warp, or a block where WIDE. A second pass takes the variance, since the mean of squares less the square
// of the mean loses all digits where the mean is large.
template <class T, bool CENTERED, bool PACKED, int C, bool WIDE>
DEV void normalize_row(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols, float epsilon, int thread, int threads) {
  GPU_SHARED(float, warps, [2][32]);
  constexpr int N = Pack<T>::N;
  float per_col = cols > 0 ? 1.0f / cols : 0.0f, m = 0, squares = 0;
  int64_t step = (int64_t)C * threads, c = 0;
  bool again = WIDE && cols > step;   // the row does not fit into the registers
  Part<T, C> v;
  if (CENTERED) {
    float sum = 0;
    do {
      v.template load<PACKED>(x + c, cols - c, thread, threads);
#pragma unroll
      for (int i = 0; i < C; i++) sum += v.at(i);
    } while (WIDE && (c += step) < cols);
    m = row_sum<WIDE>(sum, warps[0]) * per_col;
  }
  c = 0;
  do {
    if (!CENTERED || again) v.template load<PACKED>(x + c, cols - c, thread, threads);
#pragma unroll
    for (int i = 0; i < C; i++) {
      float d = column_of<T, PACKED>(i, thread, threads) < cols - c ? v.at(i) - m : 0.0f;
      squares += d * d;
    }
  } while (WIDE && (c += step) < cols);
  float s = 1 / sqrtf(row_sum<WIDE>(squares, warps[1]) * per_col + epsilon);
  c = 0;
  do {
    if (again) v.template load<PACKED>(x + c, cols - c, thread, threads);
    else v.forget_floats();
#pragma unroll
    for (int p = 0; p < C / N; p++) {
      Pack<T> w = load_part<PACKED>(weight + c, p, cols - c, thread, threads), b = {}, y;
      if (CENTERED) b = load_part<PACKED>(bias + c, p, cols - c, thread, threads);
#pragma unroll
      for (int j = 0; j < N; j++) {
        float n = (v.at(p * N + j) - m) * s * to_float(w.x[j]);
        y.x[j] = from_float<T>(CENTERED ? n + to_float(b.x[j]) : n);
      }
      store_part<PACKED>(out + c, y, p, cols - c, thread, threads);
    }
  } while (WIDE && (c += step) < cols);
  if (thread == 0) {
    if (CENTERED) *mean = m;
    *rstd = s;
  }
}

template <class T, bool CENTERED>
DEV void forward(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows, int cols, float epsilon) {
  int64_t row = (int64_t)blockIdx.x * FORWARD_WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  int lane = threadIdx.x % 32;
  out += row * cols, x += row * cols, mean += CENTERED ? row : 0, rstd += row;
  if (cols <= 256) normalize_row<T, CENTERED, true, 8, false>(out, mean, rstd, x, weight, bias, cols, epsilon, lane, 32);
  else if (cols <= 512) normalize_row<T, CENTERED, true, 16, false>(out, mean, rstd, x, weight, bias, cols, epsilon, lane, 32);
  else if (cols <= 768) normalize_row<T, CENTERED, true, 24, false>(out, mean, rstd, x, weight, bias, cols, epsilon, lane, 32);
  else normalize_row<T, CENTERED, true, 32, false>(out, mean, rstd, x, weight, bias, cols, epsilon, lane, 32);
}

template <class T, bool CENTERED>
DEV void forward_wide(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols, float epsilon, int packed) {
  int64_t row = blockIdx.x;
  out += row * cols, x += row * cols, mean += CENTERED ? row : 0, rstd += row;
  if (packed) normalize_row<T, CENTERED, true, 4 * Pack<T>::N, true>(out, mean, rstd, x, weight, bias, cols, epsilon, threadIdx.x, blockDim.x);
  else normalize_row<T, CENTERED, false, SINGLE, true>(out, mean, rstd, x, weight, bias, cols, epsilon, threadIdx.x, blockDim.x);
}

// Mean of g and of g n over one row, by one block: row_sums (rows, 2).
template <class T, bool CENTERED>
DEV void grad_sums(float* row_sums, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int cols) {
  GPU_SHARED(float, warps, [2][32]);
  int64_t row = blockIdx.x;
  d_out += row * cols, x += row * cols;
  float m = CENTERED ? mean[row] : 0.0f, s = rstd[row], sum_g = 0, sum_gn = 0;
#pragma unroll 8
  for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) {
    float g = to_float(d_out[c]) * to_float(weight[c]);
    sum_g += g;
    sum_gn += g * (to_float(x[c]) - m);
  }
  sum_g = block_sum(sum_g, warps[0]);
  sum_gn = block_sum(sum_gn, warps[1]);
  if (threadIdx.x == 0) {
    row_sums[row * 2] = CENTERED ? sum_g / cols : 0.0f;
    row_sums[row * 2 + 1] = sum_gn * s / cols;
  }
}

// The rows of part blockIdx.y, as many at once as the block has groups of `threads` threads: warps where ALONE, else any whole number of
// warps. All columns of them, or columns blockIdx.x * C * threads on where row_sums gives the means.
template <class T, bool CENTERED, bool PACKED, int C, bool ALONE>
DEV void grad_rows(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,
                   const float* row_sums, float* shared, int64_t rows, int cols, int64_t rows_per_part, int threads) {
  constexpr int N = Pack<T>::N;
  int group = threadIdx.x / threads, thread = threadIdx.x % threads, groups = blockDim.x / threads;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = C * threads;
  int64_t first = ALONE ? 0 : (int64_t)blockIdx.x * width, here = cols - first;
  int64_t begin = blockIdx.y * rows_per_part, end = begin + rows_per_part < rows ? begin + rows_per_part : rows;
  float per_col = 1.0f / cols, d_weight[C] = {}, d_bias[C] = {};
  int slot = 0;
  for (int64_t row = begin + group; row < end; row += groups, slot ^= 1) {
    int64_t at = row * cols + first;
    Part<T, C> v, d;
    v.template load<PACKED>(x + at, here, thread, threads);
    d.template load<PACKED>(d_out + at, here, thread, threads);
    float m = CENTERED ? mean[row] : 0.0f, s = rstd[row], mean_g = 0, mean_gn = 0;
    const T* weights = weight + first;
    if (!ALONE && row_sums) {
      mean_g = row_sums[row * 2], mean_gn = row_sums[row * 2 + 1];
    } else {
#pragma unroll
      for (int p = 0; p < C / N; p++) {
        Pack<T> w = load_part<PACKED>(weights, p, here, thread, threads);
#pragma unroll
        for (int j = 0; j < N; j++) {
          float g = d.at(p * N + j) * to_float(w.x[j]);
          mean_g += g;
          mean_gn += g * (v.at(p * N + j) - m);
        }
      }
      if (CENTERED) mean_g = warp_sum(mean_g);
      mean_gn = warp_sum(mean_gn);
      if (!ALONE) {
        // Two rooms in turn: one barrier a row keeps a fast warp from the room that a slow one still reads.
        float* room = shared + slot * 64;
        if (lane == 0) room[warp] = mean_g, room[32 + warp] = mean_gn;
        bar_sync(1 + group, threads);
        int from = group * (threads / 32);
        mean_g = mean_gn = 0;
        for (int w = 0; w < threads / 32; w++) mean_g += room[from + w], mean_gn += room[32 + from + w];
      }
      mean_g *= per_col, mean_gn *= s * per_col;
    }
    v.forget_floats(), d.forget_floats(), forget(weights);
    float from_g = CENTERED ? -s * mean_g : 0.0f, from_gn = -s * mean_gn;
#pragma unroll
    for (int p = 0; p < C / N; p++) {
      Pack<T> w = load_part<PACKED>(weights, p, here, thread, threads), y;
#pragma unroll
      for (int j = 0; j < N; j++) {
        int i = p * N + j;
        float n = (v.at(i) - m) * s, g = d.at(i);
        d_weight[i] += g * n;
        if (CENTERED) d_bias[i] += g;
        y.x[j] = from_float<T>(s * (g * to_float(w.x[j])) + (n * from_gn + from_g));
      }
      store_part<PACKED>(d_x + at, y, p, here, thread, threads);
    }
  }
  float* sums = shared + ROOMS;
#pragma unroll
  for (int which = 0; which < (CENTERED ? 2 : 1); which++) {
    float* to = partials + ((int64_t)which * gridDim.y + blockIdx.y) * cols + first;
    if (groups == 1) {
      store_floats<T, PACKED>(to, which == 0 ? d_weight : d_bias, here, thread, threads);
      continue;
    }
    __syncthreads();
    store_floats<T, PACKED>(sums + group * width, which == 0 ? d_weight : d_bias, here, thread, threads);
    __syncthreads();
    for (int c = threadIdx.x; c < width && c < here; c += blockDim.x) {
      float total = 0;
      for (int g = 0; g < groups; g++) total += sums[g * width + c];
      to[c] = total;
    }
  }
}

template <class T, bool CENTERED>
DEV void grad(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int64_t rows, int cols, int64_t rows_per_part) {
  GPU_SHARED(float, shared, [ROOMS + GRAD_WARPS * GRAD_NARROW]);
  if (cols <= 256) grad_rows<T, CENTERED, true, 8, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, shared, rows, cols, rows_per_part, 32);
  else if (cols <= 512) grad_rows<T, CENTERED, true, 16, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, shared, rows, cols, rows_per_part, 32);
  else grad_rows<T, CENTERED, true, 24, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, shared, rows, cols, rows_per_part, 32);
}

template <class T, bool CENTERED>
DEV void grad_wide(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,
                   const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int packed) {
  GPU_SHARED(float, shared, [ROOMS + 256 * 16]);
  if (packed) grad_rows<T, CENTERED, true, 2 * Pack<T>::N, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, shared, rows, cols, rows_per_part, threads);
  else grad_rows<T, CENTERED, false, SINGLE, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, shared, rows, cols, rows_per_part, threads);
}

// The entry points for element type T. rmsnorm's have the same arguments less mean and bias.
#define NORM_ENTRIES(T) \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, 7) void layernorm_forward_##T( \
      T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows, int cols, float epsilon) { \
    forward<T, true>(out, mean, rstd, x, weight, bias, rows, cols, epsilon); \
  } \
  GPU_EXPORT(layernorm_forward_##T) \
  extern "C" __global__ __launch_bounds__(FORWARD_THREADS) void layernorm_forward_wide_##T( \
      T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols, float epsilon, int packed) { \
    forward_wide<T, true>(out, mean, rstd, x, weight, bias, cols, epsilon, packed); \
  } \
  GPU_EXPORT(layernorm_forward_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, 4 / sizeof(T)) void layernorm_grad_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int64_t rows, int cols, int64_t rows_per_part) { \
    grad<T, true>(d_x, partials, d_out, x, weight, mean, rstd, rows, cols, rows_per_part); \
  } \
  GPU_EXPORT(layernorm_grad_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_wide_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int packed) { \
    grad_wide<T, true>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols, rows_per_part, threads, packed); \
  } \
  GPU_EXPORT(layernorm_grad_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_sums_##T( \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int cols) { \
    grad_sums<T, true>(row_sums, d_out, x, weight, mean, rstd, cols); \
  } \
  GPU_EXPORT(layernorm_grad_sums_##T) \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, 7) void rmsnorm_forward_##T( \
      T* out, float* rstd, const T* x, const T* weight, int64_t rows, int cols, float epsilon) { \
    forward<T, false>(out, nullptr, rstd, x, weight, nullptr, rows, cols, epsilon); \
  } \
  GPU_EXPORT(rmsnorm_forward_##T) \
  extern "C" __global__ __launch_bounds__(FORWARD_THREADS) void rmsnorm_forward_wide_##T( \
      T* out, float* rstd, const T* x, const T* weight, int cols, float epsilon, int packed) { \
    forward_wide<T, false>(out, nullptr, rstd, x, weight, nullptr, cols, epsilon, packed); \
  } \
  GPU_EXPORT(rmsnorm_forward_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, 4 / sizeof(T)) void rmsnorm_grad_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, int64_t rows, int cols, int64_t rows_per_part) { \
    grad<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, rows, cols, rows_per_part); \
  } \
  GPU_EXPORT(rmsnorm_grad_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_wide_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int packed) { \
    grad_wide<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, row_sums, rows, cols, rows_per_part, threads, packed); \
  } \
  GPU_EXPORT(rmsnorm_grad_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_sums_##T( \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* rstd, int cols) { \
    grad_sums<T, false>(row_sums, d_out, x, weight, nullptr, rstd, cols); \
  } \
  GPU_EXPORT(rmsnorm_grad_sums_##T)

using f32 = float;
NORM_ENTRIES(f32)
NORM_ENTRIES(bf16)
