// Squared ReLU (So et al. 2021, "Primer", arXiv:2109.08668), an op that the crate does not have.
//   forward: out[i] = max(x[i], 0)^2;  grad: d_x[i] = 2 max(x[i], 0) d_out[i].  n elements each, f32 or bf16.
// One thread an element. Deterministic: nothing is shared.
#include "gpu.cuh"

DEV int64_t element() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
DEV float relu(float x) { return x > 0 ? x : 0; }

template <class T> DEV void forward(T* out, const T* x, int64_t n) {
  int64_t i = element();
  if (i < n) out[i] = from_float<T>(relu(to_float(x[i])) * relu(to_float(x[i])));
}
template <class T> DEV void grad(T* d_x, const T* d_out, const T* x, int64_t n) {
  int64_t i = element();
  if (i < n) d_x[i] = from_float<T>(2 * relu(to_float(x[i])) * to_float(d_out[i]));
}

extern "C" __global__ void __launch_bounds__(256) squared_relu_f32(float* out, const float* x, int64_t n) { forward(out, x, n); }
GPU_EXPORT(squared_relu_f32)
extern "C" __global__ void __launch_bounds__(256) squared_relu_bf16(bf16* out, const bf16* x, int64_t n) { forward(out, x, n); }
GPU_EXPORT(squared_relu_bf16)
// The gradient op's inputs are d_out, then the op's inputs and outputs.
extern "C" __global__ void __launch_bounds__(256)
squared_relu_grad_f32(float* d_x, const float* d_out, const float* x, const float*, int64_t n) { grad(d_x, d_out, x, n); }
GPU_EXPORT(squared_relu_grad_f32)
extern "C" __global__ void __launch_bounds__(256)
squared_relu_grad_bf16(bf16* d_x, const bf16* d_out, const bf16* x, const bf16*, int64_t n) { grad(d_x, d_out, x, n); }
GPU_EXPORT(squared_relu_grad_bf16)
