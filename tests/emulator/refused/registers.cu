// Three warpgroups of which two ask for more registers than the first one leaves: one of them would wait forever.
// The compiler has to say: more registers than the block has
#include "gpu.cuh"

extern "C" __global__ void __launch_bounds__(384, 1) too_many_registers() {
  typedef RegisterShares<384, 32, 240> Shares;
  if (threadIdx.x < 128) Shares::first();
  else Shares::others();
}
