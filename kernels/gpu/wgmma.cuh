// Device side, sm_90a: warpgroup products, d (64, N) = a (64, 16) * b (16, N) + d where `accumulate` is not 0.
//
// wgmma_64xNx16<N, A_MN, B_MN>: a and b by descriptors; A_MN and B_MN say that M or N, not K, runs along their rows. Or
// a from registers, in mma_16816's layout: wgmma_64xNx16<N, B_MN>(d, registers, b, accumulate). Thread t of the
// warpgroup holds in d[4 j + 2 h + e] the element (t / 32 * 16 + 8 h + t % 32 / 4, 8 j + t % 4 * 2 + e). Registers may
// be touched before the first product after wgmma_fence(), and after wgmma_wait<N>(), which returns once at most the N
// latest groups are on their way.
#pragma once

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Operands of the assembly: 8 accumulators, then multiples of them.
#define WGMMA_D8(i)                                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),          \
      "+f"(d[i + 7])
#define WGMMA_D16(i) WGMMA_D8(i), WGMMA_D8(i + 8)
#define WGMMA_D32(i) WGMMA_D16(i), WGMMA_D16(i + 16)
#define WGMMA_D48(i) WGMMA_D32(i), WGMMA_D16(i + 32)
#define WGMMA_D64(i) WGMMA_D32(i), WGMMA_D32(i + 32)
#define WGMMA_D96(i) WGMMA_D64(i), WGMMA_D32(i + 64)
#define WGMMA_D112(i) WGMMA_D96(i), WGMMA_D16(i + 96)
#define WGMMA_D128(i) WGMMA_D64(i), WGMMA_D64(i + 64)
// Their names in it.
#define WGMMA_NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_NAMES48 WGMMA_NAMES32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_NAMES64 WGMMA_NAMES48 "," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_NAMES96 WGMMA_NAMES64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," \
  "%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_NAMES112 WGMMA_NAMES96 "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define WGMMA_NAMES128 WGMMA_NAMES112 "," \
  "%112,%113,%114,%115,%116,%117,%118,%119," \
  "%120,%121,%122,%123,%124,%125,%126,%127"

// One product. The predicate is set from `accumulate`; 1, 1 are the signs of a and b.
#define WGMMA_FROM_SHARED(N, HALF, ACCUMULATE, A, B, A_MAJOR, B_MAJOR)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES##HALF                          \
               "}, "                                                                                                   \
               "%" #A ", %" #B ", p, 1, 1, %" #A_MAJOR ", %" #B_MAJOR ";\n}"                                           \
               : WGMMA_D##HALF(0)                                                                                      \
               : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN))
#define WGMMA_FROM_REGISTERS(N, HALF, ACCUMULATE, A0, A1, A2, A3, B, B_MAJOR)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES##HALF                          \
               "}, "                                                                                                   \
               "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #B_MAJOR ";\n}"                            \
               : WGMMA_D##HALF(0)                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_MN))

template <int N, int A_MN = 0, int B_MN = 0>
DEV void wgmma_64xNx16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 224 || N == 256, "a width that has no wrapper");
  if constexpr (N == 64) WGMMA_FROM_SHARED(64, 32, 34, 32, 33, 35, 36);
  if constexpr (N == 96) WGMMA_FROM_SHARED(96, 48, 50, 48, 49, 51, 52);
  if constexpr (N == 128) WGMMA_FROM_SHARED(128, 64, 66, 64, 65, 67, 68);
  if constexpr (N == 192) WGMMA_FROM_SHARED(192, 96, 98, 96, 97, 99, 100);
  if constexpr (N == 224) WGMMA_FROM_SHARED(224, 112, 114, 112, 113, 115, 116);
  if constexpr (N == 256) WGMMA_FROM_SHARED(256, 128, 130, 128, 129, 131, 132);
}
template <int N, int B_MN = 0>
DEV void wgmma_64xNx16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 224 || N == 256, "a width that has no wrapper");
  if constexpr (N == 64) WGMMA_FROM_REGISTERS(64, 32, 37, 32, 33, 34, 35, 36, 38);
  if constexpr (N == 96) WGMMA_FROM_REGISTERS(96, 48, 53, 48, 49, 50, 51, 52, 54);
  if constexpr (N == 128) WGMMA_FROM_REGISTERS(128, 64, 69, 64, 65, 66, 67, 68, 70);
  if constexpr (N == 192) WGMMA_FROM_REGISTERS(192, 96, 101, 96, 97, 98, 99, 100, 102);
  if constexpr (N == 224) WGMMA_FROM_REGISTERS(224, 112, 117, 112, 113, 114, 115, 116, 118);
  if constexpr (N == 256) WGMMA_FROM_REGISTERS(256, 128, 133, 128, 129, 130, 131, 132, 134);
}
DEV void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  wgmma_64xNx16<64>(d, a, b, accumulate);
}
