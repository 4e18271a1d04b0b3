// Matrix products in bf16 with f32 sums by warpgroup products, for sm_90a.
//   out (m, n) = act(a b + bias), pre (m, n) = a b + bias where it is wanted, out += a b for accumulators.
//   Or out = a b + bias + residual (m, n); or, with ACTIVATION_GRAD in `activation`, out = (a b) act'(pre): then pre is
//   read. out may lie over either.
//   nn: a (m, k), b (k, n), all bf16;  nt: a (m, k), b (n, k), all bf16;  tn: a (k, m), b (k, n) bf16, out f32. bias (n). m, n, k > 0.
// Overwrites out (or adds to it, as adds_to says), and a pre that is not read. With `partials`
// (parts, m, n) f32, k is cut into `parts` of `k_part` and gemm_finish adds them in order. Deterministic: each sum is
// taken 16 k at a time, in the order of k, whatever the grid and the tile.
// a and b come by tensor maps: rows start at multiples of 16 bytes; what lies outside reads as 0. Boxes are 64 columns
// wide, and a tile's height or 64 k high. For the `shifted` kernels the rows of a may have any width, as those of
// 50,257 logits do; b comes by its map.
// After Bikshandi & Shah 2023, arXiv:2312.11918, and the CUTLASS pipelines that it describes.
//
// Launch: any number of blocks of 384 threads, best one a multiprocessor; block i works on tiles i, i + blocks, and so
// on. One thread of the first warpgroup asks the bulk copy engine for steps of 64 k, a ring of them ahead, across
// tiles. The other two warpgroups, with the registers that the first gives up, multiply; one group of products is in
// flight while the next is issued, then the step before is handed back.
//   128 x 256: a tile is both warpgroups', 64 rows each. The fewest bytes a product, for large sums and many tiles;
//   nothing multiplies while sums leave.
//   128 x 192, 128 x 128: a tile is one warpgroup's, and they take turns: the one's sums leave beside the other's
//   products. Who is next waits until the other's last products are under way. graph/scratch/product.rs chooses by the
//   shape.
// Beside a tn product, a weight's gradient, the first warpgroup's other warps can sum the columns of one of its
// factors, which is the gradient of the bias (gpu/gemm_beside.cuh).
// Sums leave by gpu/gemm_leave.cuh, 32 columns at a time. Shifted (128 x 256): all threads of the first warpgroup read
// a as the aligned words that its rows lie in, and lay it down as a bulk copy would.
//
// Cost, of a step: 128 x 256 brings 48 KB for 4,194,304 flop, 1024 cycles of the tensor cores: 85 flop a byte and 48
// bytes a cycle from the L2; 128 x 192 40 KB in 768 cycles, 79 and 53; 128 x 128 32 KB in 512 cycles, 64 and 64, which
// is all that the L2 gives a multiprocessor. Products read 80, 85 and 96 of the 128 bytes a cycle of shared memory. One
// block a multiprocessor, by registers (24 + 2 x 240 of 504 a thread of each warpgroup, of tn 40 + 2 x 232; 192 of them
// are sums) and shared memory (213 to 221 KB). Column sums: 48 rows of 512 bytes on their way a multiprocessor, a row
// in some 100 cycles of one of three warps; so of 256 columns they take as long as products with 270 others, and add
// one read of the factor to the L2's.
// Sums leave, by replay of the machine code, in 460 to 520 cycles a piece of a warp's; in 1,000 with a GELU and two
// outputs, 700 to 800 with a residual, 950 with f32 from memory, 1,150 back through a GELU, or 1,800 where sums take
// 192 registers, which leaves no room for several elements at a time. A tile is 8 pieces of each warp, 12 with a width
// of 192: so 6,200 cycles, 12,300 with a GELU, beside the 9,216 of the next tile's products at k = 768.
// 8192^3: 761 TFLOP/s measured on an H100 (97 % of cuBLAS). To be expected are 600-680 TFLOP/s, 500-570 with a GELU and
// two outputs, 550 where 8192 x 768 makes two rounds of tiles only; 8192 x 768 x 50304 730. Gradients of weights, of 96
// or 108 tiles for 132 multiprocessors, 560-620. Shifted: a thread has 16 words in flight, which the memory takes about
// 1000 cycles to bring, as long as a step's products: 450-600.
#include "gpu.cuh"
#include "gpu/gemm.cuh"
#include "gpu/gemm_ring.cuh"
#include "gpu/gemm_leave.cuh"
#include "gpu/gemm_beside.cuh"
#include "gpu/shifted_word.cuh"

namespace {

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);

