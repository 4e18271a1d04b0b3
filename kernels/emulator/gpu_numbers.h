// Numbers as CUDA C++ has them: bf16, reinterpretations, operations with stated rounding, bit counting.
//
// Compiled with -ffp-contract=off, plain operators round once each, to nearest even, as the _rn intrinsics do.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "gpu_words.h"

template <class To, class From> GPU_QUIET inline To gpu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float x) { return gpu_bits<uint32_t>(x); }
inline int __float_as_int(float x) { return gpu_bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return gpu_bits<float>(x); }
inline float __int_as_float(int x) { return gpu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return gpu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return gpu_bits<double>(x); }

// ---- bf16
struct bf16 {
  uint16_t bits;
};
struct alignas(4) bf162 {
  bf16 x, y;
};
inline float __bfloat162float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline bf16 __float2bfloat16_rn(float f) {  // to nearest even; every NaN becomes 0x7FFF, as on the device
  const uint32_t u = __float_as_uint(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline bf16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline bf162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline bf162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(bf162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __low2float(bf162 v) { return __bfloat162float(v.x); }
inline float __high2float(bf162 v) { return __bfloat162float(v.y); }
inline uint16_t __bfloat16_as_ushort(bf16 v) { return v.bits; }
inline bf16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }

// tf32: f32 with 10 bits of fraction, rounded to nearest, ties away from zero (cvt.rna.tf32.f32).
inline uint32_t to_tf32(float f) {
  const uint32_t u = __float_as_uint(f);
  return (u & 0x7F800000) == 0x7F800000 ? u : (u + 0x1000) & 0xFFFFE000u;
}

// ---- stated rounding
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }

// ---- approximations, here exact
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

// ---- the smaller and the larger, of two arithmetic types
template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- bits
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<uint32_t>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
// Four bytes of the eight in (low, high), chosen by the four nibbles of `selector`.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= static_cast<uint32_t>(all >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return out;
}
