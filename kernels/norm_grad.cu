// The gradient of layernorm and rmsnorm, norm.cu's.
//   d_out, x, d_x (rows, cols), weight (cols), all f32 or all bf16; mean, rstd (rows) f32.
//   With n = (x - mean) rstd, or x rstd, and g = d_out weight: d_x = rstd (g - mean(g) - n mean(g n)), means over the row, rmsnorm without mean(g);
//   d_weight = sum over rows of d_out n, d_bias of d_out.
// Overwrites d_x and partials (which, parts, cols) f32: d_weight's column sums, then d_bias's, one row for each part of rows_per_part rows.
// column_sum_finish adds them up. Orders are fixed and parts depend on the shape alone: the same bits everywhere.
// One warp a row up to 768 columns, beyond (wide) as many warps as it takes at 16 columns a thread; for rows that 512 threads do not hold a
// kernel before it leaves the two means in row_sums (rows, 2), and blocks divide the columns. A block stays with its part and adds up its
// column sums in registers. Its rows come by cp.async, into places of a ring that one thread alone fills and reads, so that no barrier
// comes with them: with 3 stages two rows of each warp are on their way while it works on a third, 98 KB a multiprocessor at
// 768 columns of bf16, 64 KB where rows are wide. Rows that do not fit 16-byte accesses go the wide way, without a ring.
// Bytes: d_out and x in, d_x out, once; 16 a column and part (8 for rmsnorm), 2 % at 16384 x 768, mostly in L2. About 18 instructions an
// element, half of what the issue slots give at the copy rate. Expected: 90 % of the copy rate, less 6 us for two launches.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int GRAD_WARPS = 8;
constexpr int GRAD_THREADS = 512;     // at most, where several warps take a row: 128 registers
constexpr int WIDE = 16;              // columns of each of them
constexpr int SINGLE = 8;             // and where 16-byte accesses do not fit

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

// A thread's packs of x and d_out for some rows ahead. A stage has the packs of one row, x's before d_out's.
template <class T, int P> struct Ring {
  uint4* own;     // the thread's first pack; the next is blockDim.x further on
  int stages, next, at;

  DEV Ring(uint4* shared, int stages) : own(shared + threadIdx.x), stages(stages), next(0), at(0) {}

  // Asks for a row, or for nothing where `here` is 0: a group in any case, so that groups count rows.
  DEV void ask(const T* x, const T* d_out, int64_t here, int thread, int threads) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      int c = (p * threads + thread) * Pack<T>::N, bytes = c < here ? 16 : 0;
      cp_async16_zfill(own + (next * 2 * P + p) * blockDim.x, bytes ? x + c : x, bytes);
      cp_async16_zfill(own + (next * 2 * P + P + p) * blockDim.x, bytes ? d_out + c : d_out, bytes);
    }
    cp_async_commit();
    next = next + 1 < stages ? next + 1 : 0;
  }
  // Until the row is there that was asked for stages - 1 rows ago.
  DEV const uint4* row() {
    if (stages == 3) cp_async_wait<2>();
    else if (stages == 2) cp_async_wait<1>();
    else cp_async_wait<0>();
    const uint4* row = own + at * 2 * P * blockDim.x;
    at = at + 1 < stages ? at + 1 : 0;
    return row;
  }
};

