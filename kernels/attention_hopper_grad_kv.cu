// Gradients of keys and values of attention in bf16 with Hopper's warpgroup products, for widths 64 and 128 (Dao 2023,
// "FlashAttention-2", arXiv:2307.08691, algorithm 2, in two passes, of which attention_hopper_grad_q.cu is the other;
// Shah et al. 2024, "FlashAttention-3", arXiv:2407.08608, whose backward pass takes scores from registers too).
//   Formulas, shapes and what is overwritten are those of attention.cu; attention_hopper_grad_delta.cu comes first.
//   Scale is positive and nothing is dropped. q_map, d_out_map are (B Tq, H D), k_map, v_map (B Tk, Hkv D), in boxes of
//   64 rows and 64 columns with a 128-byte swizzle; heads start at multiples of 16 bytes. Weights and their gradients
//   are rounded to bf16 for the products that sum over them.
// A part is 128 keys, and goes over tiles of 64 queries of the heads that share them, one head after the other. Each of
// two warpgroups has 64 keys and makes scores with keys as rows, w = k q^T and d = v d_out^T, so that what they become
// is, from registers, the left operand of d_v += p^T d_out and d_k += d_s^T q; tiles of q and d_out are read both ways,
// by a bit of their descriptors. Of the third warpgroup one warp asks for copies and two keep lse and delta of a tile's
// queries ready in shared memory: they belong to columns here.
// Exponentials run under the warpgroup's own product d, at width 64 under the last tile's d_k too, and d_s is made
// under d_v; the rest is under the other warpgroup's products. Tiles of queries that see none of the keys are left out;
// only the diagonal's are compared. A mask's hidden keys are rows, which become 0 at the end.
// Rows of a last tile that are not there would be the next sequence's: they are overwritten with 0, so that no value of
// another sequence is ever multiplied. At width 64 a block makes several parts, and the next one's tiles come while
// results are written: it takes the next number from a counter in memory, so which block makes a part depends on the
// chip, but what it makes does not.
// Deterministic: each sum is made by one thread, in order. Two passes make 14 products a score and column where one
// with atomics makes 10.
//   width  shared memory  registers of a consumer   cycles of products a tile   bytes a cycle of shared memory, and copied into it
//   64     147 KB         223, with v               1024                        80 + 16 of 128
//   128    162 KB         235                       2048                        96 + 16
// Exponentials (16 a cycle) take half of the products' time at width 64, a quarter at 128; 690 of 1024 issue slots are
// taken at width 64. Expected on an H100: 560 TFLOP/s made (of 750 in practice) at width 128 and 4k, 450 at width 64;
// 30 % less at 1k.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_hopper.cuh"
#include "gpu/attention_hopper_grad.cuh"

