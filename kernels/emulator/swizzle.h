// How a byte's shared address is permuted, by the bytes of a row that the pattern spans: 0, 32, 64 or 128.
//
// The 16-byte piece within a row (address bits 4 and up) is xored with the row within the pattern (bits 7 and up):
// CuTe's Swizzle<1,4,3>, <2,4,3> and <3,4,3>. A pattern repeats after eight rows and must start at a multiple of its
// size.
#pragma once
#include <cstdint>

namespace sim {

constexpr uint32_t swizzle(uint32_t address, uint32_t span_bytes) {
  return span_bytes ? address ^ ((address >> 7 & (span_bytes / 16 - 1)) << 4) : address;
}

}  // namespace sim
