// The gradient of queries of attention in bf16 with Hopper's warpgroup products, for widths 64 and 128: the second pass
// of the gradient, beside attention_hopper_grad_kv.cu, where sources, operands and what is rounded stand.
//   Overwrites d_q alone. d_s = p (d_out v^T - delta), d_q = scale d_s k.
// A part is 128 queries, and goes over tiles of 64 keys. Each of two warpgroups has 64 queries; w = q k^T and d = d_out
// v^T become the left operand of d_q from registers. The product w of a tile, d_q of the last one and d of this are
// issued together; exponentials run under the last two, the rest under the other warpgroup's products. One warp of the
// third warpgroup asks for copies. Tiles past the diagonal are left out. Rows of a last tile that are not there are
// overwritten with 0. A block makes several parts, as in the other pass, and reads what belongs to the next part's
// queries before it writes results. Deterministic: each sum is made by one thread, in order.
//   width  shared memory  registers of a consumer   cycles of products a tile   bytes a cycle of shared memory, and copied into it
//   64     144 KB         178, with q and d_out     768                         64 + 21 of 128
//   128    224 KB         206, with d_out           1536                        85 + 21
// Exponentials (16 a cycle) take two thirds of the products' time at width 64, a third at 128. Expected on an H100: 560
// TFLOP/s made (of 750 in practice) at width 128 and 4k, 420 at width 64; 20 % less at 1k.
#include "gpu.cuh"
#include "gpu/attention.cuh"
#include "gpu/attention_hopper.cuh"
#include "gpu/attention_hopper_grad.cuh"

