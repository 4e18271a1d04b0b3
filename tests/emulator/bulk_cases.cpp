// Bulk copies and warpgroup products.
#include "harness.h"

static std::string bulk(u32 seed, int bug, u32 swizzle) {
  // Boxes inside, over each edge, and off it altogether.
  struct {
    int x, y;
  } places[] = {{0, 0}, {64, 32}, {100, 40}, {-8, -3}, {40, 49}, {136, 50}};
  const int rows = 50, cols = 136;
  for (auto [x, y] : places) {
    Buffer<u16> from(random_bf16(static_cast<size_t>(rows * cols))), to(static_cast<size_t>(rows * cols)), raw(32 * 64);
    Map from_map = tensor_map(from, rows, cols, 32, 64, swizzle), to_map = tensor_map(to, rows, cols, 32, 64, swizzle);
    std::string error = launch("test_bulk", 1, 64, 2 * 32 * 64 * 2, seed, from_map, to_map, raw, x, y, bug);
    if (!error.empty()) return error;
    error = same<u32>(
        "raw", 32 * 64, [&](size_t i) { return raw[i]; },
        [&, x = x, y = y](size_t i) -> u32 {
          // Element i lies where the 16-byte piece of its row is xored with the row.
          const int r = static_cast<int>(i) / 64, stored = static_cast<int>(i) % 64,
                    c = swizzle ? (stored / 8 ^ r % 8) * 8 + stored % 8 : stored;
          const bool inside = x + c >= 0 && x + c < cols && y + r >= 0 && y + r < rows;
          return inside ? from[static_cast<size_t>((y + r) * cols + x + c)] : 0;
        });
    if (!error.empty()) return error;
    error = same<u32>(
        "to", to.data.size(), [&](size_t i) { return to[i]; },
        [&, x = x, y = y](size_t i) -> u32 {
          const int r = static_cast<int>(i) / cols - y, c = static_cast<int>(i) % cols - x;
          return r >= 0 && r < 32 && c >= 0 && c < 64 ? from[i] : 0xFFFF;
        });
    if (!error.empty()) return error;
  }
  return "";
}
static const Add plain{{"bulk copies", [](u32 seed, int bug) { return bulk(seed, bug, 0); }, {}}};
static const Add swizzled{{"bulk copies, swizzled",
                           [](u32 seed, int bug) { return bulk(seed, bug, 128); },
                           {{1, RACE, "race: bulk load overwrites"},
                            {2, RACE, "mbar_init_fence"},
                            {3, RACE, "fence.proxy.async"},
                            {4, RACE, "without ordering"},
                            {5, PLAIN, "deadlock"},
                            {6, PLAIN, "more arrivals"},
                            {7, PLAIN, "not aligned"},
                            {8, PLAIN, "bulk stores that it has not waited for"},
                            {9, PLAIN, "bulk loads on their way"}}}};

static const Add over_writes{{"bulk load over what threads wrote",
                              [](u32 seed, int bug) {
                                int x = 0, y = 0;
                                Buffer<u16> from(random_bf16(32 * 64)), raw(32 * 64);
                                Map map = tensor_map(from, 32, 64, 32, 64, 0);
                                std::string error = launch("test_bulk_over_writes", 1, 64, 0, seed, map, raw, x, y, bug);
                                if (!error.empty()) return error;
                                return same<u32>("raw", 32 * 64, [&](size_t i) { return raw[i]; }, [&](size_t i) { return from[i]; });
                              },
                              {{1, RACE, "without a fence.proxy.async"}}}};

static const Add phases{{"phases of an mbarrier",
                         [](u32 seed, int bug) {
                           int steps = 5;
                           Buffer<float> out(5);
                           std::string error = launch("test_phases", 1, 64, 0, seed, out, steps, bug);
                           if (!error.empty()) return error;
                           return same<float>("out", 5, [&](size_t i) { return out[i]; }, [](size_t i) { return static_cast<float>(i); });
                         },
                         {{1, PLAIN, "ends another phase"}}}};

static std::string product(const char* kernel, u32 n, bool a_mn, bool b_mn, u32 seed, int bug) {
  const u32 k = 192;
  Buffer<u16> a(random_bf16(64 * k)), b(random_bf16(n * k));
  Buffer<float> out(64 * n);
  Map a_map = a_mn ? tensor_map(a, k, 64, 64, 64, 128) : tensor_map(a, 64, k, 64, 64, 128);
  Map b_map = b_mn ? tensor_map(b, k, n, 64, 64, 128) : tensor_map(b, n, k, n, 64, 128);
  int k_arg = static_cast<int>(k);
  std::string error = launch(kernel, 1, 256, 64 * 64 * 2 + (n + 63) / 64 * 64 * 64 * 2, seed, out, a_map, b_map, k_arg, bug);
  if (!error.empty()) return error;
  std::vector<float> af(64 * k), bf(n * k);  // both with k along rows
  for (u32 i = 0; i < 64; i++)
    for (u32 j = 0; j < k; j++) af[i * k + j] = from_bf16(a[a_mn ? j * 64 + i : i * k + j]);
  for (u32 i = 0; i < n; i++)
    for (u32 j = 0; j < k; j++) bf[i * k + j] = from_bf16(b[b_mn ? j * n + i : i * k + j]);
  return near(
      "out", 64 * n, [&](size_t i) { return out[i]; },
      [&](size_t i) {
        double sum = 0;
        for (u32 j = 0; j < k; j++) sum += static_cast<double>(af[i / n * k + j]) * bf[i % n * k + j];
        return sum;
      },
      1e-4);  // f32 sums of 192 products of up to 1
}
#define PRODUCT(name, n, a_mn, b_mn, ...) \
  static const Add name{                  \
      {#name, [](u32 seed, int bug) { return product("test_" #name, n, a_mn, b_mn, seed, bug); }, {__VA_ARGS__}}};
PRODUCT(wgmma_64_kk, 64, false, false, {1, RACE, "race"}, {2, PLAIN, "no wgmma.fence"}, {3, PLAIN, "has not waited for"},
        {4, RACE, "race"}, {5, RACE, "may still read"}, {6, PLAIN, "no wgmma.fence"})
PRODUCT(wgmma_64_mm, 64, true, true)
PRODUCT(wgmma_96_kk, 96, false, false)
PRODUCT(wgmma_128_km, 128, false, true)
PRODUCT(wgmma_192_mk, 192, true, false)
PRODUCT(wgmma_256_mm, 256, true, true)
PRODUCT(wgmma_64_rk, 64, false, false)
PRODUCT(wgmma_128_rm, 128, false, true)

static const Add written{{"wgmma of what threads wrote",
                          [](u32 seed, int bug) {
                            Buffer<float> out(64 * 64), a(random_numbers(64 * 16)), b(random_numbers(64 * 16));
                            for (int fence_late : {0, 2}) {
                              int how = bug ? bug : fence_late;
                              std::string error = launch("test_wgmma_written", 1, 128, 0, seed, out, a, b, how);
                              if (!error.empty()) return error;
                              error = near(
                                  "out", 64 * 64, [&](size_t i) { return out[i]; },
                                  [&](size_t i) {
                                    double sum = 0;
                                    for (size_t k = 0; k < 16; k++)
                                      sum += static_cast<double>(from_bf16(to_bf16(a[i / 64 * 16 + k]))) *
                                             from_bf16(to_bf16(b[i % 64 * 16 + k]));
                                    return sum;
                                  },
                                  1e-5);
                              if (!error.empty()) return error;
                            }
                            return std::string();
                          },
                          {{1, RACE, "fence.proxy.async"}, {3, RACE, "without ordering"}}}};
