// The gradient of attention in bf16 with Hopper's warpgroup products, for widths 64 and 128 (Dao 2023, "FlashAttention-2", arXiv:2307.08691,
// algorithm 2, in two passes; Shah et al. 2024, "FlashAttention-3", arXiv:2407.08608, whose products d_k and d_v take scores from registers).
//   Formulas, shapes and what is overwritten are those of attention.cu, whose attention_grad_delta comes first; scale is positive and nothing
//   is dropped. q_map, d_out_map are (B Tq, H D), k_map, v_map (B Tk, Hkv D), in boxes of 64 rows and 64 columns with a 128-byte swizzle; heads
//   start at multiples of 16 bytes. Weights and their gradients are rounded to bf16 for the products that sum over them.
// grad_kv: a block has 128 keys, and goes over tiles of 64 queries of the heads that share them, one head after the other. Each of two
// warpgroups has 64 keys and makes scores with keys as rows, w = k q^T and d = v d_out^T, so that what they become is, from registers, the
// left operand of d_v += p^T d_out and d_k += d_s^T q; the tiles of q and d_out are read both ways, by a bit of their descriptors. Two warps
// beside the one that asks for copies keep each query's lse and delta ready in shared memory, as base of the exponentials: there they belong
// to columns. grad_q: a block has 128 queries and goes over tiles of 64 keys; lse and delta belong to rows and stay in registers.
// Exponentials run under the warpgroup's own product d, and in grad_kv d_s is made under d_v; the rest is under the other warpgroup's
// products. Tiles without a pair that sees each other are left out; only the diagonal's are compared. A mask's hidden keys are rows in grad_kv,
// whose results become 0 at the end.
// Rows of a last tile that are not there would be the next sequence's: they are overwritten with 0, so that no value of another sequence is
// ever multiplied. Deterministic: two passes, which make 14 products a score and column where one pass with atomics makes 10; each sum is
// made by one thread, in order. No split depends on the chip.
//   width  kernel   shared memory  tile pair     products' cycles  bytes of shared memory a cycle  registers of a consumer
//   64     grad_kv  80 KB          128 x 64      1024              64 + 16 by copies               200 (k, v held)
//   64     grad_q   96 KB          128 x 64      768               64 + 21                         167 (q, d_out held)
//   128    grad_kv  160 KB         128 x 64      2048              96 + 16                         235
//   128    grad_q   192 KB         128 x 64      1536              85 + 21                         199 (d_out held)
// of 128 bytes a cycle that there are, at 4096 flop a cycle; L2 gives the 16 to 21. At width 64 exponentials (16 a cycle) take 50 % of the
// products' time in grad_kv and 67 % in grad_q. Expected on an H100, counting 10 products a score and column of 14: 400 TFLOP/s at width 128
// and 8k (75 % of the tensor cores' 750 in practice), 340 at width 64; less the 1.5 us in which a block starts and ends, which is a quarter
// of a block at width 64 and 1k.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_hopper.cuh"

