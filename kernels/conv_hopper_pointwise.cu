// Convolution of one tap and stride 1 without padding, in bf16 by warpgroup products, for sm_90a: matrix products on
// images as they lie. Planes are whole groups of 8 pixels, so that rows of bulk copies start at multiples of 16 bytes.
//   conv2d_pointwise_hopper: x (N, C, plane), weight (O, C'), bias (O) or null
//     out[n,o,p] = bias[o] + sum over c of weight[o,c] * x[n,c,p]
//     The data gradient is the same with d_out for x, C and O exchanged, and the transposed weight (C, O'). That of a stride of 2 has its pixels at even
//     rows and columns of planes (spread_height, 2 W), W a multiple of 4, and zeros elsewhere.
//   conv2d_grad_weight_pointwise_hopper: d_out (N, O, plane), x (N, C, plane)
//     partials[part][o][c] = sum over the part's n, p of d_out[n,o,p] * x[n,c,p]
// C' and O' are C and O rounded up to 8, the rest 0. Tensors are bf16, sums and partials (parts, O, C') f32;
// conv2d_grad_weight_sum adds the parts in order. Overwrites out, partials. Deterministic: sums run over channels, or
// strips, and in them 16 steps at a time, whatever the tile; parts depend on sizes alone.
//
// A strip is 64 pixels of an image; those beyond the plane's end are 0 in it. One bulk copy brings a strip of 64 or
// more channels. The product takes x with its channels outermost; both operands of the weight gradient have their steps
// along rows.
//
// Launch: any number of blocks of 384 threads, best one a multiprocessor; block i works on tiles i, i + blocks, and so
// on. Tiles of the same pixels lie side by side. One thread of the first warpgroup asks for steps, a ring of them
// ahead, across tiles; the other two multiply.
//   product: 128 channels by 4 strips, 64 channels a warpgroup; or 64 channels by 8 strips, 4 a warpgroup
//   weight gradient: 128 output channels, 64 a warpgroup, by 64, 128 or 256 input channels; a part is some strips
//
// Cost: with up to 256 channels it is memory that bounds: x is read from it once and out written once, 16 bytes a
// store: C * O / (C + O) flop a byte. A tile's sums leave in about 2,000 cycles while copies for the next are on their
// way; its share of the memory's rate takes 5,000 to write 128 x 256 outputs. 85 % of the copy rate is to be expected,
// with more channels 450 TFLOP/s.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/gemm.cuh"
#include "gpu/gemm_ring.cuh"
#include "gpu/gemm_leave.cuh"
#include "gpu/conv_hopper.cuh"

// How a product is cut: strips of an image, groups of a tile's strips, tiles of channels. And rows of a plane over
// which pixels are spread, or 0.
struct PointwiseCut { int strips, groups, channel_tiles, spread_height; };
// How a weight gradient is: strips of an image, of all, of a part; parts; tiles of output and of input channels.
struct PointwiseWeightCut { int strips, all_strips, part_strips, parts, row_tiles, column_tiles; };

