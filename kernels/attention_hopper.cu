// Attention's forward pass in bf16 with Hopper's warpgroup products, for widths 64 and 128 (Shah et al. 2024, "FlashAttention-3",
// arXiv:2407.08608).
//   Formulas, shapes and what is overwritten are those of attention.cu; scale is positive and nothing is dropped. q_map, k_map, v_map are
//   (B Tq, H D) and (B Tk, Hkv D) in boxes of 128 rows and 64 columns with a 128-byte swizzle; heads start at multiples of 16 bytes.
// A block has 128 queries of a head and three warpgroups. One warp of the first keeps bulk copies of k and v on their way, two tiles of 128
// keys ahead, each with a pair of mbarriers (full, empty). The other two have 64 queries each: wgmma makes the scores from shared memory; the
// weights stay in registers as the left operand of the product with v, which is read as it lies, MN-major.
// Two things run under the softmax: the products of the other warpgroup, by named barriers that let one issue while the other computes
// exponentials, and the warpgroup's own product of the last tile's weights with v, which is issued together with this tile's scores.
// Tiles go from the last key to the first, so that the diagonal comes first and the loop has no hidden keys unless a mask is given.
// Keys of the last tile that are not there would be the next sequence's: their scores are hidden, and v's rows are overwritten with 0, so
// that no value of another sequence is ever multiplied. Deterministic: a sum is made by one thread, tiles in order.
//   width  shared memory  registers                       multiply-adds per byte copied into shared memory
//   64     80 KB          240 a consumer, 24 a producer   64: 128 x 128 x 64 x 2 a pair of tiles of 32 KB
//   128    160 KB         as above                        64
// Expected on an H200, 8k long: 520 TFLOP/s at width 128 full, 480 causal; 400 at width 64, where exponentials (16 a cycle, 128 x 128 a tile) take
// as long as the products (4096 flop a cycle), so that only a perfect overlap would reach the rate.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_hopper.cuh"

namespace hopper {
constexpr int ROWS = 128, KEYS = 128;      // queries of a block, keys of a tile
constexpr int STAGES = 2;

// In shared memory; the tiles are columns of 64, each with all of its rows.
template <int W> struct Shared {
  bf16 q[ROWS * W], k[STAGES][KEYS * W], v[STAGES][KEYS * W];
  uint64_t q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], v_cleared;
};

#if GPU_HOPPER
constexpr int TURN = 1, OWN = 3;           // named barriers: one for each consumer's turn, one for each consumer's threads

// The tile of K and V that an iteration works on, and whose turn of the ring it is.
struct Slot {
  int stage, parity;
  DEV explicit Slot(int iteration) : stage(iteration % STAGES), parity(iteration / STAGES % 2) {}
};

// One warp: copies tiles in the order of their use. Tile 0 of the iteration is the last of the sequence.
template <int W>
DEV void produce(Shared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map, const Head& head, int first,
                 int tiles, const AttentionSizes& s) {
  int lane = threadIdx.x % 32, col = head.kv_head * W, row = head.batch * s.keys;
  if (lane == 0) load<W, ROWS>(shared.q, q_map, head.head * W, head.batch * s.queries + first, &shared.q_full);
  for (int i = 0; i < tiles; i++) {
    Slot slot(i);
    int key = (tiles - 1 - i) * KEYS;
    if (lane == 0) {
      mbar_wait(&shared.k_empty[slot.stage], slot.parity ^ 1);
      load<W, KEYS>(shared.k[slot.stage], k_map, col, row + key, &shared.k_full[slot.stage]);
      mbar_wait(&shared.v_empty[slot.stage], slot.parity ^ 1);
      load<W, KEYS>(shared.v[slot.stage], v_map, col, row + key, &shared.v_full[slot.stage]);
    }
    if (key + KEYS > s.keys) {
      // The first tile alone.
      mbar_wait(&shared.v_full[slot.stage], slot.parity);
      clear_rest<W, KEYS>(shared.v[slot.stage], key + KEYS - s.keys, lane);
      proxy_fence_shared();
      __syncwarp();
      if (lane == 0) mbar_arrive(&shared.v_cleared);
    }
  }
}

