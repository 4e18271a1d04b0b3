// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the pairs of Llama's weights.
//   x, out (B, T, cols) f32 or bf16, whose rows begin with `heads` heads of `width`. With a = x[i] and b = x[i + width/2] of a head and the angle
//   p = t base^(-2i/width) at position t: out[i] = a cos p - b sin p, out[i + width/2] = b cos p + a sin p. The rest of a row is copied.
//   per_pair is -2/width log2(base). With sign -1 the angles are negative: the turn back, which is the gradient.
// Overwrites out, which may be x. One block a row; its threads first make the cosines and sines of up to 256 pairs, then share out the
// heads' 16-byte packs of those. Angles are taken in f64 and reduced to part of a turn before they are rounded: at t = 10^5 an f32 angle
// would be off by 4e-3. Deterministic: nothing is summed.
// Bytes: x and out once; where out is x, the heads alone. Expected: 85 % of the copy rate.
#include "gpu.cuh"

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

template <class T, int N> struct alignas(N * sizeof(T)) Some { T x[N]; };

// N elements at a time: a pack, or one where rows, heads or addresses are no multiple of it.
template <class T, int N>
DEV void turn(T* out, const T* x, int positions, int64_t cols, int heads, int width, double per_pair, float sign) {
  GPU_SHARED(float, cosines, [PAIRS]);
  GPU_SHARED(float, sines, [PAIRS]);
  int64_t row = blockIdx.x, turned = (int64_t)heads * width;
  int position = (int)(row % positions), half = width / 2, thread = threadIdx.x, threads = blockDim.x;
  out += row * cols, x += row * cols;
  for (int first = 0; first < half; first += PAIRS) {
    int pairs = half - first < PAIRS ? half - first : PAIRS, packs = pairs / N;
    if (first > 0) __syncthreads();
    for (int i = thread; i < pairs; i += threads) {
      Direction d = direction(position * (exp2((first + i) * per_pair) * 0.15915494309189535));
      cosines[i] = d.cos, sines[i] = sign * d.sin;
    }
    __syncthreads();
    for (int64_t item = thread; item < (int64_t)heads * packs; item += threads) {
      int at = (int)(item % packs) * N;
      int64_t a = item / packs * width + first + at, b = a + half;
      Some<T, N> va = *reinterpret_cast<const Some<T, N>*>(x + a), vb = *reinterpret_cast<const Some<T, N>*>(x + b);
#pragma unroll
      for (int j = 0; j < N; j++) {
        float ax = to_float(va.x[j]), bx = to_float(vb.x[j]), c = cosines[at + j], s = sines[at + j];
        va.x[j] = from_float<T>(ax * c - bx * s);
        vb.x[j] = from_float<T>(bx * c + ax * s);
      }
      *reinterpret_cast<Some<T, N>*>(out + a) = va;
      *reinterpret_cast<Some<T, N>*>(out + b) = vb;
    }
  }
  if (out == x) return;
  for (int64_t c = turned + thread * N; c < cols; c += threads * N)
    *reinterpret_cast<Some<T, N>*>(out + c) = *reinterpret_cast<const Some<T, N>*>(x + c);
}

template <class T> DEV void rotary(T* out, const T* x, int positions, int cols, int heads, int width, double per_pair, float sign) {
  constexpr int N = Pack<T>::N;
  if (width / 2 % N == 0 && cols % N == 0 && aligned16(out) && aligned16(x)) turn<T, N>(out, x, positions, cols, heads, width, per_pair, sign);
  else turn<T, 1>(out, x, positions, cols, heads, width, per_pair, sign);
}

extern "C" __global__ __launch_bounds__(THREADS) void rotary_f32(float* out, const float* x, int positions, int cols, int heads, int width, double per_pair, float sign) {
  rotary(out, x, positions, cols, heads, width, per_pair, sign);
}
GPU_EXPORT(rotary_f32)

extern "C" __global__ __launch_bounds__(THREADS) void rotary_bf16(bf16* out, const bf16* x, int positions, int cols, int heads, int width, double per_pair, float sign) {
  rotary(out, x, positions, cols, heads, width, per_pair, sign);
}
GPU_EXPORT(rotary_bf16)
