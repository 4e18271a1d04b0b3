// Matrix products in bf16 with f32 sums by warpgroup products, for sm_90a.
//   out (m, n) = act(a b + bias), pre (m, n) = a b + bias where it is wanted, out += a b for accumulators.
//   nn: a (m, k), b (k, n), all bf16;  nt: a (m, k), b (n, k), all bf16;  tn: a (k, m), b (k, n) bf16, out f32. bias (n). m, n, k > 0.
// Overwrites out (or adds to it, when `accumulator` and now->accumulate) and pre. With `partials` (parts, m, n) f32, k is cut into `parts` of
// `k_part` and gemm_finish adds them in order. Deterministic: each sum is taken 16 k at a time, in the order of k, whatever the grid.
// a and b come by tensor maps: rows start at multiples of 16 bytes; what lies outside reads as 0. Boxes are 64 columns wide, and a tile's height or
// 64 k high. For the `shifted` kernels the rows of a may have any width, as those of 50,257 logits do; b comes by its map.
// After Bikshandi & Shah 2023, arXiv:2312.11918, and the CUTLASS pipelines that it describes.
//
// Launch: any number of blocks of 384 threads, best one a multiprocessor; block i works on tiles i, i + blocks, and so on. One thread of the first
// warpgroup asks the bulk copy engine for steps of 64 k, a ring of them ahead, across tiles: the next tile's first steps arrive while this one's
// sums leave. The other two warpgroups, with the registers that the first gives up, own 64 rows each of the 128 x 256 (or 128 x 128) of a tile. One group of
// 4 products is in flight while the next is issued; then the step before is handed back. Sums leave through shared memory, a warp 16 x 32 at a time.
// Shifted: all threads of the first warpgroup read a as the aligned words that its rows lie in, and lay it down as a bulk copy would.
//
// Cost: a step of 128 x 256 brings 48 KB for 4,194,304 flop (85 flop a byte from the L2, 48 bytes a cycle), and takes the tensor cores 1024 cycles; a product of
// 64 x 256 x 16 reads 10 KB of shared memory in 128 cycles, 80 of the 128 bytes a cycle that there are. One block a multiprocessor, by registers (168 a thread)
// and shared memory (213 KB). So large products are bound by the tensor cores and their power: 660-700 TFLOP/s of an H200's 770-800 are to be
// expected at 8192^3. What is missing: sums leave without products beside them (about 2,500 cycles a tile, 4 % at k = 4096, 17 % at k = 768, more with
// an activation), and rows are not shared between blocks of a cluster. Shifted: a thread has 16 words in flight, which the memory takes about 1000 cycles
// to bring, as long as a step's products: 450-600 TFLOP/s.
#include "gpu.cuh"
#include "gpu/gemm.cuh"
#include "gpu/shifted_word.cuh"

namespace {

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);

struct Sizes { int m, n, k, k_part, parts; };

#if GPU_HOPPER
constexpr int TILE_M = 128, STEP = 64;
constexpr int BOX_BYTES = 64 * STEP * 2;                   // 64 rows of m or n by one step of k
constexpr int PIECE = 32, PITCH = PIECE + 8;               // columns of sums that a warp stages at once; rows 8 banks apart
constexpr int STAGED_BYTES = CONSUMERS * 4 * 16 * PITCH * 4;
// Of 168 each to begin with: one thread that asks for copies needs few, one that shifts words more.
constexpr int COPY_REGISTERS = 40, REGISTERS_BESIDE_COPY = 232, SHIFT_REGISTERS = 120, REGISTERS_BESIDE_SHIFT = 192;

// The ring of steps, and where each is: `full` once its bytes are there, `empty` once both consumers are done with it.
template <int TILE_N> struct Ring {
  static constexpr int STAGES = TILE_N == 256 ? 4 : 6, A_BYTES = TILE_M / 64 * BOX_BYTES, BYTES = A_BYTES + TILE_N / 64 * BOX_BYTES;
  uint64_t full[STAGES], empty[STAGES];
};

