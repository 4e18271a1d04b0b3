// Layer normalization over the last axis (Ba, Kiros & Hinton 2016, arXiv:1607.06450) and the same without a mean and a
// bias, by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; its epsilon is 0). The gradient is
// norm_grad.cu's.
//   x, out (rows, cols), weight, bias (cols), all f32 or all bf16; mean, rstd (rows) f32, kept for the gradient.
//   layernorm: n = (x - mean) rstd, out = n weight + bias, rstd = 1/sqrt(var + epsilon);
//   rmsnorm:   n = x rstd,          out = n weight,        rstd = 1/sqrt(mean(x^2) + epsilon).
// Overwrites out, mean, rstd. Orders are fixed: the same bits everywhere.
// A warp takes two rows of up to 4 packs a lane (1024 columns of bf16, 512 of f32), or one (long) of 5 to 8: 37 to 98
// KB of rows of a multiprocessor are on their way or in work at 768 columns and more. What a row takes from its first
// load to its last store, some 3 us, asks for 40. Beyond (wide) one block has a row, 64 bytes a thread, 64 KB of rows a
// multiprocessor; rows beyond that are read three times. Rows that do not fit 16-byte accesses go the wide way.
// Bytes: x and out, once. About 16 instructions an element of bf16: half of what the issue slots give at the copy rate.
// Expected: 92 % of the copy rate, less 3 us.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int FORWARD_WARPS = 4;
constexpr int FORWARD_THREADS = 512;  // at most, where a block takes a row, 4 packs each: 64 registers
constexpr int SINGLE = 8;             // columns a thread where 16-byte accesses do not fit

// Sums over a pack, of its values and of their squared distances from `m`; by halves, so that no addition waits for all
// before it.
template <class T, class F> DEV float sum_over(const uint4& pack, F f) {
  float sum[Pack<T>::N];
#pragma unroll
  for (int i = 0; i < Pack<T>::N; i++) sum[i] = f(of_pack<T>(pack, i));
#pragma unroll
  for (int half = Pack<T>::N / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}
template <class T> DEV float sum_pack(const uint4& pack) { return sum_over<T>(pack, [](float x) { return x; }); }
template <class T> DEV float sum_squares(const uint4& pack, float m) {
  return sum_over<T>(pack, [=](float x) { return (x - m) * (x - m); });
}

// R rows by one warp, P packs of each a lane, of which only the last may lie past the end. A second pass over the
// registers takes the variance, since the mean of squares less the square of the mean loses all digits where the mean
// is large.
template <class T, bool CENTERED, int P, int R>
DEV void normalize_rows(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows,
                        int cols, float epsilon) {
  constexpr int N = Pack<T>::N;
  int lane = threadIdx.x % 32;
  int64_t first = ((int64_t)blockIdx.x * FORWARD_WARPS + threadIdx.x / 32) * R;
  if (first >= rows) return;
  bool last = ((P - 1) * 32 + lane) * N < cols;
  float per_col = cols > 0 ? 1.0f / cols : 0.0f, m[R] = {}, s[R] = {};
  Part<T, P * N> v[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    // A row past the last is the one before it once more, and is not stored.
    const T* row = x + (first + r < rows ? first + r : first) * cols + lane * N;
#pragma unroll
    for (int p = 0; p < P; p++) v[r].packs[p] = p < P - 1 || last ? load16(row + p * 32 * N) : make_uint4(0, 0, 0, 0);
  }
  if (CENTERED) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int p = 0; p < P; p++) m[r] += sum_pack<T>(v[r].packs[p]);
    warp_sums(m);
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    m[r] *= per_col;
    v[r].forget_floats();
#pragma unroll
    for (int p = 0; p < P; p++)
      if (p < P - 1 || last) s[r] += sum_squares<T>(v[r].packs[p], m[r]);
  }
  warp_sums(s);
#pragma unroll
  for (int r = 0; r < R; r++) s[r] = 1 / sqrtf(s[r] * per_col + epsilon), v[r].forget_floats();
#pragma unroll
  for (int p = 0; p < P; p++) {
    if (p == P - 1 && !last) break;
    int at = (p * 32 + lane) * N;
    uint4 w = load16(weight + at), b = {};
    if (CENTERED) b = load16(bias + at);
#pragma unroll
    for (int r = 0; r < R; r++) {
      float y[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        y[j] = (v[r].at(p * N + j) - m[r]) * s[r] * of_pack<T>(w, j);
        if (CENTERED) y[j] += of_pack<T>(b, j);
      }
      if (first + r < rows) store16(out + (first + r) * cols + at, to_pack<T>(y));
    }
  }
  if (lane > 0) return;
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (first + r >= rows) return;
    if (CENTERED) mean[first + r] = m[r];
    rstd[first + r] = s[r];
  }
}

// By as many packs a lane as the columns take: 1 to 4, or, LONG, 5 to 8.
template <class T, bool CENTERED, bool LONG>
DEV void forward(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows, int cols,
                 float epsilon) {
  int packs = (cols + 32 * Pack<T>::N - 1) / (32 * Pack<T>::N);
  if (LONG) {
    if (packs == 5) normalize_rows<T, CENTERED, 5, 1>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else if (packs == 6) normalize_rows<T, CENTERED, 6, 1>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else if (packs == 7) normalize_rows<T, CENTERED, 7, 1>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else normalize_rows<T, CENTERED, 8, 1>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
  } else {
    if (packs <= 1) normalize_rows<T, CENTERED, 1, 2>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else if (packs == 2) normalize_rows<T, CENTERED, 2, 2>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else if (packs == 3) normalize_rows<T, CENTERED, 3, 2>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
    else normalize_rows<T, CENTERED, 4, 2>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);
  }
}

