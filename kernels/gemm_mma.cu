// Matrix products in bf16 with f32 sums on the tensor cores of every GPU from sm_80 on.
//   out (m, n) = act(a b + bias), pre (m, n) = a b + bias where it is wanted, out += a b for accumulators.
//   Or out = a b + bias + residual (m, n); or, with ACTIVATION_GRAD in `activation`, out = (a b) act'(pre): then pre is
//   read. out may lie over either.
//   nn: a (m, k), b (k, n), all bf16;  nt: a (m, k), b (n, k), all bf16;  tn: a (k, m), b (k, n) bf16, out f32. bias (n).
// Rows of a, b and out are a_pitch, b_pitch and out_pitch apart.
// Overwrites out (or adds to it, as adds_to says), and a pre that is not read. With `partials`
// (parts, m, n) f32, blockIdx.y is a part of k of `k_part` and gemm_finish adds the parts in order. Deterministic: each
// sum is taken 16 k at a time, in the order of k.
//
// Launch: (tiles of 128 x 128, parts) blocks of 128 threads, or of 256 for the `ragged` kernels, which take rows of any
// width: without a word of 16 bytes to start at, a row is read as the aligned words that it lies in and shifted in
// registers. Else cp.async brings the words.
// A ring of 3 tiles of each operand, 32 k deep; the two next are on their way while one is worked on. A warp owns 64 x
// 64 of the output (ragged: 64 x 32).
// Sums leave through shared memory, 16 rows at a time.
//
// Cost: a step brings 16 KB for 1,048,576 flop (64 flop a byte from the L2); a warp reads 8 KB of fragments for 64
// products of 16 x 8 x 16, 128 cycles of shared memory a multiprocessor where the tensor cores take 256. 2 blocks a
// multiprocessor, by registers and shared memory. On an H200 mma.sync itself ends near 400 of 990 TFLOP/s; 350 are to
// be expected, ragged 250. There it serves what gemm_hopper does not take: rows of b of odd width; on sm_80, sm_89 and
// sm_120 it is the whole path, at about 85-90 % of what they have.
#include "gpu.cuh"
#include "gpu/gemm.cuh"
#include "gpu/shifted_word.cuh"
#include "gpu/gemm_mma.cuh"

