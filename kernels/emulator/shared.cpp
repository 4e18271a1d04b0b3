// Shared memory: an arena per block. A pointer's distance from its start is the device's 32-bit shared address, so that
// descriptors and swizzles, which are functions of address bits, mean here what they mean there.
#include <cstring>

#include "block.h"

namespace sim {

constexpr size_t ALIGN = 1024;  // of every variable: GPU_SHARED asks for it on the device, too

void* shared_variable(const void* tag, size_t bytes) {
  Block& b = *current_block;
  for (auto& [known, where] : b.variables)
    if (known == tag) return where;
  const size_t start = (b.top + ALIGN - 1) / ALIGN * ALIGN;
  if (start + bytes > SHARED_START + SHARED_BYTES) fail("more than %zu bytes of shared memory", SHARED_BYTES);
  char* p = b.arena + start;
  b.top = start + bytes + RED_ZONE;
  b.variables.push_back({tag, p});
  ASAN_UNPOISON_MEMORY_REGION(p, bytes);
  memset(p, 0xFF, bytes);
  return p;
}

void* shared_dynamic() { return current_block->arena + SHARED_START; }

uint32_t shared_offset(const void* p) {
  const ptrdiff_t offset = static_cast<const char*>(p) - current_block->arena;
  if (offset < static_cast<ptrdiff_t>(SHARED_START) || offset > static_cast<ptrdiff_t>(SHARED_START + SHARED_BYTES))
    fail("%p does not point into shared memory", p);
  return static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t offset) {
  if (offset < SHARED_START || offset >= current_block->top)
    fail("shared address %u is outside of what the block has", offset);
  return current_block->arena + offset;
}

}  // namespace sim
