// A tensor map: what the bulk copy engine knows of a tensor. Stands for a CUtensorMap, in its size and alignment.
//
// Axes go from the innermost outwards; a matrix has its columns, its rows, and two axes of one element.
#pragma once
#include <cstdint>

namespace sim {

struct alignas(128) TensorMap {
  static constexpr int AXES = 4;
  const char* base;
  uint64_t sizes[AXES], pitch_bytes[AXES - 1];  // pitches of all axes but the innermost
  uint32_t box[AXES];                           // elements that one copy moves
  uint32_t apart[AXES];                         // and how far they lie apart, in elements
  uint32_t swizzle_bytes, elem_bytes, axes;
  uint64_t mark;  // MARK, once sim_tensor_map has filled the map in

  static constexpr uint64_t MARK = 0x70616D2D7279646Full;
  uint32_t row_bytes() const { return box[0] * elem_bytes; }
  uint32_t box_rows() const { return box[1] * box[2] * box[3]; }
  uint32_t box_bytes() const { return row_bytes() * box_rows(); }
};
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 128);

}  // namespace sim
