// The kernels' only include. Device: thin wrappers over inline PTX. Host: the same names over sim.h.
// Rules for kernel sources: no inline asm outside this file; GPU_SHARED / GPU_DYNAMIC for shared
// memory; cross-lane and cross-thread traffic only through these wrappers and CUDA intrinsics.
#pragma once
#include <stdint.h>
// What changes from microbatch to microbatch while a launch stays the same. `device/cuda/launch.rs` writes it.
struct Now { uint64_t seed; double loss_scale; uint32_t step, microbatch, accumulate, unused; };
#ifdef __CUDACC__ // ============================================================ device
#include <cuda.h>
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
#define GPU_SHARED(T, name, dims) __shared__ __align__(1024) T name dims
#define GPU_DYNAMIC(T, name) extern __shared__ __align__(1024) unsigned char gpu_dynamic_[]; T* name = reinterpret_cast<T*>(gpu_dynamic_)
#define GPU_EXPORT(k)
#define DEV __device__ __forceinline__
DEV uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV void bar_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
DEV void bar_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }
DEV void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); }
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory"); }
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory"); }
DEV void cp_async16(void* dst, const void* src) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(dst)), "l"(src) : "memory"); }
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEV void mbar_init(uint64_t* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(b)), "r"(n) : "memory"); }
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory"); }
DEV void mbar_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(b)) : "memory"); }
DEV void mbar_expect_tx(uint64_t* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(b)), "r"(bytes) : "memory"); }
DEV void mbar_wait(uint64_t* b, int parity) {
  asm volatile("{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra W;\nD:\n}" ::"r"(smem_addr(b)), "r"(parity) : "memory"); }
DEV void proxy_fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEV void tma_load_2d(void* dst, const CUtensorMap* m, int x, int y, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3}], [%4];"
    ::"r"(smem_addr(dst)), "l"(m), "r"(x), "r"(y), "r"(smem_addr(bar)) : "memory"); }
// 128-byte swizzle, K-major operand: rows of 64 bf16, 8-row atoms of 1024 bytes.
DEV uint64_t wgmma_desc(const void* p) { return ((uint64_t)(smem_addr(p) & 0x3FFFF) >> 4) | (1ull << 16) | ((uint64_t)(1024 >> 4) << 32) | (1ull << 62); }
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
DEV void wgmma_64x64x16(float (&d)[32], uint64_t da, uint64_t db, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "l"(da), "l"(db), "r"(accumulate)); }
// The value comes as news to the compiler: nothing that it computed from it, or loaded through it, stays in registers. No instruction.
DEV void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }
template <class T> DEV void forget(T*& p) { asm volatile("" : "+l"(p)); }
#else // ======================================================================== host
#include "emulator/sim.h"
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define DEV inline
#define threadIdx (::sim::cur->threadIdx)
#define blockIdx (::sim::cur->blockIdx)
#define blockDim (::sim::cur->blockDim)
#define gridDim (::sim::cur->gridDim)
#define GPU_QUIET __attribute__((no_sanitize("thread")))
struct bf16 { uint16_t bits; };
struct alignas(4) bf162 { bf16 x, y; };
inline float __bfloat162float(bf16 v) { uint32_t u = (uint32_t)v.bits << 16; float f; memcpy(&f, &u, 4); return f; }
inline bf16 __float2bfloat16(float f) {                      // round to nearest even, NaN kept
  uint32_t u; memcpy(&u, &f, 4);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  return {(uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16)}; }
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
#include <algorithm>
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
template <class T> T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
template <class T> T atomicAdd(T* p, T v) { T o = *p; *p = o + v; return o; }   // fibers do not preempt
#define GPU_SHARED(T, name, dims) \
  using name##_shared_t = T dims; static char name##_tag; \
  name##_shared_t& name = *static_cast<name##_shared_t*>(::sim::shared_var(&name##_tag, sizeof(name##_shared_t), 1024))
