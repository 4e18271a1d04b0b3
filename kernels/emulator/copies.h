// Asynchronous work under way: cp.async copies and bulk stores of a thread, bulk loads of a block, products of a
// warpgroup.
//
// Work runs when it is issued, when somebody waits for it, or, for bulk loads, in between, as the launch's seed has it.
// Until it is waited for, the race detector counts its memory as in use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "meeting.h"
#include "sim.h"
#include "tensor_map.h"

namespace sim {

// A first-in first-out queue of committed groups: items in order of issue, and where each group ends.
template <class Item> struct Groups {
  std::vector<Item> items;
  std::vector<size_t> ends;
  size_t first_item = 0, first_group = 0;

  void commit() { ends.push_back(items.size()); }
  size_t committed() const { return ends.size() - first_group; }
  bool idle() const { return first_item == items.size() && committed() == 0; }
  // Finishes the oldest groups until `keep` are left.
  template <class Finish> void wait(int keep, Finish finish) {
    while (committed() > static_cast<size_t>(keep)) {
      for (; first_item < ends[first_group]; first_item++) finish(items[first_item]);
      first_group++;
    }
    if (idle()) clear();
  }
  void clear() {
    items.clear();
    ends.clear();
    first_item = first_group = 0;
  }
};

struct Copy {
  void* dst;
  const void* src;
  int bytes, from_source;
  bool copied;
};
using CopyGroups = Groups<Copy>;

// A rectangle of a matrix in global memory, and its place in shared memory.
struct Box {
  TensorMap map;
  uint32_t at;
  int from[TensorMap::AXES];
};

struct BulkLoad {
  Box box;
  uint64_t* bar;
};
struct BulkStore {
  Box box;
  bool stored;
};
using StoreGroups = Groups<BulkStore>;

// A warpgroup product: where its operands and the accumulators of its 128 threads are. Operands in registers are what
// they were when it was issued: what is assigned to such a variable later is another register to nvcc, which says so
// where it cannot be (tests/emulator/planted).
struct Product {
  Wgmma what;
  float* d[128];
  uint32_t a_regs[128][4];
  bool computed;
};

struct WarpgroupState {
  Meeting meeting;
  Groups<Product> products;
  bool fenced = false;  // since the last wait
};

// Runs one of the loads under way.
void finish_load(size_t index);

}  // namespace sim
