// Convolution in bf16 on the tensor cores, forward and data gradient: implicit GEMM over tensors with their channels last (Chetlur et
// al. 2014, arXiv:1410.0759; places of elements and classes of the data gradient in gpu/conv.cuh).
//   forward:       source = x (N, H, W, C'), weight (O, kh * kw, C'), target = out (N, O, H', W') = weight * gathered x + bias (O)
//   data gradient: source = d_out (N, H', W', O'), weight (C, kh * kw, O'), target = d_x (N, C, H, W)
// C' and O' are C and O rounded up to 8, the rest 0: conv_layout.cu writes source and weight. bias may be null. All are bf16, sums f32.
// Overwrites the target. Deterministic: an element's sum runs over taps and then channels, 16 at a time, whatever the tile.
//
// Launch: tiles of channels x pixels, one block of 4 warps each; the data gradient has as many tiles for each class as its largest has.
// Steps are (tap, group of 8 channels) and 4 such groups at a time pass through a ring of 4 stages in shared memory, filled by 16-byte
// asynchronous copies with zeros for padding. A thread copies one of the 4 groups for every 32nd row of the tile: it carries that
// group's tap along without dividing, and the places of pixels lie in shared memory. Four neighbouring threads read 64 bytes in a row.
// A warp keeps 64 x 64 of the result in registers (32 x 32 in the small tile) and reads operands by ldmatrix without bank conflicts.
// The end goes through shared memory, so that the target is written along its rows: 16 bytes a store where planes are whole groups.
//
// Cost: a stage of the 128 x 128 tile is 16 KB for 1,048,576 flop: 64 flop a byte of L2 traffic, so that neither L2 nor memory bounds
// K of 256 and more. For each 16 steps a warp reads 4 KB by 8 ldmatrix (32 cycles of the shared memory's 128 bytes a cycle) for 32 mma.sync (50
// cycles at 1300 multiply-adds a cycle and multiprocessor, what mma.sync reaches on an H200). 2 blocks a multiprocessor (66 KB and
// 84 KB of shared memory each) hide one's waits under the other's products: 350 of the 400 TFLOP/s of mma.sync are to be expected on
// large layers, less the pre-pass, which reads and writes the source once.
#include "gpu.cuh"

constexpr int STAGES = 4, STAGE_GROUPS = 4, THREADS = 128;

using Square = WarpTiling<2, 2, 64, 64>;                     // 128 channels x 128 pixels
using Flat = WarpTiling<1, 4, 64, 64>;                       // 64 x 256, for few channels
using Small = WarpTiling<2, 2, 32, 32>;                      // 64 x 64, where larger tiles would leave multiprocessors idle

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

// Writes the finished tile of bf16 (Tiling::ROWS, PITCH) in units of as many pixels as fit in a Unit.
template <class Tiling, int PITCH, class Unit>
DEV void store_tile(bf16* target, const bf16* tile, const Place* columns, int rows, int64_t plane) {
  constexpr int PIXELS = sizeof(Unit) / sizeof(bf16), ACROSS = Tiling::COLUMNS / PIXELS;
  for (int index = threadIdx.x; index < Tiling::ROWS * ACROSS; index += THREADS) {
    int row = index / ACROSS, column = index % ACROSS * PIXELS;
    if (row >= rows || columns[column].row < 0) continue;
    *reinterpret_cast<Unit*>(target + columns[column].offset + row * plane) = *reinterpret_cast<const Unit*>(tile + row * PITCH + column);
  }
}