// A stage and how often the ring has gone round, as a parity.
template <int STAGES> struct Turn {
  int stage = 0, parity = 0;
  DEV void next() { if (++stage == STAGES) stage = 0, parity ^= 1; }
};

// The tiles and parts of k of all blocks.
template <int TILE_N> struct Work {
  Sizes s;
  DEV int tiles_m() const { return (s.m + TILE_M - 1) / TILE_M; }
  DEV int tiles_n() const { return (s.n + TILE_N - 1) / TILE_N; }
  DEV int count() const { return tiles_m() * tiles_n() * s.parts; }
  DEV GemmTile tile(int index) const { return gemm_tile(index % (tiles_m() * tiles_n()), tiles_m(), tiles_n()); }
  DEV int part(int index) const { return index / (tiles_m() * tiles_n()); }
  DEV int steps(int part) const { return (min(s.k - part * s.k_part, s.k_part) + STEP - 1) / STEP; }
};

// One step of an operand by its tensor map: `rows` of m or n from row0 on. K_ROWS: one box, all rows high; else boxes of 64 rows wide, a step high.
template <bool K_ROWS> DEV void load_boxes(unsigned char* to, const CUtensorMap* map, int rows, int row0, int k0, uint64_t* full) {
  if constexpr (K_ROWS) tma_load_2d(to, map, k0, row0, full);
  else for (int i = 0; i < rows / 64; i++) tma_load_2d(to + i * BOX_BYTES, map, row0 + 64 * i, k0, full);
}

// The left operand by its tensor map. One thread loads it.
template <bool TRANSPOSED> struct Boxes {
  static constexpr bool COPIED = true;
  const CUtensorMap* map;

  DEV void load(unsigned char* to, int row0, int k0, uint64_t* full) const { load_boxes<!TRANSPOSED>(to, map, TILE_M, row0, k0, full); }
};

// The left operand with rows of any width, read by all threads of the warpgroup and laid where a bulk copy would: word w of row r of a box at 8 r + (w ^ (r % 8)).
template <bool TRANSPOSED> struct Shifted {
  static constexpr bool COPIED = false;
  static constexpr int WORDS = TILE_M * STEP / 8 / 128, APART = TRANSPOSED ? 8 : 16; // of a thread; k or rows between them
  const bf16* from;
  int m, k;

  DEV void load(unsigned char* to, int row0, int k0, uint64_t* full) const {
    int thread = threadIdx.x, row = row0 + (TRANSPOSED ? thread % 16 * 8 : thread / 8), along_k = k0 + (TRANSPOSED ? thread / 16 : thread % 8 * 8);
    int line = TRANSPOSED ? thread / 16 : thread / 8, pitch = TRANSPOSED ? m : k; // row of a box
    const bf16* at = from + (TRANSPOSED ? (int64_t)along_k * m + row : (int64_t)row * k + along_k);
    uint4* place = reinterpret_cast<uint4*>(to + (TRANSPOSED ? thread % 16 / 8 * BOX_BYTES : 0)) + line * 8 + (thread % 8 ^ line % 8);
    int shift = ShiftedWord::shift_of(at); // of all: they lie multiples of 16 bytes apart
    int across = TRANSPOSED ? k - along_k : m - row, bytes = 2 * max(0, min(TRANSPOSED ? m - row : k - along_k, 8));
    ShiftedWord words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i].fetch(at + (int64_t)pitch * (i * APART), shift, i * APART < across ? bytes : 0);
#pragma unroll
    for (int i = 0; i < WORDS; i++) place[i * APART * 8] = words[i].value(shift, i * APART < across ? bytes : 0);
    proxy_fence_shared();
    mbar_arrive(full);
  }
};

