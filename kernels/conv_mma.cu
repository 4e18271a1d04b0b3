// Convolution in bf16 on the tensor cores, forward and data gradient: implicit GEMM over tensors with their channels
// last (Chetlur et al. 2014, arXiv:1410.0759; places of elements and classes of the data gradient in gpu/conv.cuh).
//   forward:       source = x (N, H, W, C'), weight (O, kh * kw, C'), target = out (N, O, H', W') = weight * gathered x + bias (O)
//   data gradient: source = d_out (N, H', W', O'), weight (C, kh * kw, O'), target = d_x (N, C, H, W)
// C' and O' are C and O rounded up to 8, the rest 0: conv_layout.cu writes source and weight. bias may be null. All are
// bf16, sums f32. Overwrites the target. Deterministic: an element's sum runs over taps and then channels, 16 at a
// time, whatever the tile.
//
// Launch: tiles of channels x pixels, one block of 4 warps each; the data gradient has as many tiles for each class as
// its largest has. Steps are (tap, group of 8 channels) and 4 such groups at a time pass through a ring of 4 stages in
// shared memory, filled by 16-byte asynchronous copies with zeros for padding. A thread copies one of the 4 groups for
// every 32nd row of the tile: it carries that group's tap along without dividing, and the places of pixels lie in
// shared memory. Four neighbouring threads read 64 bytes in a row. A warp keeps 64 x 64 of the result in registers (32
// x 32 in the small tile) and reads operands by ldmatrix without bank conflicts. The end goes through shared memory, so
// that the target is written along its rows: 16 bytes a store where planes are whole groups.
//
// Cost: a stage of the 128 x 128 tile is 16 KB for 1,048,576 flop: 64 flop a byte of L2 traffic, so that neither L2 nor
// memory bounds sums of 256 steps and more. In 16 steps a warp reads 4 KB by 8 ldmatrix, 32 cycles of the shared
// memory's 128 bytes, for 32 mma.sync: 76 cycles at 860 multiply-adds a cycle and multiprocessor, which is the 400
// TFLOP/s that mma.sync reaches on an H200. Of about 220 instructions of a stage 64 are mma.sync, a third of the issue
// slots in all. 2 blocks a multiprocessor (66 and 84 KB of shared memory, 224 registers) hide one's waits under the
// other's products: 350 TFLOP/s are to be expected on large layers, less the copy of the source, which is read and
// written once, at most 32 MB at a time, so that the product finds it in the L2 cache.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/conv_mma.cuh"

namespace {

// One group of the source's channels under one tap: what a thread copies for each row of a stage.
struct GroupStep {
  int group = 0, i = 0, j = 0;
  // A class without taps, or a source without channels, has no steps.
  DEV GroupStep(const Gather& g, int groups, int step) {
    if (groups == 0 || g.taps_w == 0) return;
    int tap = step / groups;
    group = step % groups, i = tap / g.taps_w, j = tap % g.taps_w;
  }
  // To the group STAGE_GROUPS further.
  DEV void advance(const Gather& g, int groups) {
    group += STAGE_GROUPS;
    while (group >= groups) {
      group -= groups;
      if (++j == g.taps_w) j = 0, i++;
    }
  }
};

template <bool GRAD, class Tiling>
DEV void gather_product(bf16* target, const bf16* source, const bf16* weight, const bf16* bias,
                        const ConvSizes& sizes) {
  GPU_DYNAMIC(unsigned char, shared);
  Place* columns = reinterpret_cast<Place*>(shared + STAGES * Tiling::STAGE_BYTES);
  GatherTile tile = gather_tile<GRAD>(sizes, Tiling::ROWS, Tiling::COLUMNS);
  const Gather& g = tile.gather;
  int64_t pixels = g.columns();
  if (tile.pixel >= pixels) return;

  int thread = threadIdx.x, groups = groups_of(g.source_channels), pitch = groups * GROUP;
  for (int column = thread; column < Tiling::COLUMNS; column += MMA_THREADS) {
    Pixel p = pixel_at(tile.pixel + column, g.rows, g.cols);
    int row = p.row * g.scale + g.row, col = p.col * g.scale + g.col;
    int64_t index = (p.image * g.source_height + row) * g.source_width + col;
    columns[column] = {index * pitch, tile.pixel + column < pixels ? row : NOWHERE, col};
  }
  __syncthreads();

  int steps = (int)(((int64_t)g.taps_h * g.taps_w * groups + STAGE_GROUPS - 1) / STAGE_GROUPS);
  int own_row = thread / STAGE_GROUPS, own_group = thread % STAGE_GROUPS;
  constexpr int ROWS_A_PASS = MMA_THREADS / STAGE_GROUPS;  // a multiple of 8: the permutation is the same in every pass
  GroupStep own = {g, groups, own_group};
  const bf16* filter = weight + (int64_t)(tile.channel + own_row) * g.taps * pitch;
  int64_t filter_pass = (int64_t)ROWS_A_PASS * g.taps * pitch;
  int rows = g.channels - tile.channel;
  auto load = [&](int at) {
    unsigned char* to = shared + at % STAGES * Tiling::STAGE_BYTES + narrow_at(own_row, own_group);
    bool there = own.i < g.taps_h;
    int64_t pixels_on = g.sign * ((int64_t)own.i * g.source_width + own.j);
    Place under = {pixels_on * pitch + own.group * GROUP, there ? g.sign * own.i : NOWHERE, g.sign * own.j};
    const bf16* from = filter + (int64_t)g.tap(own.i, own.j) * pitch + own.group * GROUP;
    const bf16* source_from = source + under.offset;
#pragma unroll
    for (int pass = 0; pass < Tiling::ROWS / ROWS_A_PASS; pass++) {
      copy_group(to + pass * ROWS_A_PASS * NARROW_BYTES, from, there && own_row + pass * ROWS_A_PASS < rows);
      from += filter_pass;
    }
#pragma unroll
    for (int pass = 0; pass < Tiling::COLUMNS / ROWS_A_PASS; pass++) {
      Place column = columns[own_row + pass * ROWS_A_PASS];
      bool pixel_there = inside(column, under, g.source_height, g.source_width);
      copy_group(to + Tiling::PLAIN_BYTES + pass * ROWS_A_PASS * NARROW_BYTES, source_from + column.offset,
                 pixel_there);
    }
    own.advance(g, groups);
  };

  WarpSum<Tiling> sum = {};
  run_ring(steps, load,
           [&](int at) { sum.template multiply<false, false>(shared + at % STAGES * Tiling::STAGE_BYTES); });
  finish_tile(target, bias, sum, tile, shared, columns);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_forward_square_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Square>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_square_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_forward_flat_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Flat>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_flat_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 4)
conv2d_forward_small_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Small>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_small_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_grad_input_square_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Square>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_square_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)
conv2d_grad_input_flat_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Flat>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_flat_bf16)

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 4)
conv2d_grad_input_small_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Small>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_small_bf16)
