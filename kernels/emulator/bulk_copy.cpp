// The bulk copy engine (TMA): boxes of a matrix to shared memory and back, swizzled on the way.
//
// A box lies row by row without gaps. With a swizzle of 128 bytes, bits 4 to 6 of a byte's shared address are xored with bits 7
// to 9 (PTX ISA, "Swizzling modes"; CuTe's Swizzle<3,4,3>), so that a column of 16-byte pieces spreads over all banks.
#include <cstring>

#include "block.h"
#include "swizzle.h"

namespace sim {

void mbar_complete_bytes(uint64_t* bar, uint32_t bytes);

// Calls piece(shared address, global pointer or null outside of the matrix, bytes) for every element of a box.
template <class Piece> static void for_pieces(const Box& box, Piece piece) {
  const TensorMap& m = box.map;
  const uint32_t row_bytes = m.box_cols * m.elem_bytes;
  for (uint32_t r = 0; r < m.box_rows; r++) {
    const int64_t y = static_cast<int64_t>(box.y) + r;
    for (uint32_t done = 0; done < row_bytes; done += m.elem_bytes) {
      const int64_t x = static_cast<int64_t>(box.x) + done / m.elem_bytes;
      const bool inside = x >= 0 && y >= 0 && x < static_cast<int64_t>(m.cols) && y < static_cast<int64_t>(m.rows);
      const char* global =
          inside ? m.base + static_cast<uint64_t>(y) * m.pitch_bytes + static_cast<uint64_t>(x) * m.elem_bytes : nullptr;
      piece(swizzle(box.at + r * row_bytes + done, m.swizzle_bytes), global, m.elem_bytes);
    }
  }
}

static Box box_at(const void* shared, const TensorMap& map, int x, int y, const Site& site) {
  if (map.mark != TensorMap::MARK) fail("%s at %s:%d: this is no tensor map", site.what, site.file, site.line);
  const uint32_t at = shared_offset(shared);
  const uint32_t align = map.swizzle_bytes ? map.swizzle_bytes * 8 : 128;
  if (at % align) fail("%s at %s:%d: shared address %u is not aligned to %u", site.what, site.file, site.line, at, align);
  shared_pointer(at + map.box_bytes() - 1);
  return {map, at, x, y};
}

// The part of each row that lies inside of the matrix, for the race detector.
static void touch_global(const Box& box, bool write) {
  const TensorMap& m = box.map;
  const int64_t first = box.x < 0 ? 0 : box.x;
  int64_t last = static_cast<int64_t>(box.x) + m.box_cols;
  if (last > static_cast<int64_t>(m.cols)) last = static_cast<int64_t>(m.cols);
  if (first >= last) return;
  for (uint32_t r = 0; r < m.box_rows; r++) {
    const int64_t y = static_cast<int64_t>(box.y) + r;
    if (y < 0 || y >= static_cast<int64_t>(m.rows)) continue;
    race::access(m.base + static_cast<uint64_t>(y) * m.pitch_bytes + static_cast<uint64_t>(first) * m.elem_bytes,
                 static_cast<size_t>(last - first) * m.elem_bytes, write);
  }
}

static void load_now(const BulkLoad& load) {
  for_pieces(load.box, [](uint32_t at, const char* global, uint32_t bytes) {
    void* shared = shared_pointer(at);
    if (global) memcpy(shared, global, bytes);
    else memset(shared, 0, bytes);
  });
  const uint32_t bytes = load.box.map.box_bytes();  // what lies outside counts as well
  if (race::on) race::end(shared_pointer(load.box.at), bytes, true, race::engine_of(load.bar), race::engine_done(load.bar));
  mbar_complete_bytes(load.bar, bytes);
}

static void store_now(const BulkStore& store) {
  for_pieces(store.box, [](uint32_t at, const char* global, uint32_t bytes) {
    if (global) memcpy(const_cast<char*>(global), shared_pointer(at), bytes);
  });
}

void tma_load(void* dst, const TensorMap& map, int x, int y, uint64_t* bar, const Site& site) {
  Block& b = *current_block;
  BulkLoad load{box_at(dst, map, x, y, site), bar};
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
  BulkStore store{box_at(src, map, x, y, site), current_block->at_once()};
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
    if (race::on) race::end(shared_pointer(store.box.at), store.box.map.box_bytes(), false, t->linear, t->clock[t->linear]);
  });
}

}  // namespace sim
