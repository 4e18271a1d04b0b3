// What a program's kernels read of the step, written where they read it: `Now`, behind it the word by which blocks of a
// kernel share out work, and for programs that check the first layer that is not finite, above every layer. It comes as
// the launch's argument and not by a copy: the engine that copies to the device may be at work on a shard's weights,
// and the program would begin behind them.
// One warp, of which a thread writes: 40 bytes.
#include "gpu.cuh"

struct Begun { Now now; int taken; };

extern "C" __global__ void __launch_bounds__(32) begin_program(Begun* begun, int* first_layer, Now now) {
  if (threadIdx.x != 0) return;
  begun->now = now;
  begun->taken = 0;
  if (first_layer) *first_layer = 0x7F7F7F7F;
}
GPU_EXPORT(begin_program)
