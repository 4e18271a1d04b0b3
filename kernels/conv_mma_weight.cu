// Weight gradient of a convolution in bf16 on the tensor cores: implicit GEMM over the output's pixels, with channels
// last (places of elements in gpu/conv.cuh, tiles in gpu/conv_mma.cuh).
//   d_out (N, H', W', O'), x (N, H, W, C') bf16, written by conv_layout.cu; C' and O' are C and O rounded up to 8, the
//   rest 0.
//   partials[part][o][tap * C' + c] = sum over the part's pixels of d_out[pixel][o] * x[pixel under tap][c]    f32 (parts, O, kh * kw * C')
// blockIdx.y is a part of `part_pixels` pixels, a multiple of 32; conv2d_grad_weight_sum adds the parts in order and
// puts the taps last. Overwrites partials. Deterministic: pixels in order, 16 at a time, and parts depend on sizes
// alone.
//
// Launch: tiles of 128 output channels x 128 columns, or 64 x 256 for few output channels, one block of 4 warps each.
// 32 pixels at a time pass through a ring of 4 stages in shared memory, pixels outermost; ldmatrix transposes both
// operands on the way to the registers. A column group of 8 channels under one tap belongs to one thread for the whole
// of the product, and the places of the pixels are worked out by one warp in turn, a stage ahead, so that a copy costs
// one shared read, a comparison for each axis and an addition.
//
// Cost: as conv_mma.cu, 64 flop a byte of L2 traffic and 2 blocks a multiprocessor (240 registers); of about 290
// instructions of a stage 64 are mma.sync. Partial sums add 8 bytes for each element and part, below 1 % of the traffic
// from 2,000 pixels a part on.
// 320 of the 400 TFLOP/s of mma.sync are to be expected on large layers.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/conv_mma.cuh"

namespace {

template <class Tiling>
DEV void weight_product(float* partials, const bf16* d_out, const bf16* x, const ConvSizes& s, int64_t part_pixels) {
  GPU_DYNAMIC(unsigned char, shared);
  GPU_SHARED(Place, places, [STAGES][STAGE_STEPS]);
  constexpr int PLAIN_ROW = Tiling::ROWS * 2, GATHERED_ROW = Tiling::COLUMNS * 2;
  constexpr int PLAIN_GROUPS = Tiling::ROWS / GROUP, GATHERED_GROUPS = Tiling::COLUMNS / GROUP;
  constexpr int PLAIN_PASS = MMA_THREADS / PLAIN_GROUPS, GATHERED_PASS = MMA_THREADS / GATHERED_GROUPS;

  int thread = threadIdx.x, lane = thread % 32, groups = groups_of(s.in_channels),
      out_groups = groups_of(s.out_channels);
  int pitch = groups * GROUP, out_pitch = out_groups * GROUP, columns = s.kernel_h * s.kernel_w * groups;
  int row_tiles = (s.out_channels + Tiling::ROWS - 1) / Tiling::ROWS;
  int first_row = blockIdx.x % row_tiles * Tiling::ROWS, first_column = blockIdx.x / row_tiles * Tiling::COLUMNS;
  int64_t pixels = (int64_t)s.batch * s.out_height * s.out_width, begin = blockIdx.y * part_pixels;
  int64_t end = begin + part_pixels < pixels ? begin + part_pixels : pixels;
  int steps = begin < end ? (int)((end - begin + STAGE_STEPS - 1) / STAGE_STEPS) : 0;

  auto place_pixels = [&](int step) {
    int64_t index = begin + (int64_t)step * STAGE_STEPS + lane;
    Pixel p = pixel_at(index, s.out_height, s.out_width);
    int row = p.row * s.stride - s.padding, col = p.col * s.stride - s.padding;
    places[step % STAGES][lane] = {((p.image * s.height + row) * s.width + col) * pitch, index < end ? row : NOWHERE,
                                   col};
  };
  int plain_group = thread % PLAIN_GROUPS, column = first_column / GROUP + thread % GATHERED_GROUPS;
  bool rows_there = first_row / GROUP + plain_group < out_groups;
  int plain_row = thread / PLAIN_GROUPS;
  const bf16* plain_from =
      d_out + (begin + plain_row) * out_pitch + first_row + plain_group * GROUP;  // of the stage that is loaded next
  int64_t plain_pass = (int64_t)PLAIN_PASS * out_pitch;
  int last_pixels = (int)(end - begin - (int64_t)(steps - 1) * STAGE_STEPS);
  int tap = column / groups, i = tap / s.kernel_w, j = tap % s.kernel_w;
  Place own = {((int64_t)i * s.width + j) * pitch + column % groups * GROUP, column < columns ? i : NOWHERE, j};
  const bf16* own_x = x + own.offset;
  auto load = [&](int step) {
    unsigned char* to = shared + step % STAGES * Tiling::STAGE_BYTES;
    const bf16* from = plain_from;
    int pixels_here = step + 1 < steps ? STAGE_STEPS : last_pixels;
#pragma unroll
    for (int pass = 0; pass < STAGE_STEPS / PLAIN_PASS; pass++) {
      int row = plain_row + pass * PLAIN_PASS;
      copy_group(to + wide_at(row, plain_group, PLAIN_ROW), from, rows_there && row < pixels_here);
      from += plain_pass;
    }
    plain_from += STAGE_STEPS * (int64_t)out_pitch;
#pragma unroll
    for (int pass = 0; pass < STAGE_STEPS / GATHERED_PASS; pass++) {
      int row = thread / GATHERED_GROUPS + pass * GATHERED_PASS;
      Place pixel = places[step % STAGES][row];
      bool there = inside(own, pixel, s.height, s.width);
      copy_group(to + Tiling::PLAIN_BYTES + wide_at(row, thread % GATHERED_GROUPS, GATHERED_ROW), own_x + pixel.offset,
                 there);
    }
  };

  WarpSum<Tiling> sum = {};
  if (thread / 32 < steps) place_pixels(thread / 32);        // of the first STAGES steps
  __syncthreads();
  run_ring(steps, load, [&](int step) {
    if (thread / 32 == step % STAGES && step + STAGES < steps) place_pixels(step + STAGES);
    sum.template multiply<true, true>(shared + step % STAGES * Tiling::STAGE_BYTES);
  });

  int64_t row_elems = (int64_t)columns * GROUP;
  finish_partials(partials + blockIdx.y * s.out_channels * row_elems, sum, first_row, s.out_channels, first_column,
                  row_elems);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
    conv2d_grad_weight_square_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes,
                                   int64_t part_pixels) {
  weight_product<Square>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_square_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
    conv2d_grad_weight_flat_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes,
                                 int64_t part_pixels) {
  weight_product<Flat>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_flat_bf16)