namespace {

constexpr int STAGES = 3;

template <class Out, bool A_TRANSPOSED, bool B_TRANSPOSED, bool RAGGED>
DEV void product(const GemmEnd<Out>& whole, const bf16* a, const bf16* b, int m, int n, int k, int k_part, int a_pitch,
                 int b_pitch) {
  constexpr int WARPS_ACROSS = RAGGED ? 4 : 2, THREADS = 64 * WARPS_ACROSS, ACROSS = MMA_TILE / WARPS_ACROSS;
  constexpr int PITCH = ACROSS + 8; // of staged sums: rows 8 banks apart
  GPU_SHARED(uint4, ring, [2 * STAGES][MMA_WORDS]); // a, then b
  GemmTile tile = gemm_tile(blockIdx.x, (m + MMA_TILE - 1) / MMA_TILE, (n + MMA_TILE - 1) / MMA_TILE);
  int row0 = tile.row * MMA_TILE, col0 = tile.col * MMA_TILE;
  int k_begin = blockIdx.y * k_part, k_end = min(k - k_begin, k_part) + k_begin;
  MmaOperand<!A_TRANSPOSED, THREADS, RAGGED> in_a(a, row0, m, k_begin, k_end, a_pitch);
  MmaOperand<B_TRANSPOSED, THREADS, RAGGED> in_b(b, col0, n, k_begin, k_end, b_pitch);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int warp_row = warp / WARPS_ACROSS * 64, warp_col = warp % WARPS_ACROSS * ACROSS;
  MmaFragments<!A_TRANSPOSED, 64> from_a(warp_row);
  MmaFragments<B_TRANSPOSED, ACROSS> from_b(warp_col);

  float sums[4][ACROSS / 8][4] = {};
  for (int stage = 0; stage < STAGES - 1; stage++) {
    in_a.start(ring[stage]), in_b.start(ring[STAGES + stage]);
    cp_async_commit();
    in_a.arrive(ring[stage]), in_b.arrive(ring[STAGES + stage]);
  }
  int now_in = 0, next_in = STAGES - 1;
  for (int left = k_end - k_begin; left > 0; left -= MMA_STEP) {
    cp_async_wait<STAGES - 2>();
    __syncthreads(); // this step is there for all, and all are done with the one before, whose place the next takes
    in_a.start(ring[next_in]), in_b.start(ring[STAGES + next_in]);
    cp_async_commit();
    const uint4 *tile_a = ring[now_in], *tile_b = ring[STAGES + now_in];
    uint32_t down[2][4][4], across[2][ACROSS / 16][4];
    for (int i = 0; i < 4; i++) from_a.take(down[0][i], tile_a, i, 0);
    for (int i = 0; i < ACROSS / 16; i++) from_b.take(across[0][i], tile_b, i, 0);
#pragma unroll
    for (int j = 0; j < MMA_STEP / 16; j++) {
      if (j + 1 < MMA_STEP / 16) {
        for (int i = 0; i < 4; i++) from_a.take(down[(j + 1) % 2][i], tile_a, i, j + 1);
        for (int i = 0; i < ACROSS / 16; i++) from_b.take(across[(j + 1) % 2][i], tile_b, i, j + 1);
      }
      for (int i = 0; i < 4; i++) {
        for (int c = 0; c < ACROSS / 8; c++) {
          const uint32_t(&pair)[4] = across[j % 2][c / 2];
          mma_16816(sums[i][c], down[j % 2][i], {pair[c % 2], pair[c % 2 + 2]});
        }
      }
    }
    now_in = now_in + 1 == STAGES ? 0 : now_in + 1;
    in_a.arrive(ring[next_in]), in_b.arrive(ring[STAGES + next_in]);
    next_in = next_in + 1 == STAGES ? 0 : next_in + 1;
  }

  cp_async_wait<0>();
  __syncthreads();
  float* staged = reinterpret_cast<float*>(ring[0]) + warp * 16 * PITCH;
  GemmEnd<Out> end = whole.part(blockIdx.y);
#pragma unroll 1
  for (int sixteenth = 0; sixteenth < 4; sixteenth++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i != sixteenth) continue; // registers have no index
      for (int c = 0; c < ACROSS / 8; c++) {
        float* at = staged + lane / 4 * PITCH + c * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(sums[i][c][0], sums[i][c][1]);
        *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[i][c][2], sums[i][c][3]);
      }
    }
    __syncwarp();
    end.template put_staged<16, ACROSS, PITCH>(staged, row0 + warp_row + 16 * sixteenth, col0 + warp_col);
    __syncwarp();
  }
}

}  // namespace

#define GEMM_MMA(name, Out, a_transposed, b_transposed, ragged)                                                        \
  extern "C" __global__ void __launch_bounds__(ragged ? 256 : 128, ragged ? 1 : 2)                                     \
      name(Out* out, Out* pre, float* partials, const bf16* a, const bf16* b, const Out* bias, const Out* residual,    \
           const Now* now, int accumulator, int activation, int m, int n, int k, int k_part, int a_pitch, int b_pitch, \
           int out_pitch) {                                                                                            \
    product<Out, a_transposed, b_transposed, ragged>(                                                                  \
        gemm_end(out, pre, partials, bias, residual, now, accumulator, activation, m, n, out_pitch), a, b, m, n, k,    \
        k_part, a_pitch, b_pitch);                                                                                     \
  }                                                                                                                    \
  GPU_EXPORT(name)

GEMM_MMA(gemm_nn_bf16, bf16, false, false, false)
GEMM_MMA(gemm_nt_bf16, bf16, false, true, false)
GEMM_MMA(gemm_tn_bf16, float, true, false, false)
GEMM_MMA(gemm_nn_ragged_bf16, bf16, false, false, true)
GEMM_MMA(gemm_nt_ragged_bf16, bf16, false, true, true)
GEMM_MMA(gemm_tn_ragged_bf16, float, true, false, true)
