// Axes in another order: out[i0,i1,..] = x[..] with output axis k being input axis axes[k], up to 6 axes. Bits are
// moved, none computed, so kernels are told apart by the bytes of what they move, not by its type. Overwrites out.
//
// device/cuda/transpose.rs drops axes of size 1 and merges neighbours that stay neighbours. What is left has one of two
// forms:
//   gather  the last axis is still the last (heads taken apart or put together), or a tile would be mostly empty: thread t moves units t,
//           t + 256, .. of the output, 4 a thread. A unit is as much of the last axis as 16, 8, 4 or 2 bytes hold.
//   tile    input and output end in different axes: block by block through shared memory, 32 x 32 elements of 4 bytes or 64 x 64 of 2, so
//           that a warp reads and writes whole lines of 128 bytes. A line of the tile is a word longer than it need be, so that a column is
//           spread over all banks. One block of 256 threads a tile.
// Bytes an element (f32 / bf16): 8 / 4. Expected: 90 % of the copy rate for both; a gather of single elements, for axes
// shorter than 16, reads whole lines for a part of them and counts on the L2 cache for the rest: 30-60 %.
#include "gpu.cuh"

constexpr int THREADS = 256;
constexpr int UNITS = 4;      // of a thread of the gather
constexpr int AXES = 6;

// Output axes, last one fastest: their sizes and their strides in the input, in units.
struct Axes { int count, size[AXES]; int64_t stride[AXES]; };

// Where the unit in place i of the output lies in the input. Index is 32 bits wide where that is enough: divisions
// cost.
template <class Index> DEV int64_t place_of(const Axes& axes, Index i) {
  int64_t place = 0;
  for (int k = axes.count - 1; k > 0; k--) {
    Index above = i / (Index)axes.size[k];
    place += (int64_t)(i - above * (Index)axes.size[k]) * axes.stride[k];
    i = above;
  }
  return place + (int64_t)i * axes.stride[0];
}

template <class Unit, class Index> DEV void gather_by(Unit* out, const Unit* x, int64_t n, const Axes& axes) {
  int64_t first = (int64_t)blockIdx.x * (THREADS * UNITS) + threadIdx.x;
  Unit v[UNITS];
#pragma unroll
  for (int j = 0; j < UNITS; j++)
    if (first + j * THREADS < n) v[j] = x[place_of(axes, (Index)(first + j * THREADS))];
#pragma unroll
  for (int j = 0; j < UNITS; j++)
    if (first + j * THREADS < n) out[first + j * THREADS] = v[j];
}
template <class Unit> DEV void gather(Unit* out, const Unit* x, int64_t n, const Axes& axes) {
  if (n <= 0xFFFFFFFFll) gather_by<Unit, uint32_t>(out, x, n, axes);
  else gather_by<Unit, uint64_t>(out, x, n, axes);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_gather_2(uint16_t* out, const uint16_t* x, int64_t n, const __grid_constant__ Axes axes) {
  gather(out, x, n, axes);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_gather_4(uint32_t* out, const uint32_t* x, int64_t n, const __grid_constant__ Axes axes) {
  gather(out, x, n, axes);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_gather_8(uint64_t* out, const uint64_t* x, int64_t n, const __grid_constant__ Axes axes) {
  gather(out, x, n, axes);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_gather_16(uint4* out, const uint4* x, int64_t n, const __grid_constant__ Axes axes) {
  gather(out, x, n, axes);
}
GPU_EXPORT(transpose_gather_2)
GPU_EXPORT(transpose_gather_4)
GPU_EXPORT(transpose_gather_8)
GPU_EXPORT(transpose_gather_16)

// The two axes that change places at the end, and the others, of which there are up to 4: out[.., col, .., row] = x[..,
// row, .., col]. The input's elements of a row lie side by side, the output's of a column. Strides in elements.
struct Tiles {
  int rows, cols, count, size[AXES - 2];
  int64_t row_stride, col_stride;                            // of a row in the input, of a column in the output
  int64_t in_stride[AXES - 2], out_stride[AXES - 2];
};

template <class Unit> DEV void tile_through(Unit* out, const Unit* x, const Tiles& tiles) {
  constexpr int SIDE = 128 / sizeof(Unit), WARPS = THREADS / 32;
  GPU_SHARED(Unit, tile, [SIDE][SIDE + 4 / sizeof(Unit)]);
  unsigned across = (unsigned)(tiles.cols + SIDE - 1) / SIDE, down = (unsigned)(tiles.rows + SIDE - 1) / SIDE;
  unsigned rest = blockIdx.x / across;
  int first_col = (int)(blockIdx.x - rest * across) * SIDE, first_row = (int)(rest % down) * SIDE;
  rest /= down;
  for (int k = tiles.count - 1; k >= 0; k--) {
    unsigned above = rest / (unsigned)tiles.size[k], index = rest - above * (unsigned)tiles.size[k];
    x += index * tiles.in_stride[k];
    out += index * tiles.out_stride[k];
    rest = above;
  }
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x += first_row * tiles.row_stride + first_col;
  out += first_col * tiles.col_stride + first_row;
  int rows = tiles.rows - first_row, cols = tiles.cols - first_col;
#pragma unroll
  for (int r = warp; r < SIDE; r += WARPS)
#pragma unroll
    for (int c = lane; c < SIDE; c += 32)
      if (r < rows && c < cols) tile[r][c] = x[r * tiles.row_stride + c];
  __syncthreads();
#pragma unroll
  for (int c = warp; c < SIDE; c += WARPS)
#pragma unroll
    for (int r = lane; r < SIDE; r += 32)
      if (r < rows && c < cols) out[c * tiles.col_stride + r] = tile[r][c];
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_tile_2(uint16_t* out, const uint16_t* x, const __grid_constant__ Tiles tiles) {
  tile_through(out, x, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_tile_4(uint32_t* out, const uint32_t* x, const __grid_constant__ Tiles tiles) {
  tile_through(out, x, tiles);
}
GPU_EXPORT(transpose_tile_2)
GPU_EXPORT(transpose_tile_4)
