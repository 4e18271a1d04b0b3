// What happens to gradients and weights between steps, over the flat state of a shard: tensors one after another,
// padded.
//   optimizer_add        acc[i] += x[i]: accumulators of shared parameters are joined.
//   sum_squares          table[index] = sum over a tensor of gradient^2, f64. Tensors are cut into blocks of 4096; in a block element i goes to
//                        running sum i % 32, the running sums are added by halves, and the blocks in order.
//   update_gate          the factor of clipping by the global norm (Pascanu, Mikolov & Bengio 2013) from that table, summed in order:
//                        min(1, max_norm / (norm + 1e-6)); and whether every loss of the step is finite, without which nothing is updated.
//   adamw, sgd           the update, as host/optimizer.rs writes it down: the same IEEE operations in the same order, fused where it says so.
//                        AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101.
//   finite_check         the lowest layer whose output has an infinity or a NaN.
// Every result has the host's bits, but for what is in an f32 NaN: x86 hands on an operand's, a GPU makes its own.
// Nothing waits for the host: gate and update follow one another on the stream.
//
// A bf16 weight is its f32 master rounded to the nearest, ties away from zero; the master's lower 16 bits lie beside
// it. With `bits` the master's, weight = (bits + 0x8000) >> 16 and remainder = bits & 0xFFFF. Adding 0x8000 carries
// into the upper half exactly when the remainder is 0x8000 or more, so the upper half is weight - (remainder >> 15):
// the pair is exact for every master but NaN, of which there is one, that stays NaN in the weight.
//
// Launches take up to SEGMENTS tensors, described in their arguments. One block of 256 threads a 4096 elements
// (sum_squares: one warp).
// Bytes an element: add 12; sum_squares 4; adamw 28 (weight, two moments read and written, gradient read; a bf16 weight
// with its remainder is as wide as its master); sgd 12, with momentum 20; finite_check 4 / 2. All are bound by memory:
// 90-95 % of the copy rate is expected. sum_squares ends with one warp a tensor that adds up to 9,000 blocks in order,
// some 60 us for 38 million elements.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

constexpr int BLOCK_ELEMS = 4096;   // of a block; optimizer::SUM_BLOCK
constexpr int SEGMENTS = 160;       // tensors of a launch: 24 bytes each, of the 4096 that arguments may take

// Tensors of the flat state. Blocks are numbered through all of a task's launches.
struct Segment { int64_t start, elems; uint32_t first_block, index_and_decay; };  // index << 1 | decay
struct Segments { int count; uint32_t first_block; Segment s[SEGMENTS]; };

// The segment that block `block` belongs to: the last that starts at or before it.
DEV int segment_of(const Segments& segments, uint32_t block) {
  int low = 0, high = segments.count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (segments.s[middle].first_block <= block) low = middle;
    else high = middle - 1;
  }
  return low;
}

extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS) optimizer_add(float* acc, const float* x, int64_t n) {
  zip_each(acc, acc, x, n, [](float sum, float more) { return sum + more; });
}
GPU_EXPORT(optimizer_add)

constexpr int SUM_WARPS = 8;   // blocks of 4096 that a thread block sums, one warp each
constexpr int SUM_AHEAD = 16;  // elements that a lane has on their way at once

// sums[block] of each block of 4096 elements. Lane i is running sum i; a square is exact in f64.
extern "C" __global__ void __launch_bounds__(SUM_WARPS * 32)
    sum_squares_blocks(double* sums, const float* gradient, int blocks, const __grid_constant__ Segments segments) {
  uint32_t number = blockIdx.x * SUM_WARPS + threadIdx.x / 32;
  if (number >= (uint32_t)blocks) return;
  number += segments.first_block;
  const Segment& segment = segments.s[segment_of(segments, number)];
  int64_t from = (int64_t)(number - segment.first_block) * BLOCK_ELEMS;
  int n = segment.elems - from < BLOCK_ELEMS ? (int)(segment.elems - from) : BLOCK_ELEMS;
  const float* x = gradient + segment.start + from;
  int lane = threadIdx.x % 32;
  double sum = 0;
  int i = lane;
  for (; i + (SUM_AHEAD - 1) * 32 < n; i += SUM_AHEAD * 32) {
    float v[SUM_AHEAD];
#pragma unroll
    for (int j = 0; j < SUM_AHEAD; j++) v[j] = x[i + j * 32];
#pragma unroll
    for (int j = 0; j < SUM_AHEAD; j++) sum = fma((double)v[j], (double)v[j], sum);
  }
  for (; i < n; i += 32) sum = fma((double)x[i], (double)x[i], sum);
  for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(~0u, sum, width);
  if (lane == 0) sums[number] = sum;
}
GPU_EXPORT(sum_squares_blocks)