namespace hopper_grad_kv {
using namespace hopper;

// Whether a block makes several parts. At width 128 the counters for it do not fit the registers; a part takes long
// there.
template <int W> constexpr bool SEVERAL = W == 64;
template <int W> constexpr int OWN_STAGES = SEVERAL<W> ? 2 : 1;

// A consumer may hold two tiles, and waits for one behind another that it has just let go.
static_assert(STAGES<64> >= 4 && STAGES<128> >= 3, "consumers would wait for themselves");

// In shared memory. `full` is for bulk copies, `ready` for what warps write, `empty` for consumers that are done.
template <int W> struct Shared {
  bf16 k[OWN_STAGES<W>][ROWS * W], v[OWN_STAGES<W>][ROWS * W], q[STAGES<W>][TILE * W], d_out[STAGES<W>][TILE * W];
  float top[STAGES<W>][TILE], dot[STAGES<W>][TILE];   // log2 of the softmax's denominator, and delta
  int part[OWN_STAGES<W>];                      // -1 after the last
  uint64_t own_full[OWN_STAGES<W>], own_empty[OWN_STAGES<W>], full[STAGES<W>], ready[STAGES<W>], empty[STAGES<W>];
};

#if GPU_HOPPER
// The keys of a part, and the queries that it goes over: from `begin` on, of each of `group` heads.
struct Keys {
  int batch, kv_head, first, begin, group;
  DEV Keys(int at, int together, const AttentionSizes& s) {
    Part part(at, s.batch * s.kv_heads, (s.keys + ROWS - 1) / ROWS, together);
    // Earlier keys, which the most queries see when causal, come first.
    first = part.number * ROWS;
    batch = part.head / s.kv_heads, kv_head = part.head % s.kv_heads, group = s.heads / s.kv_heads;
    begin = s.causal ? first : 0;
  }
};

// One thread: copies tiles in the order of their use. A block's first part has its number, others are the next that no
// block has taken.
template <int W>
DEV void produce(Shared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* d_out_map, const CUtensorMap* k_map,
                 const CUtensorMap* v_map, int* taken, int together, const AttentionSizes& s) {
  Slot<STAGES<W>> slot;
  Slot<OWN_STAGES<W>> own;
  int at = blockIdx.x, parts = s.batch * s.kv_heads * ((s.keys + ROWS - 1) / ROWS);
#pragma unroll 1
  for (; at < parts; own.advance()) {
    Keys part(at, together, s);
    int row = part.batch * s.keys + part.first, col = part.kv_head * W;
    mbar_wait(&shared.own_empty[own.stage], own.parity ^ 1);
    shared.part[own.stage] = at;
    load<W, ROWS, TILE>(shared.k[own.stage], k_map, col, row, &shared.own_full[own.stage]);
    load<W, ROWS, TILE>(shared.v[own.stage], v_map, col, row, &shared.own_full[own.stage]);
    if (SEVERAL<W>) at = gridDim.x + atomicAdd(taken, 1);
    col *= part.group;
    int last = col + part.group * W;
    row = part.batch * s.queries;
#pragma unroll 1
    for (; col < last; col += W)
#pragma unroll 1
      for (int query = part.begin; query < s.queries; query += TILE, slot.advance()) {
        mbar_wait(&shared.empty[slot.stage], slot.parity ^ 1);
        load<W, TILE>(shared.q[slot.stage], q_map, col, row + query, &shared.full[slot.stage]);
        load<W, TILE>(shared.d_out[slot.stage], d_out_map, col, row + query, &shared.full[slot.stage]);
      }
    if (!SEVERAL<W>) return;
  }
  mbar_wait(&shared.own_empty[own.stage], own.parity ^ 1);
  shared.part[own.stage] = -1;
  for (int i = 0; i < 2; i++) mbar_arrive(&shared.own_full[own.stage]);
}

// Two warps, each for half of a tile's queries: what a query's weights need. Queries that are not there would be the
// next sequence's: their rows become 0, and so do, for an infinite denominator, their weights.
template <int W>
DEV void prepare(Shared<W>& shared, const float* lse, const float* delta, int half, int together,
                 const AttentionSizes& s) {
  int lane = threadIdx.x % 32, at = 32 * half + lane;
  Slot<STAGES<W>> slot;
  Slot<OWN_STAGES<W>> own;
#pragma unroll 1
  for (;; own.advance()) {
    mbar_wait(&shared.own_full[own.stage], own.parity);
    if (shared.part[own.stage] < 0) return;
    Keys part(shared.part[own.stage], together, s);
    int64_t row = Head(s, part.batch, part.kv_head * part.group).row;
#pragma unroll 1
    for (int i = 0; i < part.group; i++, row += s.queries)
#pragma unroll 1
      for (int query = part.begin; query < s.queries; query += TILE, slot.advance()) {
        float top = INFINITY, dot = 0;
        if (query + at < s.queries) top = log2_sum(lse[row + query + at]), dot = delta[row + query + at];
        mbar_wait(&shared.empty[slot.stage], slot.parity ^ 1);
        shared.top[slot.stage][at] = top, shared.dot[slot.stage][at] = dot;
        int rest = query + TILE - s.queries;
        if (rest > 0) {
          mbar_wait(&shared.full[slot.stage], slot.parity);
          clear_rest<W, TILE>(half ? shared.d_out[slot.stage] : shared.q[slot.stage], rest, lane);
          proxy_fence_shared();
        }
        __syncwarp();
        if (lane == 0) mbar_arrive(&shared.ready[slot.stage]);
      }
    if (!SEVERAL<W>) return;
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.own_empty[own.stage]);
  }
}

// A warpgroup's 64 keys of each part.
template <int W>
DEV void consume(Shared<W>& shared, bf16* d_k, bf16* d_v, const int32_t* mask, int together, const AttentionSizes& s) {
  int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float scale = s.scale * LOG2_E;
  Slot<STAGES<W>> slot;
  Slot<OWN_STAGES<W>> own;
  auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.empty[stage]);
  };
