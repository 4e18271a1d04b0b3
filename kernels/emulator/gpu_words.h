// The words of CUDA C++ that C++ does not have: keywords, built-in variables, vector types, shared memory.
#pragma once
#include <cstring>

#include "sim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// Most threads of a block, which a GPU refuses to exceed, are kept with the kernel's code: a nop for each warp of them,
// at its entry. No other place that a macro here can write to says which kernel it is of.
#define __launch_bounds__(...) __attribute__((patchable_function_entry(::sim::bound_in_warps(__VA_ARGS__))))
namespace sim {
constexpr unsigned bound_in_warps(int threads, int = 0) { return static_cast<unsigned>(threads) / 32; }
}  // namespace sim
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)
#if defined(__SANITIZE_THREAD__)
#define DEV inline __attribute__((always_inline))  // then few local arrays have an address, and none without is watched
#else
#define DEV inline
#endif
// For what the race detector must not see: the emulator's own accesses inside of a kernel's object.
#define GPU_QUIET __attribute__((no_sanitize("thread")))

// The last parameter of what threads meet in: the caller's place, for messages.
#define GPU_HERE(what) ::sim::Site site = ::sim::at(what)

#define threadIdx (::sim::cur->threadIdx)
#define blockIdx (::sim::cur->blockIdx)
#define blockDim (::sim::cur->blockDim)
#define gridDim (::sim::cur->gridDim)
constexpr int warpSize = 32;

#define GPU_VECTOR2(name, T, align) \
  struct alignas(align) name {      \
    T x, y;                         \
  };                                \
  inline name make_##name(T x, T y) { return {x, y}; }
#define GPU_VECTOR4(name, T, align) \
  struct alignas(align) name {      \
    T x, y, z, w;                   \
  };                                \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
GPU_VECTOR2(float2, float, 8)
GPU_VECTOR4(float4, float, 16)
GPU_VECTOR2(double2, double, 16)
GPU_VECTOR2(int2, int, 8)
GPU_VECTOR4(int4, int, 16)
GPU_VECTOR2(uint2, uint32_t, 8)
GPU_VECTOR4(uint4, uint32_t, 16)
GPU_VECTOR2(ushort2, uint16_t, 4)
GPU_VECTOR4(ushort4, uint16_t, 8)
GPU_VECTOR4(uchar4, uint8_t, 4)
GPU_VECTOR2(longlong2, long long, 16)
GPU_VECTOR2(ulonglong2, unsigned long long, 16)
#undef GPU_VECTOR2
#undef GPU_VECTOR4
struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }

// A variable in shared memory: GPU_SHARED(float, sums, [4][32]). The dynamic part starts at GPU_DYNAMIC(float, name).
#define GPU_SHARED(T, name, dims) \
  using name##_shared_t = T dims; \
  static char name##_tag;         \
  name##_shared_t& name = *static_cast<name##_shared_t*>(::sim::shared_variable(&name##_tag, sizeof(name##_shared_t)))
#define GPU_DYNAMIC(T, name) T* name = static_cast<T*>(::sim::shared_dynamic())
// Its 32-bit address.
inline uint32_t smem_addr(const void* p) { return ::sim::shared_offset(p); }

// Memory accesses with a hint for the caches, which are not emulated.
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline T load_stream(const T* p) { return *p; }
template <class T> inline void store_stream(T* p, const T& v) { *p = v; }

// An aligned 16-byte word of which some bytes are an operand's, the rest padding or a neighbour's: no checker may look
// at it.
__attribute__((no_sanitize("address", "thread"), noinline)) inline uint4 load_whole_word(const uint4* p) { return *p; }
inline void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
inline void store8(void* p, float2 v) { *static_cast<float2*>(p) = v; }
inline void forget(int&) {}
inline void forget(uint32_t&) {}
inline void forget(int64_t&) {}
inline void forget(float&) {}
template <class T> inline void forget(T*&) {}
inline uint32_t thread_again() { return threadIdx.x; }

// Atomics. Fibers do not interrupt each other, but blocks run on several threads of the operating system.
template <class T> GPU_QUIET inline T atomicAdd(T* p, T v) {
  T old, sum;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    sum = old + v;
  } while (!__atomic_compare_exchange(p, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
GPU_QUIET inline int atomicMin(int* p, int v) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