namespace hopper_grad {
using namespace hopper;
constexpr int ROWS = 128;                  // keys (grad_kv) or queries (grad_q) of a block
constexpr int BOX_ROWS = 64;               // of every map
constexpr int QUERIES = 64, KEYS = 64;     // of a tile that is streamed: in grad_kv, in grad_q
constexpr int QUERY_STAGES = 3, KEY_STAGES = 4;

// In shared memory. `full` is for bulk copies, `ready` for what a warp writes, `empty` for consumers that are done.
template <int W> struct KvShared {
  bf16 k[ROWS * W], v[ROWS * W], q[QUERY_STAGES][QUERIES * W], d_out[QUERY_STAGES][QUERIES * W];
  float top[QUERY_STAGES][QUERIES], dot[QUERY_STAGES][QUERIES];   // log2 of the softmax's denominator, and delta
  uint64_t own_full, full[QUERY_STAGES], ready[QUERY_STAGES], empty[QUERY_STAGES];
};
template <int W> struct QShared {
  bf16 q[ROWS * W], d_out[ROWS * W], k[KEY_STAGES][KEYS * W], v[KEY_STAGES][KEYS * W];
  uint64_t own_full, k_full[KEY_STAGES], k_empty[KEY_STAGES], v_full[KEY_STAGES], v_empty[KEY_STAGES], cleared;
};

#if GPU_HOPPER
constexpr int OWN = 1;                     // named barriers: one for each consumer's threads

// A place in a ring, and whose turn of the ring it is.
template <int STAGES> struct Slot {
  int stage = 0, parity = 0;
  DEV void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };

// 64 rows of a tile as a left operand. Where registers allow they are HELD there: a product of 64 columns with both operands in shared memory
// takes all of its bandwidth.
template <int W, bool HELD> struct LeftRows {
  uint64_t rows;
  uint32_t held[W / 16][4];

  DEV LeftRows(const bf16* rows) : rows(wgmma_desc(rows)) {}
  DEV void hold(bf16* tile, int row, int lane) {
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < W / 16; i++) ldmatrix_x4(held[i], piece_of<ROWS>(tile, row + lane % 16, 2 * i + lane / 16));
    }
  }
  // products = rows tile^T, over the width.
  template <int N> DEV void issue(float (&products)[N / 2], const bf16* tile) const {
    uint64_t cols = wgmma_desc(tile);
#pragma unroll
    for (int i = 0; i < W / 16; i++) {
      int column = i * 16 / BOX * BOX, at = i % (BOX / 16) * 16;
      uint64_t right = wgmma_further(cols, (column * N + at) * 2);
      if constexpr (HELD) wgmma_64xNx16<N>(products, held[i], right, i > 0);
      else wgmma_64xNx16<N>(products, wgmma_further(rows, (column * ROWS + at) * 2), right, i > 0);
    }
    wgmma_commit();
  }
};

// What a block of grad_kv makes: 128 keys. It goes over tiles of queries from `begin` on, of each head that shares the keys.
struct KeyPart {
  int batch, kv_head, first, begin, group;
  DEV KeyPart(const AttentionSizes& s, uint32_t block = blockIdx.x) {
    int tiles = (s.keys + ROWS - 1) / ROWS, at = block / tiles;
    // Earlier keys, which the most queries see when causal, come first.
    first = (int)(block % tiles) * ROWS;
    kv_head = at % s.kv_heads, batch = at / s.kv_heads, group = s.heads / s.kv_heads;
    begin = s.causal ? first : 0;
  }
  DEV Head head(const AttentionSizes& s, int i) const { return Head(s, batch, kv_head * group + i); }
  DEV bool any(const AttentionSizes& s) const { return begin < s.queries; }
};

// One thread: copies tiles in the order of their use.
template <int W>
DEV void produce_queries(KvShared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* d_out_map, const CUtensorMap* k_map,
                         const CUtensorMap* v_map, const AttentionSizes& s) {
  KeyPart part(s);
  if (!part.any(s)) return;
  int row = part.batch * s.keys + part.first;
  load<W, ROWS, BOX_ROWS>(shared.k, k_map, part.kv_head * W, row, &shared.own_full);
  load<W, ROWS, BOX_ROWS>(shared.v, v_map, part.kv_head * W, row, &shared.own_full);
  Slot<QUERY_STAGES> slot;
  int col = part.kv_head * part.group * W, last = col + part.group * W;
#pragma unroll 1
  for (; col < last; col += W)
#pragma unroll 1
    for (int query = part.begin; query < s.queries; query += QUERIES, slot.advance()) {
      mbar_wait(&shared.empty[slot.stage], slot.parity ^ 1);
      load<W, QUERIES, BOX_ROWS>(shared.q[slot.stage], q_map, col, part.batch * s.queries + query, &shared.full[slot.stage]);
      load<W, QUERIES, BOX_ROWS>(shared.d_out[slot.stage], d_out_map, col, part.batch * s.queries + query, &shared.full[slot.stage]);
    }
}

