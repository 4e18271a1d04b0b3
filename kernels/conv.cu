// Convolution on the plain arithmetic units, for f32 at full precision: three products with a gathered matrix that is
// never written (implicit GEMM; Chetlur et al. 2014, arXiv:1410.0759; places of elements in gpu/conv.cuh).
//   x, d_x (N, C, H, W), weight, d_weight (O, C, kh, kw), out, d_out (N, O, H', W'), bias (O); contiguous.
//   out[n,o,p,q]      = bias[o] + sum over c, i, j of weight[o,c,i,j] * x[n, c, p * stride + i - padding, q * stride + j - padding]
//   d_x[n,c,h,w]      = sum over o and the taps (i, j) that reach (h, w) of weight[o,c,i,j] * d_out[n,o,p,q]
//   d_weight[o,c,i,j] = sum over n, p, q of d_out[n,o,p,q] * x[n, c, p * stride + i - padding, q * stride + j -
//   padding]
// Overwrites out and d_x; d_weight is overwritten, or added to as adds_to says. With `partials`
// (parts, O, C, kh, kw), blockIdx.y is a part of the pixels, `part_pixels` each, and conv2d_grad_weight_sum adds the
// parts in order. Deterministic: an element is one chain of fused multiply-adds over the steps in their order, and
// parts depend on sizes alone.
//
// Launch: tiles of 64 rows x 128 columns (forward: channels x pixels; weight gradient: output channels x taps), 128
// threads; the data gradient has as many tiles for each class as its largest has. Tiles of 16 steps pass through two
// buffers in shared memory, k outermost; while one is multiplied, the next is on its way through registers, and 16
// threads work out the places of the one after. A thread owns 8 x 8 elements as four squares 4 x 4, 32 rows and 64
// columns apart; a warp is 4 threads down and 8 across, so that each of its 16-byte shared reads is one pass over the
// banks. Neighbouring threads load along the pixels of a row of the image.
//
// Cost: 16 steps take 12 KB in for 262,144 flop (21 flop a byte of L2 traffic). Of about 1,500 instructions for them
// 1,024 are multiply-adds and 96 shared reads, without conflicts; the rest finds, checks and fetches 24 elements a
// thread. 3 blocks a multiprocessor (168 registers, 28 KB) hide the fetches, so that issue slots are the bound: 65 % of
// an H200's 60 TFLOP/s may be had.
#include "gpu.cuh"
#include "gpu/conv.cuh"

