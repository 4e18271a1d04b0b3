// The race detector; see race.h.
#include "race.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <mutex>

#include "block.h"

namespace sim {

// Clocks have a multiple of eight entries.
using EightEntries = uint32_t __attribute__((vector_size(32)));

static void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i += 8) {
    EightEntries a, b;
    memcpy(&a, &into[i], sizeof a);
    memcpy(&b, &from[i], sizeof b);
    a = a > b ? a : b;
    memcpy(&into[i], &a, sizeof a);
  }
}

namespace race {

bool on = false;

constexpr size_t CELL_BYTES = 2;

// Of a cell in global memory: the blocks of this launch that have written and read it, by number + 1.
struct Visits {
  uint32_t launch, writer, reader;
};
constexpr uint32_t SEVERAL = ~0u;

struct Buffer {
  const char* start;
  size_t bytes;
  Cell* cells;  // mapped, so that only what is touched takes memory
  Visits* visits;
  size_t count() const { return bytes / CELL_BYTES + 2; }
};
static std::mutex buffers_mutex;
static auto& buffers = *new std::vector<Buffer>;
static uint32_t launches = 0, epochs = 0;

static void* reserve(size_t bytes) {
  void* m = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return m == MAP_FAILED ? nullptr : m;
}
static void release(const Buffer& b) {
  munmap(b.cells, b.count() * sizeof(Cell));
  munmap(b.visits, b.count() * sizeof(Visits));
}

void start_launch() { launches++; }

void start_block(Block& b, uint32_t number) {
  if (b.shadow.cells.empty()) {
    b.shadow.cells.resize((SHARED_START + SHARED_BYTES) / CELL_BYTES + 1);
    b.shadow.crowds.resize(b.shadow.cells.size());
  }
  b.shadow.epoch = ++epochs & 0x7FFFFFFF;
  b.shadow.launch = launches;
  b.shadow.block = number;
  b.shadow.barriers.clear();
  b.shadow.fences = false;
  const size_t entries = (b.count + ENGINE_CLOCKS + PRODUCT_CLOCKS + 7) / 8 * 8;
  const auto nothing = std::make_shared<const Clock>(entries, 0);
  for (unsigned i = 0; i < b.count; i++) b.threads[i].knowledge = {nothing, nothing, i, 1};
}

// ---- order

void tick(Thread* t) {
  if (on && ++t->knowledge.own == Stamp::PENDING)
    fail("race: a thread meets others more often than the detector can count");
}

// The clock that holds what all members' have, each of which `of` names.
template <class Of>
static Clock all_together(const std::vector<Knowledge>& members, Of of) {
  Clock all = *of(members[0]);
  const Clock* last = of(members[0]).get();
  for (const Knowledge& k : members) {
    if (of(k).get() != last) join(all, *of(k));
    last = of(k).get();
  }
  return all;
}

void meet(const std::vector<Knowledge>& members, const std::vector<Thread*>& released) {
  Clock all = all_together(members, [](const Knowledge& k) -> const SharedClock& { return k.others; });
  for (const Knowledge& k : members) all[k.thread] = std::max(all[k.thread], k.own);
  const auto others = std::make_shared<const Clock>(std::move(all));
  for (Thread* t : released) {  // who goes on is a member: what it knew is in there
    t->knowledge.others = others;
    tick(t);
  }
  if (!current_block->shadow.fences) return;
  const auto fenced = std::make_shared<const Clock>(
      all_together(members, [](const Knowledge& k) -> const SharedClock& { return k.fenced; }));
  for (Thread* t : released) t->knowledge.fenced = fenced;
}

void proxy_fence(Thread* t) {
  if (!on) return;
  current_block->shadow.fences = true;
  // A fence counts anywhere on the way from the write to the asynchronous read (PTX ISA, "Causality order"): also after
  // the barrier.
  Clock fenced = *t->knowledge.others;
  fenced[t->linear] = t->knowledge.own;
  t->knowledge.fenced = std::make_shared<const Clock>(std::move(fenced));
  tick(t);
}

void barrier_initialized(uint64_t* bar) {
  if (!on) return;
  const Knowledge& k = self()->knowledge;
  Barrier& b = current_block->shadow.barriers[bar];
  b = Barrier{};
  b.clock.assign(k.others->size(), 0);
  b.fenced.assign(k.others->size(), 0);
  b.initialized_by = k.thread;
  b.initialized_at = k.own;
}
void barriers_published() {
  if (!on) return;
  for (auto& [bar, b] : current_block->shadow.barriers)
    if (b.initialized_by == self()->linear) b.published = true;
}
void barrier_used(uint64_t* bar, bool by_engine, const char* what) {
  if (!on) return;
  const Knowledge& k = self()->knowledge;
  const Barrier& b = current_block->shadow.barriers[bar];
  if (b.clock.empty()) fail("race: %s of an mbarrier that is not initialized", what);
  if (b.initialized_by != k.thread && b.initialized_at > (*k.others)[b.initialized_by])
    fail("race: %s of an mbarrier that thread %u initializes without ordering", what, b.initialized_by);
  if (by_engine && !b.published) fail("race: %s on an mbarrier that was initialized without mbar_init_fence", what);
}
void barrier_arrived(uint64_t* bar) {
  if (!on) return;
  const Knowledge& k = self()->knowledge;
  Barrier& b = current_block->shadow.barriers[bar];
  if (b.joined != k.others) join(b.clock, *k.others);
  b.joined = k.others;
  b.clock[k.thread] = std::max(b.clock[k.thread], k.own);
  if (current_block->shadow.fences) join(b.fenced, *k.fenced);
  b.before = nullptr;
  tick(self());
}
void barrier_passed(uint64_t* bar, Thread* t) {
  if (!on) return;
  Barrier& b = current_block->shadow.barriers[bar];
  if (b.before != t->knowledge.others) {
    Clock all = *t->knowledge.others;
    join(all, b.clock);
    b.before = t->knowledge.others;
    b.after = std::make_shared<const Clock>(std::move(all));
  }
  t->knowledge.others = b.after;
  if (current_block->shadow.fences) {
    Clock fenced = *t->knowledge.fenced;
    join(fenced, b.fenced);
    t->knowledge.fenced = std::make_shared<const Clock>(std::move(fenced));
  }
  tick(t);
}
unsigned engine_of(uint64_t* bar) {
  return current_block->count + static_cast<unsigned>(reinterpret_cast<uintptr_t>(bar) / 8 % ENGINE_CLOCKS);
}
uint32_t engine_done(uint64_t* bar) {
  Barrier& b = current_block->shadow.barriers[bar];
  b.before = nullptr;
  const uint32_t clock = ++b.clock[engine_of(bar)];
  if (clock == Stamp::PENDING) fail("race: more bulk copies than the detector can count");
  return clock;
}

unsigned products_of(unsigned warpgroup) { return current_block->count + ENGINE_CLOCKS + warpgroup; }
uint32_t products_done(unsigned warpgroup) {
  const unsigned entry = products_of(warpgroup);
  Thread* const threads = &current_block->threads[warpgroup * WARPGROUP];
  const uint32_t clock = (*threads->knowledge.others)[entry] + 1;
  if (clock == Stamp::PENDING) fail("race: more products than the detector can count");
  // Threads that know the same go on to do so.
  SharedClock before, after;
  for (unsigned i = 0; i < WARPGROUP; i++) {
    SharedClock& others = threads[i].knowledge.others;
    if (others != before) {
      Clock all = *others;
      all[entry] = clock;
      before = others;
      after = std::make_shared<const Clock>(std::move(all));
    }
    others = after;
  }
  return clock;
}

// ---- memory

// The cells of a range, and where it is for messages.
struct Where {
  Cell* cells = nullptr;
  Crowd* crowds = nullptr;   // in shared memory alone
  Visits* visits = nullptr;  // in global memory alone
  size_t first = 0, last = 0;
  const char* of = "shared memory";
  const char* start = nullptr;  // what a message counts bytes from
};

static Where find(const void* p, size_t bytes) {
  Block& b = *current_block;
  const char* at = static_cast<const char*>(p);
  auto where = [&](const char* start, size_t length) {
    Where w;
    w.first = static_cast<size_t>(at - start) / CELL_BYTES;
    w.last = (std::min(static_cast<size_t>(at - start) + bytes, length) - 1) / CELL_BYTES;
    w.start = start;
    return w;
  };
  if (at >= b.arena && at < b.arena + SHARED_START + SHARED_BYTES) {
    Where w = where(b.arena, SHARED_START + SHARED_BYTES);
    w.cells = b.shadow.cells.data();
    w.crowds = b.shadow.crowds.data();
    w.start = b.arena + SHARED_START;
    return w;
  }
  for (const Buffer& buffer : buffers) {
    if (at < buffer.start || at >= buffer.start + buffer.bytes) continue;
    Where w = where(buffer.start, buffer.bytes);
    w.cells = buffer.cells;
    w.visits = buffer.visits;
    w.of = "a global buffer";
    return w;
  }
  return {};
}

static bool unordered(Stamp s, const Thread* t) {
  return s &&
         (s.clock() == Stamp::PENDING || (s.thread() != t->linear && s.clock() > (*t->knowledge.others)[s.thread()]));
}
static const char* kind(uint32_t entry) {
  const unsigned count = current_block->count;
  return entry < count ? "thread" : entry < count + ENGINE_CLOCKS ? "bulk copy" : "product";
}

static Cell& fresh_cell(const Where& w, size_t index) {
  Cell& c = w.cells[index];
  if (c.epoch != current_block->shadow.epoch) c = Cell{current_block->shadow.epoch, false, {}, {}};
  return c;
}

static void check_blocks(const Where& w, size_t index, bool write, const char* at) {
  const race::Shadow& s = current_block->shadow;
  Visits& v = w.visits[index];
  if (v.launch != s.launch) v = {s.launch, 0, 0};
  const uint32_t me = s.block + 1;
  const uint32_t other = v.writer && v.writer != me ? v.writer : write && v.reader && v.reader != me ? v.reader : 0;
  if (other) {
    const char* did = other == v.writer ? "writes" : "reads";
    if (other == SEVERAL)
      fail("race: blocks: block number %u writes byte %zd of a global buffer, which others read", s.block,
           at - w.start);
    fail("race: blocks %u and %u: one %s byte %zd of a global buffer, which the other %s", other - 1, s.block, did,
         at - w.start, write ? "writes" : "reads");
  }
  if (write) v.writer = me;
  else v.reader = v.reader == 0 || v.reader == me ? me : SEVERAL;
}

static void remember_read(const Where& w, size_t index, Stamp now, const Thread* t) {
  Cell& c = w.cells[index];
  // In the entry of this thread, a free one, or one that is ordered before.
  auto is_for = [&](Stamp entry) { return entry.thread() == now.thread() || !unordered(entry, t); };
  Stamp* to = &c.read[is_for(c.read[0]) ? 0 : 1];
  if (to == &c.read[1] && w.crowds && !is_for(*to)) {
    Crowd& crowd = w.crowds[index];
    if (!c.crowded) crowd = {};
    c.crowded = true;
    // Here a warp has one entry for all of its lanes. Who finds none has the last one.
    auto is_for_warp = [&](Stamp entry) {
      const bool same_warp = entry.thread() / WARP == now.thread() / WARP && now.thread() < current_block->count;
      return same_warp || is_for(entry);
    };
    to = std::find_if(std::begin(crowd.read), std::end(crowd.read) - 1, is_for_warp);
  }
  if (to->clock() == Stamp::PENDING && now.clock() != Stamp::PENDING) return;
  *to = now;
}

// Calls each(read) for what is remembered of a cell's.
template <class Each> static void for_readers(const Where& w, size_t index, Each each) {
  for (Stamp& read : w.cells[index].read) each(read);
  if (!w.cells[index].crowded) return;
  for (Stamp& read : w.crowds[index].read) each(read);
}

void access(const void* p, size_t bytes, bool write) {
  if (!on || !cur || bytes == 0) return;
  const Thread* t = self();
  // Most accesses are to local arrays, which are the thread's own.
  if (static_cast<size_t>(static_cast<const char*>(p) - t->fiber.stack) < t->fiber.stack_bytes) return;
  const Where w = find(p, bytes);
  if (!w.cells) return;
  const uint32_t epoch = current_block->shadow.epoch;
  const Stamp now(t->linear, t->knowledge.own);
  for (size_t i = w.first; i <= w.last; i++) {
    const char* at = static_cast<const char*>(p) + (i - w.first) * CELL_BYTES;
    if (w.visits) check_blocks(w, i, write, at);
    Cell& c = w.cells[i];
    if (c.epoch != epoch) {  // the first access of this block
      c = Cell{epoch, false, {}, {}};
      (write ? c.write : c.read[0]) = now;
      continue;
    }
    if (!write && (c.read[0] == now || c.read[1] == now)) continue;  // seen; a write since would have wiped it out
    if (unordered(c.write, t))
      fail("race: %s byte %zd of %s, written by %s %u without ordering", write ? "writes" : "reads", at - w.start, w.of,
           kind(c.write.thread()), c.write.thread());
    if (!write) {
      if (!c.read[1].is_beside(now) && !(c.crowded && w.crowds[i].has_beside(now))) remember_read(w, i, now, t);
      continue;
    }
    for_readers(w, i, [&](Stamp read) {
      if (unordered(read, t))
        fail("race: writes byte %zd of %s, read by %s %u without ordering", at - w.start, w.of, kind(read.thread()),
             read.thread());
    });
    c = Cell{epoch, false, now, {}};
  }
}

void begin(const void* p, size_t bytes, bool write, unsigned owner, bool async_proxy, const char* what) {
  if (!on || !cur) return;
  const Where w = find(p, bytes);
  if (!w.cells) return;
  const Thread* t = self();
  const Stamp pending(owner, Stamp::PENDING);
  for (size_t i = w.first; i <= w.last; i++) {
    const char* at = static_cast<const char*>(p) + (i - w.first) * CELL_BYTES;
    Cell& c = fresh_cell(w, i);
    const unsigned writer = c.write.thread();
    if (unordered(c.write, t))
      fail("race: %s touches byte %zd of %s, written by %s %u without ordering", what, at - w.start, w.of, kind(writer),
           writer);
    // Also before it writes: the generic proxy's write may otherwise land later. Reads of the generic proxy before it
    // writes need no fence: a barrier's wait, as every ring of bulk loads has it.
    if (async_proxy && c.write && writer < current_block->count && c.write.clock() > (*t->knowledge.fenced)[writer])
      fail("race: %s %s byte %zd of %s, which thread %u wrote without a fence.proxy.async after it", what,
           write ? "overwrites" : "reads", at - w.start, w.of, writer);
    if (!write) {
      remember_read(w, i, pending, t);
      continue;
    }
    for_readers(w, i, [&](Stamp read) {
      if (unordered(read, t))
        fail("race: %s overwrites byte %zd of %s, which %s %u may still read", what, at - w.start, w.of,
             kind(read.thread()), read.thread());
    });
    c = Cell{c.epoch, false, pending, {}};
  }
}

void begin_product(const void* p, size_t bytes, unsigned warpgroup) {
  const Where w = find(p, bytes);
  if (!w.cells) return;
  const Thread* const threads = &current_block->threads[warpgroup * WARPGROUP];
  const Stamp pending(products_of(warpgroup), Stamp::PENDING);
  for (size_t i = w.first; i <= w.last; i++) {
    const char* at = static_cast<const char*>(p) + (i - w.first) * CELL_BYTES;
    const Stamp write = fresh_cell(w, i).write;
    // Threads mostly know the same; then none but the writer needs to be asked.
    const Knowledge* asked = nullptr;
    for (unsigned lane = 0; write && lane < WARPGROUP; lane++) {
      const Knowledge& k = threads[lane].knowledge;
      if (k.thread == write.thread() || (asked && asked->others == k.others && asked->fenced == k.fenced)) continue;
      asked = &k;
      if (unordered(write, &threads[lane]))
        fail("race: wgmma by thread %u reads byte %zd of %s, written by %s %u without ordering", k.thread, at - w.start,
             w.of, kind(write.thread()), write.thread());
      if (write.thread() < current_block->count && write.clock() > (*k.fenced)[write.thread()])
        fail(
            "race: wgmma by thread %u reads byte %zd of %s, which thread %u wrote without a fence.proxy.async after it",
            k.thread, at - w.start, w.of, write.thread());
    }
    remember_read(w, i, pending, self());
  }
}

void end(const void* p, size_t bytes, bool write, unsigned owner, Stamp done) {
  if (!on) return;
  const Where w = find(p, bytes);
  if (!w.cells) return;
  const Stamp pending(owner, Stamp::PENDING);
  for (size_t i = w.first; i <= w.last; i++) {
    Cell& c = fresh_cell(w, i);
    if (write) {
      if (c.write == pending) c.write = done;
      continue;
    }
    for_readers(w, i, [&](Stamp& read) {
      if (read == pending) read = done;
    });
  }
}

}  // namespace race
}  // namespace sim

extern "C" {
int sim_checks_races() { return sim::race::on; }
void sim_track(const void* p, uint64_t bytes) {
  using namespace sim::race;
  if (!on || bytes == 0) return;
  std::lock_guard hold(buffers_mutex);
  Buffer b{static_cast<const char*>(p), bytes, nullptr, nullptr};
  b.cells = static_cast<Cell*>(reserve(b.count() * sizeof(Cell)));
  b.visits = static_cast<Visits*>(reserve(b.count() * sizeof(Visits)));
  if (b.cells && b.visits) buffers.push_back(b);
}
void sim_untrack_all() {
  using namespace sim::race;
  std::lock_guard hold(buffers_mutex);
  for (const Buffer& b : buffers) release(b);
  buffers.clear();
}
}