// A warpgroup's 64 queries. Element 4 j + 2 h + e of an accumulator is row 16 warp + g + 8 h, column 8 j + 2 t + e.
template <int W> struct Consumer {
  float scores[KEYS / 2], acc[W / 2], max[2], sum[2];
  uint32_t weights[KEYS / 16][4];

  DEV void issue_scores(const bf16* q, const bf16* k) {
    uint64_t rows = wgmma_desc(q), cols = wgmma_desc(k);
#pragma unroll
    for (int i = 0; i < W / 16; i++) {
      int column = i * 16 / BOX * BOX, at = i % (BOX / 16) * 16;
      wgmma_64xNx16<KEYS>(scores, wgmma_further(rows, (column * ROWS + at) * 2), wgmma_further(cols, (column * KEYS + at) * 2), i > 0);
    }
    wgmma_commit();
  }
  // Scores of keys that a query does not see become minus infinity.
  DEV void hide(const AttentionSizes& s, const int32_t* mask, int query, int key, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int seen = keys_seen(s, query + 8 * h + 1) - key - 2 * t;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * j + e >= seen) scores[4 * j + 2 * h + e] = NOTHING;
    }
    if (!mask) return;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int col = key + 8 * j + 2 * t + e;
        if (col >= s.keys || mask[col] == 0) scores[4 * j + e] = scores[4 * j + 2 + e] = NOTHING;
      }
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
        for (int e = 0; e < 2; e++) partial += scores[4 * j + 2 * h + e] = exp2_fast(fmaf(scores[4 * j + 2 * h + e], scale, -shift));
      // Each lane sums its own columns; the four of a row add up at the end.
      sum[h] = fmaf(sum[h], shrink[h], partial);
    }
  }
};

