// Pooling through shared memory: what pool.cu computes, for planes of which a few rows at least fit there.
//   x, d_x (planes, H, W), out, d_out (planes, H', W') f32 or bf16; argmax (planes, H', W') i32. What beats what is
//   said in pool.cu.
// A block has some whole planes, or a strip of rows of one: what it reads of x, and what it writes, is one contiguous
// stretch, moved 16 bytes at a time.
//   forward   the stretch of x comes by cp.async, then a thread takes one window after another; a warp does, of averages, where windows are
//             few and large. Maxima of 3 x 3 and 2 x 2 go down a column, with what a row of the window has kept for the next: places outside
//             count as the nearest inside, which changes no maximum.
//   max grad  each thread first loads all its windows, up to 8. Windows are alike whose rows and columns are so many apart that they have no place in
//             common, so that they add to the strip in shared memory without atomics. One after another, with a barrier between: d_x
//             is the sum in this order.
//   avg grad  where one window has the whole plane: d_out over the window's size, a pack at a time.
// Overwrites its outputs; the same bits everywhere: nothing depends on the grid.
// Bytes: every operand once; of strips also the rows that windows of two share, 3 % at 112 x 112. 26 KB of shared
// memory a block, 6 to 8 blocks a multiprocessor. About 70 instructions a window of 3 x 3 forward, 40 a window and 3 an
// element back. Expected: 75 % of the copy rate for maxima in bf16, 85 % the others.
#include "gpu.cuh"
#include "gpu/pool.cuh"
#include "gpu/row.cuh"

constexpr int THREADS = 256;
constexpr int TILE_BYTES = 26624;     // of x, or of d_x in f32
constexpr int WINDOWS = 8;            // of a thread of the maximum's gradient
constexpr int WHOLE_PACKS = 4;        // of a thread of the average's gradient

// How planes are shared out: `planes` whole ones a block, or where strips > 1 one strip of `rows` rows, of the output
// that is.
struct Cut { int planes, strips, rows; };

// Walks over places of (planes, rows, cols) in steps of THREADS, without a division a step.
struct Places {
  int rows, cols, plane, row, col, planes_on, rows_on, cols_on;
  DEV Places(int start, int rows, int cols) : rows(rows), cols(cols) {
    row = start / cols, col = start - row * cols, plane = row / rows, row -= plane * rows;
    rows_on = THREADS / cols, cols_on = THREADS - rows_on * cols, planes_on = rows_on / rows,
    rows_on -= planes_on * rows;
  }
  DEV void step() {
    plane += planes_on, row += rows_on, col += cols_on;
    if (col >= cols) col -= cols, row++;
    if (row >= rows) row -= rows, plane++;
  }
};

// `n` elements into shared memory. The result is the first one's place there: 16-byte words of the one side are those
// of the other.
template <class T> DEV const T* stage(T* shared, const T* from, int n) {
  constexpr int N = Pack<T>::N;
  Packs<T> at(from, n);
  T* tile = shared + (N - at.head % N) % N;
  for (int p = threadIdx.x; p < at.packs; p += THREADS) cp_async16(tile + at.head + p * N, from + at.head + p * N);
  for (int i = threadIdx.x; i < at.head; i += THREADS) tile[i] = from[i];
  for (int i = at.tail + threadIdx.x; i < n; i += THREADS) tile[i] = from[i];
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  return tile;
}

DEV int clamp(int at, int size) { return at < 0 ? 0 : at < size ? at : size - 1; }

// The greatest value so far and its place; another that comes later wins where it is greater, or NaN.
struct Best {
  float value; int place;
  DEV void look(float v, int here) {
    if (v > value || v != v) value = v, place = here;
  }
};

