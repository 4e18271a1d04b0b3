// Meeting points; see meeting.h.
#include "meeting.h"

#include <cstring>

#include "block.h"

namespace sim {

// Lets everybody go on. `last_goes_on`: the running thread is a member that did not park, and not one that only
// arrived.
static void release(Meeting& m, bool last_goes_on) {
  Block& b = *current_block;
  for (Thread* t : m.waiting) b.wake(t);
  if (!m.members.empty()) {
    if (last_goes_on) m.waiting.push_back(self());
    race::meet(m.members, m.waiting);
  }
  m.reset();
}

static void check_same_place(const Meeting& m, const Site& site) {
  if (m.site.line == site.line && (m.site.file == site.file || !strcmp(m.site.file, site.file))) return;
  fail("threads meet at different places: %s at %s:%d and %s at %s:%d", m.site.what, m.site.file, m.site.line,
       site.what, site.file, site.line);
}

// `ordered`: what members did to memory comes before what the others do after the meeting.
static void meet(Meeting& m, unsigned slot, int expected, Op op, void* arg, bool ordered, const Site& site) {
  if (m.arrived == 0) {
    m.expected = expected;
    m.site = site;
  } else {
    check_same_place(m, site);
  }
  if (op) m.args[slot] = arg;
  if (race::on && ordered) m.members.push_back(self()->knowledge);
  if (++m.arrived == m.expected) {
    if (op) op(m.args.data(), m.mask);
    release(m, true);
  } else {
    m.waiting.push_back(self());
    current_block->park(site.what, site);
  }
}

// Masks may differ as long as nobody waits in a circle: another meeting may expect this lane, but not hold one that
// this lane waits for.
static Meeting& meeting_for(WarpMeetings& meetings, uint32_t mask, unsigned lane, const Site& site) {
  Meeting* fresh = nullptr;
  for (Meeting& m : meetings) {
    if (m.arrived == 0) {
      if (!fresh) fresh = &m;
    } else if (m.mask == mask) {
      return m;
    } else if (m.mask >> lane & 1 && m.present & mask) {
      fail("%s at %s:%d with mask %08x while lanes wait with mask %08x at line %d", site.what, site.file, site.line,
           mask, m.mask, m.site.line);
    }
  }
  if (!fresh) {
    if (meetings.empty()) meetings.reserve(WARP);  // references stay good
    fresh = &meetings.emplace_back();
    fresh->args.resize(WARP);
  }
  fresh->mask = mask;
  fresh->present = 0;
  return *fresh;
}

void warp_collective(uint32_t mask, Op op, void* arg, const Site& site) {
  Thread* t = self();
  Block& b = *current_block;
  if (!(mask >> t->lane & 1))
    fail("%s at %s:%d: lane %u is not in its own mask %08x", site.what, site.file, site.line, t->lane, mask);
  const unsigned lanes = b.count - (t->linear & ~(WARP - 1));
  if (lanes < WARP) mask &= (1u << lanes) - 1;  // the block's last warp may have fewer
  Meeting& m = meeting_for(b.warps[t->linear / WARP], mask, t->lane, site);
  m.present |= 1u << t->lane;
  // Of what a warp does together, __syncwarp alone orders memory. Shuffles and votes do not (CUDA C++ Programming
  // Guide, "Warp Shuffle Functions"), nor is it said of ldmatrix, stmatrix and mma.
  meet(m, t->lane, __builtin_popcount(mask), op, arg, op == nullptr, site);
}

void warpgroup_collective(Op op, void* arg, const Site& site) {
  Thread* t = self();
  Meeting& m = current_block->warpgroups[t->linear / WARPGROUP].meeting;
  if (m.args.empty()) m.args.resize(WARPGROUP);
  // Puts nothing in order that the threads did themselves; see race::products_done for the products.
  meet(m, t->linear % WARPGROUP, WARPGROUP, op, arg, false, site);
}

static Meeting& barrier(int id, int count, const Site& site) {
  if (id < 0 || id >= static_cast<int>(BARRIERS))
    fail("%s at %s:%d: there is no barrier %d", site.what, site.file, site.line, id);
  if (count % WARP)
    fail("%s at %s:%d: %d threads are no whole number of warps", site.what, site.file, site.line, count);
  Meeting& m = current_block->barriers[id];
  if (m.arrived && m.expected != count)
    fail("%s at %s:%d: barrier %d is used for %d threads and for %d", site.what, site.file, site.line, id, m.expected,
         count);
  m.expected = count;
  return m;
}

void bar_sync(int id, int count, const Site& site) {
  Block& b = *current_block;
  if (count == 0) {  // the whole block: all come to the same place
    Meeting& m = b.barriers[id];
    meet(m, 0, static_cast<int>(b.live), nullptr, nullptr, true, site);
    return;
  }
  Meeting& m = barrier(id, count, site);
  m.site = site;
  if (race::on) m.members.push_back(self()->knowledge);
  if (++m.arrived == count) {
    release(m, true);
  } else {
    m.waiting.push_back(self());
    b.park(site.what, site);
  }
}

void bar_arrive(int id, int count, const Site& site) {
  Meeting& m = barrier(id, count, site);
  m.site = site;
  if (race::on) m.members.push_back(self()->knowledge);
  if (++m.arrived == count) release(m, false);
  race::tick(self());
}

void thread_has_exited() {
  Block& b = *current_block;
  Meeting& m = b.barriers[0];
  // Barrier 0 with everybody waiting in it is a whole-block one, unless it was given a number of threads.
  if (m.arrived == 0 || m.expected != static_cast<int>(b.live) + 1) return;
  m.expected = static_cast<int>(b.live);
  if (m.arrived == m.expected) release(m, false);
}

}  // namespace sim
