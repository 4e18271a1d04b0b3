// Convolution in bf16 by warpgroup products, for sm_90a, forward and data gradient: implicit GEMM over tensors with
// their channels last (Chetlur et al. 2014, arXiv:1410.0759; places of elements and classes of the data gradient in
// gpu/conv.cuh).
//   forward:       source = x (N, H, W, C'), weight (O, kh * kw, C'), target = out (N, O, H', W') = weight * gathered x + bias (O)
//   data gradient: source = d_out (N, H', W', O'), weight (C, kh * kw, O'), target = d_x (N, C, H, W)
// C' and O' are C and O rounded up to 8, the rest 0: conv_layout.cu writes source and weight. bias may be null. All are
// bf16, sums f32.
// Overwrites the target. Deterministic: an element's sum runs over taps and then channels, 16 at a time, whatever the
// tile.
//
// Nothing is gathered by threads. The source is a tensor of four axes (channels, columns, rows, images), and what a
// tile of target pixels reads under one tap is a box of it: the tile's own box of pixels, moved by the tap. One bulk
// copy brings 64 channels of such a box and puts zeros where it lies outside of the image, so padding costs nothing; a
// stride is the distance of the box's elements. device/cuda/conv/hopper.rs chooses the box: with whole rows of an
// image, or whole images, most of a tile's 128, 224 or 256 pixels are there.
//
// Launch: any number of blocks of 384 threads, best one a multiprocessor; block i works on tiles i, i + blocks, and so
// on, on each for all classes by column.
// Tiles of the same pixels lie side by side, classes by row one after the other. One thread of the first warpgroup asks
// for steps of 64 channels under one tap, a ring of them ahead, across tiles. The other two warpgroups multiply, weight
// (rows) by pixels (columns), and write along the target's rows through shared memory, in the largest words of 16 to 2
// bytes that rows allow.
//   128 channels: the warpgroups have 64 channels each of one box of pixels.
//    64 channels: they have the same channels of a box each.
//
// Cost, of a step of 256 pixels: 128 channels bring 48 KB for 4,194,304 flop, 1024 cycles of the tensor cores, as a
// product of matrices does; 64 channels 72 KB, 72 bytes a cycle, where an L2 gives a multiprocessor about 45: so 64
// channels are bound by the L2. One block a multiprocessor, 192 to 216 KB.
// Sums leave in about 2,000 cycles a tile while copies for the next tile are on their way but nothing multiplies: 4 %
// of a tile with 512 channels, 12 % with 128. To be expected on an H100: 560 TFLOP/s with 512 channels of 7 x 7, 500
// with 128 or 256 channels, 400 with 64; less the change of layout.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/gemm.cuh"
#include "gpu/gemm_ring.cuh"
#include "gpu/gemm_leave.cuh"
#include "gpu/conv_hopper.cuh"

// How the target is cut: the box of pixels that a tile has, and bytes of the largest words in which rows of it can be
// written. Boxes across an image and down, groups of a tile's boxes in a class of pixels, tiles of channels, classes by
// row and by column.
struct ConvCut { int images, rows, cols, word, across, down, groups, channel_tiles, row_classes, col_classes; };

namespace {

#if GPU_HOPPER
// A tile: its class, its first channel, and the number of its first box. And where a box begins, counted in its class.
struct Tile { Gather g; int of = -1, channel, box; };
struct Corner { int image, row, col; };

// All tiles: classes, each cut into boxes as the largest of them is, and of each box all channels. What a block does
// with a box it does for all classes by column at once, so that words of the target that classes share are in the L2
// when the next of them is written.
struct Tiles {
  const ConvSizes& s;
  const ConvCut& cut;
  bool grad;
  int channels_a_tile, boxes_a_tile;