namespace {

constexpr int ROWS = 64, COLUMNS = 128, STEPS = 16, THREADS = 128;
// Rows of shared memory are 16 bytes longer than the tile, which spreads stores that run along the steps over the
// banks.
constexpr int SKEW = 4;

struct Shared {
  float plain[2][STEPS][ROWS + SKEW];
  float gathered[2][STEPS][COLUMNS + SKEW];
  Place columns[COLUMNS];
  Place steps[2][STEPS];
  int64_t plain_steps[2][STEPS];
};

// The operands of one tile. `Steps` gives the place of a step in the gathered matrix and its offset in the plain one.
template <class T, class Steps> struct Product {
  const T* plain;
  const T* source;
  int64_t row_pitch;             // of the plain matrix, in elements
  int first_row, rows;
  int height, width;             // of the images that are gathered from
  int64_t begin, end;            // steps
  Steps steps;
};

// This thread's first row and column; element (i, j) of its sums is 4 * (i / 4) * 8 rows and 4 * (j / 4) * 16 columns
// further.
DEV int own_row(int i) { return threadIdx.x % 32 / 8 * 4 + threadIdx.x / 64 * 16 + i % 4 + i / 4 * 32; }
DEV int own_column(int j) { return (threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8) * 4 + j % 4 + j / 4 * 64; }

// sum += plain * gathered over the product's steps. `shared.columns` is filled; it may be changed once this returns.
// ALONG_STEPS: neighbouring steps are neighbours in memory (weight gradient); otherwise neighbouring columns are.
template <bool ALONG_STEPS, class T, class Steps>
DEV void multiply(float (&sum)[8][8], Shared& shared, const Product<T, Steps>& product) {
  int thread = threadIdx.x;
  float plain[ROWS * STEPS / THREADS], gathered[COLUMNS * STEPS / THREADS];
  // The rows of the plain matrix that this thread loads: every 8th.
  int own = product.first_row + thread / STEPS, rows_left = product.rows - own;
  const T* plain_rows = product.plain + own * product.row_pitch;
  int64_t rows_pitch = product.row_pitch * (THREADS / STEPS);
  auto place_steps = [&](int64_t first, int buffer) {
    if (thread >= STEPS) return;
    int64_t step = first + thread;
    Place place = {0, NOWHERE, 0};
    int64_t offset = -1;
    if (step < product.end) product.steps.at(step, place, offset);
    shared.steps[buffer][thread] = place;
    shared.plain_steps[buffer][thread] = offset;
  };
  auto load = [&](int buffer) {
    int64_t offset = shared.plain_steps[buffer][thread % STEPS];
    const T* from = plain_rows + offset;
#pragma unroll
    for (int i = 0; i < ROWS * STEPS / THREADS; i++) {
      plain[i] = offset >= 0 && i * (THREADS / STEPS) < rows_left ? to_float(*from) : 0.0f;
      from += rows_pitch;
    }
    // One of the two places stays the same: its part of the address is added first.
    Place same = ALONG_STEPS ? shared.steps[buffer][thread % STEPS] : shared.columns[thread];
    from = product.source + same.offset;
#pragma unroll
    for (int i = 0; i < COLUMNS * STEPS / THREADS; i++) {
      Place other = ALONG_STEPS ? shared.columns[thread / STEPS + i * (THREADS / STEPS)] : shared.steps[buffer][i];
      gathered[i] = inside(same, other, product.height, product.width) ? to_float(from[other.offset]) : 0.0f;
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < ROWS * STEPS / THREADS; i++)
      shared.plain[buffer][thread % STEPS][thread / STEPS + i * (THREADS / STEPS)] = plain[i];
#pragma unroll
    for (int i = 0; i < COLUMNS * STEPS / THREADS; i++) {
      if (ALONG_STEPS) shared.gathered[buffer][thread % STEPS][thread / STEPS + i * (THREADS / STEPS)] = gathered[i];
      else shared.gathered[buffer][i][thread] = gathered[i];
    }
  };

  place_steps(product.begin, 0);
  __syncthreads();
  load(0);
  store(0);
  place_steps(product.begin + STEPS, 1);
  __syncthreads();
  int buffer = 0;
  for (int64_t step = product.begin; step < product.end; step += STEPS, buffer ^= 1) {
    bool more = step + STEPS < product.end;
    if (more) load(buffer ^ 1);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      float a[8], b[8];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float4 rows = *reinterpret_cast<const float4*>(&shared.plain[buffer][k][own_row(half * 4)]);
        float4 columns = *reinterpret_cast<const float4*>(&shared.gathered[buffer][k][own_column(half * 4)]);
        a[half * 4] = rows.x, a[half * 4 + 1] = rows.y, a[half * 4 + 2] = rows.z, a[half * 4 + 3] = rows.w;
        b[half * 4] = columns.x, b[half * 4 + 1] = columns.y, b[half * 4 + 2] = columns.z, b[half * 4 + 3] = columns.w;
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    if (more) {
      store(buffer ^ 1);
      place_steps(step + 2 * STEPS, buffer);
    }
    __syncthreads();
  }
}

// Steps of the forward pass and the data gradient: a channel of the source and a tap, taps innermost, as the weight
// lies.
struct GatherSteps {
  Gather gather;
  int64_t channel_pitch;         // of the weight, for a channel of the source
  DEV void at(int64_t step, Place& place, int64_t& offset) const {
    const Gather& g = gather;
    int taps = g.taps_h * g.taps_w;
    int channel = (int)step / taps, tap = (int)step % taps, i = tap / g.taps_w, j = tap % g.taps_w;
    place = {(int64_t)channel * g.source_height * g.source_width + g.sign * ((int64_t)i * g.source_width + j),
             g.sign * i, g.sign * j};
    offset = channel * channel_pitch + g.tap(i, j);
  }
};

// GRAD: target is d_x and source d_out; else out and x.
template <bool GRAD, class T>
DEV void gather_product(T* target, const T* source, const T* weight, const T* bias, const ConvSizes& sizes) {
  GPU_SHARED(Shared, shared, );
  GatherTile tile = gather_tile<GRAD>(sizes, ROWS, COLUMNS);
  const Gather& g = tile.gather;
  if (tile.pixel >= g.columns()) return;
  int thread = threadIdx.x;
  int64_t own = tile.pixel + thread, image = (int64_t)g.source_channels * g.source_height * g.source_width;
  Pixel pixel = pixel_at(own, g.rows, g.cols);
  int row = pixel.row * g.scale + g.row, col = pixel.col * g.scale + g.col;
  bool there = own < g.columns();
  shared.columns[thread] = {pixel.image * image + (int64_t)row * g.source_width + col, there ? row : NOWHERE, col};

  int64_t filter = (int64_t)sizes.in_channels * g.taps;
  Product<T, GatherSteps> product = {weight,
                                     source,
                                     GRAD ? g.taps : filter,
                                     tile.channel,
                                     g.channels,
                                     g.source_height,
                                     g.source_width,
                                     0,
                                     (int64_t)g.source_channels * g.taps_h * g.taps_w,
                                     {g, GRAD ? filter : g.taps}};
  float sum[8][8] = {};
  multiply<false>(sum, shared, product);

  shared.columns[thread] = {g.target(pixel), there ? 0 : NOWHERE, 0};
  __syncthreads();
  int64_t plane = (int64_t)g.height * g.width;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int channel = tile.channel + own_row(i);
    if (channel >= g.channels) continue;
    float add = bias ? to_float(bias[channel]) : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      Place at = shared.columns[own_column(j)];
      if (at.row == 0) target[at.offset + channel * plane] = from_float<T>(sum[i][j] + add);
    }
  }
}

