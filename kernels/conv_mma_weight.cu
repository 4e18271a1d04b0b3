// Weight gradient of a convolution in bf16 on the tensor cores: implicit GEMM over the output's pixels, with channels last (places of
// elements in gpu/conv.cuh, tiles in gpu/conv_mma.cuh).
//   d_out (N, H', W', O'), x (N, H, W, C') bf16, written by conv_layout.cu; C' and O' are C and O rounded up to 8, the rest 0.
//   partials[part][o][tap * C' + c] = sum over the part's pixels of d_out[pixel][o] * x[pixel under tap][c]    f32 (parts, O, kh * kw * C')
// blockIdx.y is a part of `part_pixels` pixels, a multiple of 32; conv2d_grad_weight_sum adds the parts in order and puts the taps last.
// Overwrites partials. Deterministic: pixels in order, 16 at a time, and parts depend on sizes alone.
//
// Launch: tiles of 128 output channels x 128 columns, or 64 x 256 for few output channels, one block of 4 warps each. 32 pixels at a time pass through a
// ring of 4 stages in shared memory, pixels outermost; ldmatrix transposes both operands on the way to the registers. A column
// group of 8 channels under one tap belongs to one thread for the whole of the product, and the places of the pixels are worked out by
// one warp in turn, a stage ahead, so that a copy costs one shared read, a comparison for each axis and an addition.
//
// Cost: as conv_mma.cu, 64 flop a byte of L2 traffic and 2 blocks a multiprocessor; partial sums add 8 bytes for each element and
// part, below 1 % of the traffic from 2,000 pixels a part on. 320 of the 400 TFLOP/s of mma.sync are to be expected on large layers.
#include "gpu.cuh"

constexpr int STAGES = 4, STAGE_PIXELS = 32, THREADS = 128;

using Square = WarpTiling<2, 2, 64, 64>;
using Flat = WarpTiling<1, 4, 64, 64>;

