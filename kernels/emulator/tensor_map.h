// A tensor map: what the bulk copy engine knows of a matrix. Stands for a CUtensorMap, in its size and alignment.
#pragma once
#include <cstdint>

namespace sim {

struct alignas(64) TensorMap {
  const char* base;
  uint64_t rows, cols, pitch_bytes;
  uint32_t box_rows, box_cols, swizzle_bytes, elem_bytes;
  uint64_t mark;  // MARK, once sim_tensor_map has filled the map in
  uint64_t unused[9];

  static constexpr uint64_t MARK = 0x70616D2D7279646Full;
  uint32_t box_bytes() const { return box_rows * box_cols * elem_bytes; }
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace sim