// Two warps, each for half of a tile's queries: what a query's weights need. Queries that are not there would be the next sequence's: their
// rows become 0, and so do, for an infinite denominator, their weights.
template <int W> DEV void prepare_queries(KvShared<W>& shared, const float* lse, const float* delta, int half, const AttentionSizes& s) {
  KeyPart part(s);
  int lane = threadIdx.x % 32, at = 32 * half + lane;
  int64_t row = part.head(s, 0).row;
  lse += row, delta += row;
  Slot<QUERY_STAGES> slot;
#pragma unroll 1
  for (int i = 0; i < part.group; i++, lse += s.queries, delta += s.queries)
#pragma unroll 1
    for (int query = part.begin; query < s.queries; query += QUERIES, slot.advance()) {
      float top = INFINITY, dot = 0;
      if (query + at < s.queries) top = log2_sum(lse[query + at]), dot = delta[query + at];
      mbar_wait(&shared.empty[slot.stage], slot.parity ^ 1);
      shared.top[slot.stage][at] = top, shared.dot[slot.stage][at] = dot;
      int rest = query + QUERIES - s.queries;
      if (rest > 0) {
        mbar_wait(&shared.full[slot.stage], slot.parity);
        clear_rest<W, QUERIES>(half ? shared.d_out[slot.stage] : shared.q[slot.stage], rest, lane);
        proxy_fence_shared();
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(&shared.ready[slot.stage]);
    }
}

// A warpgroup's 64 keys.
template <int W>
DEV void consume_queries(KvShared<W>& shared, bf16* d_k, bf16* d_v, const int32_t* mask, const AttentionSizes& s) {
  KeyPart part(s);
  int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int own = part.first + 64 * group;
  float scale = s.scale * LOG2_E;
  bf16 *k = shared.k + 64 * group * BOX, *v = shared.v + 64 * group * BOX;
  float sum_k[W / 2], sum_v[W / 2];
#pragma unroll
  for (int i = 0; i < W / 2; i++) sum_k[i] = sum_v[i] = 0;

  Slot<QUERY_STAGES> slot;
  int query = part.begin, heads = part.group;
  auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.empty[stage]);
  };
  auto advance = [&] {
    slot.advance();
    query += QUERIES;
    if (query >= s.queries) query = part.begin, heads--;
  };
  // Goes over tiles that see none of the keys, to the next that does.
  auto find = [&] {
    while (heads > 0 && s.causal && query + QUERIES <= own) {
      mbar_wait(&shared.full[slot.stage], slot.parity);
      release(slot.stage);
      advance();
    }
    if (heads == 0) return false;
    mbar_wait(&shared.full[slot.stage], slot.parity);
    mbar_wait(&shared.ready[slot.stage], slot.parity);
    return true;
  };
  // Also where there is nothing to see: results go by way of these tiles.
  if (part.any(s)) mbar_wait(&shared.own_full, 0);
  if (part.any(s) && find()) {
    LeftRows<W, W == 64> keys(k), values(v);
    keys.hold(k, 16 * warp, lane);
    values.hold(v, 16 * warp, lane);
    // Variables of their own for what is multiplied, scores, and weights: ptxas keeps what a product on its way may write from other uses.
    float w[QUERIES / 2], d[QUERIES / 2], p[QUERIES / 2];
    wgmma_fence();
    keys.template issue<QUERIES>(w, shared.q[slot.stage]);
    wgmma_wait<0>();
    settle(w);
    for (;;) {
      int now = slot.stage;
      wgmma_fence();
      values.template issue<QUERIES>(d, shared.d_out[now]);
      // Queries before a key do not see it.
      if (s.causal && query < own + 63) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          int hidden = own + 16 * warp + g + 8 * h - query - 2 * t;
#pragma unroll
          for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e < hidden) w[4 * j + 2 * h + e] = NOTHING;
        }
      }
