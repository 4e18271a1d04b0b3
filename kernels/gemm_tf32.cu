// Matrix products in f32 whose factors are rounded to tf32 (10 bits of fraction), on the tensor cores of every GPU from
// sm_80 on.
//   out (m, n) = act(a b + bias), pre (m, n) = a b + bias where it is wanted, out += a b for accumulators; all f32,
//   sums too.
//   Or out = a b + bias + residual (m, n); or, with ACTIVATION_GRAD in `activation`, out = (a b) act'(pre): then pre is
//   read. out may lie over either.
//   nn: a (m, k), b (k, n);  nt: a (m, k), b (n, k);  tn: a (k, m), b (k, n). bias (n).
// Overwrites out (or adds to it, as adds_to says), and a pre that is not read. With `partials`
// (parts, m, n), blockIdx.y is a part of k of `k_part` and gemm_finish adds the parts in order. Deterministic: each sum
// is taken 8 k at a time, in the order of k.
//
// Launch: (tiles of 128 x 128, parts) blocks of 128 threads. A ring of 3 tiles of each operand, 16 k deep, filled by
// cp.async: in words of 16 bytes where rows are aligned, else element by element. A warp owns 64 x 64 of the output.
// Tiles lie as in memory, padded: rows of 16 k take 20 floats, rows of 128 m or n take 136, and so the 32 elements of a
// fragment's register lie in 32 banks. Factors are rounded to nearest as they are taken. Sums leave through shared
// memory, 16 rows at a time.
//
// Cost: a step brings 16 KB for 524,288 flop (32 flop a byte from the L2); a warp reads 64 registers for 64 products of
// 16 x 8 x 8, 64 cycles of shared memory where the tensor cores take 128. 2 blocks a multiprocessor. On an H200
// mma.sync in tf32 ends near 200 of 495 TFLOP/s; 150 are to be expected.
#include "gpu.cuh"
#include "gpu/gemm.cuh"

namespace {

constexpr int TILE = 128, STEP = 16, STAGES = 3, THREADS = 128;
constexpr int WORDS = TILE * STEP / 4 / THREADS; // of an operand's step that a thread copies
constexpr int K_PITCH = STEP + 4, ROW_PITCH = TILE + 8, TILE_FLOATS = TILE * K_PITCH; // the larger: 128 * 20, 16 * 136
constexpr int OUT_PITCH = 64 + 8;
static_assert(STEP * ROW_PITCH <= TILE_FLOATS && 4 * 16 * OUT_PITCH <= 2 * STAGES * TILE_FLOATS,
              "tiles hold either layout, and staged sums");

// One thread's share of an operand's steps. K_ROWS: k runs along the rows of memory.
template <bool K_ROWS> struct Operand {
  static constexpr int APART =
      K_ROWS ? THREADS / (STEP / 4) : THREADS / (TILE / 4);  // rows or k between a thread's words
  const float* from; // the operand, where nothing is read
  const float* at;   // the first word of the next step
  int pitch, rows_left, k_left, place;

  DEV Operand(const float* operand, int row0, int rows, int k0, int k_end, int row_pitch)
      : from(operand), pitch(row_pitch) {
    int row = K_ROWS ? threadIdx.x / (STEP / 4) : threadIdx.x % (TILE / 4) * 4,
        k = K_ROWS ? threadIdx.x % (STEP / 4) * 4 : threadIdx.x / (TILE / 4);
    rows_left = rows - row0 - row, k_left = k_end - k0 - k;
    at = operand + (K_ROWS ? (int64_t)(row0 + row) * pitch + k0 + k : (int64_t)(k0 + k) * pitch + row0 + row);
    place = K_ROWS ? row * K_PITCH + k : k * ROW_PITCH + row;
  }

  DEV void start(float* tile) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      int across = (K_ROWS ? rows_left : k_left) - i * APART, along = K_ROWS ? k_left : rows_left;
      int count = across > 0 ? max(0, min(along, 4)) : 0;
      const float* word = count ? at + (int64_t)pitch * (i * APART) : from;
      float* to = tile + place + i * APART * (K_ROWS ? K_PITCH : ROW_PITCH);
      if (pitch % 4 == 0) cp_async16_zfill(to, word, 4 * count);
      else for (int e = 0; e < 4; e++) cp_async4_zfill(to + e, e < count ? word + e : from, e < count ? 4 : 0);
    }
    at += K_ROWS ? STEP : (int64_t)pitch * STEP;
    k_left -= STEP;
  }

  // Element (row, k) of a tile, rounded.
  DEV static uint32_t take(const float* tile, int row, int k) {
    return to_tf32(tile[K_ROWS ? row * K_PITCH + k : k * ROW_PITCH + row]);
  }
};

