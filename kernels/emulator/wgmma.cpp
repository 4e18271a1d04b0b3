// wgmma: a warpgroup's asynchronous product, 64 x N x 16, with operands in shared memory found through descriptors.
//
// A descriptor's bits (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout", matrix descriptor format):
//   0-13 start address, 16-29 leading byte offset, 32-45 stride byte offset, each >> 4; 49-51 base offset;
//   62-63 swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes.
// Where an element is, from its canonical layouts in CuTe's words (also CUTLASS, mma_traits_sm90_gmma.hpp), with r the
// row along M or N, k along K, W the 16-byte pieces that the swizzle spans, and elements of 2 bytes, so that a piece
// has 8 of them:
//   K-major, swizzled    ((8,m),(8,2)) : ((8W,SBO),(1,8))          r % 8 * 16W + r / 8 * SBO + k * 2; LBO is not read
//   K-major, none        ((8,m),(8,2)) : ((8,SBO),(1,LBO))         r % 8 * 16 + r / 8 * SBO + k % 8 * 2 + k / 8 * LBO
//   MN-major, swizzled   ((8,W,m),(8,2)) : ((1,8,LBO),(8W,SBO))    r % 8W * 2 + r / 8W * LBO + k % 8 * 16W + k / 8 * SBO
//   MN-major, none       ((8,1,m),(8,2)) : ((1,8,SBO),(8,LBO))     r % 8 * 2 + r / 8 * SBO + k % 8 * 16 + k / 8 * LBO
// to which the start address is added, and the swizzle is applied to the sum, as an address. So a start address inside
// of a pattern, as one gets by stepping along K, means what it means on the device. A base offset other than 0 is not
// modelled: patterns start at their size.
#include <cstring>

#include "block.h"
#include "swizzle.h"

namespace sim {

using Eight = float __attribute__((vector_size(32)));
constexpr int K = 16, ROWS = 64;

struct Layout {
  uint32_t start, leading, stride, span_bytes;
  bool mn_major;

