// Softmax and cross-entropy in one (maximum and sum in one pass: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm
// 3).
//   logits, d_logits (rows, cols) f32 or bf16; labels (rows) i32; row_losses (rows) f32, of which loss_sum.cu makes the
//   loss.
//   row_losses[r] = lse - logits[r,labels[r]] with lse = log sum over c of exp(logits[r,c]);
//   d_logits[r,c] = (exp(logits[r,c] - lse) - (c == labels[r])) loss_scale. A row with label -100 counts for nothing:
//   its loss and gradient are 0, and its logits are not read.
// The gradient gives row_losses too, unless that is null, with the bits of forward. It goes through a row twice, the
// second time from the end: on Hopper 264 rows are on their way, 27 MB of 50,257 columns in bf16, and an L2 cache of 50
// MB has most of that still.
// Rows of logits and d_logits are `pitch` apart; between cols and pitch the gradient is 0.
// Overwrites its outputs; d_logits may lie over logits. One block a row. A row of any width at any address goes in
// 16-byte packs, save what lies before the first multiple of 16 bytes and behind the last pack. Every order depends on
// the shape alone.
// Bytes: forward reads the logits of rows that count once; the gradient reads those once, the second time from the L2
// cache, and writes all. Expected: 92 % of the copy rate. Loads wait for the row's label, some 0.3 us, mostly from the
// L2 cache; a multiprocessor has two blocks, with up to 36 KB each on their way, and 30 to 50 thousand columns of bf16
// take 4 to 6 us beside others. In BERT's masked language modelling 15 % of rows count: forward should take a sixth of
// the time that it takes where all do, the gradient 58 %.
#include "gpu.cuh"
#include "gpu/row.cuh"

constexpr int THREADS = 768;       // at most, a row
constexpr int AHEAD = 3;           // packs that a thread has on their way at once
constexpr int AHEAD_BACK = 2;      // and in the gradient, which needs registers for more
constexpr int IGNORED = -100;
constexpr float LOG2_E = 1.4426950408889634f;

// The maximum of values and the sum of exp(value - maximum).
struct Sums {
  float max = -INFINITY, sum = 0;
  // What values are taken from: 0 where all are minus infinity, whose difference would not be a number.
  DEV float base() const { return max == -INFINITY ? 0.0f : max; }
  DEV void raise(float to) {
    float from = max;
    max = fmaxf(max, to);
    sum *= exp2_fast((from - base()) * LOG2_E);
  }
  DEV void add(float x) {
    raise(x);
    sum += exp2_fast((x - base()) * LOG2_E);
  }
};

// The sums of a warp's lanes, in every lane.
DEV Sums join(Sums s) {
  s.raise(warp_max(s.max));
  s.sum = warp_sum(s.sum);
  return s;
}

// The logarithm of the sum of a row's exponentials, in every thread. `warps` is shared, and not in use.
template <class T> DEV float log_sum(const T* row, int cols, float (*warps)[32]) {
  constexpr int N = Pack<T>::N;
  int thread = threadIdx.x, threads = blockDim.x;
  Packs<T> at(row, cols);
  Sums s;
  if (thread < at.head) s.add(to_float(row[thread]));
  if (thread < cols - at.tail) s.add(to_float(row[at.tail + thread]));
  for (int first = thread; first < at.packs; first += AHEAD * threads) {
    Pack<T> v[AHEAD];
    float most = s.max;
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs) v[a] = load_pack(row + at.head + (int64_t)(first + a * threads) * N);
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs)
#pragma unroll
        for (int j = 0; j < N; j++) most = fmaxf(most, to_float(v[a].x[j]));
    s.raise(most);
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * threads < at.packs) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < N; j++) sum += exp2_fast((to_float(v[a].x[j]) - s.base()) * LOG2_E);
        s.sum += sum;
      }
  }
  s = join(s);
  if (thread % 32 == 0) warps[0][thread / 32] = s.max, warps[1][thread / 32] = s.sum;
  __syncthreads();
  // Every warp joins them in the same order.
  int lane = thread % 32;
  s = lane < threads / 32 ? Sums{warps[0][lane], warps[1][lane]} : Sums{};
  s = join(s);
  return s.max + logf(s.sum);
}