namespace {

#if GPU_HOPPER
constexpr int STRIP = 64, PIXELS = 4 * STRIP;

// A strip: its image and its first pixel.
struct Place64 { int image, pixel; };
DEV Place64 strip_at(int strip, int strips) {
  int image = strip / strips;
  return {image, (strip - image * strips) * STRIP};
}
DEV void step_on(Place64& at, int strips) {
  at.pixel += STRIP;
  if (at.pixel >= strips * STRIP) at.pixel = 0, at.image++;
}

template <int CHANNELS>
DEV void fill(ConvSteps<CHANNELS, PIXELS>& ring, unsigned char* stages, const CUtensorMap* x, const CUtensorMap* weight,
              const ConvSizes& s, const PointwiseCut& cut) {
  typedef ConvSteps<CHANNELS, PIXELS> R;
  Turn<R::STAGES> turn;
  int blocks = (s.in_channels + STEP - 1) / STEP;
  for (int index = blockIdx.x; index < cut.channel_tiles * cut.groups; index += gridDim.x) {
    int group = index / cut.channel_tiles, channel = (index - group * cut.channel_tiles) * CHANNELS;
    const Place64 first = strip_at(group * 4 * R::BOXES, cut.strips);
    for (int block = 0; block < blocks; block++, turn.next()) {
      unsigned char* to = stages + turn.stage() * R::BYTES;
      uint64_t* full = &ring.full[turn.stage()];
      mbar_wait(&ring.empty[turn.stage()], turn.parity() ^ 1);
      mbar_expect_tx(full, R::BYTES);
      tma_load_4d(to, weight, block * STEP, channel, 0, 0, full);
      Place64 at = first;
#pragma unroll
      for (int i = 0; i < 4 * R::BOXES; i++, step_on(at, cut.strips))
        tma_load_4d(to + R::WEIGHT_BYTES + i * BOX_BYTES, x, at.pixel, block * STEP, at.image, 0, full);
    }
  }
}

// Of a piece that stage_words has staged, four pixels a lane at a time, with a zero after each and a row of zeros
// below. `to` is the lane's place in the first channel, or null.
DEV void leave_spread(bf16* to, int64_t plane, int rows, int width, bool below, const unsigned char* staged, int lane) {
  int row = lane / 8;
  if (!to) return;
  to += row * plane;
#pragma unroll
  for (int i = 0; i < 4; i++, row += 4, to += 4 * plane) {
    if (row >= rows) return;
    const uint2 four = *reinterpret_cast<const uint2*>(staged + row * PIECE * 2 +
                                                       ((lane % 8 / 2) ^ (row / 2 % 4)) * 16 + lane % 2 * 8);
    store16(to, make_uint4(four.x & 0xFFFF, four.x >> 16, four.y & 0xFFFF, four.y >> 16));
    if (below) store16(to + width, make_uint4(0, 0, 0, 0));
  }
}

// A warp's sums: 16 channels from `channel` on, and four strips.
DEV void leave_strips(bf16* out, const float (&sums)[1][PIXELS / 2], const bf16* bias, const ConvSizes& s,
                      const PointwiseCut& cut, Place64 at, int channel, unsigned char* staged) {
  int rows = s.out_channels - channel;
  if (rows <= 0) return;
  const RowBias add(bias, channel, rows);
  int plane = s.height * s.width;
#pragma unroll 1
  for (int piece = 0; piece < PIXELS / PIECE; piece++) {
    float v[PIECE / 2];
    int lane = thread_again() % 32;
    take_piece<0>(v, sums, add, piece);
    __syncwarp(); // the piece before has left
    stage_words(reinterpret_cast<uint4*>(staged), word_in(lane), v);
    __syncwarp();
    int pixel = at.pixel + piece % 2 * PIECE;
    int64_t first = at.image * (int64_t)s.out_channels + channel;
    if (cut.spread_height) {
      pixel += lane % 8 * 4;
      int row = pixel / s.width * 2, col = pixel % s.width * 2, width = 2 * s.width;
      int64_t spread = (int64_t)cut.spread_height * width;
      bf16* to = out + first * spread + (int64_t)row * width + col;
      leave_spread(at.image < s.batch && pixel < plane ? to : nullptr, spread, rows, width, row + 1 < cut.spread_height,
                   staged, lane);
    } else {
      pixel += lane % 4 * 8;
      leave_rows<uint4>(at.image < s.batch && pixel < plane ? out + first * plane + pixel : nullptr, plane, rows,
                        staged, lane);
    }
    if (piece % 2) step_on(at, cut.strips);
  }
}

template <int CHANNELS>
DEV void convolve(bf16* out, const CUtensorMap* x, const CUtensorMap* weight, const bf16* bias, const ConvSizes& s,
                  const PointwiseCut& cut) {
  typedef ConvSteps<CHANNELS, PIXELS> R;
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  begin(ring[0], x, weight);
  if (threadIdx.x < 128) {
    ConvRegisters::first();
    if (threadIdx.x == 0) fill<CHANNELS>(ring[0], stages, x, weight, s, cut);
    return;
  }
  ConvRegisters::others();
  int warp = threadIdx.x / 32 - 4, consumer = warp / 4;
  int row = CHANNELS == 128 ? consumer * 64 : 0, own_box = CHANNELS == 128 ? 0 : consumer;
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; index < cut.channel_tiles * cut.groups; index += gridDim.x) {
    int group = index / cut.channel_tiles, channel = (index - group * cut.channel_tiles) * CHANNELS;
    float sums[1][PIXELS / 2];
    multiply<PIXELS, false, true>(sums, ring[0], stages + row * ROW_BYTES, stages + R::WEIGHT_BYTES + own_box * R::BOX,
                                  turn, (s.in_channels + STEP - 1) / STEP);
    leave_strips(out, sums, bias, s, cut, strip_at((group * R::BOXES + own_box) * 4, cut.strips),
                 channel + row + warp % 4 * 16, stages + R::STAGES * R::BYTES + warp * LEAVING_BYTES);
  }
}

template <int COLUMNS> struct WeightSteps : StepRing<(128 + COLUMNS) * ROW_BYTES, 0> {};

