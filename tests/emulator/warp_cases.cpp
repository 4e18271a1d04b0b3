// What lanes do together, and numbers.
#include <cmath>

#include "harness.h"

static const Add shuffles{{"shuffles and votes",
                           [](u32 seed, int bug) {
                             Buffer<u64> out(12 * 32);
                             std::string error = launch("test_shuffles", 1, 32, 0, seed, out, bug);
                             if (!error.empty()) return error;
                             auto value = [](int lane) { return 0x100000001ull * (static_cast<u64>(lane) + 1); };
                             return same<u64>(
                                 "out", 12 * 32, [&](size_t i) { return out[i]; },
                                 [&](size_t i) -> u64 {
                                   const int lane = static_cast<int>(i) % 32;
                                   switch (i / 32) {
                                     case 0:
                                       return value(lane ^ 5);
                                     case 1:
                                       return value(lane * 7 % 32);
                                     case 2:
                                       return value(lane < 3 ? lane : lane - 3);
                                     case 3:
                                       return value(lane + 9 > 31 ? lane : lane + 9);
                                     case 4:
                                       return value(lane ^ 4);
                                     case 5:
                                       return value(lane / 16 * 16 + (lane + 1) % 16);
                                     case 6:
                                       return static_cast<u64>(lane % 4 == 3 ? lane : lane + 1);
                                     case 7:
                                       return lane < 16 ? static_cast<u64>(lane ^ 1) : 0;
                                     case 8:
                                       return 0x49249249;
                                     case 9:
                                       return 1;
                                     case 10:
                                       return 1;
                                     default:
                                       return 496 + 1000 * 31;
                                   }
                                 });
                           },
                           {{1, PLAIN, "while lanes wait with mask"}, {2, PLAIN, "not in the mask"}}}};

static const Add mirrored{{"what lanes of a warp write for each other",
                           [](u32 seed, int bug) {
                             Buffer<float> out(32);
                             std::string error = launch("test_mirrored", 1, 32, 0, seed, out, bug);
                             if (!error.empty()) return error;
                             return same<float>("out", 32, [&](size_t i) { return out[i]; }, [](size_t i) { return static_cast<float>(31 - i); });
                           },
                           {{1, RACE, "without ordering"}, {2, RACE, "without ordering"}}}};

static const Add fragments{
    {"ldmatrix and stmatrix",
     [](u32 seed, int) {
       Buffer<u16> in(256), back(3 * 256);
       Buffer<u32> regs(14 * 32);
       for (size_t i = 0; i < 256; i++) in[i] = static_cast<u16>(1000 + i);
       std::string error = launch("test_fragments", 1, 32, 0, seed, regs, back, in);
       if (!error.empty()) return error;
       error = same<u32>(
           "regs", 14 * 32, [&](size_t i) { return regs[i]; },
           [&](size_t i) {
             static const int first[] = {0, 1, 2, 4, 6, 10, 14};
             int op = 0;
             while (static_cast<int>(i / 32) >= first[op + 1]) op++;
             const u32 matrix = static_cast<u32>(i / 32) - static_cast<u32>(first[op]), lane = i % 32, a = lane / 4,
                       b = lane % 4 * 2;
             auto at = [&](u32 r, u32 c) { return op % 2 ? 1000 + matrix * 64 + c * 8 + r : 1000 + matrix * 64 + r * 8 + c; };
             return at(a, b) | at(a, b + 1) << 16;
           });
       if (!error.empty()) return error;
       return same<u32>(
           "back", 3 * 256, [&](size_t i) { return back[i]; },
           [&](size_t i) -> u32 { return i / 256 == 2 && i % 256 >= 128 ? 0 : 1000 + static_cast<u32>(i % 256); });
     },
     {}}};

// tf32 keeps 10 bits of fraction: to the nearest, ties away from zero. Of normal numbers.
static float to_tf32(float x) {
  int exponent;
  const double fraction = std::frexp(static_cast<double>(x), &exponent);
  return static_cast<float>(std::ldexp(std::round(fraction * 2048), exponent - 11));
}

