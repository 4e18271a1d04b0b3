// Attention's forward pass in bf16 with Hopper's warpgroup products, for widths 64 and 128 (Shah et al. 2024,
// "FlashAttention-3", arXiv:2407.08608).
//   Formulas, shapes and what is overwritten are those of attention.cu; scale is positive and nothing is dropped. q_map
//   is (B, Tq, H D), k_map and v_map are (B, Tk, Hkv D), in boxes of 64 columns and 64 (q) or 128 positions of one
//   sequence, with a 128-byte swizzle: positions past the last read as 0, so that no value of another sequence is ever
//   multiplied. Heads start at multiples of 16 bytes. taken is 0 before and after.
// A part is up to 64 queries of a head for each of three (width 64) or two (128) warpgroups, its consumers. One thread
// of another warpgroup keeps bulk copies of k and v on their way, in a ring of tiles of 128 keys, each with a pair of
// mbarriers (full, empty). wgmma makes the scores from shared memory; the weights stay in registers as the left operand
// of the product with v, which is read as it lies, MN-major.
// Two things run under the softmax: the products of the other warpgroups, by named barriers that let one ask for
// products while others compute exponentials, and the warpgroup's own product of the last tile's weights with v, which
// is asked for together with this tile's scores.
// Tiles go from the last key to the first, so that the diagonal comes first and the loop has no hidden keys unless a
// mask is given; each warpgroup leaves out those that none of its own queries sees. A mask's part of a tile, four words
// of bits, is read under the tile's products, and only tiles that have hidden keys are changed by it: 25 instructions a
// tile, and 95 more.
// A block makes several parts: queries and tiles of the next come while this one is made, and a warpgroup that is done
// goes on to it while others end. It takes the next number from a counter in memory, so which block makes a part
// depends on the chip, but what it makes does not.
// Deterministic: a sum is made by one thread, tiles in order.
//   width  queries  ring  shared memory  registers: consumer, producer  multiply-adds per byte copied into shared memory
//   64     192      5     208 KB         160, 32                        96: 192 x 128 x 64 x 2 a pair of tiles of 32 KB
//   128    128      2     192 KB         232, 40                        64
// Cycles of a multiprocessor for 64 x 128 scores, by the machine code of the loop: products 512 (width 128: 1024),
// exponentials 528 (16 a cycle), instructions 445 (501; one of a warp a cycle on each quarter). Replayed instruction by
// instruction with latencies of 4 to 6 cycles, 22 to 40 for exponentials, one consumer alone takes 1370 to 1780, two
// 750 to 940 each, three 590 to 670. Exponentials by multiply-adds, 7 instructions each, would win 9 %: at 6 of 64 they
// take as long as instructions.
// Expected on an H200, in TFLOP/s: width 64: 380 at T = 1024 causal, 440 at 2048 causal, 480 long and full, 250 at T =
// 197 (memory allows 410);
// width 128: 600 at 4096 causal, 660 long. Before, with two consumers, a ring of two tiles and one part a block: 223,
// 291, -, 98; 565, 657.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_hopper.cuh"