template <int W>
DEV void consume(Shared<W>& shared, bf16* out, float* lse, const int32_t* mask, const Head& head, int first, int tiles, const AttentionSizes& s) {
  int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int top_row = first + 64 * group, query = top_row + 16 * warp + g;
  float scale = s.scale * LOG2_E;
  bf16* q = shared.q + 64 * group * BOX;
  if (mask) mask += (int64_t)head.batch * s.keys;
  Consumer<W> c;
#pragma unroll
  for (int i = 0; i < W / 2; i++) c.acc[i] = 0;
#pragma unroll
  for (int h = 0; h < 2; h++) c.max[h] = NOTHING, c.sum[h] = 0;
  auto hidden = [&](int key) { return mask || key + KEYS > s.keys || (s.causal && key + KEYS > top_row); };

  if (tiles > 0) {
    float shrink[2];
    mbar_wait(&shared.q_full, 0);
    // The other consumer's turn comes after this one's first products; who goes first is told so by the other.
    if (group == 1) bar_arrive(TURN, 256);
    // After the second consumer's last turn there is none.
    auto pass_turn = [&](int i) { if (group == 0 || i + 1 < tiles) bar_arrive(TURN + (group ^ 1), 256); };
    bar_sync(TURN + group, 256);
    mbar_wait(&shared.k_full[0], 0);
    wgmma_fence();
    c.issue_scores(q, shared.k[0]);
    pass_turn(0);
    wgmma_wait<0>();
    settle(c.scores);
    if (lane == 0) mbar_arrive(&shared.k_empty[0]);
    int key = (tiles - 1) * KEYS;
    if (hidden(key)) c.hide(s, mask, query, key, t);
    c.exponentials(shrink, scale);
    round_pairs(c.weights, c.scores);
    if (tiles > 1) mbar_wait(&shared.k_full[1], 0);
    for (int i = 1; i < tiles; i++) {
      Slot now(i), last(i - 1), next(i + 1);
      key = (tiles - 1 - i) * KEYS;
      bar_sync(TURN + group, 256);
      mbar_wait(&shared.v_full[last.stage], last.parity);
      if (i == 1 && key + 2 * KEYS > s.keys) mbar_wait(&shared.v_cleared, 0);
      wgmma_fence();
      c.issue_scores(q, shared.k[now.stage]);
      issue_gather<W, KEYS>(c.acc, c.weights, shared.v[last.stage]);
      pass_turn(i);
      wgmma_wait<1>();
      settle(c.scores);
      if (lane == 0) mbar_arrive(&shared.k_empty[now.stage]);
      if (hidden(key)) c.hide(s, mask, query, key, t);
      c.exponentials(shrink, scale);
      settle(c.scores);
      // Waited for here, since ptxas moves the wait for products over exponentials up to the last branch.
      if (i + 1 < tiles) mbar_wait(&shared.k_full[next.stage], next.parity);
      wgmma_wait<0>();
      settle(c.acc);
      if (lane == 0) mbar_arrive(&shared.v_empty[last.stage]);
#pragma unroll
      for (int n = 0; n < W / 2; n++) c.acc[n] *= shrink[n / 2 % 2];
      round_pairs(c.weights, c.scores);
    }
    Slot last(tiles - 1);
    mbar_wait(&shared.v_full[last.stage], last.parity);
    if (tiles == 1 && KEYS > s.keys) mbar_wait(&shared.v_cleared, 0);
    wgmma_fence();
    issue_gather<W, KEYS>(c.acc, c.weights, shared.v[last.stage]);
    wgmma_wait<0>();
    settle(c.acc);
  }

  bar_sync(OWN + group, 128);
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = c.sum[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    factors[h] = total == 0 ? 0.0f : 1.0f / total;
    if (t == 0 && query + 8 * h < s.queries) lse[head.row + query + 8 * h] = fmaf(c.max[h], s.scale, logf(total));
  }
  int64_t pitch = (int64_t)s.heads * W;
  write_rows<W, ROWS>(out + head.out(s) + top_row * pitch, pitch, s.queries - top_row, q, c.acc, factors, warp, lane);
}
#endif

template <int W>
DEV void forward(bf16* out, float* lse, const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map, const int32_t* mask,
                 const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(Shared<W>, shared);
  int blocks = (s.queries + ROWS - 1) / ROWS, at = blockIdx.x / blocks;
  // Later tiles, which see the most keys when causal, come first.
  int first = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS;
  Head head(s, at / s.heads, at % s.heads);
  int tiles = (keys_seen(s, first + ROWS) + KEYS - 1) / KEYS;
  if (threadIdx.x == 0) {
    mbar_init(&shared->q_full, 1);
    mbar_init(&shared->v_cleared, 1);
    for (int i = 0; i < STAGES; i++) {
      mbar_init(&shared->k_full[i], 1);
      mbar_init(&shared->v_full[i], 1);
      mbar_init(&shared->k_empty[i], 4 * CONSUMERS);
      mbar_init(&shared->v_empty[i], 4 * CONSUMERS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && tiles > 0) produce<W>(*shared, q_map, k_map, v_map, head, first, tiles, s);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume<W>(*shared, out, lse, mask, head, first, tiles, s);
  }
#endif
}
}  // namespace hopper

// Grid: a block for each 128 queries of each head and sequence.
#define ATTENTION_HOPPER(width)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(hopper::THREADS, 1) attention_forward_hopper##width##_bf16(                               \
      bf16* out, float* lse, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,                       \
      const __grid_constant__ CUtensorMap v_map, const int32_t* mask, AttentionSizes s) {                                                \
    hopper::forward<width>(out, lse, &q_map, &k_map, &v_map, mask, s);                                                                   \
  }                                                                                                                                      \
  GPU_EXPORT(attention_forward_hopper##width##_bf16)

ATTENTION_HOPPER(64)
ATTENTION_HOPPER(128)
