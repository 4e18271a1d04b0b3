// Launches; see launch.h.
//
// A launch is a job. The thread that launches takes blocks of it one by one, and so do the helpers that are free.
// Blocks do not depend on each other, so who runs which changes nothing; of several failures, the one of the first
// block by the launch's order is told.
#include "launch.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "block.h"
#include "sim.h"

namespace sim {

// Everything here lives until the process ends: helpers may still wait when static objects are destroyed.
struct Job {
  const Call call;
  std::vector<uint64_t> order;  // block numbers; empty when in order
  uint64_t blocks;
  std::atomic<uint64_t> next{0}, first_failed{~0ull};
  std::mutex mutex;
  std::condition_variable helpers_left;
  unsigned helpers = 0;
  std::string error;

  explicit Job(const Call& c)
      : call(c), blocks(static_cast<uint64_t>(c.launch.grid.x) * c.launch.grid.y * c.launch.grid.z) {
    const uint32_t seed = c.launch.seed;
    if (seed == IN_ORDER) return;
    order.resize(blocks);
    for (uint64_t i = 0; i < blocks; i++) order[i] = seed == REVERSE ? blocks - 1 - i : i;
    uint64_t state = seed;
    for (uint64_t i = blocks; seed != REVERSE && i > 1; i--) {  // shuffles (Fisher & Yates)
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }

  // Runs blocks until none is left, or one that comes before them has failed.
  void work(Block& block) {
    const Dim3 grid = call.launch.grid;
    for (;;) {
      const uint64_t turn = next++;
      if (turn >= blocks || turn > first_failed) return;
      const uint64_t number = order.empty() ? turn : order[turn];
      const Dim3 index{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / (static_cast<uint64_t>(grid.x) * grid.y))};
      if (block.run(call, index, static_cast<uint32_t>(number))) continue;
      std::lock_guard hold(mutex);
      if (turn < first_failed) {
        first_failed = turn;
        error = block.error;
      }
    }
  }
};

// Blocks that no thread uses at the moment; a thread keeps one for the time of a launch.
static std::mutex blocks_mutex;
static auto& idle_blocks = *new std::vector<std::unique_ptr<Block>>;

static std::unique_ptr<Block> take_block() {
  std::lock_guard hold(blocks_mutex);
  if (idle_blocks.empty()) return std::make_unique<Block>();
  auto block = std::move(idle_blocks.back());
  idle_blocks.pop_back();
  return block;
}
static void give_back(std::unique_ptr<Block> block) {
  std::lock_guard hold(blocks_mutex);
  idle_blocks.push_back(std::move(block));
}

static std::mutex helpers_mutex;
static auto& jobs_wait = *new std::condition_variable;
static auto& open_jobs = *new std::deque<Job*>;
static unsigned helper_threads = 0;
static std::atomic<unsigned> wanted_threads{0};  // 0: not yet known

static unsigned threads_to_use() {
  if (wanted_threads == 0) {
    const char* given = getenv("HYDRA_EMULATOR_THREADS");
    const int number = given ? atoi(given) : static_cast<int>(std::thread::hardware_concurrency());
    wanted_threads = number < 1 ? 1 : number > 64 ? 64 : static_cast<unsigned>(number);
  }
  return wanted_threads;
}

static void help() {
  for (;;) {
    std::unique_lock hold(helpers_mutex);
    jobs_wait.wait(hold, [] { return !open_jobs.empty(); });
    Job* job = open_jobs.front();
    open_jobs.pop_front();
    job->helpers++;
    hold.unlock();
    auto block = take_block();
    job->work(*block);
    give_back(std::move(block));
    std::lock_guard leave(helpers_mutex);
    if (--job->helpers == 0) job->helpers_left.notify_all();
  }
}

// Runs all blocks on the calling thread and on up to `helpers` others.
static void run(Job& job, unsigned helpers) {
  if (helpers) {
    std::lock_guard hold(helpers_mutex);
    while (helper_threads < helpers) {
      std::thread(help).detach();
      helper_threads++;
    }
    for (unsigned i = 0; i < helpers; i++) open_jobs.push_back(&job);
    jobs_wait.notify_all();
  }
  auto block = take_block();
  job.work(*block);
  give_back(std::move(block));
  if (helpers) {
    std::unique_lock hold(helpers_mutex);
    std::erase(open_jobs, &job);
    job.helpers_left.wait(hold, [&] { return job.helpers == 0; });
  }
}

// Of this operating system thread. A plain pointer: kernels are loaded with dlopen, which has little room for
// thread-local data.
static __thread std::string* last_error = nullptr;

int refuse(const std::string& message) {
  if (!last_error) last_error = new std::string;
  *last_error = message;
  return 1;
}

static uint64_t threads_of(Dim3 block) { return static_cast<uint64_t>(block.x) * block.y * block.z; }

// Most threads of a block, as __launch_bounds__ has put it at a kernel's entry (gpu_words.h); 0 where it says nothing.
static unsigned bound_of(const void* kernel) {
  constexpr unsigned char ENDBR64[] = {0xF3, 0x0F, 0x1E, 0xFA}, NOP = 0x90;
  const unsigned char* at = static_cast<const unsigned char*>(kernel);
  if (!memcmp(at, ENDBR64, sizeof ENDBR64)) at += sizeof ENDBR64;
  unsigned warps = 0;
  while (at[warps] == NOP) warps++;
  return warps * WARP;
}

int launch(const Launch& l, void (*entry)(void**), void** args, const void* kernel) {
  constexpr uint64_t WORTH_A_HELPER = 2048;  // CUDA threads; waking a thread costs as much as running about that many
  if (l.shared_bytes > SHARED_BYTES) return refuse("a launch with more than 227 KB of shared memory");
  if (threads_of(l.block) == 0 || threads_of(l.block) > THREADS)
    return refuse("a launch with no threads in a block, or more than 1024");
  if (const unsigned most = bound_of(kernel); most && threads_of(l.block) > most)
    return refuse("a launch with " + std::to_string(threads_of(l.block)) +
                  " threads in a block, of a kernel whose __launch_bounds__ are " + std::to_string(most));
  if (threads_of(l.grid) == 0) return refuse("a launch with no blocks");
  const Call call{l, entry, args};
  Job job(call);
  unsigned helpers = threads_to_use() - 1;
  if (helpers > job.blocks - 1) helpers = static_cast<unsigned>(job.blocks - 1);
  if (job.blocks * threads_of(l.block) < WORTH_A_HELPER) helpers = 0;
  if (race::on) {
    static std::mutex one_at_a_time;
    std::lock_guard hold(one_at_a_time);
    race::start_launch();
    run(job, 0);
  } else {
    run(job, helpers);
  }
  return job.error.empty() ? 0 : refuse(job.error);
}

static std::vector<const char*>& registered() {
  static auto& names = *new std::vector<const char*>;
  return names;
}
Registration::Registration(const char* name) { registered().push_back(name); }

}  // namespace sim

extern "C" {
const char* sim_last_error() { return sim::last_error ? sim::last_error->c_str() : ""; }
int sim_kernel_count() { return static_cast<int>(sim::registered().size()); }
const char* sim_kernel_name(int index) {
  return index >= 0 && index < sim_kernel_count() ? sim::registered()[static_cast<size_t>(index)] : nullptr;
}
void sim_set_threads(unsigned count) { sim::wanted_threads = count ? count : 1; }
}