#pragma unroll
      for (int j = 0; j < QUERIES / 8; j++) {
        float2 top = *reinterpret_cast<const float2*>(&shared.top[now][8 * j + 2 * t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p[4 * j + 2 * h] = exp2_fast(fmaf(w[4 * j + 2 * h], scale, -top.x));
          p[4 * j + 2 * h + 1] = exp2_fast(fmaf(w[4 * j + 2 * h + 1], scale, -top.y));
        }
      }
      settle(p);
      // The next tile is waited for here, since ptxas moves the wait for products over exponentials up to the last branch.
      advance();
      bool more = find();
      wgmma_wait<0>();
      settle(d);
      uint32_t weights[QUERIES / 16][4], d_scores[QUERIES / 16][4];
      round_pairs(weights, p);
      wgmma_fence();
      issue_gather<W, QUERIES>(sum_v, weights, shared.d_out[now]);
#pragma unroll
      for (int j = 0; j < QUERIES / 8; j++) {
        float2 dot = *reinterpret_cast<const float2*>(&shared.dot[now][8 * j + 2 * t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p[4 * j + 2 * h] *= d[4 * j + 2 * h] - dot.x;
          p[4 * j + 2 * h + 1] *= d[4 * j + 2 * h + 1] - dot.y;
        }
      }
      round_pairs(d_scores, p);
      wgmma_fence();
      issue_gather<W, QUERIES>(sum_k, d_scores, shared.q[now]);
      if (!more) break;
      wgmma_fence();
      keys.template issue<QUERIES>(w, shared.q[slot.stage]);
      wgmma_wait<0>();
      settle(w);
      release(now);
    }
    wgmma_wait<0>();
    settle(sum_k);
    settle(sum_v);
  }

  // Made anew, so that it takes no registers in the loop.
  uint32_t block = blockIdx.x;
  forget(block);
  part = KeyPart(s, block), own = part.first + 64 * group;
  // A hidden key's weights are in its own rows alone.
  float ones[2], scales[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int at = own + 16 * warp + g + 8 * h;
    bool hidden = mask && at < s.keys && mask[(int64_t)part.batch * s.keys + at] == 0;
    ones[h] = 1, scales[h] = s.scale;
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (hidden) sum_k[4 * j + 2 * h + e] = sum_v[4 * j + 2 * h + e] = 0;
  }
  bar_sync(OWN + group, 128);
  int64_t to = part.head(s, 0).key(s) + own * (int64_t)s.kv_pitch;
  write_rows<W, ROWS>(d_v + to, s.kv_pitch, s.keys - own, v, sum_v, ones, warp, lane);
  write_rows<W, ROWS>(d_k + to, s.kv_pitch, s.keys - own, k, sum_k, scales, warp, lane);
}

// One warp: copies tiles in the order of their use.
template <int W>
DEV void produce_keys(QShared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* d_out_map, const CUtensorMap* k_map,
                      const CUtensorMap* v_map, const Head& head, int first, int tiles, const AttentionSizes& s) {
  int lane = threadIdx.x % 32, col = head.kv_head * W, row = head.batch * s.queries + first, key = 0;
  Slot<KEY_STAGES> slot;
  for (int i = 0; i < tiles; i++, key += KEYS, slot.advance()) {
    uint64_t *k_full = &shared.k_full[slot.stage], *v_full = &shared.v_full[slot.stage];
    if (lane == 0) {
      if (i == 0) load<W, ROWS, BOX_ROWS>(shared.q, q_map, head.head * W, row, &shared.own_full);
      mbar_wait(&shared.k_empty[slot.stage], slot.parity ^ 1);
      load<W, KEYS, BOX_ROWS>(shared.k[slot.stage], k_map, col, head.batch * s.keys + key, k_full);
      if (i == 0) load<W, ROWS, BOX_ROWS>(shared.d_out, d_out_map, head.head * W, row, &shared.own_full);
      mbar_wait(&shared.v_empty[slot.stage], slot.parity ^ 1);
      load<W, KEYS, BOX_ROWS>(shared.v[slot.stage], v_map, col, head.batch * s.keys + key, v_full);
    }
    int rest = key + KEYS - s.keys;
    if (rest > 0) {
      // The last tile alone. Keys that are not there would be the next sequence's. Lanes wait after the first, whose copies begin the phase.
      __syncwarp();
      mbar_wait(k_full, slot.parity);
      mbar_wait(v_full, slot.parity);
      clear_rest<W, KEYS>(shared.k[slot.stage], rest, lane);
      clear_rest<W, KEYS>(shared.v[slot.stage], rest, lane);
      proxy_fence_shared();
      __syncwarp();
      if (lane == 0) mbar_arrive(&shared.cleared);
    }
  }
}