template <int COLUMNS>
DEV void fill_weight(WeightSteps<COLUMNS>& ring, unsigned char* stages, const CUtensorMap* d_out, const CUtensorMap* x,
                     const PointwiseWeightCut& cut) {
  typedef WeightSteps<COLUMNS> R;
  Turn<R::STAGES> turn;
  int tiles = cut.row_tiles * cut.column_tiles;
  for (int index = blockIdx.x; index < tiles * cut.parts; index += gridDim.x) {
    int part = index / tiles, tile = index - part * tiles, column_tile = tile / cut.row_tiles,
        row = (tile - column_tile * cut.row_tiles) * 128;
    int first = part * cut.part_strips, steps = min(cut.part_strips, cut.all_strips - first);
    Place64 at = strip_at(first, cut.strips);
    for (int step = 0; step < steps; step++, turn.next(), step_on(at, cut.strips)) {
      unsigned char* to = stages + turn.stage() * R::BYTES;
      uint64_t* full = &ring.full[turn.stage()];
      mbar_wait(&ring.empty[turn.stage()], turn.parity() ^ 1);
      mbar_expect_tx(full, R::BYTES);
      tma_load_4d(to, d_out, at.pixel, row, at.image, 0, full);
      tma_load_4d(to + 128 * ROW_BYTES, x, at.pixel, column_tile * COLUMNS, at.image, 0, full);
    }
  }
}

template <int COLUMNS>
DEV void sum_products(float* partials, const CUtensorMap* d_out, const CUtensorMap* x, const ConvSizes& s,
                      const PointwiseWeightCut& cut) {
  typedef WeightSteps<COLUMNS> R;
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  begin(ring[0], d_out, x);
  if (threadIdx.x < 128) {
    ConvRegisters::first();
    if (threadIdx.x == 0) fill_weight<COLUMNS>(ring[0], stages, d_out, x, cut);
    return;
  }
  ConvRegisters::others();
  int warp = threadIdx.x / 32 - 4, tiles = cut.row_tiles * cut.column_tiles, pitch = (s.in_channels + 7) / 8 * 8;
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; index < tiles * cut.parts; index += gridDim.x) {
    int part = index / tiles, tile = index - part * tiles, column_tile = tile / cut.row_tiles,
        row = (tile - column_tile * cut.row_tiles) * 128;
    float sums[1][COLUMNS / 2];
    multiply<COLUMNS, false, false>(sums, ring[0], stages + warp / 4 * BOX_BYTES, stages + 128 * ROW_BYTES, turn,
                                    min(cut.part_strips, cut.all_strips - part * cut.part_strips));
    row += warp * 16;
    int rows = s.out_channels - row, column = column_tile * COLUMNS;
    float* to = partials + ((int64_t)part * s.out_channels + row) * pitch + column;
#pragma unroll 1
    for (int piece = 0; piece < COLUMNS / PIECE && rows > 0; piece++) {
      float v[PIECE / 2];
      take_piece<0>(v, sums, NoBias{}, piece);
      leave_floats(to + piece * PIECE, thread_again() % 32, pitch, v, {rows, pitch - column - piece * PIECE});
    }
  }
}
#endif

}  // namespace

// Other GPUs never get here.
#if GPU_HOPPER
#define POINTWISE_BODY(channels) convolve<channels>(out, &x, &weight, bias, sizes, cut)
#define POINTWISE_WEIGHT_BODY(columns) sum_products<columns>(partials, &d_out, &x, sizes, cut)
#else
#define POINTWISE_BODY(channels)
#define POINTWISE_WEIGHT_BODY(columns)
#endif
#define POINTWISE(name, channels)                                                                                      \
  extern "C" __global__ void __launch_bounds__(CONV_THREADS, 1)                                                        \
      name(bf16* out, const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,               \
           const bf16* bias, const __grid_constant__ ConvSizes sizes, const __grid_constant__ PointwiseCut cut) {      \
    POINTWISE_BODY(channels);                                                                                          \
  }                                                                                                                    \
  GPU_EXPORT(name)
#define POINTWISE_WEIGHT(name, columns)                                                                                \
  extern "C" __global__ void __launch_bounds__(CONV_THREADS, 1)                                                        \
      name(float* partials, const __grid_constant__ CUtensorMap d_out, const __grid_constant__ CUtensorMap x,          \
           const __grid_constant__ ConvSizes sizes, const __grid_constant__ PointwiseWeightCut cut) {                  \
    POINTWISE_WEIGHT_BODY(columns);                                                                                    \
  }                                                                                                                    \
  GPU_EXPORT(name)

POINTWISE(conv2d_pointwise_hopper_128_bf16, 128)
POINTWISE(conv2d_pointwise_hopper_64_bf16, 64)
POINTWISE_WEIGHT(conv2d_grad_weight_pointwise_hopper_256_bf16, 256)
POINTWISE_WEIGHT(conv2d_grad_weight_pointwise_hopper_128_bf16, 128)
POINTWISE_WEIGHT(conv2d_grad_weight_pointwise_hopper_64_bf16, 64)