// Adds n values in order, on every lane of a warp: 32 are read at once, and the next 32 while these are added.
template <class Value> DEV double sum_in_order(int64_t n, Value value) {
  int lane = threadIdx.x % 32;
  double sum = 0, next = lane < n ? value(lane) : 0;
  for (int64_t i = 0; i < n; i += 32) {
    double now = next;
    if (i + 32 + lane < n) next = value(i + 32 + lane);
    int here = n - i < 32 ? (int)(n - i) : 32;
    if (here == 32) {
#pragma unroll
      for (int j = 0; j < 32; j++) sum += __shfl_sync(~0u, now, j);
    } else {
      for (int j = 0; j < here; j++) sum += __shfl_sync(~0u, now, j);
    }
  }
  return sum;
}

// One warp a tensor.
extern "C" __global__ void __launch_bounds__(32)
    sum_squares_tensors(double* table, const double* sums, const __grid_constant__ Segments segments) {
  const Segment& segment = segments.s[blockIdx.x];
  const double* own = sums + segment.first_block;
  double sum = sum_in_order((segment.elems + BLOCK_ELEMS - 1) / BLOCK_ELEMS, [=](int64_t i) { return own[i]; });
  if (threadIdx.x == 0) table[segment.index_and_decay >> 1] = sum;
}
GPU_EXPORT(sum_squares_tensors)

// What an update reads of the step.
struct Gate { float grad_scale; int open; };

// One warp. `table` is null without clipping. A NaN norm gives a NaN factor: it must reach the weights, so that the
// next loss shows it.
extern "C" __global__ void __launch_bounds__(32)
    update_gate(Gate* gate, const double* table, int tensors, double max_norm, const float* losses, int count) {
  double factor = 1;
  if (table) {
    double norm = sqrt(sum_in_order(tensors, [=](int64_t i) { return table[i]; }));
    factor = max_norm / (norm + 1e-6);
    if (factor >= 1) factor = 1;
  }
  int finite = 1;
  for (int i = threadIdx.x; i < count; i += 32) finite &= fabsf(losses[i]) < INFINITY;
  for (int apart = 16; apart > 0; apart /= 2) finite &= __shfl_xor_sync(~0u, finite, apart);
  if (threadIdx.x == 0) *gate = {(float)factor, finite};
}
GPU_EXPORT(update_gate)

struct AdamwNumbers {
  float keep_decayed, keep, one_minus_beta1, beta2, one_minus_beta2, root_correction, epsilon, minus_step_size;
};

// One element: each line is one rounding.
DEV float adamw_element(float weight, float& m, float& v, float grad, float grad_scale, float keep,
                        const AdamwNumbers& a) {
  float g = __fmul_rn(grad, grad_scale);
  float d = __fadd_rn(g, -m);
  m = __fmaf_rn(a.one_minus_beta1, d, m);
  float s = __fmul_rn(a.one_minus_beta2, g);
  float u = __fmul_rn(a.beta2, v);
  v = __fmaf_rn(s, g, u);
  float r = __fsqrt_rn(v);
  float e = __fmaf_rn(r, a.root_correction, a.epsilon);
  float q = __fdiv_rn(m, e);
  float w = __fmul_rn(weight, keep);
  return __fmaf_rn(a.minus_step_size, q, w);
}

struct SgdNumbers { float weight_decay, minus_lr, momentum; int first, nesterov; };