template <int TILE_N, bool B_TRANSPOSED, class Left>
DEV void produce(Ring<TILE_N>& ring, unsigned char* stages, const Left& a, const CUtensorMap* b, const Work<TILE_N>& work) {
  typedef Ring<TILE_N> R;
  bool speaks = threadIdx.x == 0;
  if (Left::COPIED && !speaks) return;
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; index < work.count(); index += gridDim.x) {
    GemmTile tile = work.tile(index);
    int part = work.part(index), steps = work.steps(part);
    for (int step = 0; step < steps; step++, turn.next()) {
      unsigned char* to = stages + turn.stage * R::BYTES;
      uint64_t* full = &ring.full[turn.stage];
      int k0 = part * work.s.k_part + step * STEP;
      mbar_wait(&ring.empty[turn.stage], turn.parity ^ 1);
      if (speaks) {
        mbar_expect_tx(full, Left::COPIED ? R::BYTES : R::BYTES - R::A_BYTES);
        load_boxes<B_TRANSPOSED>(to + R::A_BYTES, b, TILE_N, tile.col * TILE_N, k0, full);
      }
      a.load(to, tile.row * TILE_M, k0, full);
    }
  }
}

// The sums of a warpgroup's 64 rows over one part of k.
template <int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void multiply(float (&sums)[TILE_N / 2], Ring<TILE_N>& ring, unsigned char* stages, Turn<Ring<TILE_N>::STAGES>& turn, int steps, int consumer) {
  typedef Ring<TILE_N> R;
  bool speaks = threadIdx.x % 128 == 0;
  int before = 0;
  for (int step = 0; step < steps; step++, turn.next()) {
    mbar_wait(&ring.full[turn.stage], turn.parity);
    const unsigned char *a = stages + turn.stage * R::BYTES + consumer * BOX_BYTES, *b = stages + turn.stage * R::BYTES + R::A_BYTES;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STEP / 16; j++) {
      uint64_t left = A_TRANSPOSED ? wgmma_desc_mn(a + j * 2048, BOX_BYTES) : wgmma_desc(a + j * 32);
      uint64_t right = B_TRANSPOSED ? wgmma_desc(b + j * 32) : wgmma_desc_mn(b + j * 2048, BOX_BYTES);
      wgmma_64xNx16<TILE_N, A_TRANSPOSED, !B_TRANSPOSED>(sums, left, right, step + j > 0);
    }
    wgmma_commit();
    if (step > 0) {
      wgmma_wait<1>();
      if (speaks) mbar_arrive(&ring.empty[before]);
    }
    before = turn.stage;
  }
  wgmma_wait<0>();
  if (speaks) mbar_arrive(&ring.empty[before]);
}

// Sums to their place: a warp's 16 rows, PIECE columns at a time.
template <int TILE_N, class Out> DEV void finish(const float (&sums)[TILE_N / 2], const GemmEnd<Out>& end, float* staged, int row0, int col0) {
  int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int piece = 0; piece < TILE_N / PIECE; piece++) {
#pragma unroll
    for (int i = 0; i < TILE_N / PIECE; i++) {
      if (i != piece) continue; // registers have no index
#pragma unroll
      for (int j = 0; j < PIECE / 8; j++) {
        const float* from = sums + i * PIECE / 2 + 4 * j;
        float* at = staged + lane / 4 * PITCH + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(from[0], from[1]);
        *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(from[2], from[3]);
      }
    }
    __syncwarp();
    end.template put_staged<16, PIECE, PITCH>(staged, row0, col0 + piece * PIECE);
    __syncwarp();
  }
}

