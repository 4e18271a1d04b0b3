// mbarrier: arrivals and bytes that a phase waits for, in 64 bits of shared memory.
#include "block.h"

namespace sim {

// PTX leaves the word's layout open; this one is ours.
struct Word {
  uint64_t phase : 1, valid : 1, count : 15, pending : 15;
  int64_t bytes : 32;
};

static Word& word(uint64_t* bar, const char* what) {
  if (reinterpret_cast<uintptr_t>(bar) % 8) fail("%s: the mbarrier is not 8-byte aligned", what);
  Word& w = *reinterpret_cast<Word*>(bar);
  // Poisoned memory has all bits set: no barrier has more arrivals pending than its count, nor -1 bytes to come.
  if (!w.valid || w.count == 0 || w.count == 0x7FFF) fail("%s: the mbarrier has not been initialized", what);
  return w;
}

static void settle(uint64_t* bar, Word& w) {
  if (w.pending || w.bytes) return;
  w.phase ^= 1;
  w.pending = w.count;
  Block& b = *current_block;
  for (unsigned i = 0; i < b.count; i++) {
    Thread& t = b.threads[i];
    // A wait knows the phase that runs and the one before by their parity alone (PTX ISA, "mbarrier.test_wait"): two
    // phases later it takes the one that runs for its own. Here it has been woken; on a GPU it may look only now.
    if (t.passed == bar)
      fail("an mbarrier ends another phase before thread %u has gone on from its wait for the one before, in %s at "
           "%s:%d",
           t.linear, t.site.what, t.site.file, t.site.line);
    if (t.bar != bar || static_cast<int>(w.phase) == t.parity) continue;
    t.bar = nullptr;
    t.passed = bar;
    race::barrier_passed(bar, &t);
    b.wake(&t);
  }
}

void mbar_init(uint64_t* bar, int count) {
  shared_offset(bar);
  if (count < 1 || count >= 0x7FFF) fail("mbarrier.init: %d arrivals", count);
  Word w{};
  w.valid = 1;
  w.count = w.pending = count & 0x7FFF;
  *reinterpret_cast<Word*>(bar) = w;
  race::barrier_initialized(bar);
}

void mbar_init_fence() { race::barriers_published(); }

void mbar_arrive(uint64_t* bar, int expect_bytes, const Site& site) {
  Word& w = word(bar, site.what);
  race::barrier_used(bar, false, site.what);
  if (w.pending == 0)
    fail("%s at %s:%d: more arrivals than the mbarrier's count, %u", site.what, site.file, site.line,
         static_cast<unsigned>(w.count));
  race::barrier_arrived(bar);
  w.bytes = w.bytes + expect_bytes;
  w.pending = (w.pending - 1) & 0x7FFF;
  settle(bar, w);
}

void mbar_complete_bytes(uint64_t* bar, uint32_t bytes) {
  Word& w = word(bar, "bulk load");
  w.bytes = w.bytes - static_cast<int64_t>(bytes);
  settle(bar, w);
}

void mbar_wait(uint64_t* bar, int parity, const Site& site) {
  Word& w = word(bar, site.what);
  race::barrier_used(bar, false, site.what);
  Thread* t = self();
  if (static_cast<int>(w.phase) != (parity & 1)) {  // the phase of that parity is over
    race::barrier_passed(bar, t);
    return;
  }
  t->bar = bar;
  t->parity = parity & 1;
  current_block->park(site.what, site);
  t->passed = nullptr;
}

void proxy_fence() { race::proxy_fence(self()); }

}  // namespace sim
