// The bulk copy engine (TMA): boxes of a matrix to shared memory and back, swizzled on the way.
//
// A box lies row by row without gaps. With a swizzle of 128 bytes, bits 4 to 6 of a byte's shared address are xored
// with bits 7 to 9 (PTX ISA, "Swizzling modes"; CuTe's Swizzle<3,4,3>), so that a column of 16-byte pieces spreads over
// all banks.
#include <cstring>

#include "block.h"
#include "swizzle.h"

namespace sim {

void mbar_complete_bytes(uint64_t* bar, uint32_t bytes);

// Calls row(first byte of it in the box, global pointer or null outside of the tensor) for every row of a box: all that
// the innermost axis has.
template <class Row> static void for_rows(const Box& box, Row row) {
  const TensorMap& m = box.map;
  for (uint32_t r = 0; r < m.box_rows(); r++) {
    uint32_t rest = r;
    const char* global = m.base;
    for (int axis = 1; axis < TensorMap::AXES; axis++) {
      const int64_t at = box.from[axis] + static_cast<int64_t>(rest % m.box[axis]) * m.apart[axis];
      rest /= m.box[axis];
      if (at < 0 || at >= static_cast<int64_t>(m.sizes[axis])) global = nullptr;
      if (global) global += static_cast<uint64_t>(at) * m.pitch_bytes[axis - 1];
    }
    row(r * m.row_bytes(), global);
  }
}

// Calls piece(shared address, global pointer or null outside of the tensor, bytes) for every element of a box.
template <class Piece> static void for_pieces(const Box& box, Piece piece) {
  const TensorMap& m = box.map;
  for_rows(box, [&](uint32_t start, const char* global) {
    for (uint32_t done = 0; done < m.row_bytes(); done += m.elem_bytes) {
      const int64_t x = static_cast<int64_t>(box.from[0]) + done / m.elem_bytes;
      const bool inside = global && x >= 0 && x < static_cast<int64_t>(m.sizes[0]);
      piece(swizzle(box.at + start + done, m.swizzle_bytes),
            inside ? global + static_cast<uint64_t>(x) * m.elem_bytes : nullptr, m.elem_bytes);
    }
  });
}

static Box box_at(const void* shared, const TensorMap& map, uint32_t axes, const int (&from)[TensorMap::AXES],
                  const Site& site) {
  if (map.mark != TensorMap::MARK) fail("%s at %s:%d: this is no tensor map", site.what, site.file, site.line);
  if (map.axes != axes) fail("%s at %s:%d: the tensor map has %u axes", site.what, site.file, site.line, map.axes);
  const uint32_t at = shared_offset(shared);
  const uint32_t align = map.swizzle_bytes ? map.swizzle_bytes * 8 : 128;
  if (at % align)
    fail("%s at %s:%d: shared address %u is not aligned to %u", site.what, site.file, site.line, at, align);
  shared_pointer(at + map.box_bytes() - 1);
  return {map, at, {from[0], from[1], from[2], from[3]}};
}

// The part of each row that lies inside of the matrix, for the race detector.
static void touch_global(const Box& box, bool write) {
  const TensorMap& m = box.map;
  const int64_t first = box.from[0] < 0 ? 0 : box.from[0];
  int64_t last = static_cast<int64_t>(box.from[0]) + m.box[0];
  if (last > static_cast<int64_t>(m.sizes[0])) last = static_cast<int64_t>(m.sizes[0]);
  if (first >= last) return;
  for_rows(box, [&](uint32_t, const char* global) {
    if (!global) return;
    race::access(global + static_cast<uint64_t>(first) * m.elem_bytes, static_cast<size_t>(last - first) * m.elem_bytes,
                 write);
  });
}

static void load_now(const BulkLoad& load) {
  for_pieces(load.box, [](uint32_t at, const char* global, uint32_t bytes) {
    void* shared = shared_pointer(at);
    if (global) memcpy(shared, global, bytes);
    else memset(shared, 0, bytes);
  });
  const uint32_t bytes = load.box.map.box_bytes();  // what lies outside counts as well
  if (race::on) {
    const auto engine = race::engine_of(load.bar);
    race::end(shared_pointer(load.box.at), bytes, true, engine, {engine, race::engine_done(load.bar)});
  }
  mbar_complete_bytes(load.bar, bytes);
}

static void store_now(const BulkStore& store) {
  for_pieces(store.box, [](uint32_t at, const char* global, uint32_t bytes) {
    if (global) memcpy(const_cast<char*>(global), shared_pointer(at), bytes);
  });
}

void tma_load(void* dst, const TensorMap& map, uint32_t axes, const int (&from)[TensorMap::AXES], uint64_t* bar,
              const Site& site) {
  Block& b = *current_block;
  BulkLoad load{box_at(dst, map, axes, from, site), bar};
  if (race::on) {
    race::barrier_used(bar, true, site.what);
    touch_global(load.box, false);
    race::begin(dst, map.box_bytes(), true, race::engine_of(bar), true, site.what);
  }
  if (b.at_once()) load_now(load);
  else b.loads.push_back(load);
}

void finish_load(size_t index) {
  Block& b = *current_block;
  const BulkLoad load = b.loads[index];
  b.loads.erase(b.loads.begin() + static_cast<ptrdiff_t>(index));
  load_now(load);
}

void tma_store(const TensorMap& map, const void* src, int x, int y, const Site& site) {
  BulkStore store{box_at(src, map, 2, {x, y, 0, 0}, site), current_block->at_once()};
  if (race::on) {
    race::begin(src, map.box_bytes(), false, self()->linear, true, site.what);
    touch_global(store.box, true);
  }
  if (store.stored) store_now(store);
  self()->stores.items.push_back(store);
}

void tma_store_commit() { self()->stores.commit(); }

void tma_store_wait(int keep) {
  Thread* t = self();
  t->stores.wait(keep, [t](const BulkStore& store) {
    if (!store.stored) store_now(store);
    if (race::on)
      race::end(shared_pointer(store.box.at), store.box.map.box_bytes(), false, t->linear,
                {t->linear, t->knowledge.own});
  });
}

}  // namespace sim