template <class Tiling>
DEV void weight_product(float* partials, const bf16* d_out, const bf16* x, const ConvSizes& s, int64_t part_pixels) {
  GPU_DYNAMIC(unsigned char, shared);
  GPU_SHARED(Place, places, [2][STAGE_PIXELS]);
  constexpr int PLAIN_ROW = Tiling::ROWS * 2, GATHERED_ROW = Tiling::COLUMNS * 2, PLAIN_BYTES = STAGE_PIXELS * PLAIN_ROW;
  constexpr int STAGE_BYTES = PLAIN_BYTES + STAGE_PIXELS * GATHERED_ROW;
  constexpr int PLAIN_GROUPS = Tiling::ROWS / GROUP, GATHERED_GROUPS = Tiling::COLUMNS / GROUP;
  constexpr int PLAIN_PASS = THREADS / PLAIN_GROUPS, GATHERED_PASS = THREADS / GATHERED_GROUPS;

  int thread = threadIdx.x, lane = thread % 32, groups = groups_of(s.in_channels), out_groups = groups_of(s.out_channels);
  int pitch = groups * GROUP, out_pitch = out_groups * GROUP, columns = s.kernel_h * s.kernel_w * groups;
  int row_tiles = (s.out_channels + Tiling::ROWS - 1) / Tiling::ROWS;
  int first_row = blockIdx.x % row_tiles * Tiling::ROWS, first_column = blockIdx.x / row_tiles * Tiling::COLUMNS;
  int64_t pixels = (int64_t)s.batch * s.out_height * s.out_width, begin = blockIdx.y * part_pixels;
  int64_t end = begin + part_pixels < pixels ? begin + part_pixels : pixels;
  int steps = begin < end ? (int)((end - begin + STAGE_PIXELS - 1) / STAGE_PIXELS) : 0;

  auto place_pixels = [&](int step) {
    int64_t index = begin + (int64_t)step * STAGE_PIXELS + lane;
    Pixel p = pixel_at(index, s.out_height, s.out_width);
    int row = p.row * s.stride - s.padding, col = p.col * s.stride - s.padding;
    places[step % 2][lane] = {((p.image * s.height + row) * s.width + col) * pitch, index < end ? row : NOWHERE, col};
  };
  int plain_group = thread % PLAIN_GROUPS, column = first_column / GROUP + thread % GATHERED_GROUPS;
  bool rows_there = first_row / GROUP + plain_group < out_groups;
  const bf16* plain_from = d_out + first_row + plain_group * GROUP;
  int tap = column / groups, i = tap / s.kernel_w, j = tap % s.kernel_w;
  Place own = {((int64_t)i * s.width + j) * pitch + column % groups * GROUP, column < columns ? i : NOWHERE, j};
  auto load = [&](int step) {
    unsigned char* to = shared + step % STAGES * STAGE_BYTES;
    int64_t first = begin + (int64_t)step * STAGE_PIXELS;
#pragma unroll
    for (int pass = 0; pass < STAGE_PIXELS / PLAIN_PASS; pass++) {
      int row = thread / PLAIN_GROUPS + pass * PLAIN_PASS;
      bool there = rows_there && first + row < end;
      cp_async16_or_zero(to + wide_at(row, plain_group, PLAIN_ROW), there ? plain_from + (first + row) * out_pitch : d_out, there);
    }
#pragma unroll
    for (int pass = 0; pass < STAGE_PIXELS / GATHERED_PASS; pass++) {
      int row = thread / GATHERED_GROUPS + pass * GATHERED_PASS;
      Place pixel = places[step % 2][row];
      bool there = inside(own, pixel, s.height, s.width);
      cp_async16_or_zero(to + PLAIN_BYTES + wide_at(row, thread % GATHERED_GROUPS, GATHERED_ROW), there ? x + own.offset + pixel.offset : x, there);
    }
  };

  WarpSum<Tiling> sum = {};
  for (int step = 0; step < STAGES - 1; step++) {
    if (thread < 32 && step < steps) place_pixels(step);
    __syncthreads();
    if (step < steps) load(step);
    cp_async_commit();
  }
  if (thread < 32 && STAGES - 1 < steps) place_pixels(STAGES - 1);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();                                         // this stage is full, the one before it is free, places are known
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit();
    if (thread / 32 == step % (THREADS / 32) && step + STAGES < steps) place_pixels(step + STAGES);
    const unsigned char* plain = shared + step % STAGES * STAGE_BYTES;
    const unsigned char* gathered = plain + PLAIN_BYTES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum.template multiply<true>(
          [&](int i) {
            int row = half * 16 + lane / 16 * 8 + lane % 8;
            return plain + wide_at(row, Tiling::first_row() / GROUP + i * 2 + lane / 8 % 2, PLAIN_ROW);
          },
          [&](int j) { return gathered + wide_at(half * 16 + lane % 16, Tiling::first_column() / GROUP + j * 2 + lane / 16, GATHERED_ROW); });
    }
  }
  cp_async_wait<0>();

  int64_t row_pitch = (int64_t)columns * GROUP;
  float* to = partials + blockIdx.y * s.out_channels * row_pitch;
#pragma unroll
  for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
#pragma unroll
    for (int j = 0; j < Tiling::WARP_COLUMNS / 8; j++) {
#pragma unroll
      for (int below = 0; below < 2; below++) {
        int row = first_row + Tiling::first_row() + i * 16 + lane / 4 + below * 8;
        int at = first_column + Tiling::first_column() + j * 8 + lane % 4 * 2;
        if (row >= s.out_channels || at >= row_pitch) continue;
        *reinterpret_cast<float2*>(to + row * row_pitch + at) = {sum.piece[i][j][below * 2], sum.piece[i][j][below * 2 + 1]};
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_grad_weight_square_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes, int64_t part_pixels) {
  weight_product<Square>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_square_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_grad_weight_flat_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes, int64_t part_pixels) {
  weight_product<Flat>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_flat_bf16)