template <bool GRAD, class Tiling>
DEV void gather_product(bf16* target, const bf16* source, const bf16* weight, const bf16* bias, const ConvSizes& sizes) {
  GPU_DYNAMIC(unsigned char, shared);
  constexpr int PLAIN_BYTES = Tiling::ROWS * NARROW_BYTES, STAGE_BYTES = (Tiling::ROWS + Tiling::COLUMNS) * NARROW_BYTES;
  Place* columns = reinterpret_cast<Place*>(shared + STAGES * STAGE_BYTES);
  GatherTile tile = gather_tile<GRAD>(sizes, Tiling::ROWS, Tiling::COLUMNS);
  const Gather& g = tile.gather;
  int64_t pixels = g.columns();
  if (tile.pixel >= pixels) return;

  int thread = threadIdx.x, lane = thread % 32, groups = groups_of(g.source_channels), pitch = groups * GROUP;
  for (int column = thread; column < Tiling::COLUMNS; column += THREADS) {
    Pixel p = pixel_at(tile.pixel + column, g.rows, g.cols);
    int row = p.row * g.scale + g.row, col = p.col * g.scale + g.col;
    int64_t at = (p.image * g.source_height + row) * g.source_width + col;
    columns[column] = {at * pitch, tile.pixel + column < pixels ? row : NOWHERE, col};
  }
  __syncthreads();

  int steps = (int)(((int64_t)g.taps_h * g.taps_w * groups + STAGE_GROUPS - 1) / STAGE_GROUPS);
  int own_row = thread / STAGE_GROUPS, own_group = thread % STAGE_GROUPS;
  constexpr int ROWS_A_PASS = THREADS / STAGE_GROUPS;        // a multiple of 8: the permutation is the same in every pass
  GroupStep own = {g, groups, own_group};
  const bf16* filter = weight + (int64_t)(tile.channel + own_row) * g.taps * pitch;
  auto load = [&](int stage) {
    unsigned char* to = shared + stage * STAGE_BYTES + narrow_at(own_row, own_group);
    bool there = own.i < g.taps_h;
    Place step = {(g.sign * ((int64_t)own.i * g.source_width + own.j)) * pitch + own.group * GROUP, there ? g.sign * own.i : NOWHERE, g.sign * own.j};
    const bf16* from = filter + (int64_t)g.tap(own.i, own.j) * pitch + own.group * GROUP;
#pragma unroll
    for (int pass = 0; pass < Tiling::ROWS / ROWS_A_PASS; pass++) {
      bool row_there = there && tile.channel + own_row + pass * ROWS_A_PASS < g.channels;
      cp_async16_or_zero(to + pass * ROWS_A_PASS * NARROW_BYTES, row_there ? from + (int64_t)pass * ROWS_A_PASS * g.taps * pitch : weight, row_there);
    }
#pragma unroll
    for (int pass = 0; pass < Tiling::COLUMNS / ROWS_A_PASS; pass++) {
      Place column = columns[own_row + pass * ROWS_A_PASS];
      bool pixel_there = inside(column, step, g.source_height, g.source_width);
      cp_async16_or_zero(to + PLAIN_BYTES + pass * ROWS_A_PASS * NARROW_BYTES, pixel_there ? source + column.offset + step.offset : source, pixel_there);
    }
    own.advance(g, groups);
  };

  WarpSum<Tiling> sum = {};
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < steps) load(stage);
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();                                         // this stage is full, and the one before it is free
    if (step + STAGES - 1 < steps) load((step + STAGES - 1) % STAGES);
    cp_async_commit();
    const unsigned char* plain = shared + step % STAGES * STAGE_BYTES;
    const unsigned char* gathered = plain + PLAIN_BYTES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum.template multiply<false>(
          [&](int i) { return plain + narrow_at(Tiling::first_row() + i * 16 + lane % 16, half * 2 + lane / 16); },
          [&](int j) { return gathered + narrow_at(Tiling::first_column() + j * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2); });
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  constexpr int PITCH = Tiling::COLUMNS + GROUP;             // 4 banks further a row: the lanes of a piece do not collide
  bf16* finished = reinterpret_cast<bf16*>(shared);
#pragma unroll
  for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      int row = Tiling::first_row() + i * 16 + lane / 4 + below * 8;
      float add = bias && tile.channel + row < g.channels ? to_float(bias[tile.channel + row]) : 0.0f;
#pragma unroll
      for (int j = 0; j < Tiling::WARP_COLUMNS / 8; j++) {
        bf16* at = finished + row * PITCH + Tiling::first_column() + j * 8 + lane % 4 * 2;
        at[0] = from_float<bf16>(sum.piece[i][j][below * 2] + add);
        at[1] = from_float<bf16>(sum.piece[i][j][below * 2 + 1] + add);
      }
    }
  }
  for (int column = thread; column < Tiling::COLUMNS; column += THREADS) {
    Pixel p = pixel_at(tile.pixel + column, g.rows, g.cols);
    columns[column] = {g.target(p), tile.pixel + column < pixels ? 0 : NOWHERE, 0};
  }
  __syncthreads();
  int64_t plane = (int64_t)g.height * g.width;
  int rows = g.channels - tile.channel;
  target += tile.channel * plane;
  if (g.apart == 1 && plane % GROUP == 0) store_tile<Tiling, PITCH, Pack<bf16>>(target, finished, columns, rows, plane);
  else if (g.apart == 1 && plane % 2 == 0) store_tile<Tiling, PITCH, uint32_t>(target, finished, columns, rows, plane);
  else store_tile<Tiling, PITCH, bf16>(target, finished, columns, rows, plane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_forward_square_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Square>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_square_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_forward_flat_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Flat>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_flat_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 4)
conv2d_forward_small_bf16(bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const ConvSizes sizes) {
  gather_product<false, Small>(out, x, weight, bias, sizes);
}
GPU_EXPORT(conv2d_forward_small_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_grad_input_square_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Square>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_square_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv2d_grad_input_flat_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Flat>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_flat_bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 4)
conv2d_grad_input_small_bf16(bf16* d_x, const bf16* d_out, const bf16* weight, const ConvSizes sizes) {
  gather_product<true, Small>(d_x, d_out, weight, nullptr, sizes);
}
GPU_EXPORT(conv2d_grad_input_small_bf16)
