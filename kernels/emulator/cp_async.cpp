// cp.async: a thread's copies into shared memory, in groups that it waits for.
#include <cstring>

#include "block.h"

namespace sim {

static void copy_now(const Copy& c) {
  memcpy(c.dst, c.src, static_cast<size_t>(c.from_source));
  memset(static_cast<char*>(c.dst) + c.from_source, 0, static_cast<size_t>(c.bytes - c.from_source));
}

void cp_async(void* dst, const void* src, int bytes, int from_source, const Site& site) {
  Thread* t = self();
  shared_offset(dst);
  const uintptr_t both = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src);
  if (both % static_cast<uintptr_t>(bytes))
    fail("%s at %s:%d: an operand is not %d-byte aligned", site.what, site.file, site.line, bytes);
  if (from_source < 0 || from_source > bytes)
    fail("%s at %s:%d: %d of %d bytes", site.what, site.file, site.line, from_source, bytes);
  race::begin(dst, static_cast<size_t>(bytes), true, t->linear, false, "cp.async");
  Copy c{dst, src, bytes, from_source, current_block->at_once()};
  if (c.copied) copy_now(c);
  t->copies.items.push_back(c);
}

void cp_async_commit() { self()->copies.commit(); }

void cp_async_wait(int keep) {
  Thread* t = self();
  t->copies.wait(keep, [t](const Copy& c) {
    if (!c.copied) copy_now(c);
    if (race::on) race::end(c.dst, static_cast<size_t>(c.bytes), true, t->linear, {t->linear, t->knowledge.own});
  });
}

}  // namespace sim
