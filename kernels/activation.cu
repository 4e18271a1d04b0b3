// Activation functions and their gradients (GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415).
//   forward  out[i] = activation(x[i]); out may be x.
//   grad     d_x[i] = d_out[i] * activation'(x[i]), x being what the activation was given; d_x may be d_out.
// All f32 or all bf16, computed in f32 and rounded once. Elementwise: blocks of 256 threads, 4 packs of 16 bytes a
// thread (gpu/pointwise.cuh), one pass. `kind` is graph::Activation; the branch on it stands outside the loop.
//
// Bytes an element (f32 / bf16): forward 8 / 4, grad 12 / 6. relu and every f32 case are loads and stores: expected at
// 90-95 % of the copy rate. In bf16 a GELU's 7 to 15 instructions are nearly as long as its bytes take: 85-95 % is
// expected.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

template <int KIND, class T> DEV void activate_all(T* out, const T* x, int64_t n) {
  map_each(out, x, n, [](float v) { return activate(KIND, v); });
}
template <class T> DEV void forward_of_kind(T* out, const T* x, int64_t n, int kind) {
  switch (kind) {
    case ACTIVATION_RELU: return activate_all<ACTIVATION_RELU>(out, x, n);
    case ACTIVATION_GELU_TANH: return activate_all<ACTIVATION_GELU_TANH>(out, x, n);
    case ACTIVATION_GELU_ERF: return activate_all<ACTIVATION_GELU_ERF>(out, x, n);
    case ACTIVATION_SILU: return activate_all<ACTIVATION_SILU>(out, x, n);
    default: return activate_all<ACTIVATION_NONE>(out, x, n);
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    activation_forward_f32(float* out, const float* x, int64_t n, int kind) {
  forward_of_kind(out, x, n, kind);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    activation_forward_bf16(bf16* out, const bf16* x, int64_t n, int kind) {
  forward_of_kind(out, x, n, kind);
}
GPU_EXPORT(activation_forward_f32)
GPU_EXPORT(activation_forward_bf16)

template <int KIND, class T> DEV void activate_grad_all(T* d_x, const T* d_out, const T* x, int64_t n) {
  zip_each(d_x, d_out, x, n, [](float d, float v) { return through_activation(KIND, d, v); });
}
template <class T> DEV void grad_of_kind(T* d_x, const T* d_out, const T* x, int64_t n, int kind) {
  switch (kind) {
    case ACTIVATION_RELU: return activate_grad_all<ACTIVATION_RELU>(d_x, d_out, x, n);
    case ACTIVATION_GELU_TANH: return activate_grad_all<ACTIVATION_GELU_TANH>(d_x, d_out, x, n);
    case ACTIVATION_GELU_ERF: return activate_grad_all<ACTIVATION_GELU_ERF>(d_x, d_out, x, n);
    case ACTIVATION_SILU: return activate_grad_all<ACTIVATION_SILU>(d_x, d_out, x, n);
    default: return activate_grad_all<ACTIVATION_NONE>(d_x, d_out, x, n);
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    activation_grad_f32(float* d_x, const float* d_out, const float* x, int64_t n, int kind) {
  grad_of_kind(d_x, d_out, x, n, kind);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    activation_grad_bf16(bf16* d_x, const bf16* d_out, const bf16* x, int64_t n, int kind) {
  grad_of_kind(d_x, d_out, x, n, kind);
}
GPU_EXPORT(activation_grad_f32)
GPU_EXPORT(activation_grad_bf16)
