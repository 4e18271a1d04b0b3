// Running one block; see block.h.
#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace sim {

__thread View* cur = nullptr;
__thread Block* current_block = nullptr;

void fail(const char* format, ...) {
  Block& b = *current_block;
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  b.error = text;
  b.aborted = true;
  Thread* t = self();
  if (!t) throw Failure{};
  char place[128];
  snprintf(place, sizeof place, " [block %u,%u,%u thread %u,%u,%u]", t->blockIdx.x, t->blockIdx.y, t->blockIdx.z,
           t->threadIdx.x, t->threadIdx.y, t->threadIdx.z);
  b.error += place;
  cur = nullptr;
  switch_fiber(t->fiber, b.scheduler, true);
  abort();  // nobody resumes a failed thread
}

uint32_t Block::random(uint32_t below) {  // xorshift (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 11) % below);
}

// Goes on with the next thread at once where the order leaves no choice, and otherwise back to the scheduler.
void Block::leave(Thread* t, bool forever) {
  if (call->launch.seed == IN_ORDER && head != tail) {
    Thread* next = ready[head++ & (ready.size() - 1)];
    if (next == t) {
      cur = t;
      return;
    }
    // Where the one after it stopped is rarely in the nearest cache.
    if (head != tail) __builtin_prefetch(ready[head & (ready.size() - 1)]->fiber.sp);
    if (!next->started) begin(next);
    cur = next;
    switch_fiber(t->fiber, next->fiber, forever);
  } else {
    cur = nullptr;
    switch_fiber(t->fiber, scheduler, forever);
  }
}

void Block::park(const char* state, const Site& site) {
  Thread* t = self();
  t->state = state;
  t->site = site;
  leave(t, false);
}

void Block::begin(Thread* t) {
  t->started = true;
  t->fiber.prepare(thread_body, t->linear);
}

// Ends the running thread, except for leaving it.
void Block::end_thread() {
  Thread* t = self();
  if (!t->copies.idle()) fail("a thread exits with cp.async copies that it has not waited for");
  if (!t->stores.idle()) fail("a thread exits with bulk stores that it has not waited for");
  if (!warpgroups[t->linear / WARPGROUP].products.idle())
    fail("a thread exits with wgmma products that it has not waited for");
  t->done = true;
  live--;
  thread_has_exited();
}

void Block::thread_body() {
  fiber_entered();
  Block& b = *current_block;
  for (;;) {
    b.call->entry(b.call->args);
    b.end_thread();
    if (b.call->launch.seed != IN_ORDER || b.head == b.tail) break;
    // The next thread, unless it has begun, takes over the stack, which is in the cache, without a switch.
    Thread* next = b.ready[b.head & (b.ready.size() - 1)];
    if (next->started) break;
    b.head++;
    next->started = true;
    next->fiber.trade_stacks(self()->fiber);
    cur = next;
  }
  b.finished = self();
  b.leave(self(), true);
  abort();  // nobody resumes a thread that has exited
}

void Block::set_up(const Call& c, Dim3 index) {
  call = &c;
  const Launch& launch = c.launch;
  count = live = launch.block.x * launch.block.y * launch.block.z;
  if (threads.size() < count) threads = std::vector<Thread>(count);
  while (ready.size() < count) {
    ready.assign(ready.empty() ? 64 : 2 * ready.size(), nullptr);
  }
  head = tail = 0;
  finished = nullptr;
  if (warps.size() < (count + WARP - 1) / WARP) warps.resize((count + WARP - 1) / WARP);
  if (warpgroups.size() < (count + WARPGROUP - 1) / WARPGROUP) warpgroups.resize((count + WARPGROUP - 1) / WARPGROUP);
  aborted = false;
  error.clear();

  if (!arena) {
    arena = static_cast<char*>(aligned_alloc(4096, (SHARED_START + SHARED_BYTES + 4095) / 4096 * 4096));
    ASAN_POISON_MEMORY_REGION(arena, SHARED_START + SHARED_BYTES);
  }
  variables.clear();
  top = SHARED_START + launch.shared_bytes + RED_ZONE;
  ASAN_UNPOISON_MEMORY_REGION(arena + SHARED_START, launch.shared_bytes);
  memset(arena + SHARED_START, 0xFF, launch.shared_bytes);  // NaN, whatever the type

  by_warp = launch.seed > REVERSE && launch.seed % 2;
  random_state = 0x9E3779B97F4A7C15ull * (launch.seed + 1) ^ (index.x * 2654435761u + index.y * 40503u + index.z + 1);
  if (!random_state) random_state = 1;
  if (by_warp) {
    ready_lanes.assign(warps.size(), 0);
    priorities.resize(warps.size());
    for (auto& p : priorities) p = random(1 << 30);
  }

  Dim3 at{0, 0, 0};
  for (unsigned i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.linear = i;
    t.lane = i % WARP;
    t.threadIdx = at;
    t.blockIdx = index;
    t.blockDim = launch.block;
    t.gridDim = launch.grid;
    if (++at.x == launch.block.x) {
      at.x = 0;
      if (++at.y == launch.block.y) {
        at.y = 0;
        at.z++;
      }
    }
    t.done = false;
    t.bar = t.passed = nullptr;
    if (!t.fiber.stack) stacks.give(t.fiber, i);
    t.started = false;
    wake(&t);
  }
}