namespace hopper_grad_q {
using namespace hopper;

constexpr int OWN_STAGES = 2;              // of a part's own tiles: the next part's come while this one is made

// In shared memory. `full` is for bulk copies, `empty` for consumers that are done, `ready` follows `full` once a last
// tile's rows that are not there are 0.
template <int W> struct Shared {
  bf16 q[OWN_STAGES][ROWS * W], d_out[OWN_STAGES][ROWS * W], k[STAGES<W>][TILE * W], v[STAGES<W>][TILE * W];
  uint64_t own_full[OWN_STAGES], own_empty[OWN_STAGES], k_full[STAGES<W>], k_empty[STAGES<W>], v_full[STAGES<W>],
      v_empty[STAGES<W>], ready[STAGES<W>];
  int part[OWN_STAGES];   // -1 after the last
};

#if GPU_HOPPER
// The queries of a part, and the end of the keys that it goes over.
struct Queries {
  int batch, head, kv_head, first, end;
  DEV Queries(int at, int together, const AttentionSizes& s) {
    Part part(at, s.batch * s.heads, (s.queries + ROWS - 1) / ROWS, together);
    // Later queries, which see the most keys when causal, come first.
    first = ((s.queries + ROWS - 1) / ROWS - 1 - part.number) * ROWS;
    batch = part.head / s.heads, head = part.head % s.heads, kv_head = head / (s.heads / s.kv_heads);
    end = keys_seen(s, first + ROWS);
  }
};

// One warp: copies tiles in the order of their use. A block's first part has its number, others are the next that no
// block has taken.
template <int W>
DEV void produce(Shared<W>& shared, const CUtensorMap* q_map, const CUtensorMap* d_out_map, const CUtensorMap* k_map,
                 const CUtensorMap* v_map, int* taken, int together, const AttentionSizes& s) {
  int lane = threadIdx.x % 32, at = blockIdx.x, parts = s.batch * s.heads * ((s.queries + ROWS - 1) / ROWS);
  Slot<STAGES<W>> slot;
  Slot<OWN_STAGES> own;
#pragma unroll 1
  for (; at < parts; own.advance()) {
    Queries part(at, together, s);
    if (lane == 0) {
      int col = part.head * W, row = part.batch * s.queries + part.first;
      mbar_wait(&shared.own_empty[own.stage], own.parity ^ 1);
      shared.part[own.stage] = at;
      load<W, ROWS, TILE>(shared.q[own.stage], q_map, col, row, &shared.own_full[own.stage]);
      load<W, ROWS, TILE>(shared.d_out[own.stage], d_out_map, col, row, &shared.own_full[own.stage]);
      at = gridDim.x + atomicAdd(taken, 1);
    }
#pragma unroll 1
    for (int key = 0; key < part.end; key += TILE, slot.advance()) {
      if (lane == 0) {
        int col = part.kv_head * W, row = part.batch * s.keys + key;
        mbar_wait(&shared.k_empty[slot.stage], slot.parity ^ 1);
        load<W, TILE>(shared.k[slot.stage], k_map, col, row, &shared.k_full[slot.stage]);
        mbar_wait(&shared.v_empty[slot.stage], slot.parity ^ 1);
        load<W, TILE>(shared.v[slot.stage], v_map, col, row, &shared.v_full[slot.stage]);
      }
      int rest = key + TILE - s.keys;
      if (rest > 0) {
        // The last tile alone. Keys that are not there would be the next sequence's. Lanes wait after the first, whose
        // copies begin the phase.
        __syncwarp();
        mbar_wait(&shared.k_full[slot.stage], slot.parity);
        mbar_wait(&shared.v_full[slot.stage], slot.parity);
        clear_rest<W, TILE>(shared.k[slot.stage], rest, lane);
        clear_rest<W, TILE>(shared.v[slot.stage], rest, lane);
        proxy_fence_shared();
        __syncwarp();
      }
      if (lane == 0) mbar_arrive(&shared.ready[slot.stage]);
    }
    at = __shfl_sync(~0u, at, 0);
  }
  if (lane == 0) {
    mbar_wait(&shared.own_empty[own.stage], own.parity ^ 1);
    shared.part[own.stage] = -1;
    for (int i = 0; i < 2; i++) mbar_arrive(&shared.own_full[own.stage]);
  }
}

// A warpgroup's 64 queries of each part.
template <int W>
DEV void consume(Shared<W>& shared, bf16* d_q, const float* lse, const float* delta, const int32_t* mask, int together,
                 const AttentionSizes& s) {
  int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float scale = s.scale * LOG2_E, top[2], dot[2];
  Slot<STAGES<W>> slot, last;
  Slot<OWN_STAGES> own;
  // The number of the next part, and what belongs to its queries, read before it is made: that takes as long as a tile.
  auto read = [&] {
    mbar_wait(&shared.own_full[own.stage], own.parity);
    int at = shared.part[own.stage];
    if (at < 0) return at;
    Queries part(at, together, s);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int query = part.first + 64 * group + 16 * warp + g + 8 * h;
      int64_t row = Head(s, part.batch, part.head).row + query;
      top[h] = query < s.queries ? lse[row] : NOTHING;
      dot[h] = query < s.queries ? delta[row] : 0.0f;
    }
    return at;
  };
#pragma unroll 1
  for (int at = read(); at >= 0;) {
    Queries part(at, together, s);
    int first = part.first + 64 * group, query = first + 16 * warp + g, key = 0, end = part.end;
    const int32_t* hides = mask ? mask + (int64_t)part.batch * s.keys : nullptr;
    float sum[W / 2];
    uint32_t d_scores[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < W / 2; i++) sum[i] = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) top[h] = log2_sum(top[h]);
    LeftRows<W, W == 64> queries;
    LeftRows<W, true> d_outs;
    auto wait_keys = [&] {
      mbar_wait(&shared.k_full[slot.stage], slot.parity);
      mbar_wait(&shared.v_full[slot.stage], slot.parity);
      if (key + TILE > s.keys) mbar_wait(&shared.ready[slot.stage], slot.parity);
    };
    // `opening` is known when compiled: there are no d_scores yet. Variables of their own for scores, weights and what
    // is multiplied: ptxas keeps what a product on its way may write from other uses.
    auto multiply = [&](auto opening) {
      constexpr bool OPENING = decltype(opening)::value;
      float w[TILE / 2], d[TILE / 2], p[TILE / 2];
      wgmma_fence();
      queries.issue(w, shared.k[slot.stage]);
      if constexpr (!OPENING) issue_gather<W, TILE>(sum, d_scores, shared.k[last.stage]);
      d_outs.issue(d, shared.v[slot.stage]);
      // Under the products.
      Shown<TILE> shown;
      if (hides) shown.load(hides, key, s.keys, lane), shown.vote();
      wgmma_wait<OPENING ? 1 : 2>();
      settle(w);
      if (key + TILE > s.keys || (s.causal && key + TILE > first)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          int seen = keys_seen(s, query + 8 * h + 1) - key - 2 * t;
#pragma unroll
          for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e >= seen) w[4 * j + 2 * h + e] = NOTHING;
        }
      }
      if (hides && !shown.all()) {
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (shown.hides(j, t, e)) w[4 * j + e] = w[4 * j + 2 + e] = NOTHING;
      }
