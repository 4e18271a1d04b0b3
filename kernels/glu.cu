// Gated linear units and their gradients (Shazeer 2020, arXiv:2002.05202).
//   forward  out[i] = activation(gate[i]) * up[i]; out may be gate.
//   grad     d_gate[i] = d_out[i] * up[i] * activation'(gate[i]), d_up[i] = d_out[i] * activation(gate[i]); d_gate may be d_out.
// All f32 or all bf16, computed in f32 and rounded once. Elementwise: blocks of 256 threads, 4 packs of 16 bytes a
// thread of each operand (gpu/pointwise.cuh), one pass. `kind` is graph::Activation; the branch on it stands outside
// the loop.
//
// Bytes an element (f32 / bf16): forward 12 / 6, grad 20 / 10. In bf16 silu and its gradient are 8 to 14 instructions
// an element, two of them at an eighth of the rate: on an H200 a quarter of the time that the bytes take. 90 % of the
// copy rate is expected. A gradient's three operands are 48 bytes a pack, 2 packs on their way: 74 KB a multiprocessor
// with the 3 blocks that registers are left for.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

template <int KIND, class T> DEV void gate_all(T* out, const T* gate, const T* up, int64_t n) {
  zip_each(out, gate, up, n, [](float g, float u) { return activate(KIND, g) * u; });
}
template <class T> DEV void forward_of_kind(T* out, const T* gate, const T* up, int64_t n, int kind) {
  switch (kind) {
    case ACTIVATION_RELU: return gate_all<ACTIVATION_RELU>(out, gate, up, n);
    case ACTIVATION_GELU_TANH: return gate_all<ACTIVATION_GELU_TANH>(out, gate, up, n);
    case ACTIVATION_GELU_ERF: return gate_all<ACTIVATION_GELU_ERF>(out, gate, up, n);
    case ACTIVATION_SILU: return gate_all<ACTIVATION_SILU>(out, gate, up, n);
    default: return gate_all<ACTIVATION_NONE>(out, gate, up, n);
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    glu_forward_f32(float* out, const float* gate, const float* up, int64_t n, int kind) {
  forward_of_kind(out, gate, up, n, kind);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    glu_forward_bf16(bf16* out, const bf16* gate, const bf16* up, int64_t n, int kind) {
  forward_of_kind(out, gate, up, n, kind);
}
GPU_EXPORT(glu_forward_f32)
GPU_EXPORT(glu_forward_bf16)

template <class T, int N> struct GradOperands { Few<T, N> d_out, gate, up; };

template <int KIND, class T>
DEV void gate_grad_all(T* d_gate, T* d_up, const T* d_out, const T* gate, const T* up, int64_t n) {
  constexpr int N = FEW<T>;
  bool wide = aligned_few<N>(d_gate) && aligned_few<N>(d_up) && aligned_few<N>(d_out) && aligned_few<N>(gate) &&
              aligned_few<N>(up);
  auto grad = [](T& to_gate, T& to_up, T d_of_out, T g, T u) {
    float d = to_float(d_of_out), gate = to_float(g);
    to_gate = from_float<T>(through_activation(KIND, d * to_float(u), gate));
    to_up = from_float<T>(d * activate(KIND, gate));
  };
  pointwise<N, 2>(
      n, wide,
      [=](int64_t i) { return GradOperands<T, N>{load_few<N>(d_out + i), load_few<N>(gate + i), load_few<N>(up + i)}; },
      [=](int64_t i, const GradOperands<T, N>& v) {
        Few<T, N> to_gate, to_up;
        for (int k = 0; k < N; k++) grad(to_gate.x[k], to_up.x[k], v.d_out.x[k], v.gate.x[k], v.up.x[k]);
        store_few<N>(d_gate + i, to_gate);
        store_few<N>(d_up + i, to_up);
      },
      [=](int64_t i) { grad(d_gate[i], d_up[i], d_out[i], gate[i], up[i]); });
}
template <class T>
DEV void grad_of_kind(T* d_gate, T* d_up, const T* d_out, const T* gate, const T* up, int64_t n, int kind) {
  switch (kind) {
    case ACTIVATION_RELU: return gate_grad_all<ACTIVATION_RELU>(d_gate, d_up, d_out, gate, up, n);
    case ACTIVATION_GELU_TANH: return gate_grad_all<ACTIVATION_GELU_TANH>(d_gate, d_up, d_out, gate, up, n);
    case ACTIVATION_GELU_ERF: return gate_grad_all<ACTIVATION_GELU_ERF>(d_gate, d_up, d_out, gate, up, n);
    case ACTIVATION_SILU: return gate_grad_all<ACTIVATION_SILU>(d_gate, d_up, d_out, gate, up, n);
    default: return gate_grad_all<ACTIVATION_NONE>(d_gate, d_up, d_out, gate, up, n);
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS, GPU_BLOCKS(4))
    glu_grad_f32(float* d_gate, float* d_up, const float* d_out, const float* gate, const float* up, int64_t n,
                 int kind) {
  grad_of_kind(d_gate, d_up, d_out, gate, up, n, kind);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS, GPU_BLOCKS(3))
    glu_grad_bf16(bf16* d_gate, bf16* d_up, const bf16* d_out, const bf16* gate, const bf16* up, int64_t n, int kind) {
  grad_of_kind(d_gate, d_up, d_out, gate, up, n, kind);
}
GPU_EXPORT(glu_grad_f32)
GPU_EXPORT(glu_grad_bf16)
