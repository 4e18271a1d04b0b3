// Weight gradient of a convolution in bf16 by warpgroup products, for sm_90a: implicit GEMM over the output's pixels,
// with channels last.
//   d_out (N, H', W', O'), x (N, H, W, C') bf16, written by conv_layout.cu; C' and O' are C and O rounded up to 8, the
//   rest 0.
//   partials[part][o][tap * C' + c] = sum over the part's pixels of d_out[pixel][o] * x[pixel under tap][c]    f32 (parts, O, kh * kw * C')
// conv2d_grad_weight_sum adds the parts in order and puts the taps last. Overwrites partials. Deterministic: a sum runs
// over boxes of 64 pixels and 16 pixels at a time in them; boxes and parts depend on sizes alone.
//
// A step is a box of 64 pixels, (images, rows, columns) powers of two that device/cuda/conv/hopper_weight.rs chooses so
// that few of them are not there. One bulk copy brings 64 channels of it: of d_out as it lies, and of x moved by a tap,
// with zeros outside of the image. Both lie with their pixels outermost, and the products take them so. What is no
// pixel of d_out is 0 in it.
//
// Launch: any number of blocks of 384 threads, best one a multiprocessor; block i works on tiles i, i + blocks, and so
// on. Tiles of one part lie side by side. One thread of the first warpgroup asks for steps, a ring of them ahead,
// across tiles; the other two multiply. Columns come in blocks of 64 input channels under one tap.
//   128 rows: the warpgroups have 64 output channels each, of 3 or 4 blocks of columns.
//    64 rows: they have the same 64 output channels, of 3 blocks of columns each.
//
// Cost, of a step: 128 rows by 4 blocks bring 48 KB for 1024 cycles of the tensor cores, by 3 blocks 40 KB for 768; 64
// rows by 6 blocks 56 KB for 768, 73 bytes a cycle where an L2 gives a multiprocessor about 45. Sums leave as f32 in
// about 3,000 cycles a tile and part, 8 bytes an element and part written and read. To be expected on an H100: 450-500
// TFLOP/s with 128 and more output channels, 300 with 64; less both changes of layout.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/gemm.cuh"
#include "gpu/gemm_ring.cuh"
#include "gpu/gemm_leave.cuh"
#include "gpu/conv_hopper.cuh"

// How the product is cut. A box of pixels; boxes across an image and down, all of them, of a part; parts; tiles of
// output channels and of columns.
struct ConvWeightCut { int images, rows, cols, across, down, boxes, part_boxes, parts, row_tiles, column_tiles; };

namespace {

#if GPU_HOPPER
template <int ROWS, int BLOCKS> struct Steps : StepRing<(ROWS / 64 + BLOCKS) * BOX_BYTES, 0> {
  static constexpr int ROW_BOXES = ROWS / 64, WIDTH = ROWS == 128 ? 64 * BLOCKS : 32 * BLOCKS; // columns of a warpgroup
};

struct Part { int first, end; };

// All tiles: the first part's come first.
struct WeightTiles {
  const ConvSizes& s;
  const ConvWeightCut& cut;

  DEV int tiles() const { return cut.row_tiles * cut.column_tiles; }
  DEV bool there(int index) const { return index < tiles() * cut.parts; }
  DEV int row(int index) const { return index % cut.row_tiles; }
  DEV int column(int index) const { return index % tiles() / cut.row_tiles; }
  DEV Part part(int index) const {
    int first = index / tiles() * cut.part_boxes;
    return {first, min(first + cut.part_boxes, cut.boxes)};
  }
  DEV int pitch() const { return (s.in_channels + 7) / 8 * 8; }
  DEV int blocks_a_tap() const { return (s.in_channels + 63) / 64; }
  DEV int blocks() const { return s.kernel_h * s.kernel_w * blocks_a_tap(); }
};

// What the first thread does: fills the ring, tile after tile.
template <int ROWS, int BLOCKS>
DEV void fill(Steps<ROWS, BLOCKS>& ring, unsigned char* stages, const CUtensorMap* d_out, const CUtensorMap* x,
              const WeightTiles& tiles) {
  typedef Steps<ROWS, BLOCKS> R;
  const ConvSizes& s = tiles.s;
  const ConvWeightCut& cut = tiles.cut;
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; tiles.there(index); index += gridDim.x) {
    int first_block = tiles.column(index) * BLOCKS, blocks = min(BLOCKS, tiles.blocks() - first_block);
    int channel[BLOCKS], down[BLOCKS], across[BLOCKS]; // of each block, and where its tap puts a pixel's row and column
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      int tap = (first_block + b) / tiles.blocks_a_tap();
      channel[b] = (first_block + b - tap * tiles.blocks_a_tap()) * 64;
      down[b] = tap / s.kernel_w - s.padding, across[b] = tap % s.kernel_w - s.padding;
    }
    Part part = tiles.part(index);
    int line = part.first / cut.across, col = part.first % cut.across * cut.cols, row = line % cut.down * cut.rows,
        image = line / cut.down * cut.images;
    for (int box = part.first; box < part.end; box++, turn.next()) {
      unsigned char* to = stages + turn.stage() * R::BYTES;
      uint64_t* full = &ring.full[turn.stage()];
      mbar_wait(&ring.empty[turn.stage()], turn.parity() ^ 1);
      mbar_expect_tx(full, (R::ROW_BOXES + blocks) * BOX_BYTES);
#pragma unroll
      for (int r = 0; r < R::ROW_BOXES; r++)
        tma_load_4d(to + r * BOX_BYTES, d_out, tiles.row(index) * ROWS + r * 64, col, row, image, full);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
        if (b < blocks)
          tma_load_4d(to + (R::ROW_BOXES + b) * BOX_BYTES, x, channel[b], col * s.stride + across[b],
                      row * s.stride + down[b], image, full);
      col += cut.cols;
      if (col >= cut.across * cut.cols) col = 0, row += cut.rows;
      if (row >= cut.down * cut.rows) row = 0, image += cut.images;
    }
  }
}

