// The race detector: reports accesses to the same memory that nothing puts in order, one of them a write.
//
// It is on when kernels were compiled with -fsanitize=thread: the compiler's calls at every access land in tsan_hooks.cpp rather
// than in its own library. Happens-before is kept as a vector clock for every CUDA thread (Lamport 1978; Mattern 1989) plus
// entries for the copy engine; memory is watched in cells of two bytes, the smallest element that kernels use. Beside shared
// memory it watches the buffers given to sim_track(), there also between the blocks of a launch, which nothing puts in order at
// all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace sim {

struct Block;
struct Thread;

using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from);

namespace race {

extern bool on;
constexpr unsigned ENGINE_CLOCKS = 32;  // entries for the bulk copy engine, by mbarrier

// What the detector remembers of an mbarrier.
struct Barrier {
  Clock clock, fenced;
  unsigned initialized_by = 0;
  uint32_t initialized_at = 0;
  bool published = false;
};

// What it knows of a cell of two bytes.
struct Cell {
  uint32_t epoch, write_clock, write_thread, read_clock[2], read_thread[2];
};

// A block's part.
struct Shadow {
  std::vector<Cell> cells;                    // of the arena
  uint32_t epoch = 0, launch = 0, block = 0;  // cells of another epoch are blank
  std::unordered_map<const void*, Barrier> barriers;
  bool fences = false;  // whether any thread has called fence.proxy.async yet
  Clock clock, fenced;  // what the members of a meeting have in common, while it is released
};

// Between launches and blocks. One launch at a time runs under the detector, its blocks on one thread.
void start_launch();
void start_block(Block&, uint32_t number);

// The running thread's accesses.
void access(const void* p, size_t bytes, bool write);
// Asynchronous work is checked when it is issued, and under way until ended with the clock entry that stands for its end.
// `async_proxy`: by the copy engine or wgmma, which see a thread's writes only after fence.proxy.async.
void begin(const void* p, size_t bytes, bool write, unsigned owner, bool async_proxy, const char* what);
void end(const void* p, size_t bytes, bool write, unsigned owner, uint32_t clock);

// Order.
void tick(Thread*);
void meet(const std::vector<Thread*>& members, const std::vector<Thread*>& released);
void proxy_fence(Thread*);
void barrier_initialized(uint64_t* bar);
void barriers_published();
void barrier_used(uint64_t* bar, bool by_engine, const char* what);
void barrier_arrived(uint64_t* bar);
void barrier_passed(uint64_t* bar, Thread*);
unsigned engine_of(uint64_t* bar);
uint32_t engine_done(uint64_t* bar);  // the engine's clock entry after one more copy

}  // namespace race
}  // namespace sim