// One row by a block.
template <class T, bool CENTERED, bool PACKED, int C>
DEV void normalize_wide(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols,
                        float epsilon) {
  GPU_SHARED(float, warps, [2][32]);
  constexpr int N = Pack<T>::N;
  int thread = threadIdx.x, threads = blockDim.x;
  int64_t row = blockIdx.x;
  out += row * cols, x += row * cols;
  float per_col = cols > 0 ? 1.0f / cols : 0.0f, m = 0, squares = 0;
  int64_t step = (int64_t)C * threads, c = 0;
  bool again = cols > step;   // the row does not fit into the registers
  Part<T, C> v;
  if (CENTERED) {
    float sum = 0;
    do {
      v.template load<PACKED>(x + c, (int)(cols - c), thread, threads);
#pragma unroll
      for (int p = 0; p < C / N; p++) sum += sum_pack<T>(v.packs[p]);
    } while ((c += step) < cols);
    m = block_sum(sum, warps[0]) * per_col;
  }
  c = 0;
  do {
    int here = (int)(cols - c);
    if (!CENTERED || again) v.template load<PACKED>(x + c, here, thread, threads);
    else v.forget_floats();
#pragma unroll
    for (int p = 0; p < C / N; p++) {
      if constexpr (PACKED) {
        if (column_of<T, true>(p * N, thread, threads) < here) squares += sum_squares<T>(v.packs[p], m);
      } else {
#pragma unroll
        for (int i = p * N; i < (p + 1) * N; i++) {
          float d = column_of<T, false>(i, thread, threads) < here ? v.at(i) - m : 0.0f;
          squares += d * d;
        }
      }
    }
  } while ((c += step) < cols);
  float s = 1 / sqrtf(block_sum(squares, warps[1]) * per_col + epsilon);
  c = 0;
  do {
    int here = (int)(cols - c);
    if (again) v.template load<PACKED>(x + c, here, thread, threads);
    else v.forget_floats();
#pragma unroll
    for (int p = 0; p < C / N; p++) {
      uint4 w = load_words<PACKED>(weight + c, p, here, thread, threads), b = {};
      if (CENTERED) b = load_words<PACKED>(bias + c, p, here, thread, threads);
      float y[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        y[j] = (v.at(p * N + j) - m) * s * of_pack<T>(w, j);
        if (CENTERED) y[j] += of_pack<T>(b, j);
      }
      store_words<PACKED>(out + c, y, p, here, thread, threads);
    }
  } while ((c += step) < cols);
  if (thread > 0) return;
  if (CENTERED) mean[row] = m;
  rstd[row] = s;
}

template <class T, bool CENTERED>
DEV void forward_wide(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols,
                      float epsilon, int packed) {
  if (packed) normalize_wide<T, CENTERED, true, 4 * Pack<T>::N>(out, mean, rstd, x, weight, bias, cols, epsilon);
  else normalize_wide<T, CENTERED, false, SINGLE>(out, mean, rstd, x, weight, bias, cols, epsilon);
}

// The entry points for element type T. rmsnorm's have the same arguments less mean and bias.
#define NORM_ENTRIES(T)                                                                                                \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, GPU_BLOCKS(6)) void layernorm_forward_##T(               \
      T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows, int cols,            \
      float epsilon) {                                                                                                 \
    forward<T, true, false>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);                                    \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_forward_##T)                                                                                    \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, GPU_BLOCKS(4)) void layernorm_forward_long_##T(          \
      T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int64_t rows, int cols,            \
      float epsilon) {                                                                                                 \
    forward<T, true, true>(out, mean, rstd, x, weight, bias, rows, cols, epsilon);                                     \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_forward_long_##T)                                                                               \
  extern "C" __global__ __launch_bounds__(FORWARD_THREADS, GPU_BLOCKS(2)) void layernorm_forward_wide_##T(             \
      T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, int cols, float epsilon,           \
      int packed) {                                                                                                    \
    forward_wide<T, true>(out, mean, rstd, x, weight, bias, cols, epsilon, packed);                                    \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_forward_wide_##T)                                                                               \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, GPU_BLOCKS(6)) void rmsnorm_forward_##T(                 \
      T* out, float* rstd, const T* x, const T* weight, int64_t rows, int cols, float epsilon) {                       \
    forward<T, false, false>(out, nullptr, rstd, x, weight, nullptr, rows, cols, epsilon);                             \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_forward_##T)                                                                                      \
  extern "C" __global__ __launch_bounds__(FORWARD_WARPS * 32, GPU_BLOCKS(4)) void rmsnorm_forward_long_##T(            \
      T* out, float* rstd, const T* x, const T* weight, int64_t rows, int cols, float epsilon) {                       \
    forward<T, false, true>(out, nullptr, rstd, x, weight, nullptr, rows, cols, epsilon);                              \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_forward_long_##T)                                                                                 \
  extern "C" __global__ __launch_bounds__(FORWARD_THREADS, GPU_BLOCKS(2)) void rmsnorm_forward_wide_##T(               \
      T* out, float* rstd, const T* x, const T* weight, int cols, float epsilon, int packed) {                         \
    forward_wide<T, false>(out, nullptr, rstd, x, weight, nullptr, cols, epsilon, packed);                             \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_forward_wide_##T)

using f32 = float;
NORM_ENTRIES(f32)
NORM_ENTRIES(bf16)
