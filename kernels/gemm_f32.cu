// Matrix products on the plain arithmetic units, for f32 at full precision.
//   out (m, n) = act(a b + bias), pre (m, n) = a b + bias where it is wanted, out += a b for accumulators.
//   Or out = a b + bias + residual (m, n); or, with ACTIVATION_GRAD in `activation`, out = (a b) act'(pre): then pre is
//   read. out may lie over either.
//   nn: a (m, k), b (k, n);  nt: a (m, k), b (n, k);  tn: a (k, m), b (k, n). bias (n).
// Overwrites out (or adds to it, as adds_to says), and a pre that is not read. With `partials`
// (parts, m, n), blockIdx.y is a part of k of `k_part` and gemm_finish adds the parts in order. Deterministic: each
// element is one chain of fused multiply-adds in the order of k.
//
// Launch: (tiles of 128 x 128, parts) blocks of 128 threads. A block keeps two k-steps of 8 of both operands in shared
// memory as f32, k outermost; while it works on one, the next is on its way through registers. A thread owns 16 x 8
// elements, as squares of 4 x 4 that lie 32 rows or 64 columns apart, so that a warp (8 threads across, 4 down) reads
// each operand as whole 16-byte words from distinct banks.
// Rows of k-contiguous operands are transposed on the way in; the row index is xored with 16 in every second group of 4
// k, which keeps those scattered stores free of bank conflicts and every 16-byte word whole.
//
// Cost: a k-step moves 8 KB in for 262,144 flop (32 flop a byte of L2 traffic). For each k a warp reads 6 16-byte words
// a lane, 24 cycles of shared memory, for 128 multiply-adds a lane; the 8 warps of 2 blocks (by registers) take 192 of
// the 256 cycles that their arithmetic takes. With 8 x 8 elements a thread both took 256. A k's reads are issued before
// the multiply-adds of the one before. Of 1,200 instructions of a step 1,024 are multiply-adds. Measured at 8192^3 on
// an H200: 39.0 TFLOP/s, where a step had 1,350 instructions, for the xor was worked out at each read; 36.4 with 8 x 8;
// cuBLAS 51.1. 43 are to be expected now.
#include "gpu.cuh"
#include "gpu/gemm.cuh"

namespace {

constexpr int TILE = 128, STEP = 8, THREADS = 128;
constexpr int DOWN = 16, ACROSS = 8; // elements of a thread

// Where element (k, row) of an operand's step lies.
DEV int slot(int k, int row) { return k * TILE + (row ^ (k / 4 * 16)); }

// Up to 4 elements from `from`, `count` of them there; `whole` when 16-byte (bf16: 8-byte) loads are aligned, and count
// a multiple of 4.
DEV void load_quad(float (&to)[4], const float* from, int count, bool whole) {
  if (whole && count >= 4) {
    float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    for (int i = 0; i < 4; i++) to[i] = i < count ? from[i] : 0.0f;
  }
}

// One operand's walk along k: `K_ROWS` when it is stored with k along a row. A thread carries 4 neighbours of each of
// two rows.
template <bool K_ROWS> struct Operand {
  static constexpr int QUADS = TILE * STEP / 4 / THREADS,
                       APART = K_ROWS ? TILE / QUADS : STEP / QUADS;  // rows, or k, between a thread's quads
  const float* at; // the thread's first quad of the next step
  int pitch, k_left, row_left;
  float held[QUADS][4];

  DEV static int row() { return K_ROWS ? threadIdx.x / (STEP / 4) : threadIdx.x % (TILE / 4) * 4; }
  DEV static int k() { return K_ROWS ? threadIdx.x % (STEP / 4) * 4 : threadIdx.x / (TILE / 4); }

  DEV Operand(const float* from, int row0, int rows, int k0, int k_end, int row_pitch)
      : pitch(row_pitch), k_left(k_end - k0 - k()), row_left(rows - row0 - row()) {
    int64_t first_row = row0 + row(), first_k = k0 + k();
    at = from + (K_ROWS ? first_row * pitch + first_k : first_k * pitch + first_row);
  }

  DEV void fetch() {
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      int along = K_ROWS ? k_left : row_left, across = (K_ROWS ? row_left : k_left) - q * APART;
      load_quad(held[q], at + (int64_t)pitch * (q * APART), across > 0 ? along : 0, pitch % 4 == 0);
    }
    at += K_ROWS ? STEP : (int64_t)pitch * STEP;
    k_left -= STEP;
  }