#pragma unroll
      for (int i = 0; i < TILE / 2; i++) p[i] = exp2_fast(fmaf(w[i], scale, -top[i / 2 % 2]));
      settle(p);
      // Waited for here, since ptxas moves the wait for products over exponentials up to the last branch.
      int before = last.stage;
      last = slot;
      slot.advance();
      key += TILE;
      if (key < end) wait_keys();
      wgmma_wait<0>();
      settle(d);
      if (lane == 0) mbar_arrive(&shared.v_empty[last.stage]);
      if (lane == 0 && !OPENING) mbar_arrive(&shared.k_empty[before]);
#pragma unroll
      for (int i = 0; i < TILE / 2; i++) p[i] *= d[i] - dot[i / 2 % 2];
      round_pairs(d_scores, p);
    };
    bf16* q = shared.q[own.stage] + 64 * group * BOX;
    if (end > 0) {
      queries.take(q, 16 * warp, lane);
      d_outs.take(shared.d_out[own.stage] + 64 * group * BOX, 16 * warp, lane);
      wait_keys();
      multiply(Constant<true>());
      while (key < end) multiply(Constant<false>());
      wgmma_fence();
      issue_gather<W, TILE>(sum, d_scores, shared.k[last.stage]);
      wgmma_wait<0>();
      settle(sum);
      if (lane == 0) mbar_arrive(&shared.k_empty[last.stage]);
    }
    int made = own.stage;
    own.advance();
    at = read();
    bar_sync(OWN + group, 128);
    const float scales[2] = {s.scale, s.scale};
    int64_t to = Head(s, part.batch, part.head).query(s) + first * (int64_t)s.q_pitch;
    write_rows<W, ROWS>(d_q + to, s.q_pitch, s.queries - first, q, sum, scales, warp, lane);
    proxy_fence_shared();
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.own_empty[made]);
  }
}
#endif

template <int W>
DEV void grad_q(bf16* d_q, const float* lse, const float* delta, const CUtensorMap* q_map, const CUtensorMap* d_out_map,
                const CUtensorMap* k_map, const CUtensorMap* v_map, const int32_t* mask, int* taken, int together,
                const AttentionSizes& s) {
#if GPU_HOPPER
  GPU_DYNAMIC(Shared<W>, shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < OWN_STAGES; i++) {
      mbar_init(&shared->own_full[i], 2);
      mbar_init(&shared->own_empty[i], 4 * CONSUMERS);
    }
    for (int i = 0; i < STAGES<W>; i++) {
      mbar_init(&shared->k_full[i], 1);
      mbar_init(&shared->v_full[i], 1);
      mbar_init(&shared->ready[i], 1);
      mbar_init(&shared->k_empty[i], 4 * CONSUMERS);
      mbar_init(&shared->v_empty[i], 4 * CONSUMERS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    Registers<true>::first();
    if (threadIdx.x < 32) produce<W>(*shared, q_map, d_out_map, k_map, v_map, taken, together, s);
  } else {
    Registers<true>::others();
    consume<W>(*shared, d_q, lse, delta, mask, together, s);
  }
#endif
}
}  // namespace hopper_grad_q

// Grid: as many blocks as there are parts, of 128 queries of each head and sequence, or fewer.
#define ATTENTION_GRAD_HOPPER(width)                                                                                   \
  extern "C" __global__ void __launch_bounds__(hopper::THREADS, 1) attention_grad_q_hopper##width##_bf16(              \
      bf16* d_q, const float* lse, const float* delta, const __grid_constant__ CUtensorMap q_map,                      \
      const __grid_constant__ CUtensorMap d_out_map, const __grid_constant__ CUtensorMap k_map,                        \
      const __grid_constant__ CUtensorMap v_map, const int32_t* mask, int* taken, int together, AttentionSizes s) {    \
    hopper_grad_q::grad_q<width>(d_q, lse, delta, &q_map, &d_out_map, &k_map, &v_map, mask, taken, together, s);       \
  }                                                                                                                    \
  GPU_EXPORT(attention_grad_q_hopper##width##_bf16)

ATTENTION_GRAD_HOPPER(64)
ATTENTION_GRAD_HOPPER(128)
