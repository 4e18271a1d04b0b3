// Making tensor maps, with the limits of cuTensorMapEncodeTiled; see tensor_map.h.
#include "tensor_map.h"

#include <cstring>

#include "launch.h"
#include "sim.h"

using sim::TensorMap;

// The axes go from the innermost outwards, `boxed` in elements of the tensor of which every apart'th is copied.
static int make_map(void* out128, const void* base, uint32_t elem_bytes, uint32_t axes, const uint64_t* sizes,
                    const uint64_t* pitch_bytes, const uint32_t* boxed, const uint32_t* apart, uint32_t swizzle_bytes) {
  const uint64_t longest = 1ull << 32, longest_pitch = 1ull << 40;
  const char* fault = nullptr;
  if (elem_bytes != 2 && elem_bytes != 4) return sim::refuse("elements have 2 or 4 bytes");
  const uint64_t box_row_bytes = static_cast<uint64_t>(boxed[0]) * elem_bytes;
  if (reinterpret_cast<uintptr_t>(base) % 16) fault = "the tensor does not start at a multiple of 16 bytes";
  else if (box_row_bytes % 16) fault = "a row of the box is no multiple of 16 bytes";
  else if (swizzle_bytes != 0 && swizzle_bytes != 32 && swizzle_bytes != 64 && swizzle_bytes != 128)
    fault = "there is no such swizzle";
  else if (swizzle_bytes && box_row_bytes > swizzle_bytes) fault = "a row of the box is longer than the swizzle's span";
  else if (apart[0] != 1) fault = "elements of the innermost axis lie apart";
  TensorMap map{static_cast<const char*>(base), {}, {}, {}, {}, swizzle_bytes, elem_bytes, axes, TensorMap::MARK};
  for (uint32_t i = 0; i < TensorMap::AXES && !fault; i++) {
    const bool there = i < axes;
    map.sizes[i] = there ? sizes[i] : 1, map.apart[i] = there ? apart[i] : 1;
    map.box[i] = there ? (boxed[i] + apart[i] - 1) / apart[i] : 1;
    if (i > 0) map.pitch_bytes[i - 1] = there ? pitch_bytes[i - 1] : 0;
    if (!there) continue;
    if (sizes[i] == 0 || sizes[i] > longest) fault = "an axis has no elements or more than 2^32";
    else if (boxed[i] == 0 || boxed[i] > 256) fault = "an axis of the box has no elements or more than 256";
    else if (apart[i] == 0 || apart[i] > 8) fault = "elements lie more than 8 apart";
    else if (i > 0 && pitch_bytes[i - 1] % 16) fault = "rows do not lie a multiple of 16 bytes apart";
    else if (i > 0 && pitch_bytes[i - 1] >= longest_pitch) fault = "rows lie 2^40 bytes or more apart";
  }
  if (fault) return sim::refuse(fault);
  memcpy(out128, &map, sizeof map);
  return 0;
}

extern "C" int sim_tensor_map(void* out128, const void* base, uint32_t elem_bytes, uint64_t rows, uint64_t cols,
                              uint64_t pitch_bytes, uint32_t box_rows, uint32_t box_cols, uint32_t swizzle_bytes) {
  const uint64_t sizes[] = {cols, rows};
  const uint32_t boxed[] = {box_cols, box_rows}, apart[] = {1, 1};
  return make_map(out128, base, elem_bytes, 2, sizes, &pitch_bytes, boxed, apart, swizzle_bytes);
}

extern "C" int sim_tensor_map_4d(void* out128, const void* base, uint32_t elem_bytes, const uint64_t* sizes,
                                 const uint64_t* pitch_bytes, const uint32_t* boxed, const uint32_t* apart,
                                 uint32_t swizzle_bytes) {
  return make_map(out128, base, elem_bytes, 4, sizes, pitch_bytes, boxed, apart, swizzle_bytes);
}