// Steps of the weight gradient: output pixels.
struct PixelSteps {
  ConvSizes sizes;
  DEV void at(int64_t step, Place& place, int64_t& offset) const {
    const ConvSizes& s = sizes;
    Pixel pixel = pixel_at(step, s.out_height, s.out_width);
    int row = pixel.row * s.stride - s.padding, col = pixel.col * s.stride - s.padding;
    place = {(pixel.image * s.in_channels * s.height + row) * s.width + col, row, col};
    offset = (pixel.image * s.out_channels * s.out_height + pixel.row) * s.out_width + pixel.col;
  }
};

template <class T> DEV void weight_product(float* d_weight, float* partials, const T* d_out, const T* x, const Now* now,
                                           const ConvSizes& s, int64_t part_pixels, int accumulator) {
  GPU_SHARED(Shared, shared, );
  int thread = threadIdx.x, taps = s.kernel_h * s.kernel_w, columns = s.in_channels * taps;
  int row_tiles = (s.out_channels + ROWS - 1) / ROWS;
  int first_row = blockIdx.x % row_tiles * ROWS, first_column = blockIdx.x / row_tiles * COLUMNS;
  int own = first_column + thread, channel = own / taps, i = own % taps / s.kernel_w, j = own % s.kernel_w;
  shared.columns[thread] = {((int64_t)channel * s.height + i) * s.width + j, own < columns ? i : NOWHERE, j};

  int64_t pixels = (int64_t)s.batch * s.out_height * s.out_width, begin = blockIdx.y * part_pixels;
  Product<T, PixelSteps> product = {d_out,
                                    x,
                                    (int64_t)s.out_height * s.out_width,
                                    first_row,
                                    s.out_channels,
                                    s.height,
                                    s.width,
                                    begin,
                                    begin + part_pixels < pixels ? begin + part_pixels : pixels,
                                    {s}};
  float sum[8][8] = {};
  multiply<true>(sum, shared, product);

  float* to = partials ? partials + (int64_t)blockIdx.y * s.out_channels * columns : d_weight;
  bool add = !partials && adds_to(accumulator, now);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = first_row + own_row(i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int column = first_column + own_column(j);
      if (row >= s.out_channels || column >= columns) continue;
      float* at = to + (int64_t)row * columns + column;
      *at = add ? *at + sum[i][j] : sum[i][j];
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv2d_forward_f32(float* out, const float* x, const float* weight, const float* bias, const ConvSizes sizes) {
  gather_product<false>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_f32)

extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv2d_grad_input_f32(float* d_x, const float* d_out, const float* weight, const ConvSizes sizes) {
  gather_product<true>(d_x, d_out, weight, static_cast<const float*>(nullptr), sizes);
}
GPU_EXPORT(conv2d_grad_input_f32)

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    conv2d_grad_weight_f32(float* d_weight, float* partials, const float* d_out, const float* x, const Now* now,
                           const ConvSizes sizes, int64_t part_pixels, int accumulator) {
  weight_product(d_weight, partials, d_out, x, now, sizes, part_pixels, accumulator);
}
GPU_EXPORT(conv2d_grad_weight_f32)
