// mma.sync: products of a warp's register fragments.
//
// Layouts are those of PTX ISA, "Matrix fragments for mma": of lane l, g = l / 4 and t = l % 4. Each output sums along
// k in order, from 0, and is then added to the accumulator: one of the orders that the hardware, which does not state
// its own, may have.
#include <cstring>

#include "block.h"

namespace sim {

using Eight = float __attribute__((vector_size(32)));

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

static float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static float low_bf16(uint32_t pair) { return as_float(pair << 16); }
static float high_bf16(uint32_t pair) { return as_float(pair & 0xFFFF0000u); }

// c (16, 8) of the lanes' accumulators += a (16, K) * b (K, 8).
template <int K> static void multiply(void** args, const float (&a)[16][K], const Eight (&b)[K]) {
  for (int row = 0; row < 16; row++) {
    Eight sum = {};
    for (int k = 0; k < K; k++) sum += a[row][k] * b[k];
    for (int t = 0; t < 4; t++) {
      float* d = static_cast<Fragments*>(args[row % 8 * 4 + t])->d + row / 8 * 2;
      d[0] += sum[2 * t];
      d[1] += sum[2 * t + 1];
    }
  }
}

void mma_16816_bf16(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  Fragments mine{d, a, b};
  warp_collective(
      ~0u,
      [](void** args, uint32_t) {
        float a[16][16];
        Eight b[16];
        for (int lane = 0; lane < 32; lane++) {
          const Fragments& f = *static_cast<Fragments*>(args[lane]);
          const int g = lane / 4, k = lane % 4 * 2;
          for (int half = 0; half < 2; half++) {  // of k
            a[g][k + 8 * half] = low_bf16(f.a[2 * half]);
            a[g][k + 8 * half + 1] = high_bf16(f.a[2 * half]);
            a[g + 8][k + 8 * half] = low_bf16(f.a[2 * half + 1]);
            a[g + 8][k + 8 * half + 1] = high_bf16(f.a[2 * half + 1]);
            b[k + 8 * half][g] = low_bf16(f.b[half]);
            b[k + 8 * half + 1][g] = high_bf16(f.b[half]);
          }
        }
        multiply<16>(args, a, b);
      },
      &mine, site);
}

// The hardware reads the upper 19 bits of a register.
static float tf32(uint32_t bits) { return as_float(bits & 0xFFFFE000u); }

void mma_1688_tf32(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  Fragments mine{d, a, b};
  warp_collective(
      ~0u,
      [](void** args, uint32_t) {
        float a[16][8];
        Eight b[8];
        for (int lane = 0; lane < 32; lane++) {
          const Fragments& f = *static_cast<Fragments*>(args[lane]);
          const int g = lane / 4, t = lane % 4;
          a[g][t] = tf32(f.a[0]);
          a[g + 8][t] = tf32(f.a[1]);
          a[g][t + 4] = tf32(f.a[2]);
          a[g + 8][t + 4] = tf32(f.a[3]);
          b[t][g] = tf32(f.b[0]);
          b[t + 4][g] = tf32(f.b[1]);
        }
        multiply<8>(args, a, b);
      },
      &mine, site);
}

}  // namespace sim
