// Convolution of one tap and stride 1 without padding, in bf16 on the tensor cores: matrix products on images as they
// lie (tiles in gpu/conv_mma.cuh). Planes are whole groups of 8 pixels, so that 16 bytes never belong to two images.
//   conv2d_pointwise: x (N, C, plane), weight (O, C'), bias (O) or null
//     out[n,o,p] = bias[o] + sum over c of weight[o,c] * x[n,c,p]
//     The data gradient is the same with d_out for x, C and O exchanged, and the transposed weight (C, O').
//   conv2d_grad_weight_pointwise: d_out (N, O, plane), x (N, C, plane)
//     partials[part][o][c] = sum over the part's n, p of d_out[n,o,p] * x[n,c,p]
// C' and O' are C and O rounded up to 8, the rest 0. Tensors are bf16, sums and partials (parts, O, C') f32; blockIdx.y
// is a part of `part_pixels` pixels, a multiple of 32, and conv2d_grad_weight_sum adds the parts in order. Overwrites
// out, partials. Deterministic: a sum runs over its steps 16 at a time, whatever the tile, and parts depend on sizes
// alone.
//
// Launch: tiles of channels x pixels, or output x input channels, one block of 4 warps each; 32 channels, or pixels, at
// a time pass through a ring of 4 stages. The product takes x with its channels outermost in shared memory and ldmatrix
// transposes it; both operands of the weight gradient have their steps along rows already. So no tensor is copied first
// but a small weight.
//
// Cost: the 128 x 128 tile does 64 flop for a byte of L2 traffic. With few channels it is memory that bounds: x is read
// from it once, since the blocks of one tile of pixels lie side by side, and out written once, 16 bytes a store: C * O
// / (C + O) flop a byte, so below 183 (an H200's balance) at ResNet-50's 64 to 256 channels: 85 % of the copy rate is
// to be expected there, twice what a first pass that puts channels last would leave; with more channels 370 of the 400
// TFLOP/s of mma.sync. Two blocks a multiprocessor.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/conv_mma.cuh"