template <bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void product(const GemmEnd<float>& whole, const float* a, const float* b, int m, int n, int k, int k_part) {
  typedef Operand<!A_TRANSPOSED> A;
  typedef Operand<B_TRANSPOSED> B;
  GPU_DYNAMIC(float, ring); // tiles of a, then of b
  GemmTile tile = gemm_tile(blockIdx.x, (m + TILE - 1) / TILE, (n + TILE - 1) / TILE);
  int row0 = tile.row * TILE, col0 = tile.col * TILE;
  int k_begin = blockIdx.y * k_part, k_end = min(k - k_begin, k_part) + k_begin;
  A in_a(a, row0, m, k_begin, k_end, A_TRANSPOSED ? m : k);
  B in_b(b, col0, n, k_begin, k_end, B_TRANSPOSED ? k : n);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int warp_row = warp / 2 * 64, warp_col = warp % 2 * 64;

  float sums[4][8][4] = {};
  for (int stage = 0; stage < STAGES - 1; stage++) {
    in_a.start(ring + stage * TILE_FLOATS), in_b.start(ring + (STAGES + stage) * TILE_FLOATS);
    cp_async_commit();
  }
  int now_in = 0, next_in = STAGES - 1;
  for (int left = k_end - k_begin; left > 0; left -= STEP) {
    cp_async_wait<STAGES - 2>();
    __syncthreads(); // this step is there for all, and all are done with the one before, whose place the next takes
    in_a.start(ring + next_in * TILE_FLOATS), in_b.start(ring + (STAGES + next_in) * TILE_FLOATS);
    cp_async_commit();
    const float *tile_a = ring + now_in * TILE_FLOATS, *tile_b = ring + (STAGES + now_in) * TILE_FLOATS;
#pragma unroll
    for (int j = 0; j < STEP; j += 8) {
      uint32_t down[4][4], across[8][2];
      for (int i = 0; i < 4; i++)
        for (int r = 0; r < 4; r++) down[i][r] = A::take(tile_a, warp_row + 16 * i + g + r % 2 * 8, j + t + r / 2 * 4);
      for (int i = 0; i < 8; i++)
        for (int r = 0; r < 2; r++) across[i][r] = B::take(tile_b, warp_col + 8 * i + g, j + t + 4 * r);
      for (int i = 0; i < 4; i++)
        for (int c = 0; c < 8; c++) mma_1688_tf32(sums[i][c], down[i], across[c]);
    }
    now_in = now_in + 1 == STAGES ? 0 : now_in + 1, next_in = next_in + 1 == STAGES ? 0 : next_in + 1;
  }

  cp_async_wait<0>();
  __syncthreads();
  float* staged = ring + warp * 16 * OUT_PITCH;
  GemmEnd<float> end = whole.part(blockIdx.y);
#pragma unroll 1
  for (int sixteenth = 0; sixteenth < 4; sixteenth++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i != sixteenth) continue; // registers have no index
      for (int c = 0; c < 8; c++) {
        float* at = staged + g * OUT_PITCH + c * 8 + t * 2;
        *reinterpret_cast<float2*>(at) = make_float2(sums[i][c][0], sums[i][c][1]);
        *reinterpret_cast<float2*>(at + 8 * OUT_PITCH) = make_float2(sums[i][c][2], sums[i][c][3]);
      }
    }
    __syncwarp();
    end.put_staged<16, 64, OUT_PITCH>(staged, row0 + warp_row + 16 * sixteenth, col0 + warp_col);
    __syncwarp();
  }
}

}  // namespace

#define GEMM_TF32(name, a_transposed, b_transposed)                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                             \
      name(float* out, float* pre, float* partials, const float* a, const float* b, const float* bias,                 \
           const float* residual, const Now* now, int accumulator, int activation, int m, int n, int k, int k_part) {  \
    product<a_transposed, b_transposed>(                                                                               \
        gemm_end(out, pre, partials, bias, residual, now, accumulator, activation, m, n, n), a, b, m, n, k, k_part);   \
  }                                                                                                                    \
  GPU_EXPORT(name)

GEMM_TF32(gemm_nn_tf32, false, false)
GEMM_TF32(gemm_nt_tf32, false, true)
GEMM_TF32(gemm_tn_tf32, true, false)