  DEV void place(float* tile) const {
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const float(&v)[4] = held[q];
      if (K_ROWS) {
        for (int e = 0; e < 4; e++) tile[slot(k() + e, row() + q * APART)] = v[e];
      } else {
        *reinterpret_cast<float4*>(tile + slot(k() + q * APART, row())) = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  }
};

// A thread's N elements of each k, by fours that lie 4 TILE / N apart. Those are multiples of 32, so that of a slot's
// xor only `at` is touched, and all else is a constant beside one of two addresses.
template <int N> struct Reader {
  const float* of_first; // in a step's first 4 k
  int to_second;         // from there to the place for its second 4

  DEV Reader(const float* tile, int at) : of_first(tile + slot(0, at)), to_second(slot(4, at) - slot(0, at)) {}
  DEV void read(float (&to)[N], int k) const {
    const float* from = of_first + (k < 4 ? k * TILE : to_second + (k - 4) * TILE);
    for (int i = 0; i < N; i += 4) {
      float4 v = *reinterpret_cast<const float4*>(from + i * TILE / N);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  }
};

template <bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void product(const GemmEnd<float>& whole, const float* a, const float* b, int m, int n, int k, int k_part) {
  GPU_SHARED(float, tiles, [4 * TILE * STEP]); // two buffers of a, two of b
  GemmTile tile = gemm_tile(blockIdx.x, (m + TILE - 1) / TILE, (n + TILE - 1) / TILE);
  int row0 = tile.row * TILE, col0 = tile.col * TILE;
  int k_begin = blockIdx.y * k_part, k_end = min(k - k_begin, k_part) + k_begin;
  Operand<!A_TRANSPOSED> in_a(a, row0, m, k_begin, k_end, A_TRANSPOSED ? m : k);
  Operand<B_TRANSPOSED> in_b(b, col0, n, k_begin, k_end, B_TRANSPOSED ? k : n);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int y = (warp / 2 * 4 + lane / 8) * 4, x = (warp % 2 * 8 + lane % 8) * 4;

  float sums[DOWN][ACROSS] = {};
  in_a.fetch();
  in_b.fetch();
  int buffer = 0;
  for (int left = k_end - k_begin; left > 0; left -= STEP, buffer ^= 1) {
    in_a.place(tiles + buffer * TILE * STEP);
    in_b.place(tiles + (2 + buffer) * TILE * STEP);
    __syncthreads(); // the other buffer's readers passed the last one
    if (left > STEP) {
      in_a.fetch();
      in_b.fetch();
    }
    Reader<DOWN> of_a(tiles + buffer * TILE * STEP, y);
    Reader<ACROSS> of_b(tiles + (2 + buffer) * TILE * STEP, x);
    float down[2][DOWN], across[2][ACROSS];
    of_a.read(down[0], 0), of_b.read(across[0], 0);
#pragma unroll
    for (int kk = 0; kk < STEP; kk++) {
      if (kk + 1 < STEP) of_a.read(down[(kk + 1) % 2], kk + 1), of_b.read(across[(kk + 1) % 2], kk + 1);
#pragma unroll
      for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++) sums[i][j] = fmaf(down[kk % 2][i], across[kk % 2][j], sums[i][j]);
    }
  }
  GemmEnd<float> end = whole.part(blockIdx.y);
  // Out by eighths of 32 x 64 through shared memory, 8 rows a warp.
#pragma unroll
  for (int eighth = 0; eighth < 8; eighth++) {
    int down = eighth / 2 * 4, across = eighth % 2 * 4;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      *reinterpret_cast<float4*>(tiles + (y + i) * (TILE / 2) + x) = make_float4(
          sums[down + i][across], sums[down + i][across + 1], sums[down + i][across + 2], sums[down + i][across + 3]);
    }
    __syncthreads();
    int warp_row = warp * 8;
    end.put_staged<8, TILE / 2, TILE / 2>(tiles + warp_row * TILE / 2, row0 + down * 8 + warp_row, col0 + across * 16);
  }
}

}  // namespace

#define GEMM_F32(name, a_transposed, b_transposed)                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                             \
      name(float* out, float* pre, float* partials, const float* a, const float* b, const float* bias,                 \
           const float* residual, const Now* now, int accumulator, int activation, int m, int n, int k, int k_part) {  \
    product<a_transposed, b_transposed>(                                                                               \
        gemm_end(out, pre, partials, bias, residual, now, accumulator, activation, m, n, n), a, b, m, n, k, k_part);   \
  }                                                                                                                    \
  GPU_EXPORT(name)

GEMM_F32(gemm_nn_f32, false, false)
GEMM_F32(gemm_nt_f32, false, true)
GEMM_F32(gemm_tn_f32, true, false)