#define GPU_DYNAMIC(T, name) T* name = static_cast<T*>(::sim::shared_dynamic())
inline void forget(uint32_t&) {}
template <class T> void forget(T*&) {}
#define SITE_ARG ::sim::Site site = {__builtin_FUNCTION(), __builtin_FILE(), __builtin_LINE()}
inline void __syncthreads(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::bar_sync(0, 0, {"__syncthreads", f, l}); }
inline void bar_sync(int id, int n, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::bar_sync(id, n, {"bar.sync", f, l}); }
inline void bar_arrive(int id, int n, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::bar_arrive(id, n, {"bar.arrive", f, l}); }
inline void __syncwarp(unsigned m = ~0u, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::warp_collective(m, nullptr, nullptr, {"__syncwarp", f, l}); }
namespace sim {
struct Shfl { uint64_t in, out; int src; };
template <class T> GPU_QUIET T shfl(unsigned mask, T v, int src, Site s) {
  Shfl a{0, 0, src}; memcpy(&a.in, &v, sizeof v);
  warp_collective(mask, [](void** p, int n) GPU_QUIET { for (int i = 0; i < n; i++) if (p[i]) { auto* a = (Shfl*)p[i]; if (!p[a->src & 31]) fail("shuffle reads lane %d, which is not in the mask", a->src); a->out = ((Shfl*)p[a->src & 31])->in; } }, &a, s);
  T r; memcpy(&r, &a.out, sizeof r); return r; }
}
#define SHFL(name, expr) template <class T> T name(unsigned m, T v, int k, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { int lane = ::sim::cur->lane; return ::sim::shfl(m, v, expr, {#name, f, l}); }
SHFL(__shfl_xor_sync, lane ^ k)
SHFL(__shfl_sync, k)
SHFL(__shfl_down_sync, lane + k > 31 ? lane : lane + k)
SHFL(__shfl_up_sync, lane < k ? lane : lane - k)
namespace sim {
inline GPU_QUIET float b2f(uint32_t v, int hi) { uint32_t u = hi ? v & 0xFFFF0000 : v << 16; float f; memcpy(&f, &u, 4); return f; }
struct Mma { float* d; const uint32_t *a, *b; };
inline GPU_QUIET void mma_16816_op(void** p, int) {
  float A[16][16], B[8][16], C[16][8];          // B transposed, so that both run along k
  for (int l = 0; l < 32; l++) { auto* m = (Mma*)p[l]; int g = l / 4, t = l % 4 * 2;
    for (int h = 0; h < 2; h++) for (int e = 0; e < 2; e++) { A[g][t + 8 * h + e] = b2f(m->a[2 * h], e); A[g + 8][t + 8 * h + e] = b2f(m->a[2 * h + 1], e); B[g][t + 8 * h + e] = b2f(m->b[h], e); }
    C[g][t] = m->d[0]; C[g][t + 1] = m->d[1]; C[g + 8][t] = m->d[2]; C[g + 8][t + 1] = m->d[3]; }
  for (int i = 0; i < 16; i++) for (int j = 0; j < 8; j++) { float s = 0; for (int k = 0; k < 16; k++) s += A[i][k] * B[j][k]; C[i][j] += s; }
  for (int l = 0; l < 32; l++) { auto* m = (Mma*)p[l]; int g = l / 4, t = l % 4 * 2; m->d[0] = C[g][t]; m->d[1] = C[g][t + 1]; m->d[2] = C[g + 8][t]; m->d[3] = C[g + 8][t + 1]; }
}
struct Ldm { uint32_t* r; const uint16_t* row; uint16_t v[8]; };
}
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
  sim::Mma m{d, a, b}; sim::warp_collective(~0u, sim::mma_16816_op, &m, {"mma.sync", f, l}); }
template <bool TRANS> inline void sim_ldmatrix(uint32_t (&r)[4], const void* row, sim::Site s) {
  if ((uintptr_t)row % 16) sim::fail("ldmatrix row at %s:%d is not 16-byte aligned", s.file, s.line);
  sim::shared_offset(row); sim::Ldm a{r, (const uint16_t*)row, {}};
  for (int i = 0; i < 8; i++) a.v[i] = a.row[i];               // each lane reads its row: the checkers see who reads what
  sim::warp_collective(~0u, [](void** p, int) GPU_QUIET {
    for (int l = 0; l < 32; l++) for (int m = 0; m < 4; m++) { uint32_t w = 0;
      for (int e = 0; e < 2; e++) { int row = l / 4, col = l % 4 * 2 + e; if (TRANS) std::swap(row, col); w |= (uint32_t)((sim::Ldm*)p[m * 8 + row])->v[col] << 16 * e; }
      ((sim::Ldm*)p[l])->r[m] = w; } }, &a, s); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim_ldmatrix<false>(r, row, {"ldmatrix", f, l}); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim_ldmatrix<true>(r, row, {"ldmatrix.trans", f, l}); }
inline void cp_async16(void* d, const void* s) {
  if (((uintptr_t)d | (uintptr_t)s) % 16) sim::fail("cp.async operands are not 16-byte aligned");
  for (int i = 0; i < 2; i++) { volatile uint64_t t = ((const volatile uint64_t*)s)[i]; (void)t; }   // touched by this thread, so the checkers see it
  sim::cp_async(d, s, 16); }
