// Bulk copies, mbarriers and warpgroup products, and what goes wrong with them: each kernel has its mistakes, by
// number.
#include "gpu.cuh"

// A box of 64 columns and 32 rows of `from`, at (x, y), in shared memory as it lies there (raw, 64 * 32 bf16), and
// stored at (x, y) of `to`. 64 threads. 1 no wait for the load, 2 no fence after initializing, 3 no proxy fence before
// the store, 4 the source is written before the store has read it, 5 more bytes are expected than come, 6 one arrival
// too many, 7 a misaligned place, 8 no wait for the store, 9 none for a second load of the same.
extern "C" __global__ void test_bulk(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, bf16* raw,
                                     int x, int y, int bug) {
#if GPU_HOPPER
  GPU_DYNAMIC(bf16, tile);  // (32, 64), and as much again
  GPU_SHARED(uint64_t, full, [1]);
  const int t = threadIdx.x, elems = 32 * 64;
  if (t == 0) {
    tma_prefetch_map(&from);
    mbar_init(full, 1);
    if (bug != 2) mbar_init_fence();
  }
  __syncthreads();
  if (t == 0) {
    mbar_expect_tx(full, elems * 2 + (bug == 5 ? 16 : 0));
    if (bug == 6) mbar_arrive(full), mbar_arrive(full);
    tma_load_2d(tile + (bug == 7 ? 8 : 0), &from, x, y, full);
  }
  if (bug != 1) mbar_wait(full, 0);
  for (int i = t; i < elems; i += 64) {
    raw[i] = tile[i];
    tile[elems + i] = tile[i];
  }
  if (bug != 3) proxy_fence_shared();
  __syncthreads();
  if (t == 0) {
    tma_store_2d(&to, tile + elems, x, y);
    tma_store_commit();
    if (bug == 4) tile[elems] = from_float<bf16>(1);
    if (bug != 8) tma_store_wait_read<0>();
    if (bug != 8) tma_store_wait<0>();
    mbar_expect_tx(full, elems * 2);
    tma_load_2d(tile, &from, x, y, full);
    if (bug != 9) mbar_wait(full, 1);
  }
#endif
}
GPU_EXPORT(test_bulk)

// The same box in raw, over what the threads have written there. 64 threads. 1 no proxy fence between their writes and
// the load's.
extern "C" __global__ void test_bulk_over_writes(const __grid_constant__ CUtensorMap from, bf16* raw, int x, int y, int bug) {
#if GPU_HOPPER
  GPU_SHARED(bf16, tile, [32 * 64]);
  GPU_SHARED(uint64_t, full, [1]);
  const int t = threadIdx.x, elems = 32 * 64;
  if (t == 0) {
    mbar_init(full, 1);
    mbar_init_fence();
  }
  for (int i = t; i < elems; i += 64) tile[i] = from_float<bf16>(1);
  if (bug != 1) proxy_fence_shared();
  __syncthreads();
  if (t == 0) {
    mbar_expect_tx(full, elems * 2);
    tma_load_2d(tile, &from, x, y, full);
  }
  mbar_wait(full, 0);
  for (int i = t; i < elems; i += 64) raw[i] = tile[i];
#endif
}
GPU_EXPORT(test_bulk_over_writes)

// out (steps): a thread of one warp writes numbers, one of another reads them, through one shared slot and two
// mbarriers. 64 threads. 1 the first one goes on without waiting until the slot is free: then a phase may end whose
// predecessor's end nobody has seen.
extern "C" __global__ void test_phases(float* out, int steps, int bug) {
#if GPU_HOPPER
  GPU_SHARED(uint64_t, full, [1]);
  GPU_SHARED(uint64_t, free, [1]);
  const int t = threadIdx.x;
  if (t == 0) {
    mbar_init(full, 1), mbar_init(free, 1);
    mbar_init_fence();
  }
  __syncthreads();
  for (int i = 0; i < steps; i++) {
    if (t == 0) {
      if (i > 0 && bug != 1) mbar_wait(free, (i - 1) & 1);
      mbar_arrive(full);
    } else if (t == 32) {
      mbar_wait(full, i & 1);
      out[i] = (float)i;
      mbar_arrive(free);
    }
  }
#endif
}
GPU_EXPORT(test_phases)

#if GPU_HOPPER
constexpr int K_TILE = 64;
// nvcc compiles what is right: it says aloud where products would have to wait for each other.
#ifdef __CUDACC__
#define MISTAKE 0
#else
#define MISTAKE bug
#endif

