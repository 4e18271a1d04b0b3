// Tensors with their channels last, for the convolutions on the tensor cores.
//   in (batch, channels, positions) bf16 -> out (batch, positions, channels'), channels' = channels rounded up to 8,
//   the rest 0.
// Overwrites out. It serves three uses: images (N, C, H * W); the forward pass's weight (O, C, kh * kw); and, taken as
// (1, O, C * kh * kw), the data gradient's weight, whose channels are O. Deterministic: a copy.
// conv2d_channels_last_strided: of images `width` wide only every stride-th row and column, `cols` to a row: all that a
// filter of one tap reads.
//
// Launch: one block of 256 threads a tile of 64 channels x 64 positions, through shared memory. Reads run along
// positions, 16 bytes a thread where rows of positions are whole packs; a tile of all positions is read as one stretch
// of memory. Writes are 16 bytes a thread along the channels, 128 bytes in a row. One read and one write: bound by
// memory, 90 % of the copy rate is to be expected.
#include "gpu.cuh"
#include "gpu/conv.cuh"
#include "gpu/conv_mma.cuh"

constexpr int TILE = 64, THREADS = 256;
// Of a row in shared memory: an odd number of words, so that both directions spread over the banks.
constexpr int PITCH = TILE + 2;

namespace {

// Where a position's element is in a channel of `in`, whose elements are `channel_elems` apart.
struct Whole {
  static constexpr bool PACKED = true;
  int64_t channel_elems;
  DEV int64_t at(int64_t position) const { return position; }
};
struct Strided {
  static constexpr bool PACKED = false;
  int64_t channel_elems;
  int cols, width, stride;
  DEV int64_t at(int64_t position) const {
    Divided row = divided(position, cols);
    return (row.quotient * width + row.remainder) * stride;
  }
};

template <class Places>
DEV void put_channels_last(bf16* out, const bf16* in, int64_t batch, int channels, int64_t positions,
                           const Places& places) {
  GPU_SHARED(bf16, tile, [TILE * PITCH]);
  int padded = groups_of(channels) * GROUP, channel_tiles = (padded + TILE - 1) / TILE;
  int64_t position_tiles = (positions + TILE - 1) / TILE, index = blockIdx.x;
  int channel = (int)(index % channel_tiles) * TILE;
  int64_t position = index / channel_tiles % position_tiles * TILE, image = index / channel_tiles / position_tiles;
  int height = channels - channel < TILE ? channels - channel : TILE;
  int width = positions - position < TILE ? (int)(positions - position) : TILE;
  const bf16* from = in + (image * channels + channel) * places.channel_elems;

  constexpr int PACK = Pack<bf16>::N;
  if (!Places::PACKED) {
    // A thread has one position, and every fourth channel.
    int column = threadIdx.x % TILE;
    int64_t at = column < width ? places.at(position + column) : 0;
#pragma unroll 4
    for (int row = threadIdx.x / TILE; row < height && column < width; row += THREADS / TILE)
      tile[row * PITCH + column] = from[row * places.channel_elems + at];
  } else if (positions % PACK == 0) {
    from += position;
    for (int i = threadIdx.x; i < TILE * TILE / PACK; i += THREADS) {
      int row = i / (TILE / PACK), column = i % (TILE / PACK) * PACK;
      if (row >= height || column >= width) continue;
      Pack<bf16> pack = load_pack(from + row * positions + column);
#pragma unroll
      for (int k = 0; k < PACK; k++) tile[row * PITCH + column + k] = pack.x[k];
    }
  } else {
    from += position;
    for (int i = threadIdx.x; i < height * width; i += THREADS) {
      int row = i / width, column = i % width;
      tile[row * PITCH + column] = from[row * positions + column];
    }
  }
  __syncthreads();
  int groups = padded - channel < TILE ? (padded - channel) / GROUP : TILE / GROUP;
  bf16* to = out + (image * positions + position) * padded + channel;
  for (int i = threadIdx.x; i < groups * width; i += THREADS) {
    int group = i % groups, column = i / groups;
    Pack<bf16> pack;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      int row = group * GROUP + k;
      pack.x[k] = row < height ? tile[row * PITCH + column] : from_float<bf16>(0.0f);
    }
    store_pack(to + (int64_t)column * padded + group * GROUP, pack);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_channels_last_bf16(bf16* out, const bf16* in, int64_t batch, int channels, int64_t positions) {
  put_channels_last(out, in, batch, channels, positions, Whole{positions});
}
GPU_EXPORT(conv2d_channels_last_bf16)

// `in` has `channel_elems` elements a channel.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv2d_channels_last_strided_bf16(bf16* out, const bf16* in, int64_t batch, int channels, int64_t positions,
                                      int64_t channel_elems, int cols, int width, int stride) {
  put_channels_last(out, in, batch, channels, positions, Strided{channel_elems, cols, width, stride});
}
GPU_EXPORT(conv2d_channels_last_strided_bf16)