// A warpgroup's 64 queries.
template <int W>
DEV void consume_keys(QShared<W>& shared, bf16* d_q, const float* lse, const float* delta, const int32_t* mask, const Head& head, int first,
                      int tiles, const AttentionSizes& s) {
  int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int own = first + 64 * group, query = own + 16 * warp + g;
  float scale = s.scale * LOG2_E;
  bf16 *q = shared.q + 64 * group * BOX, *d_out = shared.d_out + 64 * group * BOX;
  if (mask) mask += (int64_t)head.batch * s.keys;
  float sum[W / 2], top[2], dot[2];
  uint32_t d_scores[KEYS / 16][4];
#pragma unroll
  for (int i = 0; i < W / 2; i++) sum[i] = 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int at = query + 8 * h;
    top[h] = at < s.queries ? log2_sum(lse[head.row + at]) : INFINITY;
    dot[h] = at < s.queries ? delta[head.row + at] : 0.0f;
  }
  Slot<KEY_STAGES> slot, last;
  int key = 0, end = tiles * KEYS;
  LeftRows<W, W == 64> queries(q);
  LeftRows<W, true> d_outs(d_out);
  auto wait_keys = [&] {
    mbar_wait(&shared.k_full[slot.stage], slot.parity);
    mbar_wait(&shared.v_full[slot.stage], slot.parity);
    if (key + KEYS > s.keys) mbar_wait(&shared.cleared, 0);
  };
  // `first` is known when compiled: there are no d_scores yet. Variables of their own for scores, weights and what is multiplied: ptxas keeps
  // what a product on its way may write from other uses.
  auto multiply = [&](auto first) {
    constexpr bool FIRST = decltype(first)::value;
    float w[KEYS / 2], d[KEYS / 2], p[KEYS / 2];
    wgmma_fence();
    if constexpr (!FIRST) issue_gather<W, KEYS>(sum, d_scores, shared.k[last.stage]);
    queries.template issue<KEYS>(w, shared.k[slot.stage]);
    if constexpr (!FIRST) wgmma_wait<1>();
    d_outs.template issue<KEYS>(d, shared.v[slot.stage]);
    wgmma_wait<1>();
    settle(w);
    if (lane == 0 && !FIRST) mbar_arrive(&shared.k_empty[last.stage]);
    if (mask || key + KEYS > s.keys || (s.causal && key + KEYS > own)) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int seen = keys_seen(s, query + 8 * h + 1) - key - 2 * t;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (8 * j + e >= seen) w[4 * j + 2 * h + e] = NOTHING;
      }
      if (mask) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            int col = key + 8 * j + 2 * t + e;
            if (col >= s.keys || mask[col] == 0) w[4 * j + e] = w[4 * j + 2 + e] = NOTHING;
          }
      }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) p[i] = exp2_fast(fmaf(w[i], scale, -top[i / 2 % 2]));
    settle(p);
    // Waited for here, since ptxas moves the wait for products over exponentials up to the last branch.
    last = slot;
    slot.advance();
    key += KEYS;
    if (key < end) wait_keys();
    wgmma_wait<0>();
    settle(d);
    if (lane == 0) mbar_arrive(&shared.v_empty[last.stage]);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) p[i] *= d[i] - dot[i / 2 % 2];
    round_pairs(d_scores, p);
  };
  if (tiles > 0) {
    mbar_wait(&shared.own_full, 0);
    queries.hold(q, 16 * warp, lane);
    d_outs.hold(d_out, 16 * warp, lane);
    wait_keys();
    multiply(Constant<true>());
    while (key < end) multiply(Constant<false>());
    wgmma_fence();
    issue_gather<W, KEYS>(sum, d_scores, shared.k[last.stage]);
    wgmma_wait<0>();
    settle(sum);
  }
  bar_sync(OWN + group, 128);
  const float scales[2] = {s.scale, s.scale};
  write_rows<W, ROWS>(d_q + head.query(s) + own * (int64_t)s.q_pitch, s.q_pitch, s.queries - own, q, sum, scales, warp, lane);
}
#endif

