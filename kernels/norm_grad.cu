// The gradient of layernorm and rmsnorm, norm.cu's.
//   d_out, x, d_x (rows, cols), weight (cols), all f32 or all bf16; mean, rstd (rows) f32.
//   With n = (x - mean) rstd, or x rstd, and g = d_out weight: d_x = rstd (g - mean(g) - n mean(g n)), means over the
//   row, rmsnorm without mean(g); d_weight = sum over rows of d_out n, d_bias of d_out.
// Overwrites d_x and partials (which, parts, cols) f32: d_weight's column sums, then d_bias's, one row for each part of
// rows_per_part rows. column_sum_finish adds them up. Orders are fixed and parts depend on the shape alone: the same
// bits everywhere.
// One warp a row up to 768 columns, beyond (wide) as many warps as it takes at 16 columns a thread; for rows that 512
// threads do not hold a kernel before it leaves the two means in row_sums (rows, 2), and blocks divide the columns. A
// block stays with its part and adds up its column sums in registers. Its rows come by cp.async, into places of a ring
// that one thread alone fills and reads, so that no barrier comes with them: with 3 stages two rows of each warp are on
// their way while it works on a third, 98 KB a multiprocessor at 768 columns of bf16, 64 KB where rows are wide. Rows
// that do not fit 16-byte accesses go the wide way, without a ring.
// Bytes: d_out and x in, d_x out, once; 16 a column and part (8 for rmsnorm), 2 % at 16384 x 768, mostly in L2. About
// 25 instructions an element of bf16, 32 where rows are wide: 70 % of the issue slots at the copy rate, or all of them
// where a quarter of the lanes is idle, as at 1600 columns. Expected: 90 % of the copy rate, 80 % at such widths, less
// 6 us for two launches.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int GRAD_WARPS = 8;
constexpr int GRAD_THREADS = 512;     // at most, where several warps take a row: 128 registers
constexpr int WIDE = 16;              // columns of each of them
constexpr int SINGLE = 8;             // and where 16-byte accesses do not fit

// Mean of g and of g n over one row, by one block: row_sums (rows, 2).
template <class T, bool CENTERED>
DEV void grad_sums(float* row_sums, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,
                   int cols) {
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

// A thread's packs of x and d_out for some rows ahead. A stage has the packs of one row, x's before d_out's; `pitch`
// packs lie between one and the next, one for each thread of the block.
template <class T, int P, bool ALONE> struct Ring {
  uint4* own;
  int stages, next, at;   // where the next stage to ask for begins, and the next to read

  DEV Ring(uint4* shared, int stages) : own(shared + threadIdx.x), stages(stages), next(0), at(0) {}
  static DEV int pitch() { return ALONE ? GRAD_WARPS * 32 : blockDim.x; }
  DEV int after(int stage) const {
    return stage + 2 * P * pitch() < stages * 2 * P * pitch() ? stage + 2 * P * pitch() : 0;
  }

  // Asks for `bytes` of each pack, 16 or 0, of a row; a group of copies in any case, so that groups count rows. Packs
  // lie `apart` elements from each other.
  DEV void ask(const T* x, const T* d_out, int apart, const int (&bytes)[P]) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      cp_async16_zfill(own + next + p * pitch(), x + p * apart, bytes[p]);
      cp_async16_zfill(own + next + (P + p) * pitch(), d_out + p * apart, bytes[p]);
    }
    cp_async_commit();
    next = after(next);
  }
  // Waits until the row is there that was asked for stages - 1 rows ago; returns where it begins.
  DEV uint32_t row() {
    if (stages == 3) cp_async_wait<2>();
    else if (stages == 2) cp_async_wait<1>();
    else cp_async_wait<0>();
    int row = at;
    at = after(at);
    return row;
  }
};

