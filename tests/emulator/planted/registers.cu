// A mistake that nvcc has to find: registers that a product on its way reads are written before it is waited for.
//
// The emulator does not look for it, since the value that a product was given is the one it reads, in C++ as on a chip:
// what is assigned later is another register to nvcc, and where it cannot be, as in this loop, ptxas makes the products
// wait for each other and says so.
#include "gpu.cuh"

// d (64, 64) += a (64, 16) b (16, 64) for each of the n fragments in `a`. 128 threads.
extern "C" __global__ void __launch_bounds__(128, 1) changed_registers(float* out, const uint32_t* a, int n) {
#if GPU_HOPPER
  GPU_SHARED(bf16, b, [64 * 64]);
  float d[32];
  uint32_t f[4];
  for (int i = 0; i < 32; i++) d[i] = 0;
  for (int r = 0; r < 4; r++) f[r] = a[threadIdx.x * 4 + r];
#pragma unroll 1
  for (int i = 1; i <= n; i++) {
    wgmma_fence();
    wgmma_64xNx16<64>(d, f, wgmma_desc(b), 1);
    wgmma_commit();
    for (int r = 0; r < 4; r++) f[r] = a[(i * 128 + threadIdx.x) * 4 + r];
    wgmma_wait<0>();
  }
  for (int i = 0; i < 32; i++) out[threadIdx.x * 32 + i] = d[i];
#endif
}