template <int W>
DEV void grad_kv(bf16* d_k, bf16* d_v, const float* lse, const float* delta, const CUtensorMap* q_map, const CUtensorMap* d_out_map,
                 const CUtensorMap* k_map, const CUtensorMap* v_map, const int32_t* mask, const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(KvShared<W>, shared);
  if (threadIdx.x == 0) {
    mbar_init(&shared->own_full, 2);
    for (int i = 0; i < QUERY_STAGES; i++) {
      mbar_init(&shared->full[i], 2);
      mbar_init(&shared->ready[i], 2);
      mbar_init(&shared->empty[i], 4 * CONSUMERS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce_queries<W>(*shared, q_map, d_out_map, k_map, v_map, s);
    int half = threadIdx.x / 32 - 1;
    if (half == 0 || half == 1) prepare_queries<W>(*shared, lse, delta, half, s);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume_queries<W>(*shared, d_k, d_v, mask, s);
  }
#endif
}

template <int W>
DEV void grad_q(bf16* d_q, const float* lse, const float* delta, const CUtensorMap* q_map, const CUtensorMap* d_out_map,
                const CUtensorMap* k_map, const CUtensorMap* v_map, const int32_t* mask, const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(QShared<W>, shared);
  int blocks = (s.queries + ROWS - 1) / ROWS, at = blockIdx.x / blocks;
  // Later tiles, which see the most keys when causal, come first.
  int first = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS;
  Head head(s, at / s.heads, at % s.heads);
  int tiles = (keys_seen(s, first + ROWS) + KEYS - 1) / KEYS;
  if (threadIdx.x == 0) {
    mbar_init(&shared->own_full, 2);
    mbar_init(&shared->cleared, 1);
    for (int i = 0; i < KEY_STAGES; i++) {
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
    if (threadIdx.x < 32) produce_keys<W>(*shared, q_map, d_out_map, k_map, v_map, head, first, tiles, s);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume_keys<W>(*shared, d_q, lse, delta, mask, head, first, tiles, s);
  }
#endif
}
}  // namespace hopper_grad

// Grids: a block for each 128 keys (grad_kv) or queries (grad_q) of each head and sequence.
#define ATTENTION_GRAD_HOPPER(width)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(hopper_grad::THREADS, 1) attention_grad_kv_hopper##width##_bf16(                               \
      bf16* d_k, bf16* d_v, const float* lse, const float* delta, const __grid_constant__ CUtensorMap q_map,                             \
      const __grid_constant__ CUtensorMap d_out_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, \
      const int32_t* mask, AttentionSizes s) {                                                                                           \
    hopper_grad::grad_kv<width>(d_k, d_v, lse, delta, &q_map, &d_out_map, &k_map, &v_map, mask, s);                                           \
  }                                                                                                                                      \
  GPU_EXPORT(attention_grad_kv_hopper##width##_bf16)                                                                                     \
  extern "C" __global__ void __launch_bounds__(hopper_grad::THREADS, 1) attention_grad_q_hopper##width##_bf16(                                \
      bf16* d_q, const float* lse, const float* delta, const __grid_constant__ CUtensorMap q_map,                                        \
      const __grid_constant__ CUtensorMap d_out_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, \
      const int32_t* mask, AttentionSizes s) {                                                                                           \
    hopper_grad::grad_q<width>(d_q, lse, delta, &q_map, &d_out_map, &k_map, &v_map, mask, s);                                                 \
  }                                                                                                                                      \
  GPU_EXPORT(attention_grad_q_hopper##width##_bf16)

ATTENTION_GRAD_HOPPER(64)
ATTENTION_GRAD_HOPPER(128)
