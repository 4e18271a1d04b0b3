// Numbers and reductions that more than one kernel needs. Included by gpu.cuh, on both sides.
#pragma once

DEV float to_float(float x) { return x; }
DEV float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> DEV T from_float(float x);
template <> DEV float from_float<float>(float x) { return x; }
template <> DEV bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

// Two bf16 in a register, the first in the lower half, as matrix fragments have them.
DEV uint32_t pack_bf16(float low, float high) {
  return (uint32_t)__bfloat16_as_ushort(__float2bfloat16(high)) << 16 | __bfloat16_as_ushort(__float2bfloat16(low));
}
DEV float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// As many elements as one 16-byte access moves; a pointer to one must be 16-byte aligned.
template <class T> struct alignas(16) Pack { static constexpr int N = 16 / sizeof(T); T x[N]; };
template <class T> DEV Pack<T> load_pack(const T* p) { return *reinterpret_cast<const Pack<T>*>(p); }
template <class T> DEV void store_pack(T* p, const Pack<T>& v) { *reinterpret_cast<Pack<T>*>(p) = v; }
DEV bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Over a warp, by halves: 16, 8, 4, 2, 1 lanes apart. Every lane gets the result; all 32 lanes take part.
DEV float warp_sum(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}
// Several sums at once: their shuffles run side by side.
template <int N> DEV void warp_sums(float (&x)[N]) {
  for (int apart = 16; apart > 0; apart /= 2)
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(~0u, x[i], apart);
}
DEV float warp_max(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}

// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011), the same words as base/philox.rs.
struct Words { uint32_t w[4]; };
DEV Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; round++) {
    if (round > 0) { k0 += 0x9E3779B9u; k1 += 0xBB67AE85u; }
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c0 = n0; c1 = (uint32_t)p1; c2 = n2; c3 = (uint32_t)p0;
  }
  return {{c0, c1, c2, c3}};
}
// The words of elements 4 * block to 4 * block + 3 of op `op`: Stream::words.
DEV Words random_words(const Now* now, uint32_t op, uint64_t block) {
  return philox((uint32_t)block, op, now->microbatch, now->step, (uint32_t)now->seed, (uint32_t)(now->seed >> 32));
}

// graph::Activation, in its order; and what is added to a kind where its gradient is meant.
enum Activation {
  ACTIVATION_NONE = 0,
  ACTIVATION_RELU = 1,
  ACTIVATION_GELU_TANH = 2,
  ACTIVATION_GELU_ERF = 3,
  ACTIVATION_SILU = 4,
  ACTIVATION_GRAD = 5
};

// GELU's two forms of x P(x), in 7 to 15 instructions by the fast exponential, its factor log2(e) in the constants:
// within 3e-7 of the largest value around, so the norm of an f32 result is as good as with tanhf and erff, which take
// twice as many.
//
// By tanh: P(x) = (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). `rest` is 1 - P(x), without
// cancellation.
DEV float tanh_share(float x, float& rest) {
  float e = exp2_fast(x * (-2.3022081983f - 0.1029432386f * (x * x)));
  float share = reciprocal_fast(1 + e);
  rest = x > 0 ? e * share : 1 - share;
  return share;
}

// By the error function: P(x) is the normal distribution's, through Abramowitz & Stegun 1964, equation 7.1.26, whose
// error is at most 7.5e-8 here and falls with exp(-x^2 / 2) in the tails. `bell` is exp(-x^2 / 2).
DEV float normal_share(float x, float& bell) {
  bell = exp2_fast(-0.7213475204f * (x * x));
  float t = reciprocal_fast(1 + 0.3275911f * 0.7071067812f * fabsf(x));
  float tail = 0.5f * bell * t *
               (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return x < 0 ? tail : 1 - tail;
}

// The logistic function, 1 / (1 + exp(-x)), and `rest`, 1 less that without cancellation.
DEV float logistic(float x, float& rest) {
  float e = exp2_fast(-1.4426950409f * x);
  float share = reciprocal_fast(1 + e);
  rest = x > 0 ? e * share : 1 - share;
  return share;
}

DEV float activate(int kind, float x) {
  float unused;
  switch (kind) {
    case ACTIVATION_RELU: return x > 0 ? x : (x != x ? x : 0.0f);
    case ACTIVATION_GELU_TANH: return x * tanh_share(x, unused);
    case ACTIVATION_GELU_ERF: return x * normal_share(x, unused);
    case ACTIVATION_SILU: return x * logistic(x, unused);
    default: return x;
  }
}
// Of N values at once: the kind is looked at once.
template <int N> DEV void activate_each(int kind, float (&x)[N]) {
  if (kind == ACTIVATION_RELU)
    for (int i = 0; i < N; i++) x[i] = activate(ACTIVATION_RELU, x[i]);
  else if (kind == ACTIVATION_GELU_TANH)
    for (int i = 0; i < N; i++) x[i] = activate(ACTIVATION_GELU_TANH, x[i]);
  else if (kind == ACTIVATION_GELU_ERF)
    for (int i = 0; i < N; i++) x[i] = activate(ACTIVATION_GELU_ERF, x[i]);
  else if (kind == ACTIVATION_SILU)
    for (int i = 0; i < N; i++) x[i] = activate(ACTIVATION_SILU, x[i]);
}
DEV float activate_grad(int kind, float x) {
  switch (kind) {
    case ACTIVATION_RELU: return x > 0 ? 1.0f : 0.0f;
    case ACTIVATION_GELU_TANH: {
      float rest, share = tanh_share(x, rest);
      float square = fminf(x * x, 1e38f); // finite: far out share * rest is 0
      return share + x * (share * rest) * (1.5957691216f + 0.2140644488f * square);
    }
    case ACTIVATION_GELU_ERF: {
      float bell, share = normal_share(x, bell);
      return share + x * 0.3989422804f * bell;
    }
    case ACTIVATION_SILU: {
      float rest, share = logistic(x, rest);
      return share + x * (share * rest);
    }
    default: return 1.0f;
  }
}
// The gradient of what went into an activation, `d` being that of what came out.
DEV float through_activation(int kind, float d, float x) {
  if (kind == ACTIVATION_RELU) return x <= 0 ? 0.0f : d;  // chosen, not multiplied: an infinite gradient is dropped too
  return d * activate_grad(kind, x);
}
// Of N values at once: the kind is looked at once.
template <int N> DEV void through_each(int kind, float (&d)[N], const float (&x)[N]) {
  if (kind == ACTIVATION_RELU)
    for (int i = 0; i < N; i++) d[i] = through_activation(ACTIVATION_RELU, d[i], x[i]);
  else if (kind == ACTIVATION_GELU_TANH)
    for (int i = 0; i < N; i++) d[i] = through_activation(ACTIVATION_GELU_TANH, d[i], x[i]);
  else if (kind == ACTIVATION_GELU_ERF)
    for (int i = 0; i < N; i++) d[i] = through_activation(ACTIVATION_GELU_ERF, d[i], x[i]);
  else if (kind == ACTIVATION_SILU)
    for (int i = 0; i < N; i++) d[i] = through_activation(ACTIVATION_SILU, d[i], x[i]);
}
