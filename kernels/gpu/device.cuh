// Device side: types, shared memory, barriers, memory accesses with a hint, fast functions.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
typedef __nv_bfloat162 bf162;
#define DEV __device__ __forceinline__
#define GPU_QUIET

// A variable in shared memory: GPU_SHARED(float, sums, [4][32]). The dynamic part starts at GPU_DYNAMIC(float, name).
#define GPU_SHARED(T, name, dims) __shared__ __align__(1024) T name dims
extern __shared__ __align__(1024) unsigned char gpu_dynamic_[];
#define GPU_DYNAMIC(T, name) T* name = reinterpret_cast<T*>(gpu_dynamic_)
#define GPU_EXPORT(kernel)

// Its 32-bit address.
DEV uint32_t smem_addr(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Named barriers 0 to 15 for a number of threads; `arrive` does not wait.
DEV void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Values of 2, 4, 8 or 16 bytes that are read or written once: they leave the caches first.
template <int BYTES> struct StreamWord;
template <> struct StreamWord<2> { typedef unsigned short T; };
template <> struct StreamWord<4> { typedef unsigned int T; };
template <> struct StreamWord<8> { typedef uint2 T; };
template <> struct StreamWord<16> { typedef uint4 T; };
template <class T> DEV T load_stream(const T* p) {
  typedef typename StreamWord<sizeof(T)>::T Word;
  const Word word = __ldcs(reinterpret_cast<const Word*>(p));
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
template <class T> DEV void store_stream(T* p, const T& value) {
  typedef typename StreamWord<sizeof(T)>::T Word;
  Word word;
  memcpy(&word, &value, sizeof word);
  __stcs(reinterpret_cast<Word*>(p), word);
}

// An aligned 16-byte word of which some bytes are an operand's: no access check looks at the others, which are there
// all the same.
DEV uint4 load_whole_word(const uint4* p) { return *p; }

// One store of 16 or 8 bytes; p is a multiple of that. The compiler splits a struct's store when it may not prove its
// parts adjacent.
DEV void store16(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEV void store8(void* p, float2 v) {
  asm volatile("st.global.v2.f32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x), "f"(v.y) : "memory");
}

// The value comes as news to the compiler: nothing that it computed from it, or loaded through it, stays in registers.
// No instruction.
DEV void forget(int& word) { asm volatile("" : "+r"(word)); }
DEV void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }
DEV void forget(int64_t& word) { asm volatile("" : "+l"(word)); }
DEV void forget(float& value) { asm volatile("" : "+f"(value)); }
// threadIdx.x, read anew: it takes no register until then.
DEV uint32_t thread_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
template <class T> DEV void forget(T*& p) { asm volatile("" : "+l"(p)); }

// 2^x within 2 ulp.
DEV float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp; 0 from 2^126 on.
DEV float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tf32: f32 with 10 bits of fraction, rounded to nearest, ties away from zero.
DEV uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