#if GPU_HOPPER
// Of 168 each to begin with: a thread that asks for copies needs few, one that sums columns more, one that shifts words
// most.
template <bool COPIED, bool SUMS>
using Registers = RegisterShares<THREADS, !COPIED ? 120 : SUMS ? 40 : 24, !COPIED ? 192 : SUMS ? 232 : 240>;

// The left operand with rows of any width, read by all threads of the warpgroup and laid where a bulk copy would: word
// w of row r of a box at 8 r + (w ^ (r % 8)).
template <bool TRANSPOSED> struct Shifted {
  static constexpr bool COPIED = false;
  static constexpr int WORDS = TILE_M * STEP / 8 / 128,
                       APART = TRANSPOSED ? 8 : 16;  // of a thread; k or rows between them
  const bf16* from;
  int m, k;

  DEV void prefetch() const {}
  DEV void load(unsigned char* to, int row0, int k0, uint64_t* full) const {
    int thread = threadIdx.x, row = row0 + (TRANSPOSED ? thread % 16 * 8 : thread / 8),
        along_k = k0 + (TRANSPOSED ? thread / 16 : thread % 8 * 8);
    int line = TRANSPOSED ? thread / 16 : thread / 8, pitch = TRANSPOSED ? m : k; // row of a box
    const bf16* at = from + (TRANSPOSED ? (int64_t)along_k * m + row : (int64_t)row * k + along_k);
    uint4* place = reinterpret_cast<uint4*>(to + (TRANSPOSED ? thread % 16 / 8 * BOX_BYTES : 0)) + line * 8 +
                   (thread % 8 ^ line % 8);
    int shift = ShiftedWord::shift_of(at); // of all: they lie multiples of 16 bytes apart
    int across = TRANSPOSED ? k - along_k : m - row, bytes = 2 * max(0, min(TRANSPOSED ? m - row : k - along_k, 8));
    ShiftedWord words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      words[i].fetch(at + (int64_t)pitch * (i * APART), shift, i * APART < across ? bytes : 0);
#pragma unroll
    for (int i = 0; i < WORDS; i++) place[i * APART * 8] = words[i].value(shift, i * APART < across ? bytes : 0);
    proxy_fence_shared();
    mbar_arrive(full);
  }
};

// `end_of(part)` says what becomes of the sums of a part of k. It is asked anew for each tile: kept, the answer would
// take registers from the sums. Columns are summed `beside` products that are gradients of weights, where both operands
// come by maps.
template <int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED, class End, class Left>
DEV void product(const End& end_of, const Left& a, const CUtensorMap* b, const Sizes& sizes, const Beside& beside) {
  typedef Ring<TILE_N> R;
  constexpr bool SUMS = A_TRANSPOSED && Left::COPIED;
  typedef Registers<Left::COPIED, SUMS> Shares;
  constexpr bool SHARED = TILE_N == 256; // a tile between the two warpgroups; else they have every other tile
  constexpr int BLOCKS = SHARED ? 1 : 2;
  Work<TILE_N> work = {sizes};
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  static_assert(1024 + R::STAGES * R::BYTES + CONSUMERS * 4 * STAGED_BYTES <= 227 * 1024,
                "more shared memory than a block can have");
  static_assert(BESIDE_BYTES <= CONSUMERS * 4 * STAGED_BYTES, "f32 sums leave without a stage: its place is free");
  if (threadIdx.x == 0) {
    a.prefetch(), tma_prefetch_map(b);
    for (int i = 0; i < R::STAGES; i++)
      mbar_init(&ring[0].full[i], Left::COPIED ? 1 : 129), mbar_init(&ring[0].empty[i], SHARED ? CONSUMERS : 1);
    for (int i = 0; i < CONSUMERS; i++) mbar_init(&ring[0].next[i], 1);
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    Shares::first();
    if (SUMS && threadIdx.x >= 32) sum_beside(beside, stages + R::STAGES * R::BYTES);
    else produce<TILE_N, B_TRANSPOSED>(ring[0], stages, a, b, work);
    return;
  }
  Shares::others();
  for (int item = SHARED ? 0 : threadIdx.x / 128 - 1;; item += SHARED ? 1 : 2) {
    forget(work.s.m),
        forget(work.s.n);  // the numbers of tiles are counted anew: kept, they would take registers from the sums
    int consumer = SHARED ? (int)thread_again() / 128 - 1 : item % 2;
    int index = work.index(item);
    if (index >= work.count()) return;
    GemmTile tile = work.tile(index);
    int part = work.part(index);
    Turn<R::STAGES> turn = {work.steps_before(item) % (2 * R::STAGES)};
    stage_bias<TILE_N>(end_of(part), stages + R::STAGES * R::BYTES + (threadIdx.x / 32 - 4) * STAGED_BYTES,
                       tile.col * TILE_N);
    // The other's steps have all come when its last products are under way: until then the ring's parities say nothing
    // of this one's.
    if (!SHARED) mbar_wait(&ring[0].next[consumer], (item / 2 & 1) ^ (consumer == 0));
    float sums[BLOCKS][TILE_N / 2];
    multiply<TILE_N, BLOCKS, A_TRANSPOSED, B_TRANSPOSED>(sums, ring[0], stages, turn, work.steps(part),
                                                         SHARED ? consumer : 0,
                                                         SHARED ? nullptr : &ring[0].next[consumer ^ 1]);
    leave_all<SHARED ? 8 : 4>(sums, end_of, part, stages + R::STAGES * R::BYTES, tile.row * TILE_M, tile.col * TILE_N);
  }
}