namespace {

template <class Tiling>
DEV void pointwise_product(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes& s) {
  GPU_DYNAMIC(unsigned char, shared);
  constexpr int ACROSS = Tiling::COLUMNS / GROUP, STEPS_A_PASS = MMA_THREADS / ACROSS,
                ROWS_A_PASS = MMA_THREADS / STAGE_GROUPS;
  GatherTile tile = gather_tile<false>(s, Tiling::ROWS, Tiling::COLUMNS);
  int thread = threadIdx.x, pitch = groups_of(s.in_channels) * GROUP, rows = s.out_channels - tile.channel;

  int own_row = thread / STAGE_GROUPS, own_group = thread % STAGE_GROUPS;
  const bf16* weight_from = weight + (int64_t)(tile.channel + own_row) * pitch + own_group * GROUP;
  int own_column = thread % ACROSS, own_step = thread / ACROSS;
  int64_t plane = (int64_t)s.height * s.width, pixel = tile.pixel + own_column * GROUP;
  Pixel p = pixel_at(pixel, s.height, s.width);
  bool pixels_there = pixel < tile.gather.columns();
  const bf16* x_from = x + (p.image * s.in_channels + own_step) * plane + (int64_t)p.row * s.width + p.col;
  auto load = [&](int step) {
    unsigned char* to = shared + step % STAGES * Tiling::STAGE_BYTES;
    bool group_there = step * STAGE_STEPS + own_group * GROUP < pitch;
    const bf16* from = weight_from + step * STAGE_STEPS;
#pragma unroll
    for (int pass = 0; pass < Tiling::ROWS / ROWS_A_PASS; pass++) {
      int row = own_row + pass * ROWS_A_PASS;
      copy_group(to + narrow_at(row, own_group), from, group_there && row < rows);
      from += (int64_t)ROWS_A_PASS * pitch;
    }
    from = x_from;
#pragma unroll
    for (int pass = 0; pass < STAGE_STEPS / STEPS_A_PASS; pass++) {
      int channel = own_step + pass * STEPS_A_PASS;
      bool there = pixels_there && step * STAGE_STEPS + channel < s.in_channels;
      copy_group(to + Tiling::PLAIN_BYTES + wide_at(channel, own_column, Tiling::COLUMNS * 2), from, there);
      from += STEPS_A_PASS * plane;
    }
    x_from += STAGE_STEPS * plane;
  };
  WarpSum<Tiling> sum = {};
  run_ring((s.in_channels + STAGE_STEPS - 1) / STAGE_STEPS, load,
           [&](int step) { sum.template multiply<false, true>(shared + step % STAGES * Tiling::STAGE_BYTES); });
  finish_tile(out, bias, sum, tile, shared, reinterpret_cast<Place*>(shared + STAGES * Tiling::STAGE_BYTES));
}

template <class Tiling>
DEV void weight_product(float* partials, const bf16* d_out, const bf16* x, const ConvSizes& s, int64_t part_pixels) {
  GPU_DYNAMIC(unsigned char, shared);
  constexpr int ROWS_A_PASS = MMA_THREADS / STAGE_GROUPS;
  int row_tiles = (s.out_channels + Tiling::ROWS - 1) / Tiling::ROWS;
  int first_row = blockIdx.x % row_tiles * Tiling::ROWS, first_column = blockIdx.x / row_tiles * Tiling::COLUMNS;
  int64_t plane = (int64_t)s.height * s.width, pixels = s.batch * plane, begin = blockIdx.y * part_pixels;
  int64_t end = begin + part_pixels < pixels ? begin + part_pixels : pixels;
  int steps = begin < end ? (int)((end - begin + STAGE_STEPS - 1) / STAGE_STEPS) : 0;

  int own_row = threadIdx.x / STAGE_GROUPS, own_group = threadIdx.x % STAGE_GROUPS;
  int64_t pixel = begin + own_group * GROUP, image = pixel / plane, position = pixel % plane;
  auto load = [&](int step) {
    unsigned char* to = shared + step % STAGES * Tiling::STAGE_BYTES + narrow_at(own_row, own_group);
    bool there = pixel < end;
    const bf16* from = d_out + (image * s.out_channels + first_row + own_row) * plane + position;
#pragma unroll
    for (int pass = 0; pass < Tiling::ROWS / ROWS_A_PASS; pass++) {
      int row = own_row + pass * ROWS_A_PASS;
      copy_group(to + pass * ROWS_A_PASS * NARROW_BYTES, from, there && first_row + row < s.out_channels);
      from += ROWS_A_PASS * plane;
    }
    from = x + (image * s.in_channels + first_column + own_row) * plane + position;
#pragma unroll
    for (int pass = 0; pass < Tiling::COLUMNS / ROWS_A_PASS; pass++) {
      bool column_there = there && first_column + own_row + pass * ROWS_A_PASS < s.in_channels;
      copy_group(to + Tiling::PLAIN_BYTES + pass * ROWS_A_PASS * NARROW_BYTES, from, column_there);
      from += ROWS_A_PASS * plane;
    }
    pixel += STAGE_STEPS;
    for (position += STAGE_STEPS; position >= plane; image++) position -= plane;
  };
  WarpSum<Tiling> sum = {};
  run_ring(steps, load,
           [&](int step) { sum.template multiply<false, false>(shared + step % STAGES * Tiling::STAGE_BYTES); });
  int64_t columns = groups_of(s.in_channels) * GROUP;
  finish_partials(partials + blockIdx.y * s.out_channels * columns, sum, first_row, s.out_channels, first_column,
                  columns);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_pointwise_square_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  pointwise_product<Square>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_pointwise_square_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_pointwise_flat_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  pointwise_product<Flat>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_pointwise_flat_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 4)
conv2d_pointwise_small_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  pointwise_product<Small>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_pointwise_small_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
    conv2d_grad_weight_pointwise_square_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes,
                                             int64_t part_pixels) {
  weight_product<Square>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_pointwise_square_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
    conv2d_grad_weight_pointwise_flat_bf16(float* partials, const bf16* d_out, const bf16* x, const ConvSizes sizes,
                                           int64_t part_pixels) {
  weight_product<Flat>(partials, d_out, x, sizes, part_pixels);
}
GPU_EXPORT(conv2d_grad_weight_pointwise_flat_bf16)