// The rows of part blockIdx.y, as many at once as the block has groups of `threads` threads: warps where ALONE, else
// any whole number of warps. All columns of them, or columns blockIdx.x * C * threads on where row_sums gives the
// means.
template <class T, bool CENTERED, bool PACKED, int C, bool ALONE>
DEV void grad_rows(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean,
                   const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part,
                   int some_threads, int stages) {
  constexpr int N = Pack<T>::N, P = C / N;
  GPU_SHARED(float2, rooms, [2][GRAD_THREADS / 32]);
  GPU_DYNAMIC(uint4, shared);
  const int threads = ALONE ? 32 : some_threads;
  int group = threadIdx.x / threads, thread = threadIdx.x % threads, groups = ALONE ? GRAD_WARPS : blockDim.x / threads;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = C * threads;
  int64_t first = ALONE ? 0 : (int64_t)blockIdx.x * width, here = cols - first;
  int64_t row = blockIdx.y * rows_per_part + group,
          end = row - group + rows_per_part < rows ? row - group + rows_per_part : rows;
  // To the thread's first pack, of its first row.
  int64_t start = row * cols + first + (PACKED ? thread * N : 0), step = (int64_t)groups * cols;
  x += start, d_out += start, d_x += start, weight += first + (PACKED ? thread * N : 0), mean += CENTERED ? row : 0,
      rstd += row;
  const int apart = threads * N;
  int bytes[P];   // of a pack that are columns
#pragma unroll
  for (int p = 0; p < P; p++) bytes[p] = (p * threads + thread) * N < here ? 16 : 0;
  float per_col = 1.0f / cols, d_weight[C] = {}, d_bias[C] = {};
  Ring<T, P, ALONE> ring(shared, stages);
  const T *x_ahead = x, *d_ahead = d_out;
  int64_t asked = row;
  auto ask = [&] {
    int wanted[P];
#pragma unroll
    for (int p = 0; p < P; p++) wanted[p] = asked < end ? bytes[p] : 0;
    ring.ask(x_ahead, d_ahead, apart, wanted);
    x_ahead += step, d_ahead += step, asked += groups;
  };
  if (PACKED)
    for (int ahead = 1; ahead < stages; ahead++) ask();
  float m = 0, s = 0, next_m = 0, next_s = 0;   // of this row and the next
  if (row < end) next_m = CENTERED ? *mean : 0.0f, next_s = *rstd;
  for (int slot = 0; row < end; row += groups, slot ^= 1, x += step, d_out += step, d_x += step) {
    uint32_t packs = 0, again = 0;
    if (PACKED) {
      ask();
      packs = ring.row();
    }
    auto x_pack = [&](int p) {
      return PACKED ? ring.own[packs + p * ring.pitch()] : load_words<false>(x + again, p, here, thread, threads);
    };
    auto d_pack = [&](int p) {
      return PACKED ? ring.own[packs + (P + p) * ring.pitch()]
                    : load_words<false>(d_out + again, p, here, thread, threads);
    };
    auto w_pack = [&](int p) {
      if (!PACKED) return load_words<false>(weight + again, p, here, thread, threads);
      return bytes[p] ? load16(weight + again + p * apart) : make_uint4(0, 0, 0, 0);
    };
    m = next_m, s = next_s;
    mean += CENTERED ? groups : 0, rstd += groups;
    if (row + groups < end) next_m = CENTERED ? *mean : 0.0f, next_s = *rstd;
    float sums[2] = {};   // of g, of g n
    if (!ALONE && row_sums) {
      sums[0] = row_sums[row * 2], sums[1] = row_sums[row * 2 + 1];
    } else {
#pragma unroll
      for (int p = 0; p < P; p++) {
        uint4 v = x_pack(p), d = d_pack(p), w = w_pack(p);
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
        if (lane == 0) rooms[slot][warp] = make_float2(sums[0], sums[1]);
        bar_sync(1 + group, threads);
        const float2* room = rooms[slot] + group * (threads / 32);
        sums[0] = sums[1] = 0;
#pragma unroll 2
        for (int w = 0; w < threads / 32; w++) {
          float2 theirs = room[w];
          sums[0] += theirs.x, sums[1] += theirs.y;
        }
      }
      sums[0] *= per_col, sums[1] *= s * per_col;
    }
    // The packs are read anew, since they would take the registers that the column sums need.
    forget(packs), forget(again);
#pragma unroll
    for (int p = 0; p < P; p++) {
      uint4 v = x_pack(p), d = d_pack(p), w = w_pack(p);
      float y[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        float n = (of_pack<T>(v, j) - m) * s, g = of_pack<T>(d, j);
        d_weight[p * N + j] += g * n;
        if (CENTERED) d_bias[p * N + j] += g;
        // The product is rounded as it was for the mean: in a row of one column nothing is left of it.
        float from_mean = __fmul_rn(g, of_pack<T>(w, j));
        if (CENTERED) from_mean -= sums[0];
        y[j] = s * (from_mean - n * sums[1]);
      }
      if (!PACKED) store_words<false>(d_x, y, p, here, thread, threads);
      else if (bytes[p]) store16(d_x + p * apart, to_pack<T>(y));
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
DEV void grad(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean,
              const float* rstd, int64_t rows, int cols, int64_t rows_per_part, int stages) {
  if (cols <= 256)
    grad_rows<T, CENTERED, true, 8, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols,
                                          rows_per_part, 32, stages);
  else if (cols <= 512)
    grad_rows<T, CENTERED, true, 16, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols,
                                           rows_per_part, 32, stages);
  else
    grad_rows<T, CENTERED, true, 24, true>(d_x, partials, d_out, x, weight, mean, rstd, nullptr, rows, cols,
                                           rows_per_part, 32, stages);
}

// `stages` is 0 where 16-byte accesses do not fit.
template <class T, bool CENTERED>
DEV void grad_wide(T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean,
                   const float* rstd, const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads,
                   int stages) {
  if (stages > 0)
    grad_rows<T, CENTERED, true, WIDE, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols,
                                              rows_per_part, threads, stages);
  else
    grad_rows<T, CENTERED, false, SINGLE, false>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols,
                                                 rows_per_part, threads, stages);
}