namespace hopper_forward {
using namespace hopper;

template <int W> constexpr int CONSUMERS = W == 64 ? 3 : 2;        // warpgroups with 64 queries each
template <int W> constexpr int ROWS = 64 * CONSUMERS<W>;           // queries of a part, at most
template <int W> constexpr int THREADS = 128 * (1 + CONSUMERS<W>);
template <int W> constexpr int STAGES = W == 64 ? 5 : 2;           // of the ring of tiles of k and v
constexpr int KEYS = 128;                                          // of a tile
constexpr int OWN_STAGES = 2;  // of a part's queries: the next part's come while this one is made

// A part: `groups` times 64 queries from `first` on, and the tiles that any of them sees. None has no groups: it
// follows the last.
struct Queries { int batch, head, first, groups, tiles; };

// In shared memory; the tiles are columns of 64, each with all of its rows.
template <int W> struct Shared {
  bf16 q[OWN_STAGES][ROWS<W> * W], k[STAGES<W>][KEYS * W], v[STAGES<W>][KEYS * W];
  uint64_t q_full[OWN_STAGES], q_empty[OWN_STAGES], k_full[STAGES<W>], k_empty[STAGES<W>], v_full[STAGES<W>],
      v_empty[STAGES<W>];
  Queries part[OWN_STAGES];
};

#if GPU_HOPPER
// All of the 65536 that there are.
template <int W> using Registers = RegisterShares<THREADS<W>, W == 64 ? 32 : 40, W == 64 ? 160 : 232>;
constexpr int TURN = 1, OWN = 4;  // named barriers: one for each consumer's turn, one for each consumer's threads

// Parts of a head: 64 queries for each consumer, in some one less, so that all are as equal as can be.
template <int W> DEV int parts_of_head(const AttentionSizes& s) { return (s.queries + ROWS<W> - 1) / ROWS<W>; }
DEV int tiles_before(const AttentionSizes& s, int query) { return (keys_seen(s, query) + KEYS - 1) / KEYS; }

// The copying thread alone divides; consumers read what comes of it.
template <int W> DEV Queries queries_of(int at, int together, const AttentionSizes& s) {
  int parts = parts_of_head<W>(s), all = (s.queries + 63) / 64, least = all / parts, larger = all % parts;
  Part part(at, s.batch * s.heads, parts, together);
  // Later queries, which see the most keys when causal, come first.
  int number = parts - 1 - part.number, before = number - (parts - larger);
  int first = 64 * (number * least + (before > 0 ? before : 0)), groups = least + (before >= 0);
  return {part.head / s.heads, part.head % s.heads, first, groups, tiles_before(s, first + 64 * groups)};
}

// A box's rows of one sequence from `row` on, W columns from `col` on; rows past its last are 0.
template <int W, int TILE_ROWS>
DEV void load_rows(bf16* to, const CUtensorMap* map, int col, int row, int batch, uint64_t* full) {
#pragma unroll
  for (int box = 0; box < W / BOX; box++)
    tma_load_4d(to + box * TILE_ROWS * BOX, map, col + box * BOX, row, batch, 0, full);
}

// One thread: copies tiles in the order in which their places get free, of each part from the last key to the first. A
// block's first part has its number, others are the next that no block has taken. Each block is once told that there is
// none: whole launches ask as often as there are parts.
template <int W>
DEV void produce(Shared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map,
                 int* taken, int together, const AttentionSizes& s) {
  int at = blockIdx.x, parts = s.batch * s.heads * parts_of_head<W>(s);
  int batch = 0, col = 0;
  auto load_tile = [&](Slot<STAGES<W>>& slot, bf16(&tiles)[STAGES<W>][KEYS* W], uint64_t (&full)[STAGES<W>],
                       uint64_t (&empty)[STAGES<W>], const CUtensorMap* map, int key) {
    mbar_wait(&empty[slot.stage], slot.parity ^ 1);
    mbar_expect_tx(&full[slot.stage], KEYS * W * 2);
    load_rows<W, KEYS>(tiles[slot.stage], map, col, key, batch, &full[slot.stage]);
    slot.advance();
  };
  Slot<STAGES<W>> k_slot, v_slot;
  auto load_k = [&](int key) { load_tile(k_slot, shared.k, shared.k_full, shared.k_empty, k_map, key); };
  auto load_v = [&](int key) { load_tile(v_slot, shared.v, shared.v_full, shared.v_empty, v_map, key); };
  Slot<OWN_STAGES> own;
#pragma unroll 1
  for (; at < parts; own.advance()) {
    Queries part = queries_of<W>(at, together, s);
    mbar_wait(&shared.q_empty[own.stage], own.parity ^ 1);
    shared.part[own.stage] = part;
    mbar_expect_tx(&shared.q_full[own.stage], part.groups * 64 * W * 2);
#pragma unroll 1
    for (int i = 0; i < part.groups; i++)
      load_rows<W, ROWS<W>>(shared.q[own.stage] + i * 64 * BOX, q_map, part.head * W, part.first + 64 * i, part.batch,
                            &shared.q_full[own.stage]);
    int asked = atomicAdd(taken, 1);
    batch = part.batch, col = part.head / (s.heads / s.kv_heads) * W;
    // The scores of a tile are made together with sums by the weights of the last: its keys are free a tile earlier
    // than its values.
    int first = (part.tiles - 1) * KEYS;
    load_k(first);
#pragma unroll 1
    for (int key = first; key >= 0; key -= KEYS) {
      if (key > 0) load_k(key - KEYS);
      load_v(key);
    }
    if (asked == parts - 1) atomicAdd(taken, -parts);
    at = gridDim.x + asked;
  }
  mbar_wait(&shared.q_empty[own.stage], own.parity ^ 1);
  shared.part[own.stage] = {};
  mbar_arrive(&shared.q_full[own.stage]);
}

// What a warpgroup has of its 64 queries. Element 4 j + 2 h + e of an accumulator is row 16 warp + g + 8 h, column 8 j
// + 2 t + e.
template <int W> struct Consumer {
  float scores[KEYS / 2], acc[W / 2], max[2], sum[2];
  uint32_t weights[KEYS / 16][4];

  DEV void issue_scores(const bf16* q, const bf16* k) {
    uint64_t rows = wgmma_desc(q), cols = wgmma_desc(k);
#pragma unroll
    for (int i = 0; i < W / 16; i++) {
      int column = i * 16 / BOX * BOX, at = i % (BOX / 16) * 16;
      wgmma_64xNx16<KEYS>(scores, wgmma_further(rows, (column * ROWS<W> + at) * 2),
                          wgmma_further(cols, (column * KEYS + at) * 2), i > 0);
    }
    wgmma_commit();
  }
  // Scores of keys that a query does not see become minus infinity: of those after it, and that are not there.
  DEV void hide_rest(const AttentionSizes& s, int query, int key, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int seen = keys_seen(s, query + 8 * h + 1) - key - 2 * t;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * j + e >= seen) scores[4 * j + 2 * h + e] = NOTHING;
    }
  }
  // And of those that the mask hides.
  DEV void hide_masked(const Shown<KEYS>& shown, int t) {
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (shown.hides(j, t, e)) scores[4 * j + e] = scores[4 * j + 2 + e] = NOTHING;
  }
  // Scores become weights; `shrink` is what sums so far have to be multiplied by.
  DEV void exponentials(float (&shrink)[2], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = max[h], partial = 0;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float shift = shift_of(top) * scale;
      shrink[h] = exp2_fast(fmaf(max[h], scale, -shift));
      max[h] = top;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          partial += scores[4 * j + 2 * h + e] = exp2_fast(fmaf(scores[4 * j + 2 * h + e], scale, -shift));
      // Each lane sums its own columns; the four of a row add up at the end.
      sum[h] = fmaf(sum[h], shrink[h], partial);
    }
  }
};

