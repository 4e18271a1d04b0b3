// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the pairs of Llama's weights.
//   x, out (B, T, cols) f32 or bf16, whose rows begin with `heads` heads of `width`. With a = x[i] and b = x[i +
//   width/2] of a head and the angle p = t base^(-2i/width) at position t: out[i] = a cos p - b sin p, out[i + width/2]
//   = b cos p + a sin p. The rest of a row is copied.
//   per_pair is -2/width log2(base). Of a frequency f = base^(-2i/width) the share k = clamp(constant + slope f + along
//   i, 0, 1) stays and the rest is multiplied by `slowed`, for long contexts (graph::RotaryScaling). Cosines are
//   multiplied by `cos_scale` and sines by `sin_scale`: what is turned is stretched by them, and where they have
//   opposite signs it is turned back, which is the gradient.
// Overwrites out, which may be x. A block takes the rows of one position in `together` sequences, or of `run` positions
// in all sequences where these are few; it first makes the cosines and sines of up to 256 pairs and positions, once for
// all its sequences. A thread has a 16-byte pack of either half of a head, or two packs of what is copied, and goes
// over the block's rows, the next one's packs on their way while it turns what it has: its first ones while angles are
// made. Angles are taken in f64 and reduced to part of a turn before they are rounded: at t = 10^5 an f32 angle would
// be off by 4e-3. Deterministic: nothing is summed.
// Of llama_1b's 3072 columns of bf16 a block has 192 threads of 48 registers, each 32 bytes or more on their way: 6 KB
// a block, 42 KB a multiprocessor that holds seven, where 20 KB hide 1.4 us of latency. Before a block's first store
// lie its launch and its angles, some 2 us: with a row a block that was most of its life, and an H200 made 68 % of the
// copy rate; blocks have up to four rows, as long as there are 12 blocks for each multiprocessor
// (device/cuda/rotary.rs), so that fewer rows, as of one short sequence, are spread out as before.
// Bytes: x and out once; where out is x, the heads alone. Expected: 90 % of the copy rate.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

constexpr int THREADS = 256;  // at most
constexpr int ANGLES = 256;   // that are kept at once: of so many pairs, at one position or several

// Cosine and sine of 2 pi turns, by their series within an eighth of a turn of a quarter's multiple: exact to f32's
// rounding, and without the stack that the library's take for large angles.
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

struct Slowing { double slowed, constant, slope, along; };
// As graph::Rotation::frequency computes it.
DEV double frequency(int pair, double per_pair, Slowing slowing) {
  double f = exp2(pair * per_pair), kept = slowing.constant + slowing.slope * f + slowing.along * pair;
  kept = kept < 0 ? 0 : kept > 1 ? 1 : kept;
  return f * (kept + (1 - kept) * slowing.slowed);
}

// Sizes, and how a block's rows are chosen: `together` sequences, `run` positions. One of them is 1, or all sequences
// are taken together.
struct Sizes { int batch, positions, cols, heads, width, together, run; };

// N neighbours in shared memory, where they are aligned.
template <int N> DEV void load_angles(float (&to)[N], const float* from) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      Pack<float> four = load_pack(from + i);
#pragma unroll
      for (int e = 0; e < 4; e++) to[i + e] = four.x[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = from[i];
  }
}