inline void cp_async_commit() { sim::cp_async_commit(); }
template <int N> inline void cp_async_wait() { sim::cp_async_wait(N); }
inline void mbar_init(uint64_t* b, int n) { sim::mbar_init(b, n); }
inline void mbar_init_fence() {}
inline void mbar_arrive(uint64_t* b) { sim::mbar_arrive(b, 1, 0); }
inline void mbar_expect_tx(uint64_t* b, int bytes) { sim::mbar_arrive(b, 1, bytes); }
inline void mbar_wait(uint64_t* b, int parity, const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::mbar_wait(b, parity, {"mbarrier.try_wait", f, l}); }
inline void proxy_fence_shared() { sim::proxy_fence(); }
struct alignas(64) CUtensorMap { const char* base; uint64_t dims[2], pitch; uint32_t box[2], swizzle, elem; uint64_t pad[8]; };
inline void tma_load_2d(void* dst, const CUtensorMap* m, int x, int y, uint64_t* bar, const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
  uint32_t base = sim::shared_offset(dst); CUtensorMap t = *m;
  if (base % 128 || (t.swizzle == 128 && base % 1024)) sim::fail("TMA destination %u at %s:%d is misaligned", base, f, l);
  sim::tma_submit(dst, t.box[0] * t.box[1] * t.elem, bar, [=]() GPU_QUIET {
    for (uint32_t r = 0; r < t.box[1]; r++) for (uint32_t c = 0; c < t.box[0]; c++) {
      uint32_t o = base + (r * t.box[0] + c) * t.elem; if (t.swizzle == 128) o ^= (o >> 7 & 7) << 4;
      long gx = (long)x + c, gy = (long)y + r; char* d = (char*)sim::shared_pointer(o);
      if (gx < 0 || gy < 0 || gx >= (long)t.dims[0] || gy >= (long)t.dims[1]) memset(d, 0, t.elem); else memcpy(d, t.base + gy * t.pitch + gx * t.elem, t.elem); } }, {"TMA load", f, l}); }
inline uint64_t wgmma_desc(const void* p) { return ((uint64_t)(sim::shared_offset(p) & 0x3FFFF) >> 4) | (1ull << 16) | ((uint64_t)(1024 >> 4) << 32) | (1ull << 62); }
inline void wgmma_fence() {}
inline void wgmma_commit(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::wgmma_commit({"wgmma.commit_group", f, l}); }
template <int N> inline void wgmma_wait(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { sim::wgmma_wait(N, {"wgmma.wait_group", f, l}); }
namespace sim {
struct Wg { float* d; uint64_t da, db; int acc; const char* f; int l; };
inline GPU_QUIET float wg_elem(uint64_t desc, int r, int k) {         // K-major, 128-byte swizzle
  uint32_t start = (desc & 0x3FFF) << 4, sbo = (desc >> 32 & 0x3FFF) << 4;
  uint32_t o = start + r / 8 * sbo + r % 8 * 128 + k * 2; o ^= (o >> 7 & 7) << 4;
  uint16_t b; memcpy(&b, shared_pointer(o), 2); return b2f(b, 0); }
template <int N> GPU_QUIET void wgmma_op(void** p, int) {
  Wg w = *(Wg*)p[0]; float* d[128];
  for (int i = 0; i < 128; i++) { d[i] = ((Wg*)p[i])->d; if (((Wg*)p[i])->da != w.da || ((Wg*)p[i])->db != w.db) fail("wgmma descriptors differ within the warpgroup"); }
  std::tuple<std::array<float*, 128>> keep; for (int i = 0; i < 128; i++) std::get<0>(keep)[i] = d[i];
  // the 64 (N) rows x 128 bytes each operand's swizzle atoms span; this k-step reads 32 bytes of each row
  wgmma_submit(shared_pointer((w.da & 0x3FFF) << 4 & ~1023u), 64 * 128, shared_pointer((w.db & 0x3FFF) << 4 & ~1023u), N * 128, [=]() GPU_QUIET {
    static float A[64][16], B[N][16];
    for (int k = 0; k < 16; k++) { for (int i = 0; i < 64; i++) A[i][k] = wg_elem(w.da, i, k); for (int j = 0; j < N; j++) B[j][k] = wg_elem(w.db, j, k); }
    for (int t = 0; t < 128; t++) { float* d = std::get<0>(keep)[t]; int row = t / 32 * 16 + t % 32 / 4;
      for (int j = 0; j < N / 8; j++) for (int e = 0; e < 4; e++) { int r = row + e / 2 * 8, c = j * 8 + t % 4 * 2 + e % 2; float s = 0; for (int k = 0; k < 16; k++) s += A[r][k] * B[c][k]; d[4 * j + e] = (w.acc ? d[4 * j + e] : 0) + s; } } });
}
}
inline void wgmma_64x64x16(float (&d)[32], uint64_t da, uint64_t db, int acc, const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
  sim::Wg w{d, da, db, acc, f, l}; sim::warpgroup_collective(sim::wgmma_op<64>, &w, {"wgmma.mma_async", f, l}); }
// GPU_EXPORT(k): `int k_sim(const sim::Launch*, void** args)`, args as cuLaunchKernel takes them.
namespace sim { template <auto K> struct Entry; template <class... A, void (*K)(A...)> struct Entry<K> {
  template <size_t... I> static void call(void** p, std::index_sequence<I...>) { K(*static_cast<std::remove_reference_t<A>*>(p[I])...); }
  static void run(void** p) { call(p, std::index_sequence_for<A...>{}); } }; }
#define GPU_EXPORT(k) extern "C" int k##_sim(const ::sim::Launch* l, void** args) { return ::sim::launch(*l, ::sim::Entry<k>::run, args); }
#endif
#include "gpu/math.cuh"
#include "gpu/row.cuh"
