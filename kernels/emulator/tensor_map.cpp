// Making tensor maps, with the limits of cuTensorMapEncodeTiled; see tensor_map.h.
#include "tensor_map.h"

#include <cstring>

#include "launch.h"
#include "sim.h"

using sim::TensorMap;

extern "C" int sim_tensor_map(void* out128, const void* base, uint32_t elem_bytes, uint64_t rows, uint64_t cols,
                              uint64_t pitch_bytes, uint32_t box_rows, uint32_t box_cols, uint32_t swizzle_bytes) {
  const uint64_t longest = 1ull << 32, longest_pitch = 1ull << 40;
  const uint64_t box_row_bytes = static_cast<uint64_t>(box_cols) * elem_bytes;
  const char* fault = nullptr;
  if (elem_bytes != 2 && elem_bytes != 4) fault = "elements have 2 or 4 bytes";
  else if (reinterpret_cast<uintptr_t>(base) % 16) fault = "the matrix does not start at a multiple of 16 bytes";
  else if (pitch_bytes % 16) fault = "rows do not lie a multiple of 16 bytes apart";
  else if (pitch_bytes >= longest_pitch) fault = "rows lie 2^40 bytes or more apart";
  else if (rows == 0 || cols == 0 || rows > longest || cols > longest) fault = "an axis has no elements or more than 2^32";
  else if (box_rows == 0 || box_cols == 0 || box_rows > 256 || box_cols > 256)
    fault = "an axis of the box has no elements or more than 256";
  else if (box_row_bytes % 16) fault = "a row of the box is no multiple of 16 bytes";
  else if (swizzle_bytes != 0 && swizzle_bytes != 32 && swizzle_bytes != 64 && swizzle_bytes != 128)
    fault = "there is no such swizzle";
  else if (swizzle_bytes && box_row_bytes > swizzle_bytes) fault = "a row of the box is longer than the swizzle's span";
  if (fault) return sim::refuse(fault);
  const TensorMap map{static_cast<const char*>(base),
                      rows,
                      cols,
                      pitch_bytes,
                      box_rows,
                      box_cols,
                      swizzle_bytes,
                      elem_bytes,
                      TensorMap::MARK,
                      {}};
  memcpy(out128, &map, sizeof map);
  return 0;
}