// N elements at a time: a pack, or one where rows, heads or addresses are no multiple of it.
template <class T, int N>
DEV void turn(T* out, const T* x, const Sizes& s, double per_pair, Slowing slowing, Direction scale) {
  GPU_SHARED(float, cosines, [ANGLES]);
  GPU_SHARED(float, sines, [ANGLES]);
  int half = s.width / 2, turned = s.heads * s.width, thread = threadIdx.x, threads = blockDim.x;
  int groups = (s.batch + s.together - 1) / s.together, block = blockIdx.x;
  int sequence = block % groups * s.together, position = block / groups * s.run;
  int run = s.positions - position < s.run ? s.positions - position : s.run;
  int rows = (s.batch - sequence < s.together ? s.batch - sequence : s.together) * run;
  int64_t start = ((int64_t)sequence * s.positions + position) * s.cols;
  for (int first = 0; first == 0 || first < half; first += ANGLES) {
    int pairs = half - first < ANGLES ? half - first : ANGLES, packs = pairs / N, turns = s.heads * packs;
    // Pieces of what is copied: an item is two, `copies` apart.
    int copies = out != x && first == 0 ? (s.cols - turned + 2 * N - 1) / (2 * N) : 0, items = turns + copies;
    // Where in a row an item begins, how much further on its other half lies, and whether that is there.
    auto place = [&](int item) {
      return item < turns ? item / packs * s.width + first + item % packs * N : turned + (item - turns) * N;
    };
    auto apart = [&](int item) { return item < turns ? half : copies * N; };
    auto whole = [&](int item) { return item < turns || turned + (item - turns + copies) * N < s.cols; };
    int item = thread;
    int64_t at = start;
    Few<T, N> a = {}, b = {};
    if (item < items) {
      at += place(item);
      a = load_few<N>(x + at);
      if (whole(item)) b = load_few<N>(x + at + apart(item));
    }
    if (first > 0) __syncthreads();
    for (int i = thread; i < pairs * run; i += threads) {
      Direction d =
          direction((position + i / pairs) * (frequency(first + i % pairs, per_pair, slowing) * 0.15915494309189535));
      cosines[i] = scale.cos * d.cos, sines[i] = scale.sin * d.sin;
    }
    __syncthreads();
    for (; item < items; item += threads) {
      bool turning = item < turns, both = whole(item);
      int other = apart(item), angle = turning ? item % packs * N : 0;
      for (int row = 0, along = 0; row < rows; row++) {
        Few<T, N> next_a = {}, next_b = {};
        int64_t next = at + s.cols;
        int turns_by = angle + along * pairs;
        // From the last position to the first of the next sequence.
        if (++along == run) along = 0, next += (int64_t)(s.positions - run) * s.cols;
        if (row + 1 < rows) {
          next_a = load_few<N>(x + next);
          if (both) next_b = load_few<N>(x + next + other);
        } else if (item + threads < items) {
          next = start + place(item + threads);
          next_a = load_few<N>(x + next);
          if (whole(item + threads)) next_b = load_few<N>(x + next + apart(item + threads));
        }
        if (turning) {
          float c[N], s[N];
          load_angles(c, cosines + turns_by);
          load_angles(s, sines + turns_by);
#pragma unroll
          for (int j = 0; j < N; j++) {
            float ax = to_float(a.x[j]), bx = to_float(b.x[j]);
            a.x[j] = from_float<T>(ax * c[j] - bx * s[j]);
            b.x[j] = from_float<T>(bx * c[j] + ax * s[j]);
          }
        }
        store_few<N>(out + at, a);
        if (both) store_few<N>(out + at + other, b);
        at = next, a = next_a, b = next_b;
      }
    }
  }
}

template <class T>
DEV void rotary(T* out, const T* x, const Sizes& s, double per_pair, Slowing slowing, Direction scale) {
  constexpr int N = Pack<T>::N;
  if (s.width / 2 % N == 0 && s.cols % N == 0 && aligned16(out) && aligned16(x))
    turn<T, N>(out, x, s, per_pair, slowing, scale);
  else turn<T, 1>(out, x, s, per_pair, slowing, scale);
}

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(4)) void rotary_f32(
    float* out, const float* x, int batch, int positions, int cols, int heads, int width, int together, int run,
    double per_pair, double slowed, double constant, double slope, double along, float cos_scale, float sin_scale) {
  rotary(out, x, {batch, positions, cols, heads, width, together, run}, per_pair, {slowed, constant, slope, along},
         {cos_scale, sin_scale});
}
GPU_EXPORT(rotary_f32)

extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(5)) void rotary_bf16(
    bf16* out, const bf16* x, int batch, int positions, int cols, int heads, int width, int together, int run,
    double per_pair, double slowed, double constant, double slope, double along, float cos_scale, float sin_scale) {
  rotary(out, x, {batch, positions, cols, heads, width, together, run}, per_pair, {slowed, constant, slope, along},
         {cos_scale, sin_scale});
}
GPU_EXPORT(rotary_bf16)