// The stretch of x that a block has, and its windows.
template <class T> struct Share {
  int64_t first_out;                    // its first window
  int count, out_rows, first_out_row;   // planes, and rows of windows of each
  int first_row, plane_elems;           // the first row of x, elements from a plane to the next
  const T* tile;
  DEV Share(T* shared, const T* x, int64_t planes, const Sizes& s, const Cut& cut) {
    int64_t part = blockIdx.x / cut.strips, plane = part * cut.planes;
    count = planes - plane < cut.planes ? (int)(planes - plane) : cut.planes;
    first_out_row = (int)(blockIdx.x - part * cut.strips) * cut.rows;
    out_rows = s.out_height - first_out_row < cut.rows ? s.out_height - first_out_row : cut.rows;
    first_out = (plane * s.out_height + first_out_row) * s.out_width;
    Range rows = {0, s.height};
    if (cut.strips > 1) {
      rows.first = inside(first_out_row, s.stride, s.padding, s.kernel_h, s.height).first;
      rows.end = inside(first_out_row + out_rows - 1, s.stride, s.padding, s.kernel_h, s.height).end;
    }
    first_row = rows.first, plane_elems = s.height * s.width;
    tile = stage(shared, x + (plane * s.height + rows.first) * s.width,
                 cut.strips > 1 ? rows.len() * s.width : count * plane_elems);
  }
};

// Windows of any size.
template <class T> DEV void max_windows(T* out, int32_t* argmax, const Share<T>& share, const Sizes& s) {
  Places at(threadIdx.x, share.out_rows, s.out_width);
  int windows = share.count * share.out_rows * s.out_width;
#pragma unroll 1
  for (int i = threadIdx.x; i < windows; i += THREADS, at.step()) {
    Range rows = inside(share.first_out_row + at.row, s.stride, s.padding, s.kernel_h, s.height),
          cols = inside(at.col, s.stride, s.padding, s.kernel_w, s.width);
    const T* plane = share.tile + at.plane * share.plane_elems - share.first_row * s.width;
    Best best = {-INFINITY, rows.len() == 0 || cols.len() == 0 ? -1 : rows.first * s.width + cols.first};
    for (int row = rows.first; row < rows.end; row++)
      for (int col = cols.first; col < cols.end; col++)
        best.look(to_float(plane[row * s.width + col]), row * s.width + col);
    out[i] = from_float<T>(best.value);
    argmax[i] = best.place;
  }
}

// Windows of K x K, K being 2 or 3: a thread goes down a column of them. The last row of a window is looked at once
// where the next begins with it.
template <int K, class T> DEV void max_columns(T* out, int32_t* argmax, const Share<T>& share, const Sizes& s) {
  int columns = share.count * s.out_width, groups = columns < THREADS ? THREADS / columns : 1,
      group = threadIdx.x / columns;
  if (groups == 1) group = 0;
  int each = (share.out_rows + groups - 1) / groups, begin = group * each,
      end = begin + each < share.out_rows ? begin + each : share.out_rows;
  for (int column = groups == 1 ? threadIdx.x : threadIdx.x - group * columns; column < columns && begin < end;
       column += THREADS) {
    int plane = column / s.out_width, out_col = column - plane * s.out_width, left = out_col * s.stride - s.padding;
    const T* x = share.tile + plane * share.plane_elems - share.first_row * s.width;
    bool nothing = left >= s.width || left + K <= 0;
    int col[K], kept_row = -1;
#pragma unroll
    for (int j = 0; j < K; j++) col[j] = clamp(left + j, s.width);
    Best kept = {};   // of row kept_row
    auto row_best = [&](int row) {
      int at = row * s.width;
      Best best = {to_float(x[at + col[0]]), at + col[0]};
#pragma unroll
      for (int j = 1; j < K; j++) best.look(to_float(x[at + col[j]]), at + col[j]);
      return best;
    };
    int top = (share.first_out_row + begin) * s.stride - s.padding;
    int to = (plane * share.out_rows + begin) * s.out_width + out_col;
#pragma unroll 1
    for (int row = begin; row < end; row++, top += s.stride, to += s.out_width) {
      Best best = {-INFINITY, -1};
      if (!nothing && top < s.height && top + K > 0) {
        int first = clamp(top, s.height);
        best = first == kept_row ? kept : row_best(first);
#pragma unroll
        for (int i = 1; i < K; i++) {
          kept_row = clamp(top + i, s.height);
          kept = row_best(kept_row);
          best.look(kept.value, kept.place);
        }
      }
      out[to] = from_float<T>(best.value);
      argmax[to] = best.place;
    }
  }
}