template <class T>
DEV void forward(float* row_losses, const T* logits, const int32_t* labels, int cols, int pitch) {
  GPU_SHARED(float, warps, [2][32]);
  int64_t row = blockIdx.x;
  int label = labels[row];
  if (label == IGNORED) {
    if (threadIdx.x == 0) row_losses[row] = 0;
    return;
  }
  logits += row * pitch;
  float lse = log_sum(logits, cols, warps);
  if (threadIdx.x == 0) row_losses[row] = lse - to_float(logits[label]);
}

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(2))
    void cross_entropy_forward_f32(float* row_losses, const float* logits, const int32_t* labels, int cols, int pitch) {
  forward(row_losses, logits, labels, cols, pitch);
}
GPU_EXPORT(cross_entropy_forward_f32)

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(2))
    void cross_entropy_forward_bf16(float* row_losses, const bf16* logits, const int32_t* labels, int cols, int pitch) {
  forward(row_losses, logits, labels, cols, pitch);
}
GPU_EXPORT(cross_entropy_forward_bf16)

// Zeros for a row.
template <class T> DEV void clear_row(T* row, int cols) {
  Packs<T> at(row, cols);
  int thread = threadIdx.x, threads = blockDim.x;
  if (thread < at.head) row[thread] = from_float<T>(0);
  if (thread < cols - at.tail) row[at.tail + thread] = from_float<T>(0);
  for (int pack = thread; pack < at.packs; pack += threads)
    store16(row + at.head + (int64_t)pack * Pack<T>::N, make_uint4(0, 0, 0, 0));
}

template <class T>
DEV void grad(T* d_logits, float* row_losses, const T* logits, const int32_t* labels, int cols, int pitch,
              const Now* now) {
  constexpr int N = Pack<T>::N;
  GPU_SHARED(float, warps, [2][32]);
  int64_t row = blockIdx.x;
  int thread = threadIdx.x, threads = blockDim.x, label = labels[row];
  d_logits += row * pitch, logits += row * pitch;
  if (label == IGNORED) {
    if (thread == 0 && row_losses) row_losses[row] = 0;
    return clear_row(d_logits, pitch);
  }
  // Read before the barrier behind which it may be overwritten.
  float at_label = thread == 0 ? to_float(logits[label]) : 0;
  float lse = log_sum(logits, cols, warps), scale = (float)now->loss_scale;
  if (thread == 0 && row_losses) row_losses[row] = lse - at_label;
  auto one = [&](float x, int c) {
    float p = exp2_fast((x - lse) * LOG2_E);
    return (c == label ? p - 1 : p) * scale;
  };
  // Where d_logits lies over logits, each thread overwrites what it has read itself.
  Packs<T> at(d_logits, logits, cols);
  int round = AHEAD_BACK * threads;
  for (int first = (at.packs - 1) / round * round + thread; first >= 0; first -= round) {
    Pack<T> v[AHEAD_BACK];
#pragma unroll
    for (int a = 0; a < AHEAD_BACK; a++)
      if (first + a * threads < at.packs) v[a] = load_pack(logits + at.head + (int64_t)(first + a * threads) * N);
#pragma unroll
    for (int a = 0; a < AHEAD_BACK; a++)
      if (first + a * threads < at.packs) {
        int c = at.head + (first + a * threads) * N;
#pragma unroll
        for (int j = 0; j < N; j++) v[a].x[j] = from_float<T>(one(to_float(v[a].x[j]), c + j));
        store_pack(d_logits + c, v[a]);
      }
  }
  for (int c = thread; c < at.head; c += threads) d_logits[c] = from_float<T>(one(to_float(logits[c]), c));
  for (int c = at.tail + thread; c < cols; c += threads) d_logits[c] = from_float<T>(one(to_float(logits[c]), c));
  for (int c = cols + thread; c < pitch; c += threads) d_logits[c] = from_float<T>(0);
}

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(2))
    void cross_entropy_grad_f32(float* d_logits, float* row_losses, const float* logits, const int32_t* labels,
                                int cols, int pitch, const Now* now) {
  grad(d_logits, row_losses, logits, labels, cols, pitch, now);
}
GPU_EXPORT(cross_entropy_grad_f32)

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(2))
    void cross_entropy_grad_bf16(bf16* d_logits, float* row_losses, const bf16* logits, const int32_t* labels, int cols,
                                 int pitch, const Now* now) {
  grad(d_logits, row_losses, logits, labels, cols, pitch, now);
}
GPU_EXPORT(cross_entropy_grad_bf16)
