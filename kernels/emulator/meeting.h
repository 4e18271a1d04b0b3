// A meeting point: members park until the last one arrives, which may do something for all of them.
//
// Barriers, shuffles, votes, ldmatrix, mma and wgmma are all this one thing.
#pragma once
#include <cstdint>
#include <vector>

#include "race.h"
#include "sim.h"

namespace sim {

struct Thread;

struct Meeting {
  int arrived = 0, expected = 0;
  uint32_t mask = 0, present = 0;  // of a warp's meeting: the lanes that are to come, and those that have
  Op op = nullptr;
  Site site;                // where the first member came from
  std::vector<void*> args;  // by lane; what absent lanes left here is stale
  std::vector<Thread*> waiting;
  std::vector<race::Knowledge>
      members;  // waiting or not, as they came; for the race detector, where the meeting orders memory

  void reset() {
    arrived = expected = 0;
    mask = 0;
    op = nullptr;
    waiting.clear();
    members.clear();
  }
};

// Meetings of one warp: as many as there are disjoint masks on their way.
using WarpMeetings = std::vector<Meeting>;

// A block-wide barrier that waits for every live thread has one less to wait for.
void thread_has_exited();

}  // namespace sim