#pragma unroll 1
  for (;; own.advance()) {
    mbar_wait(&shared.own_full[own.stage], own.parity);
    if (shared.part[own.stage] < 0) return;
    Keys part(shared.part[own.stage], together, s);
    float sum_k[W / 2], sum_v[W / 2];
#pragma unroll
    for (int i = 0; i < W / 2; i++) sum_k[i] = sum_v[i] = 0;
    int first = part.first + 64 * group, query = part.begin, heads = part.begin < s.queries ? part.group : 0;
    auto advance = [&] {
      slot.advance();
      query += TILE;
      if (query >= s.queries) query = s.causal ? first - 64 * group : 0, heads--;
    };
    // Goes over tiles that see none of the keys, to the next that does.
    auto find = [&] {
      while (heads > 0 && s.causal && query + TILE <= first) {
        mbar_wait(&shared.full[slot.stage], slot.parity);
        release(slot.stage);
        advance();
      }
      if (heads == 0) return false;
      mbar_wait(&shared.full[slot.stage], slot.parity);
      mbar_wait(&shared.ready[slot.stage], slot.parity);
      return true;
    };
    // Of the last tile whose d_k has not been asked for.
    uint32_t d_scores[TILE / 16][4];
    int last = 0;
    LeftRows<W, false> keys;
    LeftRows<W, W == 64> values;
    // True where there is another tile. `opening` is known when compiled: there are no d_scores yet. Variables of their
    // own for scores, weights and what is multiplied: ptxas keeps what a product on its way may write from other uses.
    auto multiply = [&](auto opening) {
      constexpr bool OPENING = decltype(opening)::value;
      float w[TILE / 2], d[TILE / 2], p[TILE / 2];
      int now = slot.stage, before = last;
      wgmma_fence();
      if constexpr (W == 64) {
        keys.issue(w, shared.q[now]);
        if constexpr (!OPENING) issue_gather<W, TILE>(sum_k, d_scores, shared.q[before]);
        values.issue(d, shared.d_out[now]);
        wgmma_wait<OPENING ? 1 : 2>();
        settle(w);
      } else {
        // Registers do not reach for d_scores beside this tile's exponentials: the last tile's d_k is there already.
        keys.issue(w, shared.q[now]);
        wgmma_wait<0>();
        settle(w);
        wgmma_fence();
        values.issue(d, shared.d_out[now]);
      }
      // Queries before a key do not see it.
      if (s.causal && query < first + 63) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          int hidden = first + 16 * warp + g + 8 * h - query - 2 * t;
#pragma unroll
          for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e < hidden) w[4 * j + 2 * h + e] = NOTHING;
        }
      }
