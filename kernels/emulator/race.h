// The race detector: reports accesses to the same memory that nothing puts in order, one of them a write.
//
// It is on when kernels were compiled with -fsanitize=thread: the compiler's calls at every access land in
// tsan_hooks.cpp rather than in its own library. Happens-before is kept as a vector clock for every CUDA thread
// (Lamport 1978; Mattern 1989) plus entries for the copy engine; memory is watched in cells of two bytes, the smallest
// element that kernels use. Beside shared memory it watches the buffers given to sim_track(), there also between the
// blocks of a launch, which nothing puts in order at all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace sim {

struct Block;
struct Thread;

using Clock = std::vector<uint32_t>;
// A clock that does not change any more, since several hold it: those that met have it in common, so that a barrier
// costs a clock rather than one a thread.
using SharedClock = std::shared_ptr<const Clock>;

namespace race {

// What a thread knows of others, and the time it has itself.
struct Knowledge {
  SharedClock others;  // the thread's own entry is out of date
  SharedClock fenced;  // writes made visible to the async proxy
  unsigned thread = 0;
  uint32_t own = 0;
};

extern bool on;
constexpr unsigned ENGINE_CLOCKS = 32;  // entries for the bulk copy engine, by mbarrier
constexpr unsigned PRODUCT_CLOCKS = 8;  // and for wgmma's products, by warpgroup

// What the detector remembers of an mbarrier.
struct Barrier {
  Clock clock, fenced;
  SharedClock joined;           // the last that was joined into it: who arrives next often brings the same
  SharedClock before, after;    // what the last thread to pass knew, and knows since: of the clock as it is
  unsigned initialized_by = 0;
  uint32_t initialized_at = 0;
  bool published = false;
};

// When a thread did something: its number, or an entry's of the copy engine or of products, and its clock, which is
// never 0. Nothing is 0.
class Stamp {
  static constexpr unsigned CLOCK_BITS = 21;
  uint32_t bits = 0;

 public:
  static constexpr uint32_t PENDING = (1u << CLOCK_BITS) - 1;  // under way, so after everything
  Stamp() = default;
  Stamp(unsigned thread, uint32_t clock) : bits(thread << CLOCK_BITS | clock) {}
  unsigned thread() const { return bits >> CLOCK_BITS; }
  uint32_t clock() const { return bits & PENDING; }
  explicit operator bool() const { return bits != 0; }
  bool operator==(const Stamp&) const = default;
  // By lanes of one warp, which have met others as often.
  bool is_beside(Stamp other) const { return ((bits ^ other.bits) & ~(31u << CLOCK_BITS)) == 0; }
};

// What it knows of a cell of two bytes: the last write, and two of the reads since. Where it is in shared memory, reads
// by more are in its crowd.
struct Cell {
  uint32_t epoch : 31, crowded : 1;
  Stamp write, read[2];
};
// A thread each of some more warps, lest one that nobody waits for be forgotten for those that come later. Apart from
// the cell: few have one, and the memory that all cells take is what the detector's time goes to.
struct Crowd {
  Stamp read[4];
  bool has_beside(Stamp one) const {
    return read[0].is_beside(one) | read[1].is_beside(one) | read[2].is_beside(one) | read[3].is_beside(one);
  }
};

// A block's part.
struct Shadow {
  std::vector<Cell> cells;                    // of the arena
  std::vector<Crowd> crowds;                  // as many
  uint32_t epoch = 0, launch = 0, block = 0;  // cells of another epoch are blank
  std::unordered_map<const void*, Barrier> barriers;
  bool fences = false;  // whether any thread has called fence.proxy.async yet
};

// Between launches and blocks. One launch at a time runs under the detector, its blocks on one thread.
void start_launch();
void start_block(Block&, uint32_t number);

// The running thread's accesses.
void access(const void* p, size_t bytes, bool write);
// Asynchronous work is checked when it is issued, and under way until ended with the time that stands for its end.
// `owner`: a thread, or an entry of the copy engine or of products.
// `async_proxy`: by the copy engine or wgmma, which see a thread's writes only after fence.proxy.async.
void begin(const void* p, size_t bytes, bool write, unsigned owner, bool async_proxy, const char* what);
void end(const void* p, size_t bytes, bool write, unsigned owner, Stamp done);

// Order.
void tick(Thread*);
// `members`: as they were when they came; `released`: those that go on, of them.
void meet(const std::vector<Knowledge>& members, const std::vector<Thread*>& released);
void proxy_fence(Thread*);
void barrier_initialized(uint64_t* bar);
void barriers_published();
void barrier_used(uint64_t* bar, bool by_engine, const char* what);
void barrier_arrived(uint64_t* bar);
void barrier_passed(uint64_t* bar, Thread*);
unsigned engine_of(uint64_t* bar);
uint32_t engine_done(uint64_t* bar);  // the engine's clock entry after one more copy
// A read by a product, which each warp of a warpgroup issues: what it reads has to be ordered before it for all of them.
void begin_product(const void* p, size_t bytes, unsigned warpgroup);
unsigned products_of(unsigned warpgroup);
// The entry of a warpgroup's products after some more are done, of which all of its threads know: a wait orders products
// before what each of them does next, but not their own accesses among each other.
uint32_t products_done(unsigned warpgroup);

}  // namespace race
}  // namespace sim