// The next thread by the launch's order, no longer among the ready ones; null if nobody is ready.
Thread* Block::choose() {
  if (by_warp) return choose_by_warp();
  if (head == tail) return nullptr;
  const size_t wrap = ready.size() - 1;
  const size_t pick = random_order()                 ? head + random(static_cast<uint32_t>(tail - head))
                      : call->launch.seed == REVERSE ? tail - 1
                                                     : head;
  std::swap(ready[head & wrap], ready[pick & wrap]);
  return ready[head++ & wrap];
}

// A warp runs as far as it can, its lanes by number. Priorities change now and then.
Thread* Block::choose_by_warp() {
  const uint32_t warps_in_use = (count + WARP - 1) / WARP;
  if (random(512) == 0) priorities[random(warps_in_use)] = random(1 << 30);
  uint32_t best = warps_in_use;
  for (uint32_t w = 0; w < warps_in_use; w++)
    if (ready_lanes[w] && (best == warps_in_use || priorities[w] > priorities[best])) best = w;
  if (best == warps_in_use) return nullptr;
  const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(ready_lanes[best]));
  ready_lanes[best] &= ready_lanes[best] - 1;
  return &threads[best * WARP + lane];
}

void Block::schedule() {
  while (!aborted) {
    if (!loads.empty() && random_order() && random(8) == 0) finish_load(random(static_cast<uint32_t>(loads.size())));
    if (Thread* next = choose()) {
      cur = next;
      if (!next->started) {
        if (finished) next->fiber.trade_stacks(finished->fiber);
        begin(next);
      }
      finished = nullptr;
      switch_fiber(scheduler, next->fiber);
    } else if (live && !loads.empty()) {
      finish_load(random_order() ? random(static_cast<uint32_t>(loads.size())) : 0);
    } else {
      break;
    }
  }
}

std::string Block::who_waits_where() const {
  std::map<std::string, std::pair<unsigned, unsigned>> places;  // how many, the first of them
  for (unsigned i = 0; i < count; i++) {
    const Thread& t = threads[i];
    if (t.done) continue;
    auto& [threads_here, first] =
        places[std::string(t.state) + " at " + t.site.file + ":" + std::to_string(t.site.line)];
    if (threads_here++ == 0) first = i;
  }
  std::string text = "deadlock:";
  for (auto& [place, who] : places)
    text += " " + std::to_string(who.first) + " threads (first " + std::to_string(who.second) + ") in " + place + ";";
  return text + " " + std::to_string(count - live) + " threads have exited";
}

bool Block::run(const Call& c, Dim3 index, uint32_t number) {
  current_block = this;
  set_up(c, index);
  if (race::on) race::start_block(*this, number);
  scheduler.adopt_native_stack();
  try {
    schedule();
  } catch (const Failure&) {  // the text is in `error`
  }
  if (!aborted && live) error = who_waits_where();
  // They would write into the memory of the block that comes next.
  if (!aborted && !live && !loads.empty())
    error = "a block ends with " + std::to_string(loads.size()) + " bulk loads on their way";
  const bool fine = error.empty();
  if (!fine) {  // what a failed block leaves behind
    for (auto& warp : warps)
      for (auto& m : warp) m.reset();
    for (auto& m : barriers) m.reset();
    for (auto& g : warpgroups) {
      g.meeting.reset();
      g.products.clear();
    }
    for (auto& t : threads) {
      t.copies.clear();
      t.stores.clear();
      t.fiber.abandoned = true;
    }
    loads.clear();
  }
  for (auto& g : warpgroups) g.fenced = false;
  ASAN_POISON_MEMORY_REGION(arena, top < SHARED_START + SHARED_BYTES ? top : SHARED_START + SHARED_BYTES);
  current_block = nullptr;
  cur = nullptr;
  return fine;
}

}  // namespace sim