#pragma unroll
      for (int j = 0; j < TILE / 8; j++) {
        float2 top = *reinterpret_cast<const float2*>(&shared.top[now][8 * j + 2 * t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p[4 * j + 2 * h] = exp2_fast(fmaf(w[4 * j + 2 * h], scale, -top.x));
          p[4 * j + 2 * h + 1] = exp2_fast(fmaf(w[4 * j + 2 * h + 1], scale, -top.y));
        }
      }
      settle(p);
      // The next tile is waited for here, since ptxas moves the wait for products over exponentials up to the last
      // branch.
      last = now;
      advance();
      bool more = find();
      wgmma_wait<0>();
      settle(d);
      if constexpr (W == 64 && !OPENING) release(before);
      uint32_t weights[TILE / 16][4];
      round_pairs(weights, p);
      wgmma_fence();
      issue_gather<W, TILE>(sum_v, weights, shared.d_out[now]);
#pragma unroll
      for (int j = 0; j < TILE / 8; j++) {
        float2 dot = *reinterpret_cast<const float2*>(&shared.dot[now][8 * j + 2 * t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p[4 * j + 2 * h] *= d[4 * j + 2 * h] - dot.x;
          p[4 * j + 2 * h + 1] *= d[4 * j + 2 * h + 1] - dot.y;
        }
      }
      round_pairs(d_scores, p);
      if constexpr (W != 64) {
        wgmma_fence();
        issue_gather<W, TILE>(sum_k, d_scores, shared.q[now]);
        wgmma_wait<0>();
        release(now);
      }
      return more;
    };
    if (find()) {
      keys.take(shared.k[own.stage] + 64 * group * BOX, 16 * warp, lane);
      values.take(shared.v[own.stage] + 64 * group * BOX, 16 * warp, lane);
      bool more = true;
      if constexpr (W == 64) more = multiply(Constant<true>());
      while (more) more = multiply(Constant<false>());
      if constexpr (W == 64) {
        wgmma_fence();
        issue_gather<W, TILE>(sum_k, d_scores, shared.q[last]);
        wgmma_wait<0>();
        release(last);
      }
      settle(sum_k);
      settle(sum_v);
    }

    // Made anew, so that it takes no registers in the loop.
    part = Keys(shared.part[own.stage], together, s), first = part.first + 64 * group;
    bf16 *k = shared.k[own.stage] + 64 * group * BOX, *v = shared.v[own.stage] + 64 * group * BOX;
    // A hidden key's weights are in its own rows alone.
    float ones[2], scales[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int at = first + 16 * warp + g + 8 * h;
      bool hidden = mask && at < s.keys && mask[(int64_t)part.batch * s.keys + at] == 0;
      ones[h] = 1, scales[h] = s.scale;
#pragma unroll
      for (int j = 0; j < W / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (hidden) sum_k[4 * j + 2 * h + e] = sum_v[4 * j + 2 * h + e] = 0;
    }
    bar_sync(OWN + group, 128);
    int64_t to = Head(s, part.batch, part.kv_head * part.group).key(s) + first * (int64_t)s.kv_pitch;
    write_rows<W, ROWS>(d_v + to, s.kv_pitch, s.keys - first, v, sum_v, ones, warp, lane);
    write_rows<W, ROWS>(d_k + to, s.kv_pitch, s.keys - first, k, sum_k, scales, warp, lane);
    if (!SEVERAL<W>) return;
    proxy_fence_shared();
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.own_empty[own.stage]);
  }
}
#endif

template <int W>
DEV void grad_kv(bf16* d_k, bf16* d_v, const float* lse, const float* delta, const CUtensorMap* q_map,
                 const CUtensorMap* d_out_map, const CUtensorMap* k_map, const CUtensorMap* v_map, const int32_t* mask,
                 int* taken, int together, const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(Shared<W>, shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < OWN_STAGES<W>; i++) {
      mbar_init(&shared->own_full[i], 2);
      mbar_init(&shared->own_empty[i], 4 * CONSUMERS + 2);
    }
    for (int i = 0; i < STAGES<W>; i++) {
      mbar_init(&shared->full[i], 2);
      mbar_init(&shared->ready[i], 2);
      mbar_init(&shared->empty[i], 4 * CONSUMERS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    Registers<SEVERAL<W>>::first();
    if (threadIdx.x == 0) produce<W>(*shared, q_map, d_out_map, k_map, v_map, taken, together, s);
    int half = threadIdx.x / 32 - 1;
    if (half == 0 || half == 1) prepare<W>(*shared, lse, delta, half, together, s);
  } else {
    Registers<SEVERAL<W>>::others();
    consume<W>(*shared, d_k, d_v, mask, together, s);
  }
#endif
}
}  // namespace hopper_grad_kv

// Grid: as many blocks as there are parts, of 128 keys of each head and sequence, or fewer.
#define ATTENTION_GRAD_HOPPER(width)                                                                                   \
  extern "C" __global__ void __launch_bounds__(hopper::THREADS, 1) attention_grad_kv_hopper##width##_bf16(             \
      bf16* d_k, bf16* d_v, const float* lse, const float* delta, const __grid_constant__ CUtensorMap q_map,           \
      const __grid_constant__ CUtensorMap d_out_map, const __grid_constant__ CUtensorMap k_map,                        \
      const __grid_constant__ CUtensorMap v_map, const int32_t* mask, int* taken, int together, AttentionSizes s) {    \
    hopper_grad_kv::grad_kv<width>(d_k, d_v, lse, delta, &q_map, &d_out_map, &k_map, &v_map, mask, taken, together,    \
                                   s);                                                                                 \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_kv_hopper##width##_bf16)

ATTENTION_GRAD_HOPPER(64)
ATTENTION_GRAD_HOPPER(128)
