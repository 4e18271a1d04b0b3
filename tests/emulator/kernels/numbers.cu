// Conversions, stated rounding, bits. One thread an element; out has as many rows as operations.
#include "gpu.cuh"

// out (20, n) f32; x, y (n) f32.
extern "C" __global__ void test_numbers(float* out, const float* x, const float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float a = load_stream(x + i), b = __ldg(y + i);
  const float2 both = unpack_bf16(pack_bf16(a, b));
  const bf162 pair = __floats2bfloat162_rn(a, b);
  float* o = out + i;
  store_stream(o + 0 * n, __bfloat162float(__float2bfloat16_rn(a)));
  o[1 * n] = __uint_as_float(to_tf32(a));
  o[2 * n] = both.x;
  o[3 * n] = both.y;
  o[4 * n] = __low2float(pair) + __high2float(pair);
  o[5 * n] = __fmaf_rn(a, b, -__fmul_rn(a, b));
  o[6 * n] = __fadd_rn(a, b);
  o[7 * n] = __fsub_rn(a, b);
  o[8 * n] = __fdiv_rn(a, b);
  o[9 * n] = __fsqrt_rn(fabsf(a));
  o[10 * n] = (float)__fma_rn((double)a, (double)b, -__dmul_rn((double)a, 0.1));
  o[11 * n] = (float)__dadd_rn(__dsub_rn((double)a, 1e9), 1e9);
  o[12 * n] = (float)__ddiv_rn((double)a, __dsqrt_rn((double)fabsf(b)));
  o[13 * n] = exp2_fast(b);
  o[14 * n] = min(a, b) + 2 * max(a, b);
  o[15 * n] = (float)__popc(__float_as_uint(a));
  o[16 * n] = (float)__clz(__float_as_int(b));
  o[17 * n] = (float)__ffs(__float_as_int(a));
  o[18 * n] = (float)__umulhi(__float_as_uint(a), __float_as_uint(b));
  o[19 * n] = (float)__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x5410);
}
GPU_EXPORT(test_numbers)

// out (n) 16-byte packs = in, by the wide streaming accesses.
extern "C" __global__ void test_streams(Pack<bf16>* out, const Pack<bf16>* in, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) store_stream(out + i, load_stream(in + i));
}
GPU_EXPORT(test_streams)