// A warpgroup's 64 queries of each part.
template <int W>
DEV void consume(Shared<W>& shared, bf16* out, float* lse, const int32_t* mask, const AttentionSizes& s) {
  constexpr int C = CONSUMERS<W>;
  // Shuffled, so that the compiler knows the number to be one for the warp.
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32,
      g = lane / 4, t = lane % 4;
  int following = group + 1 == C ? 0 : group + 1;
  float scale = s.scale * LOG2_E;
  Slot<STAGES<W>> slot;
  Slot<OWN_STAGES> own;
  // Consumers ask for products in turns, one tile each, whether they have products or not: exponentials of one run
  // under those of others.
  auto take_turn = [&] { bar_sync(TURN + group, 256); };
  auto pass_turn = [&] { bar_arrive(TURN + following, 256); };
  auto release = [&](uint64_t* empty) { if (lane == 0) mbar_arrive(empty); };
  if (group == C - 1) pass_turn();

#pragma unroll 1
  for (;; own.advance()) {
    mbar_wait(&shared.q_full[own.stage], own.parity);
    const Queries& part = shared.part[own.stage];
    if (part.groups == 0) break;
    int tiles = group < part.groups ? tiles_before(s, part.first + 64 * (group + 1)) : 0;
    // Those that none of this warpgroup's queries sees.
#pragma unroll 1
    for (int i = part.tiles - tiles; i > 0; i--, slot.advance()) {
      take_turn();
      pass_turn();
      mbar_wait(&shared.k_full[slot.stage], slot.parity);
      release(&shared.k_empty[slot.stage]);
      mbar_wait(&shared.v_full[slot.stage], slot.parity);
      release(&shared.v_empty[slot.stage]);
    }
    if (tiles > 0) {
      Consumer<W> c;
      float shrink[2];
      bf16* q = shared.q[own.stage] + 64 * group * BOX;
      const int32_t* hides = mask;
      int key = (tiles - 1) * KEYS;
#pragma unroll
      for (int i = 0; i < W / 2; i++) c.acc[i] = 0;
#pragma unroll
      for (int h = 0; h < 2; h++) c.max[h] = NOTHING, c.sum[h] = 0;

      mbar_wait(&shared.k_full[slot.stage], slot.parity);
      take_turn();
      wgmma_fence();
      c.issue_scores(q, shared.k[slot.stage]);
      pass_turn();
      int first = part.first + 64 * group;
      if (mask) hides = mask + (int64_t)part.batch * s.keys;
      Shown<KEYS> shown;
      shown.show_all();
      if (hides) shown.load(hides, key, s.keys, lane), shown.vote();
      wgmma_wait<0>();
      settle(c.scores);
      release(&shared.k_empty[slot.stage]);
      // Of causal queries this tile alone has keys that come after one of them: tiles are no shorter than a warpgroup's
      // queries.
      if (key + KEYS > s.keys || (s.causal && key + KEYS > first)) c.hide_rest(s, first + 16 * warp + g, key, t);
      if (!shown.all()) c.hide_masked(shown, t);
      c.exponentials(shrink, scale);
      round_pairs(c.weights, c.scores);
      Slot<STAGES<W>> last = slot;
      slot.advance();
      if (key > 0) mbar_wait(&shared.k_full[slot.stage], slot.parity);
#pragma unroll 1
      while (key > 0) {
        key -= KEYS;
        mbar_wait(&shared.v_full[last.stage], last.parity);
        take_turn();
        wgmma_fence();
        c.issue_scores(q, shared.k[slot.stage]);
        issue_gather<W, KEYS>(c.acc, c.weights, shared.v[last.stage]);
        pass_turn();
        // Under the products.
        if (hides) shown.load(hides, key, s.keys, lane), shown.vote();
        wgmma_wait<1>();
        settle(c.scores);
        release(&shared.k_empty[slot.stage]);
        if (!shown.all()) c.hide_masked(shown, t);
        c.exponentials(shrink, scale);
        settle(c.scores);
        // Waited for here, since ptxas moves the wait for products over exponentials up to the last branch.
        int before = last.stage;
        last = slot;
        slot.advance();
        if (key > 0) mbar_wait(&shared.k_full[slot.stage], slot.parity);
        wgmma_wait<0>();
        settle(c.acc);
        release(&shared.v_empty[before]);
#pragma unroll
        for (int n = 0; n < W / 2; n++) c.acc[n] *= shrink[n / 2 % 2];
        round_pairs(c.weights, c.scores);
      }
      mbar_wait(&shared.v_full[last.stage], last.parity);
      wgmma_fence();
      issue_gather<W, KEYS>(c.acc, c.weights, shared.v[last.stage]);

      // Read anew, so that it takes no registers in the loop.
      first = part.first + 64 * group;
      Head head(s, part.batch, part.head);
      int query = first + 16 * warp + g;
      float factors[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float total = c.sum[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factors[h] = total == 0 ? 0.0f : 1.0f / total;
        if (t == 0 && query + 8 * h < s.queries) lse[head.row + query + 8 * h] = fmaf(c.max[h], s.scale, logf(total));
      }
      wgmma_wait<0>();
      settle(c.acc);
      release(&shared.v_empty[last.stage]);
      bar_sync(OWN + group, 128);
      int64_t pitch = (int64_t)s.heads * W;
      write_rows<W, ROWS<W>>(out + head.out(s) + first * pitch, pitch, s.queries - first, q, c.acc, factors, warp,
                             lane);
      proxy_fence_shared();
    }
    __syncwarp();
    release(&shared.q_empty[own.stage]);
  }
  // The turn that follows the last.
  if (group == 0) take_turn();
}
#endif

template <int W>
DEV void forward(bf16* out, float* lse, const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map,
                 const int32_t* mask, int* taken, int together, const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(Shared<W>, shared);
  if (threadIdx.x == 0) {
    tma_prefetch_map(q_map), tma_prefetch_map(k_map), tma_prefetch_map(v_map);
    for (int i = 0; i < OWN_STAGES; i++) {
      mbar_init(&shared->q_full[i], 1);
      mbar_init(&shared->q_empty[i], 4 * CONSUMERS<W>);
    }
    for (int i = 0; i < STAGES<W>; i++) {
      mbar_init(&shared->k_full[i], 1);
      mbar_init(&shared->v_full[i], 1);
      mbar_init(&shared->k_empty[i], 4 * CONSUMERS<W>);
      mbar_init(&shared->v_empty[i], 4 * CONSUMERS<W>);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    Registers<W>::first();
    if (threadIdx.x == 0) produce<W>(*shared, q_map, k_map, v_map, taken, together, s);
  } else {
    Registers<W>::others();
    consume<W>(*shared, out, lse, mask, s);
  }
#endif
}
}  // namespace hopper_forward

// Grid: as many blocks as there are parts, of up to 64 queries of each head and sequence for each consumer, or fewer.
// `taken` is 0, and 0 again.
#define ATTENTION_HOPPER(width)                                                                                        \
  extern "C" __global__ void __launch_bounds__(hopper_forward::THREADS<width>, 1)                                      \
      attention_forward_hopper##width##_bf16(bf16* out, float* lse, const __grid_constant__ CUtensorMap q_map,         \
                                             const __grid_constant__ CUtensorMap k_map,                                \
                                             const __grid_constant__ CUtensorMap v_map, const int32_t* mask,           \
                                             int* taken, int together, AttentionSizes s) {                             \
    hopper_forward::forward<width>(out, lse, &q_map, &k_map, &v_map, mask, taken, together, s);                        \
  }                                                                                                                    \
  GPU_EXPORT(attention_forward_hopper##width##_bf16)

ATTENTION_HOPPER(64)
ATTENTION_HOPPER(128)
