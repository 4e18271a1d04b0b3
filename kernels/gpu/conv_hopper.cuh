// What the convolutions by warpgroup products share: one thread of a block's first warpgroup asks for bulk copies, a
// ring of steps ahead, and the other two warpgroups multiply. Included by the kernels of sm_90a, after gemm_ring.cuh
// and gemm_leave.cuh.
#pragma once

constexpr int CONV_THREADS = 384;

#if GPU_HOPPER
typedef RegisterShares<CONV_THREADS, 72, 216> ConvRegisters; // of 168 each to begin with
constexpr int CONSUMER_WARPS = 8;
constexpr int ROW_BYTES = STEP * 2,
              LEAVING_BYTES = 16 * PIECE * 2;  // of a pixel or channel in a step; of a piece of a warp's sums

// Where each step is: `full` once its bytes are there, `empty` once both warpgroups are done with it.
template <int BYTES_, int BYTES_BESIDE> struct StepRing {
  static constexpr int BYTES = BYTES_, STAGES = (226 * 1024 - BYTES_BESIDE) / BYTES;
  uint64_t full[STAGES], empty[STAGES];
};

// Of channels by pixels, of which 64 channels have two boxes: weights first, then pixels.
template <int CHANNELS, int PIXELS>
struct ConvSteps : StepRing<(CHANNELS + 128 / CHANNELS * PIXELS) * ROW_BYTES, CONSUMER_WARPS * LEAVING_BYTES> {
  static constexpr int BOXES = 128 / CHANNELS, WEIGHT_BYTES = CHANNELS * ROW_BYTES, BOX = PIXELS * ROW_BYTES;
};

// What a block does first.
template <class Ring> DEV void begin(Ring& ring, const CUtensorMap* left, const CUtensorMap* right) {
  if (threadIdx.x == 0) {
    tma_prefetch_map(left), tma_prefetch_map(right);
    for (int i = 0; i < Ring::STAGES; i++) mbar_init(&ring.full[i], 1), mbar_init(&ring.empty[i], 2);
    mbar_init_fence();
  }
  __syncthreads();
}

// A warpgroup's sums over the ring's next steps, 64 by WIDTH; its operands begin at `left` and `right` of each. MN: not
// the steps of a sum run along rows.
template <int WIDTH, bool LEFT_MN, bool RIGHT_MN, class Ring>
DEV void multiply(float (&sums)[1][WIDTH / 2], Ring& ring, const unsigned char* left, const unsigned char* right,
                  Turn<Ring::STAGES>& turn, int steps) {
  bool speaks = threadIdx.x % 128 == 0;
  int before = 0;
  for (int step = 0; step < steps; step++, turn.next()) {
    mbar_wait(&ring.full[turn.stage()], turn.parity());
    const unsigned char *a = left + turn.stage() * Ring::BYTES, *b = right + turn.stage() * Ring::BYTES;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STEP / 16; j++) {
      uint64_t a_desc = LEFT_MN ? wgmma_desc_mn(a + j * 2048, BOX_BYTES) : wgmma_desc(a + j * 32);
      uint64_t b_desc = RIGHT_MN ? wgmma_desc_mn(b + j * 2048, BOX_BYTES) : wgmma_desc(b + j * 32);
      wgmma_64xNx16<WIDTH, LEFT_MN, RIGHT_MN>(sums[0], a_desc, b_desc, step + j > 0);
    }
    wgmma_commit();
    if (step > 0) {
      wgmma_wait<1>();
      if (speaks) mbar_arrive(&ring.empty[before]);
    }
    before = turn.stage();
  }
  wgmma_wait<0>();
  if (speaks && steps > 0) mbar_arrive(&ring.empty[before]);
  if (steps == 0)
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) sums[0][i] = 0;
}

// The bias of a lane's two rows of a piece, which is that of channels from `channel` on.
struct RowBias {
  float rows[2] = {};

  DEV RowBias(const bf16* bias, int channel, int left) {
    int row = threadIdx.x % 32 / 4;
    if (!bias) return;
    for (int h = 0; h < 2; h++)
      if (row + 8 * h < left) rows[h] = to_float(bias[channel + row + 8 * h]);
  }
  DEV float at(int k) const { return rows[k / 2 % 2]; }
};
struct NoBias {
  DEV float at(int) const { return 0; }
};

// Of a piece that stage_words has staged, the rows that are there, from `to` on, one Word a lane at a time. `to` is the
// lane's place in the first row, or null where its pixels are not there.
template <class Word> DEV void leave_rows(bf16* to, int64_t plane, int rows, const unsigned char* staged, int lane) {
  constexpr int ACROSS = PIECE * 2 / sizeof(Word), DOWN = 32 / ACROSS;
  int at = lane % ACROSS * (int)sizeof(Word), row = lane / ACROSS;
  if (!to) return;
  to += row * plane;
#pragma unroll 4
  for (int i = 0; i < 16 / DOWN; i++, row += DOWN, to += DOWN * plane) {
    const unsigned char* from = staged + row * PIECE * 2 + ((at / 16) ^ (row / 2 % 4)) * 16 + at % 16;
    if (row < rows) *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
  }
}
#endif