// The rows of part blockIdx.y, as many at once as the block has groups of `threads` threads: warps where ALONE, else any whole number of
// warps. All columns of them, or columns blockIdx.x * C * threads on where row_sums gives the means.
template <class T, bool CENTERED, bool PACKED, int C, bool ALONE>
DEV void grad_rows(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,
                   const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) {
  constexpr int N = Pack<T>::N, P = C / N;
  GPU_SHARED(float, rooms, [2][2][GRAD_THREADS / 32]);
  GPU_DYNAMIC(uint4, shared);
  int group = threadIdx.x / threads, thread = threadIdx.x % threads, groups = blockDim.x / threads;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = C * threads;
  int64_t first = ALONE ? 0 : (int64_t)blockIdx.x * width, here = cols - first;
  int64_t row = blockIdx.y * rows_per_part, end = row + rows_per_part < rows ? row + rows_per_part : rows;
  row += group;
  x += first, d_out += first, weight += first, d_x += first;
  float per_col = 1.0f / cols, d_weight[C] = {}, d_bias[C] = {};
  Ring<T, P> ring(shared, stages);
  auto ask = [&](int64_t row) {
    bool any = row < end;
    ring.ask(any ? x + row * cols : x, any ? d_out + row * cols : d_out, any ? here : 0, thread, threads);
  };
  if (PACKED)
    for (int ahead = 0; ahead < stages - 1; ahead++) ask(row + ahead * groups);
  float m = 0, s = 0, next_m = 0, next_s = 0;   // of this row and the next
  if (row < end) next_m = CENTERED ? mean[row] : 0.0f, next_s = rstd[row];
  for (int slot = 0; row < end; row += groups, slot ^= 1) {
    const uint4* packs = nullptr;
    if (PACKED) {
      ask(row + (stages - 1) * groups);
      packs = ring.row();
    }
    const T *x_row = x + row * cols, *d_row = d_out + row * cols, *weights = weight;
    auto x_pack = [&](int p) { return PACKED ? packs[p * blockDim.x] : load_words<false>(x_row, p, here, thread, threads); };
    auto d_pack = [&](int p) { return PACKED ? packs[(P + p) * blockDim.x] : load_words<false>(d_row, p, here, thread, threads); };
    m = next_m, s = next_s;
    if (row + groups < end) next_m = CENTERED ? mean[row + groups] : 0.0f, next_s = rstd[row + groups];
    float sums[2] = {};   // of g, of g n
    if (!ALONE && row_sums) {
      sums[0] = row_sums[row * 2], sums[1] = row_sums[row * 2 + 1];
    } else {
#pragma unroll
      for (int p = 0; p < P; p++) {
        uint4 v = x_pack(p), d = d_pack(p), w = load_words<PACKED>(weights, p, here, thread, threads);
#pragma unroll
        for (int j = 0; j < N; j++) {
          float g = __fmul_rn(of_pack<T>(d, j), of_pack<T>(w, j));
          if (CENTERED) sums[0] += g;
          sums[1] += g * (of_pack<T>(v, j) - m);
        }
      }
      warp_sums(sums);
      if (!ALONE) {
        // Two rooms in turn: one barrier a row keeps a fast warp from the room that a slow one still reads.
        float (&room)[2][GRAD_THREADS / 32] = rooms[slot];
        if (lane == 0) room[0][warp] = sums[0], room[1][warp] = sums[1];
        bar_sync(1 + group, threads);
        int from = group * (threads / 32);
        sums[0] = sums[1] = 0;
        for (int w = 0; w < threads / 32; w++) sums[0] += room[0][from + w], sums[1] += room[1][from + w];
      }
      sums[0] *= per_col, sums[1] *= s * per_col;
    }
    // The packs are read anew, since they would take the registers that the column sums need.
    forget(packs), forget(x_row), forget(d_row), forget(weights);
#pragma unroll
    for (int p = 0; p < P; p++) {
      uint4 v = x_pack(p), d = d_pack(p), w = load_words<PACKED>(weights, p, here, thread, threads);
      float y[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        float n = (of_pack<T>(v, j) - m) * s, g = of_pack<T>(d, j);
        d_weight[p * N + j] += g * n;
        if (CENTERED) d_bias[p * N + j] += g;
        // The product is rounded as it was for the mean: in a row of one column nothing is left of it.
        float apart = __fmul_rn(g, of_pack<T>(w, j));
        if (CENTERED) apart -= sums[0];
        y[j] = s * (apart - n * sums[1]);
      }
      store_words<PACKED>(d_x + row * cols, y, p, here, thread, threads);
    }
  }
  if (PACKED) cp_async_wait<0>();
  float* joined = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int which = 0; which < (CENTERED ? 2 : 1); which++) {
    float* to = partials + ((int64_t)which * gridDim.y + blockIdx.y) * cols + first;
    if (groups == 1) {
      store_floats<T, PACKED>(to, which == 0 ? d_weight : d_bias, here, thread, threads);
      continue;
    }
    __syncthreads();
    store_floats<T, PACKED>(joined + group * width, which == 0 ? d_weight : d_bias, here, thread, threads);
    __syncthreads();
    for (int c = threadIdx.x; c < width && c < here; c += blockDim.x) {
      float total = 0;
      for (int g = 0; g < groups; g++) total += joined[g * width + c];
      to[c] = total;
    }
  }
}

template <class T, bool CENTERED>
DEV void grad(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int64_t rows, int cols, int64_t rows_per_part, int stages) {
  if (cols <= 256) grad_rows<T, CENTERED, true, 8, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols, rows_per_part, 32, stages);
  else if (cols <= 512) grad_rows<T, CENTERED, true, 16, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols, rows_per_part, 32, stages);
  else grad_rows<T, CENTERED, true, 24, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols, rows_per_part, 32, stages);
}

// `stages` is 0 where 16-byte accesses do not fit.
template <class T, bool CENTERED>
DEV void grad_wide(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,
                   const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) {
  if (stages > 0) grad_rows<T, CENTERED, true, WIDE, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols, rows_per_part, threads, stages);
  else grad_rows<T, CENTERED, false, SINGLE, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols, rows_per_part, threads, stages);
}

// The entry points for element type T. rmsnorm's have the same arguments less mean.
#define NORM_GRAD_ENTRIES(T) \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, 2) void layernorm_grad_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int64_t rows, int cols, int64_t rows_per_part, int stages) { \
    grad<T, true>(d_x, partials, d_out, x, weight, mean, rstd, rows, cols, rows_per_part, stages); \
  } \
  GPU_EXPORT(layernorm_grad_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_wide_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) { \
    grad_wide<T, true>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols, rows_per_part, threads, stages); \
  } \
  GPU_EXPORT(layernorm_grad_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_sums_##T( \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int cols) { \
    grad_sums<T, true>(row_sums, d_out, x, weight, mean, rstd, cols); \
  } \
  GPU_EXPORT(layernorm_grad_sums_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, 2) void rmsnorm_grad_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, int64_t rows, int cols, int64_t rows_per_part, int stages) { \
    grad<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, rows, cols, rows_per_part, stages); \
  } \
  GPU_EXPORT(rmsnorm_grad_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_wide_##T( \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) { \
    grad_wide<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, row_sums, rows, cols, rows_per_part, threads, stages); \
  } \
  GPU_EXPORT(rmsnorm_grad_wide_##T) \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_sums_##T( \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* rstd, int cols) { \
    grad_sums<T, false>(row_sums, d_out, x, weight, nullptr, rstd, cols); \
  } \
  GPU_EXPORT(rmsnorm_grad_sums_##T)

using f32 = float;
NORM_GRAD_ENTRIES(f32)
NORM_GRAD_ENTRIES(bf16)