DEV float sgd_element(float weight, float& buffer, float grad, float grad_scale, float weight_decay, bool has_buffer,
                      const SgdNumbers& a) {
  float g = __fmaf_rn(weight_decay, weight, __fmul_rn(grad, grad_scale));
  if (has_buffer) {
    buffer = a.first ? g : __fmaf_rn(a.momentum, buffer, g);
    g = a.nesterov ? __fmaf_rn(a.momentum, buffer, g) : buffer;
  }
  return __fmaf_rn(a.minus_lr, g, weight);
}

// Weights as the update sees them: f32, or bf16 with the lower halves of their masters.
struct Masters {
  float* weight;
  template <int N> DEV Few<float, N> load(int64_t i) const { return load_few<N>(weight + i); }
  template <int N> DEV void store(int64_t i, const Few<float, N>& w) const { store_few<N>(weight + i, w); }
  template <int N> DEV bool aligned(int64_t i) const { return aligned_few<N>(weight + i); }
};
struct SplitMasters {
  uint16_t *weight, *remainder;
  static DEV float join(uint16_t weight, uint16_t remainder) {
    uint32_t bits = (uint32_t)(uint16_t)(weight - (remainder >> 15)) << 16 | remainder;
    return __uint_as_float(bits);
  }
  static DEV void split(float master, uint16_t& weight, uint16_t& remainder) {
    uint32_t bits = __float_as_uint(master);
    if (master != master) bits = 0x7FC00000u;
    weight = (uint16_t)((bits + 0x8000u) >> 16);
    remainder = (uint16_t)bits;
  }
  template <int N> DEV Few<float, N> load(int64_t i) const {
    Few<uint16_t, N> high = load_few<N>(weight + i), low = load_few<N>(remainder + i);
    Few<float, N> w;
    for (int k = 0; k < N; k++) w.x[k] = join(high.x[k], low.x[k]);
    return w;
  }
  template <int N> DEV void store(int64_t i, const Few<float, N>& w) const {
    Few<uint16_t, N> high, low;
    for (int k = 0; k < N; k++) split(w.x[k], high.x[k], low.x[k]);
    store_few<N>(weight + i, high);
    store_few<N>(remainder + i, low);
  }
  template <int N> DEV bool aligned(int64_t i) const {
    return aligned_few<N>(weight + i) && aligned_few<N>(remainder + i);
  }
};

// Walks over this block's elements of its segment, N = 4 a time and at last one by one: visit(N as a type, element).
template <int N> struct Width { static constexpr int value = N; };
template <class Visit> DEV void each_of_block(const Segments& segments, bool wide, Visit visit) {
  constexpr int N = FEW<float>;
  uint32_t number = segments.first_block + blockIdx.x;
  const Segment& segment = segments.s[segment_of(segments, number)];
  int64_t from = (int64_t)(number - segment.first_block) * BLOCK_ELEMS;
  int n = segment.elems - from < BLOCK_ELEMS ? (int)(segment.elems - from) : BLOCK_ELEMS;
  int64_t start = segment.start + from;
  bool decays = segment.index_and_decay & 1;
  int whole = wide && start % N == 0 ? n - n % N : 0;
#pragma unroll 1
  for (int i = threadIdx.x * N; i < whole; i += POINTWISE_THREADS * N) visit(Width<N>{}, start + i, decays);
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < n; i += POINTWISE_THREADS) visit(Width<1>{}, start + i, decays);
}