// A warp's sums: 16 output channels from `row` on, and columns from block `block` on.
template <int WIDTH>
DEV void leave_columns(float* partials, const float (&sums)[1][WIDTH / 2], const WeightTiles& tiles, int row,
                       int block) {
  int rows = tiles.s.out_channels - row, pitch = tiles.pitch();
  int64_t columns = (int64_t)tiles.s.kernel_h * tiles.s.kernel_w * pitch;
  if (rows <= 0) return;
#pragma unroll 1
  for (int piece = 0; piece < WIDTH / PIECE; piece++) {
    int at = block + piece / 2, tap = at / tiles.blocks_a_tap(),
        channel = (at - tap * tiles.blocks_a_tap()) * 64 + piece % 2 * PIECE;
    if (at >= tiles.blocks()) return;
    float v[PIECE / 2];
    take_piece<0>(v, sums, NoBias{}, piece);
    leave_floats(partials + row * columns + (int64_t)tap * pitch + channel, thread_again() % 32, columns, v,
                 {rows, pitch - channel});
  }
}

template <int ROWS, int BLOCKS>
DEV void sum_products(float* partials, const CUtensorMap* d_out, const CUtensorMap* x, const WeightTiles& tiles) {
  typedef Steps<ROWS, BLOCKS> R;
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  static_assert(1024 + R::STAGES * R::BYTES <= 227 * 1024, "more shared memory than a block can have");
  begin(ring[0], d_out, x);
  if (threadIdx.x < 128) {
    ConvRegisters::first();
    if (threadIdx.x == 0) fill(ring[0], stages, d_out, x, tiles);
    return;
  }
  ConvRegisters::others();
  int warp = threadIdx.x / 32 - 4, consumer = warp / 4;
  int own_row = ROWS == 128 ? consumer : 0, own_block = ROWS == 128 ? 0 : consumer * (BLOCKS / 2);
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; tiles.there(index); index += gridDim.x) {
    Part part = tiles.part(index);
    float sums[1][R::WIDTH / 2];
    multiply<R::WIDTH, true, true>(sums, ring[0], stages + own_row * BOX_BYTES,
                                   stages + (R::ROW_BOXES + own_block) * BOX_BYTES, turn, part.end - part.first);
    int64_t elems = (int64_t)tiles.s.out_channels * tiles.s.kernel_h * tiles.s.kernel_w * tiles.pitch();
    leave_columns<R::WIDTH>(partials + index / tiles.tiles() * elems, sums, tiles,
                            tiles.row(index) * ROWS + own_row * 64 + warp % 4 * 16,
                            tiles.column(index) * BLOCKS + own_block);
  }
}
#endif

}  // namespace

// Other GPUs never get here.
#if GPU_HOPPER
#define CONV_HOPPER_WEIGHT_BODY(rows, blocks) sum_products<rows, blocks>(partials, &d_out, &x, WeightTiles{sizes, cut})
#else
#define CONV_HOPPER_WEIGHT_BODY(rows, blocks)
#endif
#define CONV_HOPPER_WEIGHT(name, rows, blocks)                                                                         \
  extern "C" __global__ void __launch_bounds__(CONV_THREADS, 1)                                                        \
      name(float* partials, const __grid_constant__ CUtensorMap d_out, const __grid_constant__ CUtensorMap x,          \
           const __grid_constant__ ConvSizes sizes, const __grid_constant__ ConvWeightCut cut) {                       \
    CONV_HOPPER_WEIGHT_BODY(rows, blocks);                                                                             \
  }                                                                                                                    \
  GPU_EXPORT(name)

CONV_HOPPER_WEIGHT(conv2d_grad_weight_hopper_128x256_bf16, 128, 4)
CONV_HOPPER_WEIGHT(conv2d_grad_weight_hopper_128x192_bf16, 128, 3)
CONV_HOPPER_WEIGHT(conv2d_grad_weight_hopper_64x384_bf16, 64, 6)