#endif

// By the tensor maps of both operands, or with the rows of a as they are. Other GPUs never get here.
template <int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED, class End>
DEV void product_of_maps(const End& end_of, const CUtensorMap* a, const CUtensorMap* b, const Sizes& sizes,
                         const Beside& beside) {
#if GPU_HOPPER
  product<TILE_N, A_TRANSPOSED, B_TRANSPOSED>(end_of, Boxes<A_TRANSPOSED>{a}, b, sizes, beside);
#endif
}
template <bool A_TRANSPOSED, bool B_TRANSPOSED, class End>
DEV void product_of_rows(const End& end_of, const bf16* a, const CUtensorMap* b, const Sizes& sizes) {
#if GPU_HOPPER
  product<256, A_TRANSPOSED, B_TRANSPOSED>(end_of, Shifted<A_TRANSPOSED>{a, sizes.m, sizes.k}, b, sizes, {});
#endif
}

}  // namespace

#define GEMM_HOPPER(name, Out, tile_n, a_transposed, b_transposed)                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(                                                       \
      Out* out, Out* pre, float* partials, const __grid_constant__ CUtensorMap a,                                      \
      const __grid_constant__ CUtensorMap b, const Out* bias, const Out* residual, const Now* now, int accumulator,    \
      int activation, int m, int n, int k, int k_part, int out_pitch, int parts, Beside beside) {                      \
    auto end_of = [=](int part) {                                                                                      \
      return gemm_end(out, pre, partials, bias, residual, now, accumulator, activation, m, n, out_pitch).part(part);   \
    };                                                                                                                 \
    product_of_maps<tile_n, a_transposed, b_transposed>(end_of, &a, &b, {m, n, k, k_part, parts}, beside);             \
  }                                                                                                                    \
  GPU_EXPORT(name)

#define GEMM_SHIFTED(name, Out, a_transposed, b_transposed)                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                             \
      name(Out* out, Out* pre, float* partials, const bf16* a, const __grid_constant__ CUtensorMap b, const Out* bias, \
           const Out* residual, const Now* now, int accumulator, int activation, int m, int n, int k, int k_part,      \
           int out_pitch, int parts) {                                                                                 \
    auto end_of = [=](int part) {                                                                                      \
      return gemm_end(out, pre, partials, bias, residual, now, accumulator, activation, m, n, out_pitch).part(part);   \
    };                                                                                                                 \
    product_of_rows<a_transposed, b_transposed>(end_of, a, &b, {m, n, k, k_part, parts});                              \
  }                                                                                                                    \
  GPU_EXPORT(name)

GEMM_HOPPER(gemm_nn_256_bf16, bf16, 256, false, false)
GEMM_HOPPER(gemm_nt_256_bf16, bf16, 256, false, true)
GEMM_HOPPER(gemm_tn_256_bf16, float, 256, true, false)
GEMM_HOPPER(gemm_nn_192_bf16, bf16, 192, false, false)
GEMM_HOPPER(gemm_nt_192_bf16, bf16, 192, false, true)
GEMM_HOPPER(gemm_tn_192_bf16, float, 192, true, false)
GEMM_HOPPER(gemm_nn_128_bf16, bf16, 128, false, false)
GEMM_HOPPER(gemm_nt_128_bf16, bf16, 128, false, true)
GEMM_HOPPER(gemm_tn_128_bf16, float, 128, true, false)
GEMM_SHIFTED(gemm_nn_shifted_bf16, bf16, false, false)
GEMM_SHIFTED(gemm_tn_shifted_bf16, float, true, false)
