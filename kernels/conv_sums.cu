// Sums of a convolution's gradients over many blocks: the bias gradient, and the parts of the weight gradient.
//   d_out (N, O, positions) f32 or bf16; d_bias (O), d_weight (O, C, taps) f32; partial sums f32.
//   d_bias[o]       = sum over n, p of d_out[n,o,p]
//   d_weight[o,c,t] = sum over parts of partials[part][o][c * channel_pitch + t * tap_pitch]
// d_bias and d_weight are overwritten, or added to as adds_to says.
// Deterministic: the order of every sum depends on sizes alone.
//
// Bias: a block of 256 threads sums `part_elems` values of one channel (blockIdx.x = channel * parts + part), 16 bytes
// a load where planes are whole packs; threads, then lanes by halves, then warps in order. With several parts, a warp a
// channel adds them.
// Weight: a thread an element, parts in order, 8 loads in flight; where channels follow each other in the parts, a warp
// 8 channels by 4 taps. All of it is bound by memory: one read of d_out, or of the partial sums, which the split keeps
// below 34 MB, so that they come from the L2 cache.
#include "gpu.cuh"
#include "gpu/conv.cuh"

namespace {

constexpr int THREADS = 256;

DEV void put(float* at, float sum, const Now* now, int accumulator) {
  *at = adds_to(accumulator, now) ? *at + sum : sum;
}

// The sum of values [begin, end) of a channel, counted over images and then positions, in units of PACK values.
template <int PACK, class T>
DEV float channel_sum(const T* d_out, int channel, int channels, int positions, int64_t begin, int64_t end) {
  int plane = positions / PACK, apart = THREADS / plane, rest = THREADS % plane;
  Divided at = divided(begin + threadIdx.x, plane);
  int64_t image = at.quotient;
  int position = at.remainder;
  float sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
    const T* from = d_out + ((image * channels + channel) * plane + position) * PACK;
    if (PACK == 1) {
      sum += to_float(*from);
    } else {
      Pack<T> pack = load_pack(from);
#pragma unroll
      for (int k = 0; k < Pack<T>::N; k++) sum += to_float(pack.x[k]);
    }
    image += apart, position += rest;
    if (position >= plane) position -= plane, image++;
  }
  return sum;
}

template <class T>
DEV void grad_bias(float* d_bias, float* partials, const T* d_out, const Now* now, int batch, int channels,
                   int positions, int64_t part_elems, int accumulator) {
  GPU_SHARED(float, warps, [THREADS / 32]);
  constexpr int PACK = Pack<T>::N;
  int64_t elems = (int64_t)batch * positions, parts = (elems + part_elems - 1) / part_elems;
  if (parts == 0) parts = 1;
  int channel = (int)(blockIdx.x / parts);
  int64_t begin = blockIdx.x % parts * part_elems, end = begin + part_elems < elems ? begin + part_elems : elems;
  float sum = 0;
  if (begin < end) {
    sum = positions % PACK == 0 ? channel_sum<PACK>(d_out, channel, channels, positions, begin / PACK, end / PACK)
                                : channel_sum<1>(d_out, channel, channels, positions, begin, end);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = warps[0];
  for (int warp = 1; warp < THREADS / 32; warp++) sum += warps[warp];
  if (partials) partials[blockIdx.x] = sum;
  else put(d_bias + channel, sum, now, accumulator);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    conv2d_grad_bias_f32(float* d_bias, float* partials, const float* d_out, const Now* now, int batch, int channels,
                         int positions, int64_t part_elems, int accumulator) {
  grad_bias(d_bias, partials, d_out, now, batch, channels, positions, part_elems, accumulator);
}
GPU_EXPORT(conv2d_grad_bias_f32)

extern "C" __global__ void __launch_bounds__(THREADS)
    conv2d_grad_bias_bf16(float* d_bias, float* partials, const bf16* d_out, const Now* now, int batch, int channels,
                          int positions, int64_t part_elems, int accumulator) {
  grad_bias(d_bias, partials, d_out, now, batch, channels, positions, part_elems, accumulator);
}
GPU_EXPORT(conv2d_grad_bias_bf16)

// partials (channels, parts) -> d_bias.
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_grad_bias_sum(float* d_bias, const float* partials, const Now* now, int channels, int parts, int accumulator) {
  int channel = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (channel >= channels) return;
  float sum = 0;
  for (int part = threadIdx.x % 32; part < parts; part += 32) sum += partials[(int64_t)channel * parts + part];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) put(d_bias + channel, sum, now, accumulator);
}
GPU_EXPORT(conv2d_grad_bias_sum)

// partials (parts, out_channels, row_pitch) -> d_weight.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv2d_grad_weight_sum(float* d_weight, const float* partials, const Now* now, int out_channels, int in_channels,
                           int taps, int64_t row_pitch, int channel_pitch, int tap_pitch, int parts, int accumulator) {
  int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x, row;
  int channel, tap;
  if (tap_pitch == 1 || taps == 1) {
    Divided pair = divided(index, taps), whole = divided(pair.quotient, in_channels);
    row = whole.quotient, channel = whole.remainder, tap = pair.remainder;
  } else {
    // Channels follow each other in the parts and taps in the gradient: 8 of those by 4 of these a warp, so that it
    // reads whole sectors.
    Divided taps_of = divided(index / 32, (taps + 3) / 4),
            channels_of = divided(taps_of.quotient, (in_channels + 7) / 8);
    row = channels_of.quotient, channel = channels_of.remainder * 8 + (int)(index % 8),
    tap = taps_of.remainder * 4 + (int)(index / 8 % 4);
  }
  if (row >= out_channels || channel >= in_channels || tap >= taps) return;
  index = (row * in_channels + channel) * taps + tap;
  const float* from = partials + row * row_pitch + (int64_t)channel * channel_pitch + (int64_t)tap * tap_pitch;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; part++) sum += from[part * out_channels * row_pitch];
  put(d_weight + index, sum, now, accumulator);
}
GPU_EXPORT(conv2d_grad_weight_sum)
