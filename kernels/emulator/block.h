// A block of CUDA threads: who is ready to run, what they share, and which asynchronous work is on its way.
//
// An operating system thread runs one block at a time. The object is reused from block to block, so that a block costs
// no allocation; `current_block` is the one that this operating system thread runs.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "copies.h"
#include "fiber.h"
#include "meeting.h"
#include "race.h"
#include "sim.h"

namespace sim {

constexpr size_t SHARED_BYTES = 227 << 10;  // what a block of an H100 may have
constexpr size_t SHARED_START = 1024;       // the first kilobyte is the system's, as on the device
constexpr size_t RED_ZONE = 32;             // between shared variables
constexpr unsigned WARP = 32, WARPGROUP = 128, BARRIERS = 16, THREADS = 1024;

struct Thread : View {
  Fiber fiber;
  bool started = false, done = false;
  const char* state = "ready";  // what it waits in, with its place, for messages
  Site site;
  uint64_t* bar = nullptr;  // the mbarrier it waits at, and for which parity to pass
  int parity = 0;
  uint64_t* passed = nullptr;  // the mbarrier that has let it pass, until it goes on
  CopyGroups copies;
  StoreGroups stores;
  race::Knowledge knowledge;  // race detector: happens-before
};

// What all threads of a launch have in common.
struct Call {
  const Launch& launch;
  void (*entry)(void**);
  void** args;
};

// Thrown when a failure is found while no CUDA thread runs.
struct Failure {};

struct Block {
  const Call* call = nullptr;
  std::vector<Thread> threads;  // `count` of them are in use
  unsigned count = 0, live = 0;
  std::vector<WarpMeetings> warps;
  std::vector<WarpgroupState> warpgroups;
  Meeting barriers[BARRIERS];

  char* arena = nullptr;
  size_t top = 0;  // end of what is in use of it
  std::vector<std::pair<const void*, char*>> variables;

  // Who is ready: a ring of a power of two, or, where warps have priorities, a bit for each lane of each warp.
  std::vector<Thread*> ready;
  size_t head = 0, tail = 0;
  bool by_warp = false;
  std::vector<uint32_t> ready_lanes, priorities;
  std::vector<BulkLoad> loads;  // on their way
  Fiber scheduler;
  Stacks stacks;
  uint64_t random_state = 1;
  Thread* finished = nullptr;  // the last one that left its stack behind, warm from the cache
  bool aborted = false;
  std::string error;
  race::Shadow shadow;
  float product_a[64][16],
      product_b[16][256];  // a wgmma's operands while it is computed; too large for a fiber's stack

  // Runs the block at `index`; false, with `error`, when it fails.
  bool run(const Call&, Dim3 index, uint32_t number);

  bool random_order() const { return call->launch.seed > REVERSE; }
  uint32_t random(uint32_t below);
  // Whether asynchronous work that is issued now is also done now.
  bool at_once() { return call->launch.seed == IN_ORDER || (random_order() && random(2)); }
  void wake(Thread* t) {
    t->state = "ready";
    if (by_warp) ready_lanes[t->linear / WARP] |= 1u << t->lane;
    else ready[tail++ & (ready.size() - 1)] = t;
  }
  // Stops the running thread until somebody wakes it.
  void park(const char* state, const Site&);

 private:
  void set_up(const Call&, Dim3 index);
  void schedule();
  Thread* choose();
  Thread* choose_by_warp();
  void begin(Thread*);
  void end_thread();
  void leave(Thread*, bool forever);
  std::string who_waits_where() const;
  static void thread_body();
};

extern __thread Block* current_block __attribute__((tls_model("initial-exec"), visibility("hidden")));
inline Thread* self() { return static_cast<Thread*>(cur); }

}  // namespace sim