template <class T>
DEV void max_forward(T* out, int32_t* argmax, const T* x, int64_t planes, const Sizes& s, const Cut& cut) {
  GPU_SHARED(T, shared, [TILE_BYTES / sizeof(T)]);
  Share<T> share(shared, x, planes, s, cut);
  if (s.kernel_h == 3 && s.kernel_w == 3) max_columns<3>(out + share.first_out, argmax + share.first_out, share, s);
  else if (s.kernel_h == 2 && s.kernel_w == 2)
    max_columns<2>(out + share.first_out, argmax + share.first_out, share, s);
  else max_windows(out + share.first_out, argmax + share.first_out, share, s);
}

// By threads, or by warps where `lanes` is 32.
template <class T> DEV void avg_forward(T* out, const T* x, int64_t planes, const Sizes& s, const Cut& cut, int lanes) {
  GPU_SHARED(T, shared, [TILE_BYTES / sizeof(T)]);
  Share<T> share(shared, x, planes, s, cut);
  int windows = share.count * share.out_rows * s.out_width, lane = threadIdx.x % lanes;
  for (int i = threadIdx.x / lanes; i < windows; i += THREADS / lanes) {
    int line = i / s.out_width, plane_at = line / share.out_rows, col_at = i - line * s.out_width,
        row_at = line - plane_at * share.out_rows;
    Range rows = inside(share.first_out_row + row_at, s.stride, s.padding, s.kernel_h, s.height),
          cols = inside(col_at, s.stride, s.padding, s.kernel_w, s.width);
    const T* plane = share.tile + plane_at * share.plane_elems - share.first_row * s.width;
    float sum = 0;
    if (lanes == 1) {
      for (int row = rows.first; row < rows.end; row++)
#pragma unroll 8
        for (int col = cols.first; col < cols.end; col++) sum += to_float(plane[row * s.width + col]);
    } else {
      int count = rows.len() * cols.len(), across = cols.len();
#pragma unroll 4
      for (int e = lane; e < count; e += 32)
        sum += to_float(plane[(rows.first + e / across) * s.width + cols.first + e % across]);
      sum = warp_sum(sum);
    }
    if (lane == 0) out[share.first_out + i] = from_float<T>(sum / ((float)s.kernel_h * s.kernel_w));
  }
}

// Windows a power of two of rows apart, or of columns, have no place in common: mask_h and mask_w are one less, mask_w
// has bits_w bits.
template <class T>
DEV void max_grad(T* d_x, const T* d_out, const int32_t* argmax, int64_t planes, const Sizes& s, const Cut& cut,
                  int mask_h, int mask_w, int bits_w) {
  constexpr int N = Pack<T>::N, NOWHERE = -1;
  GPU_SHARED(float, shared, [TILE_BYTES / 4]);
  int64_t part = blockIdx.x / cut.strips, plane = part * cut.planes;
  int count = planes - plane < cut.planes ? (int)(planes - plane) : cut.planes;
  int first_row = (int)(blockIdx.x - part * cut.strips) * cut.rows,
      rows = s.height - first_row < cut.rows ? s.height - first_row : cut.rows;
  int elems = count * rows * s.width;
  Range out_rows = {0, s.out_height};
  if (cut.strips > 1) {
    out_rows.first = covering(first_row, s.stride, s.padding, s.kernel_h, s.out_height).first;
    out_rows.end = covering(first_row + rows - 1, s.stride, s.padding, s.kernel_h, s.out_height).end;
  }
  d_x += (plane * s.height + first_row) * s.width;
  Packs<T> packs(d_x, elems);
  float* tile = shared + (4 - packs.head % 4) % 4;   // packs of d_x begin at words of 16 bytes
  int windows = count * out_rows.len() * s.out_width;
  int64_t first_out = (plane * s.out_height + out_rows.first) * s.out_width;
  int place[WINDOWS];
  T grad[WINDOWS];
#pragma unroll
  for (int k = 0; k < WINDOWS; k++) {
    int i = k * THREADS + threadIdx.x;
    if (i < windows) place[k] = argmax[first_out + i], grad[k] = d_out[first_out + i];
  }
  for (int i = threadIdx.x; i < TILE_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  // From here on the place in the tile, and above it which windows it is alike.
  Places at(threadIdx.x, out_rows.len() > 0 ? out_rows.len() : 1, s.out_width);
#pragma unroll
  for (int k = 0; k < WINDOWS; k++, at.step()) {
    int here = place[k] - first_row * s.width;
    bool adds = k * THREADS + (int)threadIdx.x < windows && place[k] >= 0 && here >= 0 && here < rows * s.width;
    int alike = (at.row & mask_h) << bits_w | (at.col & mask_w);
    place[k] = adds ? (at.plane * rows * s.width + here) | (alike << 16) : NOWHERE;
  }
#pragma unroll 1
  for (int alike = 0; alike < (mask_h + 1) << bits_w; alike++) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < WINDOWS; k++)
      if (place[k] >> 16 == alike) tile[place[k] & 0xFFFF] += to_float(grad[k]);
  }
  __syncthreads();
  for (int p = threadIdx.x; p < packs.packs; p += THREADS) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = tile[packs.head + p * N + j];
    store16(d_x + packs.head + p * N, to_pack<T>(v));
  }
  for (int i = threadIdx.x; i < packs.head; i += THREADS) d_x[i] = from_float<T>(tile[i]);
  for (int i = packs.tail + threadIdx.x; i < elems; i += THREADS) d_x[i] = from_float<T>(tile[i]);
}