  // Whether this block has so many tiles and one more, which that is. A class is worked out when it is not that of the
  // tile before.
  DEV bool find(int item, Tile& tile) const {
    int turn = item / cut.col_classes, index = blockIdx.x + turn * gridDim.x;
    int rest = index / cut.channel_tiles, before = rest / cut.groups;
    if (before >= cut.row_classes) return false;
    // Where padding is half of an odd filter, the last class by row has the most taps.
    int of = (cut.row_classes - 1 - before) * cut.col_classes + item - turn * cut.col_classes;
    if (of != tile.of) tile.g = grad ? grad_input_gather(s, of) : forward_gather(s);
    tile.of = of;
    tile.channel = (index - rest * cut.channel_tiles) * channels_a_tile;
    tile.box = (rest - before * cut.groups) * boxes_a_tile;
    return true;
  }
  DEV Corner corner(int box) const {
    int line = box / cut.across, image = line / cut.down;
    return {image * cut.images, (line - image * cut.down) * cut.rows, (box - line * cut.across) * cut.cols};
  }
};

DEV int blocks_of(const Gather& g) { return (g.source_channels + STEP - 1) / STEP; }

// What the first thread does: fills the ring, tile after tile.
template <int CHANNELS, int PIXELS>
DEV void fill(ConvSteps<CHANNELS, PIXELS>& ring, unsigned char* stages, const CUtensorMap* source,
              const CUtensorMap* weight, const Tiles& tiles) {
  typedef ConvSteps<CHANNELS, PIXELS> R;
  Turn<R::STAGES> turn;
  Tile tile;
  int bytes = R::WEIGHT_BYTES + R::BOXES * tiles.cut.images * tiles.cut.rows * tiles.cut.cols * ROW_BYTES;
  for (int item = 0; tiles.find(item, tile); item++) {
    const Gather& g = tile.g;
    Corner corners[R::BOXES];
#pragma unroll
    for (int b = 0; b < R::BOXES; b++) {
      corners[b] = tiles.corner(tile.box + b);
      corners[b].row = corners[b].row * g.scale + g.row, corners[b].col = corners[b].col * g.scale + g.col;
    }
    int blocks = blocks_of(g);
    for (int i = 0; i < g.taps_h; i++)
      for (int j = 0; j < g.taps_w; j++)
        for (int block = 0; block < blocks; block++, turn.next()) {
          unsigned char* to = stages + turn.stage() * R::BYTES;
          uint64_t* full = &ring.full[turn.stage()];
          mbar_wait(&ring.empty[turn.stage()], turn.parity() ^ 1);
          mbar_expect_tx(full, bytes);
          tma_load_4d(to, weight, block * STEP, g.tap(i, j), tile.channel, 0, full);
#pragma unroll
          for (int b = 0; b < R::BOXES; b++)
            tma_load_4d(to + R::WEIGHT_BYTES + b * R::BOX, source, block * STEP, corners[b].col + g.sign * j,
                        corners[b].row + g.sign * i, corners[b].image, full);
        }
  }
}

// A warp's sums: 16 channels from `channel` on, and the pixels of a box.
template <int PIXELS>
DEV void leave_box(bf16* target, const float (&sums)[1][PIXELS / 2], const bf16* bias, const Gather& g,
                   const ConvCut& box, const Corner& corner, int channel, unsigned char* staged) {
  int rows = g.channels - channel;
  if (rows <= 0) return;
  const RowBias add(bias, channel, rows);
  int64_t plane = (int64_t)g.height * g.width;
  bf16* first = target + (corner.image * (int64_t)g.channels + channel) * plane +
                (int64_t)(g.first_row + corner.row * g.apart) * g.width + g.first_col + corner.col * g.apart;
  // What is left of the class. Both divisors are at most 256, and so are pixels: a product by 2^16 / divisor, rounded
  // up, divides them.
  int images = min(box.images, g.batch - corner.image), rows_left = g.rows - corner.row,
      cols_left = g.cols - corner.col;
  int run = box.rows * box.cols, by_run = 65536 / run + 1, by_cols = 65536 / box.cols + 1, pixels_a_word = box.word / 2;
#pragma unroll 1
  for (int piece = 0; piece < PIXELS / PIECE; piece++) {
    float v[PIECE / 2];
    int lane = thread_again() % 32; // what depends on it is found anew: kept, it would take registers from the sums
    take_piece<0>(v, sums, add, piece);
    __syncwarp(); // the piece before has left
    stage_words(reinterpret_cast<uint4*>(staged), word_in(lane), v);
    __syncwarp();
    int pixel = piece * PIECE + lane * pixels_a_word % PIECE;
    int image = pixel * by_run >> 16, in_run = pixel - image * run, row = in_run * by_cols >> 16,
        col = in_run - row * box.cols;
    bool there = image < images && row < rows_left && col < cols_left;
    bf16* to = there ? first + (image * (int64_t)g.channels * plane + (int64_t)row * g.apart * g.width + col * g.apart)
                     : nullptr;
    if (box.word == 16) leave_rows<uint4>(to, plane, rows, staged, lane);
    else if (box.word == 8) leave_rows<uint2>(to, plane, rows, staged, lane);
    else if (box.word == 4) leave_rows<uint32_t>(to, plane, rows, staged, lane);
    else leave_rows<bf16>(to, plane, rows, staged, lane);
  }
}

template <int CHANNELS, int PIXELS>
DEV void convolve(bf16* target, const CUtensorMap* source, const CUtensorMap* weight, const bf16* bias,
                  const Tiles& tiles) {
  typedef ConvSteps<CHANNELS, PIXELS> R;
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  static_assert(1024 + R::STAGES * R::BYTES + CONSUMER_WARPS * LEAVING_BYTES <= 227 * 1024,
                "more shared memory than a block can have");
  begin(ring[0], source, weight);
  if (threadIdx.x < 128) {
    ConvRegisters::first();
    if (threadIdx.x == 0) fill(ring[0], stages, source, weight, tiles);
    return;
  }
  ConvRegisters::others();
  int warp = threadIdx.x / 32 - 4, consumer = warp / 4;
  int row = CHANNELS == 128 ? consumer * 64 : 0, own_box = CHANNELS == 128 ? 0 : consumer;
  Turn<R::STAGES> turn;
  Tile tile;
  for (int item = 0; tiles.find(item, tile); item++) {
    float sums[1][PIXELS / 2];
    multiply<PIXELS, false, false>(sums, ring[0], stages + row * ROW_BYTES, stages + R::WEIGHT_BYTES + own_box * R::BOX,
                                   turn, tile.g.taps_h * tile.g.taps_w * blocks_of(tile.g));
    leave_box<PIXELS>(target, sums, bias, tile.g, tiles.cut, tiles.corner(tile.box + own_box),
                      tile.channel + row + warp % 4 * 16, stages + R::STAGES * R::BYTES + warp * LEAVING_BYTES);
  }
}
#endif

}  // namespace

