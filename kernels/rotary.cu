// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the pairs of Llama's weights.
//   x, out (B, T, cols) f32 or bf16, whose rows begin with `heads` heads of `width`. With a = x[i] and b = x[i + width/2] of a head and the angle
//   p = t base^(-2i/width) at position t: out[i] = a cos p - b sin p, out[i + width/2] = b cos p + a sin p. The rest of a row is copied.
//   per_pair is -2/width log2(base). Of a frequency f = base^(-2i/width) the share k = clamp(constant + slope f, 0, 1) stays and the rest is
//   multiplied by `slowed`, for long contexts (graph::RotaryScaling). With sign -1 the angles are negative: the turn back, which is the gradient.
// Overwrites out, which may be x. One block a row; its threads first make the cosines and sines of up to 256 pairs, then share out the
// heads' 16-byte packs of those. A thread's first packs are on their way while it makes them, and its next ones while it turns what it has:
// 6 KB a block and 40 KB or more a multiprocessor at 3072 columns of bf16. Angles are taken in f64 and reduced to part of a turn before they are
// rounded: at t = 10^5 an f32 angle would be off by 4e-3. Deterministic: nothing is summed.
// Bytes: x and out once; where out is x, the heads alone. Expected: 90 % of the copy rate.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

constexpr int THREADS = 256;  // at most
constexpr int PAIRS = 256;    // of which the angles are kept at once

// Cosine and sine of 2 pi turns, by their series within an eighth of a turn of a quarter's multiple: exact to f32's rounding, and without the
// stack that the library's take for large angles.
struct Direction { float cos, sin; };
DEV Direction direction(double turns) {
  double quarters = floor(4 * turns + 0.5);
  float x = (float)(turns - 0.25 * quarters) * 6.2831853071795865f, y = x * x;
  float sin = x + x * y * (-1 / 6.0f + y * (1 / 120.0f + y * (-1 / 5040.0f + y * (1 / 362880.0f))));
  float cos = 1 + y * (-0.5f + y * (1 / 24.0f + y * (-1 / 720.0f + y * (1 / 40320.0f))));
  int quarter = (int)((int64_t)quarters & 3);
  float a = quarter & 1 ? sin : cos, b = quarter & 1 ? cos : sin;
  return {quarter == 1 || quarter == 2 ? -a : a, quarter >= 2 ? -b : b};
}

struct Slowing { double slowed, constant, slope; };
// As graph::Rotation::frequency computes it.
DEV double frequency(int pair, double per_pair, Slowing slowing) {
  double f = exp2(pair * per_pair), kept = slowing.constant + slowing.slope * f;
  kept = kept < 0 ? 0 : kept > 1 ? 1 : kept;
  return f * (kept + (1 - kept) * slowing.slowed);
}

// N elements at a time: a pack, or one where rows, heads or addresses are no multiple of it.
template <class T, int N>
DEV void turn(T* out, const T* x, int positions, int64_t cols, int heads, int width, double per_pair, Slowing slowing, float sign) {
  GPU_SHARED(float, cosines, [PAIRS]);
  GPU_SHARED(float, sines, [PAIRS]);
  int64_t row = blockIdx.x, turned = (int64_t)heads * width;
  int position = (int)(row % positions), half = width / 2, thread = threadIdx.x, threads = blockDim.x;
  out += row * cols, x += row * cols;
  Few<T, N> rest = {};   // this thread's first piece of what is copied
  bool copies = out != x && turned + thread * N < cols;
  if (copies) rest = load_few<N>(x + turned + thread * N);
  for (int first = 0; first < half; first += PAIRS) {
    int pairs = half - first < PAIRS ? half - first : PAIRS, packs = pairs / N, items = heads * packs;
    // Where both halves of an item lie.
    auto place = [&](int item) { return (int64_t)(item / packs) * width + first + item % packs * N; };
    Few<T, N> a = {}, b = {};
    if (thread < items) a = load_few<N>(x + place(thread)), b = load_few<N>(x + place(thread) + half);
    if (first > 0) __syncthreads();
    for (int i = thread; i < pairs; i += threads) {
      Direction d = direction(position * (frequency(first + i, per_pair, slowing) * 0.15915494309189535));
      cosines[i] = d.cos, sines[i] = sign * d.sin;
    }
    __syncthreads();
    for (int item = thread; item < items; item += threads) {
      Few<T, N> next_a = {}, next_b = {}, to_a, to_b;
      int next = item + threads, at = item % packs * N;
      if (next < items) next_a = load_few<N>(x + place(next)), next_b = load_few<N>(x + place(next) + half);
#pragma unroll
      for (int j = 0; j < N; j++) {
        float ax = to_float(a.x[j]), bx = to_float(b.x[j]), c = cosines[at + j], s = sines[at + j];
        to_a.x[j] = from_float<T>(ax * c - bx * s);
        to_b.x[j] = from_float<T>(bx * c + ax * s);
      }
      store_few<N>(out + place(item), to_a);
      store_few<N>(out + place(item) + half, to_b);
      a = next_a, b = next_b;
    }
  }
  if (copies) store_few<N>(out + turned + thread * N, rest);
  if (out == x) return;
  for (int64_t c = turned + (int64_t)(thread + threads) * N; c < cols; c += (int64_t)threads * N) store_few<N>(out + c, load_few<N>(x + c));
}

template <class T> DEV void rotary(T* out, const T* x, int positions, int cols, int heads, int width, double per_pair, Slowing slowing, float sign) {
  constexpr int N = Pack<T>::N;
  if (width / 2 % N == 0 && cols % N == 0 && aligned16(out) && aligned16(x)) turn<T, N>(out, x, positions, cols, heads, width, per_pair, slowing, sign);
  else turn<T, 1>(out, x, positions, cols, heads, width, per_pair, slowing, sign);
}

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(4)) void rotary_f32(float* out, const float* x, int positions, int cols, int heads, int width, double per_pair, double slowed, double constant, double slope, float sign) {
  rotary(out, x, positions, cols, heads, width, per_pair, {slowed, constant, slope}, sign);
}
GPU_EXPORT(rotary_f32)

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(4)) void rotary_bf16(bf16* out, const bf16* x, int positions, int cols, int heads, int width, double per_pair, double slowed, double constant, double slope, float sign) {
  rotary(out, x, positions, cols, heads, width, per_pair, {slowed, constant, slope}, sign);
}
GPU_EXPORT(rotary_bf16)