static const Add mma{{"mma bf16 and tf32",
                      [](u32 seed, int) {
                        Buffer<float> out16(128), out8(128), a16(random_numbers(256)), b16(random_numbers(128)),
                            a8(random_numbers(128)), b8(random_numbers(64));
                        std::string error = launch("test_mma", 1, 32, 0, seed, out16, out8, a16, b16, a8, b8);
                        if (!error.empty()) return error;
                        auto bf16 = [](float x) { return static_cast<double>(from_bf16(to_bf16(x))); };
                        error = near(
                            "out16", 128, [&](size_t i) { return out16[i]; },
                            [&](size_t i) {
                              double sum = 1;
                              for (size_t k = 0; k < 16; k++) sum += bf16(a16[i / 8 * 16 + k]) * bf16(b16[k * 8 + i % 8]);
                              return sum;
                            },
                            1e-5);  // f32 sums of 16 products of up to 1
                        if (!error.empty()) return error;
                        return near(
                            "out8", 128, [&](size_t i) { return out8[i]; },
                            [&](size_t i) {
                              double sum = 1;
                              for (size_t k = 0; k < 8; k++)
                                sum += static_cast<double>(to_tf32(a8[i / 8 * 8 + k])) * to_tf32(b8[k * 8 + i % 8]);
                              return sum;
                            },
                            1e-5);
                      },
                      {}}};

static const Add numbers{{"numbers",
                          [](u32 seed, int) {
                            std::vector<float> xs, ys;
                            for (float x : {0.0f, -0.0f, 1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 3.3895314e38f,
                                            3.4028235e38f, 1.000488281f, 65504.0f})
                              xs.push_back(x);
                            for (float x : random_numbers(1000)) xs.push_back(x * 10);
                            ys = random_numbers(xs.size());
                            ys[3] = NAN;
                            int n = static_cast<int>(xs.size());
                            Buffer<float> out(20 * xs.size()), x(xs), y(ys);
                            std::string error =
                                launch("test_numbers", (static_cast<unsigned>(n) + 127) / 128, 128, 0, seed, out, x, y, n);
                            if (!error.empty()) return error;
                            const size_t rows = xs.size();
                            auto want = [&](size_t i) -> float {
                              const float a = xs[i % rows], b = ys[i % rows];
                              const double ad = a, bd = b;
                              u32 byte_perm = (bits_of(a) & 0xFFFF) | bits_of(b) << 16;
                              switch (i / rows) {
                                case 0:
                                case 2:
                                  return from_bf16(to_bf16(a));
                                case 1:
                                  return std::isinf(to_tf32(a)) ? INFINITY : to_tf32(a);
                                case 3:
                                  return from_bf16(to_bf16(b));
                                case 4:
                                  return from_bf16(to_bf16(a)) + from_bf16(to_bf16(b));
                                case 5:
                                  return static_cast<float>(ad * bd - static_cast<double>(static_cast<float>(ad * bd)));
                                case 6:
                                  return static_cast<float>(ad + bd);
                                case 7:
                                  return static_cast<float>(ad - bd);
                                case 8:
                                  return static_cast<float>(ad / bd);
                                case 9:
                                  return static_cast<float>(std::sqrt(std::fabs(ad)));
                                case 10:
                                  return static_cast<float>(std::fma(ad, bd, -(ad * 0.1)));
                                case 11:
                                  return static_cast<float>((ad - 1e9) + 1e9);
                                case 12:
                                  return static_cast<float>(ad / std::sqrt(std::fabs(bd)));
                                case 13:
                                  return std::exp2(b);
                                case 14:
                                  return b != b ? a + 2 * a : (a < b ? a : b) + 2 * (a < b ? b : a);
                                case 15:
                                  return static_cast<float>(__builtin_popcount(bits_of(a)));
                                case 16:
                                  return static_cast<float>(bits_of(b) ? __builtin_clz(bits_of(b)) : 32);
                                case 17:
                                  return static_cast<float>(__builtin_ffs(static_cast<int>(bits_of(a))));
                                case 18:
                                  return static_cast<float>(static_cast<u32>(static_cast<u64>(bits_of(a)) * bits_of(b) >> 32));
                                default:
                                  return static_cast<float>(byte_perm);
                              }
                            };
                            return same<float>("out", out.data.size(), [&](size_t i) { return out[i]; }, want);
                          },
                          {}}};

static const Add streams{{"16-byte streams",
                          [](u32 seed, int) {
                            Buffer<u16> out(8 * 77), in(random_bf16(8 * 77));
                            int n = 77;
                            std::string error = launch("test_streams", 3, 32, 0, seed, out, in, n);
                            return error.empty() ? same<u32>(
                                                       "out", in.data.size(), [&](size_t i) { return out[i]; },
                                                       [&](size_t i) { return in[i]; })
                                                 : error;
                          },
                          {}}};