// The entry points for element type T. rmsnorm's have the same arguments less mean.
#define NORM_GRAD_ENTRIES(T)                                                                                           \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, GPU_BLOCKS(2)) void layernorm_grad_##T(                     \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,      \
      int64_t rows, int cols, int64_t rows_per_part, int stages) {                                                     \
    grad<T, true>(d_x, partials, d_out, x, weight, mean, rstd, rows, cols, rows_per_part, stages);                     \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_grad_##T)                                                                                       \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_wide_##T(                                  \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd,      \
      const float* row_sums, int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) {                 \
    grad_wide<T, true>(d_x, partials, d_out, x, weight, mean, rstd, row_sums, rows, cols, rows_per_part, threads,      \
                       stages);                                                                                        \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_grad_wide_##T)                                                                                  \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void layernorm_grad_sums_##T(                                  \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* mean, const float* rstd, int cols) {  \
    grad_sums<T, true>(row_sums, d_out, x, weight, mean, rstd, cols);                                                  \
  }                                                                                                                    \
  GPU_EXPORT(layernorm_grad_sums_##T)                                                                                  \
  extern "C" __global__ __launch_bounds__(GRAD_WARPS * 32, GPU_BLOCKS(2)) void rmsnorm_grad_##T(                       \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, int64_t rows, int cols, \
      int64_t rows_per_part, int stages) {                                                                             \
    grad<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, rows, cols, rows_per_part, stages);                 \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_grad_##T)                                                                                         \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_wide_##T(                                    \
      T* d_x, float* partials, const T* d_out, const T* x, const T* weight, const float* rstd, const float* row_sums,  \
      int64_t rows, int cols, int64_t rows_per_part, int threads, int stages) {                                        \
    grad_wide<T, false>(d_x, partials, d_out, x, weight, nullptr, rstd, row_sums, rows, cols, rows_per_part, threads,  \
                        stages);                                                                                       \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_grad_wide_##T)                                                                                    \
  extern "C" __global__ __launch_bounds__(GRAD_THREADS) void rmsnorm_grad_sums_##T(                                    \
      float* row_sums, const T* d_out, const T* x, const T* weight, const float* rstd, int cols) {                     \
    grad_sums<T, false>(row_sums, d_out, x, weight, nullptr, rstd, cols);                                              \
  }                                                                                                                    \
  GPU_EXPORT(rmsnorm_grad_sums_##T)

using f32 = float;
NORM_GRAD_ENTRIES(f32)
NORM_GRAD_ENTRIES(bf16)