// d_x (planes, positions), one window a plane, of `size` elements.
template <class T> DEV void avg_grad_whole(T* d_x, const T* d_out, int64_t elems, int positions, float size) {
  constexpr int N = Pack<T>::N;
  int64_t first = (int64_t)blockIdx.x * (THREADS * WHOLE_PACKS * N), first_plane = first / positions;
  int before = (int)(first - first_plane * positions);
  d_out += first_plane;
#pragma unroll
  for (int k = 0; k < WHOLE_PACKS; k++) {
    int offset = (k * THREADS + threadIdx.x) * N, here = elems - first - offset < N ? (int)(elems - first - offset) : N;
    if (here <= 0) return;
    unsigned at = (unsigned)before + offset, plane = at / positions, position = at - plane * positions;
    float y[N], value = to_float(d_out[plane]) / size;
#pragma unroll
    for (int j = 0; j < N; j++) {
      y[j] = value;
      if (++position == (unsigned)positions && j + 1 < here) position = 0, value = to_float(d_out[++plane]) / size;
    }
    if (here == N) {
      store16(d_x + first + offset, to_pack<T>(y));
    } else {
#pragma unroll
      for (int j = 0; j < N; j++)
        if (j < here) d_x[first + offset + j] = from_float<T>(y[j]);
    }
  }
}

// The entry points for element type T.
#define POOL_TILE_ENTRIES(T)                                                                                           \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(6)) void max_pool_forward_tile_##T(                      \
      T* out, int32_t* argmax, const T* x, int64_t planes, Sizes s, Cut cut) {                                         \
    max_forward(out, argmax, x, planes, s, cut);                                                                       \
  }                                                                                                                    \
  GPU_EXPORT(max_pool_forward_tile_##T)                                                                                \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(5)) void max_pool_grad_tile_##T(                         \
      T* d_x, const T* d_out, const int32_t* argmax, int64_t planes, Sizes s, Cut cut, int mask_h, int mask_w,         \
      int bits_w) {                                                                                                    \
    max_grad(d_x, d_out, argmax, planes, s, cut, mask_h, mask_w, bits_w);                                              \
  }                                                                                                                    \
  GPU_EXPORT(max_pool_grad_tile_##T)                                                                                   \
  extern "C" __global__ __launch_bounds__(THREADS, GPU_BLOCKS(6)) void avg_pool_forward_tile_##T(                      \
      T* out, const T* x, int64_t planes, Sizes s, Cut cut, int lanes) {                                               \
    avg_forward(out, x, planes, s, cut, lanes);                                                                        \
  }                                                                                                                    \
  GPU_EXPORT(avg_pool_forward_tile_##T)                                                                                \
  extern "C" __global__ __launch_bounds__(THREADS) void avg_pool_grad_whole_##T(T* d_x, const T* d_out, int64_t elems, \
                                                                                int positions, float size) {           \
    avg_grad_whole(d_x, d_out, elems, positions, size);                                                                \
  }                                                                                                                    \
  GPU_EXPORT(avg_pool_grad_whole_##T)

using f32 = float;
POOL_TILE_ENTRIES(f32)
POOL_TILE_ENTRIES(bf16)