template <class Out, int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED, class Left>
DEV void product(const GemmEnd<Out>& whole, const Left& a, const CUtensorMap* b, const Sizes& sizes) {
  typedef Ring<TILE_N> R;
  const Work<TILE_N> work = {sizes};
  GPU_SHARED(R, ring, [1]);
  GPU_DYNAMIC(unsigned char, stages);
  static_assert(1024 + R::STAGES * R::BYTES + STAGED_BYTES <= 227 * 1024, "more shared memory than a block can have");
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::STAGES; i++) mbar_init(&ring[0].full[i], Left::COPIED ? 1 : 129), mbar_init(&ring[0].empty[i], CONSUMERS);
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<Left::COPIED ? COPY_REGISTERS : SHIFT_REGISTERS>();
    produce<TILE_N, B_TRANSPOSED>(ring[0], stages, a, b, work);
    return;
  }
  setmaxnreg_inc<Left::COPIED ? REGISTERS_BESIDE_COPY : REGISTERS_BESIDE_SHIFT>();
  int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
  float* staged = reinterpret_cast<float*>(stages + R::STAGES * R::BYTES) + warp * 16 * PITCH;
  Turn<R::STAGES> turn;
  for (int index = blockIdx.x; index < work.count(); index += gridDim.x) {
    GemmTile tile = work.tile(index);
    float sums[TILE_N / 2];
    multiply<TILE_N, A_TRANSPOSED, B_TRANSPOSED>(sums, ring[0], stages, turn, work.steps(work.part(index)), consumer);
    finish<TILE_N>(sums, whole.part(work.part(index)), staged, tile.row * TILE_M + warp * 16, tile.col * TILE_N);
  }
}

#endif

// By the tensor maps of both operands, or with the rows of a as they are. Other GPUs never get here.
template <class Out, int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void product_of_maps(const GemmEnd<Out>& end, const CUtensorMap* a, const CUtensorMap* b, const Sizes& sizes) {
#if GPU_HOPPER
  product<Out, TILE_N, A_TRANSPOSED, B_TRANSPOSED>(end, Boxes<A_TRANSPOSED>{a}, b, sizes);
#endif
}
template <class Out, int TILE_N, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void product_of_rows(const GemmEnd<Out>& end, const bf16* a, const CUtensorMap* b, const Sizes& sizes) {
#if GPU_HOPPER
  product<Out, TILE_N, A_TRANSPOSED, B_TRANSPOSED>(end, Shifted<A_TRANSPOSED>{a, sizes.m, sizes.k}, b, sizes);
#endif
}

}  // namespace

#define GEMM_HOPPER(name, Out, tile_n, a_transposed, b_transposed)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                               \
      name(Out* out, Out* pre, float* partials, const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,            \
           const Out* bias, const Now* now, int accumulator, int activation, int m, int n, int k, int k_part, int out_pitch, int parts) { \
    product_of_maps<Out, tile_n, a_transposed, b_transposed>(                                                                            \
        gemm_end(out, pre, partials, bias, now, accumulator, activation, m, n, out_pitch), &a, &b, {m, n, k, k_part, parts});            \
  }                                                                                                                                      \
  GPU_EXPORT(name)

#define GEMM_SHIFTED(name, Out, a_transposed, b_transposed)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                               \
      name(Out* out, Out* pre, float* partials, const bf16* a, const __grid_constant__ CUtensorMap b, const Out* bias, const Now* now,   \
           int accumulator, int activation, int m, int n, int k, int k_part, int out_pitch, int parts) {                                 \
    product_of_rows<Out, 256, a_transposed, b_transposed>(                                                                               \
        gemm_end(out, pre, partials, bias, now, accumulator, activation, m, n, out_pitch), a, &b, {m, n, k, k_part, parts});             \
  }                                                                                                                                      \
  GPU_EXPORT(name)

GEMM_HOPPER(gemm_nn_256_bf16, bf16, 256, false, false)
GEMM_HOPPER(gemm_nt_256_bf16, bf16, 256, false, true)
GEMM_HOPPER(gemm_tn_256_bf16, float, 256, true, false)
GEMM_HOPPER(gemm_nn_128_bf16, bf16, 128, false, false)
GEMM_HOPPER(gemm_nt_128_bf16, bf16, 128, false, true)
GEMM_HOPPER(gemm_tn_128_bf16, float, 128, true, false)
GEMM_SHIFTED(gemm_nn_shifted_bf16, bf16, false, false)
GEMM_SHIFTED(gemm_tn_shifted_bf16, float, true, false)