  Layout(uint64_t desc, bool mn, const char* what) {
    static constexpr uint32_t SPANS[] = {0, 128, 64, 32};
    start = static_cast<uint32_t>(desc & 0x3FFF) << 4;
    leading = static_cast<uint32_t>(desc >> 16 & 0x3FFF) << 4;
    stride = static_cast<uint32_t>(desc >> 32 & 0x3FFF) << 4;
    span_bytes = SPANS[desc >> 62];
    mn_major = mn;
    if (desc >> 49 & 7) fail("wgmma: descriptor of %s with a base offset", what);
  }
  // The shared address of the 16-byte piece that holds (r, k) and the next seven along the major axis. Both are
  // multiples of 8 there.
  uint32_t piece(int r, int k) const {
    const uint32_t row = static_cast<uint32_t>(r), col = static_cast<uint32_t>(k), width = span_bytes / 16;
    uint32_t at;
    if (mn_major) {
      at = width ? row % (8 * width) * 2 + row / (8 * width) * leading + col % 8 * 16 * width + col / 8 * stride
                 : row / 8 * stride + col % 8 * 16 + col / 8 * leading;
    } else {
      at = width ? row % 8 * 16 * width + row / 8 * stride + col * 2
                 : row % 8 * 16 + row / 8 * stride + col / 8 * leading;
    }
    return swizzle(start + at, span_bytes);
  }
  // Calls visit(r, k, address) for every piece of an operand of `rows` rows.
  template <class Visit> void for_pieces(int rows, Visit visit) const {
    for (int r = 0; r < rows; r += mn_major ? 8 : 1)
      for (int k = 0; k < K; k += mn_major ? 1 : 8) visit(r, k, piece(r, k));
  }
};

static float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

// Reads an operand; put(r, k, value).
template <class Put> static void read(const Layout& layout, int rows, Put put) {
  layout.for_pieces(rows, [&](int r, int k, uint32_t at) {
    uint16_t piece[8];
    memcpy(piece, shared_pointer(at), 16);
    for (int i = 0; i < 8; i++) put(layout.mn_major ? r + i : r, layout.mn_major ? k : k + i, from_bf16(piece[i]));
  });
}

static void compute(const Product& p) {
  auto& a = current_block->product_a;  // (64, K)
  auto& b = current_block->product_b;  // (K, N)
  read(Layout(p.what.b_desc, p.what.b_mn_major, "B"), p.what.n, [&](int r, int k, float value) { b[k][r] = value; });
  if (p.what.a_regs) {
    for (int t = 0; t < 128; t++)
      for (int i = 0; i < 4; i++) {
        const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
        a[row][k] = from_bf16(static_cast<uint16_t>(p.a_regs[t][i]));
        a[row][k + 1] = from_bf16(static_cast<uint16_t>(p.a_regs[t][i] >> 16));
      }
  } else {
    read(Layout(p.what.a_desc, p.what.a_mn_major, "A"), ROWS, [&](int r, int k, float value) { a[r][k] = value; });
  }
  for (int row = 0; row < ROWS; row++) {
    // The four threads of this row: columns 2t and 2t + 1 of each eight.
    float* const* d = p.d + row / 16 * 32 + row % 8 * 4;
    const int half = row % 16 / 8 * 2;
    for (int j = 0; j < p.what.n / 8; j++) {
      Eight sum = {};
      for (int k = 0; k < K; k++) {
        Eight eight;
        memcpy(&eight, &b[k][8 * j], sizeof eight);
        sum += a[row][k] * eight;
      }
      for (int t = 0; t < 4; t++) {
        float* out = d[t] + 4 * j + half;
        out[0] = (p.what.accumulate ? out[0] : 0.0f) + sum[2 * t];
        out[1] = (p.what.accumulate ? out[1] : 0.0f) + sum[2 * t + 1];
      }
    }
  }
}

// Tells the race detector which shared memory a product reads, from when it is issued until it is waited for.
template <class Tell> static void for_reads(const Product& p, Tell tell) {
  auto pieces = [&](int, int, uint32_t at) { tell(shared_pointer(at)); };
  if (!p.what.a_regs) Layout(p.what.a_desc, p.what.a_mn_major, "A").for_pieces(ROWS, pieces);
  Layout(p.what.b_desc, p.what.b_mn_major, "B").for_pieces(p.what.n, pieces);
}

static WarpgroupState& group() { return current_block->warpgroups[self()->linear / WARPGROUP]; }

void wgmma(const Wgmma& product, const Site& site) {
  if (!group().fenced)
    fail("%s at %s:%d: no wgmma.fence since the last wait, or at all", site.what, site.file, site.line);
  Wgmma mine = product;
  warpgroup_collective(
      [](void** args, uint32_t) {
        const Wgmma& first = *static_cast<Wgmma*>(args[0]);
        Product p;
        p.what = first;
        p.computed = false;
        for (unsigned i = 0; i < WARPGROUP; i++) {
          const Wgmma& w = *static_cast<Wgmma*>(args[i]);
          if (w.a_desc != first.a_desc || w.b_desc != first.b_desc || w.accumulate != first.accumulate)
            fail("wgmma: operands differ within the warpgroup");
          p.d[i] = w.d;
          if (w.a_regs) memcpy(p.a_regs[i], w.a_regs, sizeof p.a_regs[i]);
        }
        const unsigned warpgroup = self()->linear / WARPGROUP;
        if (race::on) for_reads(p, [&](void* piece) { race::begin_product(piece, 16, warpgroup); });
        group().products.items.push_back(p);
      },
      &mine, site);
}

void wgmma_fence(const Site& site) {
  warpgroup_collective([](void**, uint32_t) { group().fenced = true; }, nullptr, site);
}

void wgmma_commit(const Site& site) {
  warpgroup_collective(
      [](void**, uint32_t) {
        auto& products = group().products;
        if (current_block->at_once()) {
          // In order also among groups: whatever is older goes first.
          for (size_t i = products.first_item; i < products.items.size(); i++) {
            Product& p = products.items[i];
            if (!p.computed) compute(p);
            p.computed = true;
          }
        }
        products.commit();
      },
      nullptr, site);
}

void wgmma_wait(int keep, const Site& site) {
  warpgroup_collective(
      [](void** args, uint32_t) {
        // Who waits touches registers next.
        group().fenced = false;
        const unsigned warpgroup = self()->linear / WARPGROUP, entry = race::products_of(warpgroup);
        const uint32_t clock = race::on ? race::products_done(warpgroup) : 0;
        group().products.wait(*static_cast<int*>(args[0]), [&](const Product& p) {
          if (!p.computed) compute(p);
          if (race::on) for_reads(p, [&](void* piece) { race::end(piece, 16, false, entry, {entry, clock}); });
        });
      },
      &keep, site);
}

}  // namespace sim