template <class W>
DEV void adamw_all(W weights, float* m, float* v, const float* gradient, const Gate* gate, const AdamwNumbers& numbers,
                   const Segments& segments) {
  if (!gate->open) return;
  constexpr int N = FEW<float>;
  const float grad_scale = gate->grad_scale;
  const AdamwNumbers a = numbers;
  bool wide = weights.template aligned<N>(0) && aligned_few<N>(m) && aligned_few<N>(v) && aligned_few<N>(gradient);
  each_of_block(segments, wide, [=](auto width, int64_t i, bool decays) {
    constexpr int K = decltype(width)::value;
    float keep = decays ? a.keep_decayed : a.keep;
    Few<float, K> w = weights.template load<K>(i), first = load_few<K>(m + i), second = load_few<K>(v + i),
                  g = load_few<K>(gradient + i);
    for (int k = 0; k < K; k++) w.x[k] = adamw_element(w.x[k], first.x[k], second.x[k], g.x[k], grad_scale, keep, a);
    weights.template store<K>(i, w);
    store_few<K>(m + i, first);
    store_few<K>(v + i, second);
  });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    adamw_f32(float* weight, float* m, float* v, const float* gradient, const Gate* gate, AdamwNumbers numbers,
              const __grid_constant__ Segments segments) {
  adamw_all(Masters{weight}, m, v, gradient, gate, numbers, segments);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    adamw_bf16(uint16_t* weight, uint16_t* remainder, float* m, float* v, const float* gradient, const Gate* gate,
               AdamwNumbers numbers, const __grid_constant__ Segments segments) {
  adamw_all(SplitMasters{weight, remainder}, m, v, gradient, gate, numbers, segments);
}
GPU_EXPORT(adamw_f32)
GPU_EXPORT(adamw_bf16)

// `buffer` is null without momentum; the first update sets it and never reads it.
template <class W>
DEV void sgd_all(W weights, float* buffer, const float* gradient, const Gate* gate, const SgdNumbers& numbers,
                 const Segments& segments) {
  if (!gate->open) return;
  constexpr int N = FEW<float>;
  const float grad_scale = gate->grad_scale;
  const SgdNumbers a = numbers;
  bool wide = weights.template aligned<N>(0) && aligned_few<N>(buffer) && aligned_few<N>(gradient);
  each_of_block(segments, wide, [=](auto width, int64_t i, bool decays) {
    constexpr int K = decltype(width)::value;
    float weight_decay = decays ? a.weight_decay : 0.0f;
    Few<float, K> w = weights.template load<K>(i), b = {}, g = load_few<K>(gradient + i);
    if (buffer && !a.first) b = load_few<K>(buffer + i);
    for (int k = 0; k < K; k++)
      w.x[k] = sgd_element(w.x[k], b.x[k], g.x[k], grad_scale, weight_decay, buffer != nullptr, a);
    weights.template store<K>(i, w);
    if (buffer) store_few<K>(buffer + i, b);
  });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    sgd_f32(float* weight, float* buffer, const float* gradient, const Gate* gate, SgdNumbers numbers,
            const __grid_constant__ Segments segments) {
  sgd_all(Masters{weight}, buffer, gradient, gate, numbers, segments);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    sgd_bf16(uint16_t* weight, uint16_t* remainder, float* buffer, const float* gradient, const Gate* gate,
             SgdNumbers numbers, const __grid_constant__ Segments segments) {
  sgd_all(SplitMasters{weight, remainder}, buffer, gradient, gate, numbers, segments);
}
GPU_EXPORT(sgd_f32)
GPU_EXPORT(sgd_bf16)

// Of n elements, `cols` of every `pitch` count. The minimum of integers does not depend on who comes first.
template <class T> DEV void check_all(int* first_layer, const T* x, int64_t n, int cols, int pitch, int layer) {
  constexpr int N = FEW<T>;
  auto bad = [=](int64_t i, float v) { return !(fabsf(v) < INFINITY) && i % pitch < cols; };
  pointwise<N, 4>(
      n, aligned_few<N>(x), [=](int64_t i) { return load_few<N>(x + i); },
      [=](int64_t i, const Few<T, N>& v) {
        for (int k = 0; k < N; k++)
          if (bad(i + k, to_float(v.x[k]))) atomicMin(first_layer, layer);
      },
      [=](int64_t i) {
        if (bad(i, to_float(x[i]))) atomicMin(first_layer, layer);
      });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    finite_check_f32(int* first_layer, const float* x, int64_t n, int cols, int pitch, int layer) {
  check_all(first_layer, x, n, cols, pitch, layer);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    finite_check_bf16(int* first_layer, const bf16* x, int64_t n, int cols, int pitch, int layer) {
  check_all(first_layer, x, n, cols, pitch, layer);
}
GPU_EXPORT(finite_check_f32)
GPU_EXPORT(finite_check_bf16)