// A ring of one slot: a producer warp loads, a warpgroup multiplies. out (64, N) = a (64, k) * b (k, N), with a as (64,
// k) or, A_MN, (k, 64), and b as (N, k) or, B_MN, (k, N).
template <int N, int A_MN, int B_MN, bool REGISTERS>
DEV void product(float* out, const CUtensorMap& a_map, const CUtensorMap& b_map, int k, int bug) {
  GPU_DYNAMIC(bf16, tiles);
  GPU_SHARED(uint64_t, full, [1]);
  GPU_SHARED(uint64_t, free, [1]);
  constexpr int PANELS = (N + 63) / 64, TILE = 64 * K_TILE;  // elements
  bf16 *a = tiles, *b = tiles + TILE;
  const int t = threadIdx.x;
  if (t == 0) {
    mbar_init(full, 1);
    mbar_init(free, 128);
    mbar_init_fence();
  }
  __syncthreads();
  if (t >= 128) {
    RegisterShares<256, 24, 240>::first();
    if (t == 128)
      for (int i = 0; i < k / K_TILE; i++) {
        if (i > 0 && bug != 4) mbar_wait(free, (i - 1) & 1);
        mbar_expect_tx(full, (TILE + (B_MN ? PANELS * TILE : N * K_TILE)) * 2);
        A_MN ? tma_load_2d(a, &a_map, 0, i * K_TILE, full) : tma_load_2d(a, &a_map, i * K_TILE, 0, full);
        if (B_MN)
          for (int p = 0; p < PANELS; p++) tma_load_2d(b + p * TILE, &b_map, 64 * p, i * K_TILE, full);
        else tma_load_2d(b, &b_map, i * K_TILE, 0, full);
      }
    return;
  }
  RegisterShares<256, 24, 240>::others();
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = 7;  // the first product does not add
  for (int i = 0; i < k / K_TILE; i++) {
    if (bug != 1) mbar_wait(full, i & 1);
    if (bug != 2 && (bug != 6 || i == 0)) wgmma_fence();
    for (int kk = 0; kk < K_TILE; kk += 16) {
      const uint64_t b_at = B_MN ? wgmma_desc_mn(b + kk * 64, TILE * 2) : wgmma_desc(b + kk);
      const int accumulate = i > 0 || kk > 0;
      if constexpr (REGISTERS) {
        uint32_t f[4];
        for (int r = 0; r < 4; r++) {
          const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8, col = kk + t % 4 * 2 + r / 2 * 8;
          const int at = row * 64 + (col / 8 ^ row % 8) * 8 + col % 8;  // swizzled
          f[r] = pack_bf16(to_float(a[at]), to_float(a[at + 1]));
        }
        wgmma_fence();  // after registers are written
        wgmma_64xNx16<N, B_MN>(d, f, b_at, accumulate);
      } else {
        const uint64_t a_at = A_MN ? wgmma_desc_mn(a + kk * 64, TILE * 2) : wgmma_desc(a + kk);
        wgmma_64xNx16<N, A_MN, B_MN>(d, a_at, b_at, accumulate);
      }
    }
    wgmma_commit();
    if (bug != 3 && bug != 5) wgmma_wait<0>();
    mbar_arrive(free);
  }
  if (bug == 5) wgmma_wait<0>();
  for (int j = 0; j < N / 2; j++) out[(t / 32 * 16 + t % 32 / 4 + j / 2 % 2 * 8) * N + j / 4 * 8 + t % 4 * 2 + j % 2] = d[j];
}
#define TEST_PRODUCT(name, N, A_MN, B_MN, REGISTERS)                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                                 \
      name(float* out, const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int k, int bug) { \
    product<N, A_MN, B_MN, REGISTERS>(out, a, b, k, MISTAKE);                                                              \
  }                                                                                                                    \
  GPU_EXPORT(name)
// The mistakes of all of them: 1 no wait for the load, 2 no wgmma.fence, 3 no wait for the products, 4 the producer
// does not wait for a free slot, 5 the slot is given back before the products are done, 6 no wgmma.fence after a wait.
TEST_PRODUCT(test_wgmma_64_kk, 64, 0, 0, false)
TEST_PRODUCT(test_wgmma_64_mm, 64, 1, 1, false)
TEST_PRODUCT(test_wgmma_96_kk, 96, 0, 0, false)
TEST_PRODUCT(test_wgmma_128_km, 128, 0, 1, false)
TEST_PRODUCT(test_wgmma_192_mk, 192, 1, 0, false)
TEST_PRODUCT(test_wgmma_256_mm, 256, 1, 1, false)
TEST_PRODUCT(test_wgmma_64_rk, 64, 0, 0, true)
TEST_PRODUCT(test_wgmma_128_rm, 128, 0, 1, true)
#endif

// out (64, 64) = a (64, 16) * b (64, 16) transposed, operands written by the threads themselves in the swizzled layout.
// 128 threads. 1 no proxy fence. 2 is no mistake: the fence after the barrier. 3 no barrier: warps do not wait for each
// other where they issue a product.
extern "C" __global__ void test_wgmma_written(float* out, const float* a, const float* b, int bug) {
#if GPU_HOPPER
  GPU_SHARED(bf16, sa, [64 * 64]);
  GPU_SHARED(bf16, sb, [64 * 64]);
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 16; i += 128) {
    const int row = i / 16, col = i % 16, at = row * 64 + (col / 8 ^ row % 8) * 8 + col % 8;
    sa[at] = from_float<bf16>(a[i]);
    sb[at] = from_float<bf16>(b[i]);
  }
  if (bug == 0 || bug == 3) proxy_fence_shared();
  if (bug != 3) __syncthreads();
  if (bug == 2) proxy_fence_shared();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  wgmma_fence();
  wgmma_64x64x16(d, wgmma_desc(sa), wgmma_desc(sb), 1);
  wgmma_commit();
  wgmma_wait<0>();
  for (int j = 0; j < 32; j++) out[(t / 32 * 16 + t % 32 / 4 + j / 2 % 2 * 8) * 64 + j / 4 * 8 + t % 4 * 2 + j % 2] = d[j];
#endif
}
GPU_EXPORT(test_wgmma_written)
