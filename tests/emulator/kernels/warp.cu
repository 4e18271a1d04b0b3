// What lanes do together: shuffles, votes, matrix fragments, mma.
#include "gpu.cuh"

// out (12, 32) u64: one row an operation, one column a lane. One warp. bug 1: lanes use different masks; 2: a lane
// reads one that is not there.
extern "C" __global__ void test_shuffles(uint64_t* out, int bug) {
  const int lane = threadIdx.x;
  const uint64_t mine = 0x100000001ull * (lane + 1);
  out[0 * 32 + lane] = __shfl_xor_sync(~0u, mine, 5);
  out[1 * 32 + lane] = __shfl_sync(~0u, mine, lane * 7 % 32);
  out[2 * 32 + lane] = __shfl_up_sync(~0u, mine, 3);
  out[3 * 32 + lane] = __shfl_down_sync(~0u, mine, 9);
  out[4 * 32 + lane] = __shfl_xor_sync(~0u, mine, 4, 8);
  out[5 * 32 + lane] = __shfl_sync(~0u, mine, lane + 1, 16);
  out[6 * 32 + lane] = __shfl_down_sync(~0u, (float)lane, 1, 4);
  out[7 * 32 + lane] = 0;
  if (lane < 16) {
    const unsigned mask = bug == 1 && lane == 3 ? 0xFFFFFu : 0xFFFFu;
    out[7 * 32 + lane] = __shfl_xor_sync(mask, lane, bug == 2 && lane == 0 ? 16 : 1);
  }
  __syncwarp();
  out[8 * 32 + lane] = __ballot_sync(~0u, lane % 3 == 0);
  out[9 * 32 + lane] = __any_sync(~0u, lane == 31) + 10 * __any_sync(~0u, lane == 32);
  out[10 * 32 + lane] = __all_sync(~0u, lane < 32) + 10 * __all_sync(~0u, lane < 31);
  out[11 * 32 + lane] = (uint64_t)(warp_sum((float)lane) + 1000 * warp_max((float)(lane ^ 11)));
}
GPU_EXPORT(test_shuffles)

// out (32) = what each lane's mirror image wrote into shared memory. One warp. 1 a shuffle where lanes have to wait for
// each other's writes, 2 a vote.
extern "C" __global__ void test_mirrored(float* out, int bug) {
  GPU_SHARED(float, slots, [32]);
  const int lane = threadIdx.x;
  slots[lane] = (float)lane;
  if (bug == 1) __shfl_xor_sync(~0u, lane, 1);
  else if (bug == 2) __any_sync(~0u, lane);
  else __syncwarp();
  out[lane] = slots[31 - lane];
}
GPU_EXPORT(test_mirrored)

// in (4, 8, 8) b16; regs (14, 32) u32: x1, x2, x4, each plain and transposed; back (3, 4, 8, 8): stored by x4, x4
// transposed, x2. One warp.
extern "C" __global__ void test_fragments(uint32_t* regs, uint16_t* back, const uint16_t* in) {
  GPU_SHARED(uint16_t, tile, [4 * 64]);
  GPU_SHARED(uint16_t, stored, [3][4 * 64]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) {
    tile[i] = in[i];
    for (int k = 0; k < 3; k++) stored[k][i] = 0;
  }
  __syncwarp();
  uint32_t one, one_t, two[2], two_t[2], four[4], four_t[4];
  ldmatrix_x1(one, tile + lane % 8 * 8);
  ldmatrix_x1_trans(one_t, tile + lane % 8 * 8);
  ldmatrix_x2(two, tile + lane % 16 * 8);
  ldmatrix_x2_trans(two_t, tile + lane % 16 * 8);
  ldmatrix_x4(four, tile + lane * 8);
  ldmatrix_x4_trans(four_t, tile + lane * 8);
  regs[lane] = one;
  regs[32 + lane] = one_t;
  for (int i = 0; i < 2; i++) regs[(2 + i) * 32 + lane] = two[i], regs[(4 + i) * 32 + lane] = two_t[i];
  for (int i = 0; i < 4; i++) regs[(6 + i) * 32 + lane] = four[i], regs[(10 + i) * 32 + lane] = four_t[i];
#if GPU_HOPPER
  stmatrix_x4(stored[0] + lane * 8, four);
  stmatrix_x4_trans(stored[1] + lane * 8, four_t);
  stmatrix_x2(stored[2] + lane % 16 * 8, two);
#endif
  __syncwarp();
  for (int i = lane; i < 3 * 4 * 64; i += 32) back[i] = stored[i / 256][i % 256];
}
GPU_EXPORT(test_fragments)

// out16 (16, 8) = a16 (16, 16) * b16 (16, 8) + 1, bf16 from f32; out8 (16, 8) = a8 (16, 8) * b8 (8, 8) + 1, tf32. One
// warp.
extern "C" __global__ void test_mma(float* out16, float* out8, const float* a16, const float* b16, const float* a8,
                                    const float* b8) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float d[4] = {1, 1, 1, 1}, e[4] = {1, 1, 1, 1};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const float* row = a16 + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    a[i] = pack_bf16(row[0], row[1]);
  }
  for (int i = 0; i < 2; i++) b[i] = pack_bf16(b16[(2 * t + 8 * i) * 8 + g], b16[(2 * t + 8 * i + 1) * 8 + g]);
  mma_16816(d, a, b);
  for (int i = 0; i < 4; i++) a[i] = to_tf32(a8[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) b[i] = to_tf32(b8[(t + 4 * i) * 8 + g]);
  mma_1688_tf32(e, a, b);
  for (int i = 0; i < 4; i++) {
    out16[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
    out8[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = e[i];
  }
}
GPU_EXPORT(test_mma)