// Other GPUs never get here.
#if GPU_HOPPER
#define CONV_HOPPER_BODY(channels, pixels)                                                                             \
  convolve<channels, pixels>(target, &source, &weight, bias, Tiles{sizes, cut, grad != 0, channels, 128 / channels})
#else
#define CONV_HOPPER_BODY(channels, pixels)
#endif
#define CONV_HOPPER(name, channels, pixels)                                                                            \
  extern "C" __global__ void __launch_bounds__(CONV_THREADS, 1)                                                        \
      name(bf16* target, const __grid_constant__ CUtensorMap source, const __grid_constant__ CUtensorMap weight,       \
           const bf16* bias, int grad, const __grid_constant__ ConvSizes sizes, const __grid_constant__ ConvCut cut) { \
    CONV_HOPPER_BODY(channels, pixels);                                                                                \
  }                                                                                                                    \
  GPU_EXPORT(name)

CONV_HOPPER(conv2d_hopper_128x256_bf16, 128, 256)
CONV_HOPPER(conv2d_hopper_128x224_bf16, 128, 224)
CONV_HOPPER(conv2d_hopper_128x128_bf16, 128, 128)
CONV_HOPPER(conv2d_hopper_64x256_bf16, 64, 256)
CONV_HOPPER(conv2d_hopper_64x224_bf16, 64, 224)
CONV_HOPPER(conv2d_hopper_64x128_bf16, 64, 128)
