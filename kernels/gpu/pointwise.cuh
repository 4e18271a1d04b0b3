// How elementwise kernels walk over their tensors. Included by gpu.cuh, on both sides.
#pragma once

// A block covers THREADS * PACKS packs of N elements, pack j of thread t being number j * THREADS + t: every access of
// a warp is one contiguous stretch. A thread has 4 loads of 16 bytes in flight, of one operand or of two: at full
// occupancy four times what hides the latency. device/cuda/elementwise.rs computes grids from the same numbers.
constexpr int POINTWISE_THREADS = 256;
constexpr int POINTWISE_PACKS = 4;

// N elements that one access moves; a pointer to them must be a multiple of their size.
template <class T, int N> struct alignas(N * sizeof(T)) Few { T x[N]; };
template <int N, class T> DEV Few<T, N> load_few(const T* p) { return *reinterpret_cast<const Few<T, N>*>(p); }
template <int N, class T> DEV void store_few(T* p, const Few<T, N>& v) {
  if constexpr (sizeof(v) == 16) {
    uint4 bits;
    memcpy(&bits, &v, 16);
    store16(p, bits);
  } else {
    *reinterpret_cast<Few<T, N>*>(p) = v;
  }
}
template <int N, class T> DEV bool aligned_few(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) == 0;
}

// Elements that an access of at most 16 bytes moves of either type.
template <class A, class B = A> constexpr int FEW = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// Walks over n elements, N at a time where `wide`: load(i) returns what the elements from i on need, finish(i, loaded)
// computes and stores them. FLIGHT packs are loaded before the first of them is stored. An output may lie over an
// input: nobody else touches those elements. one(i) does a single element: those past the last whole pack, and all of
// them where some operand is not aligned.
template <int N, int FLIGHT, class Load, class Finish, class One>
DEV void pointwise(int64_t n, bool wide, Load load, Finish finish, One one) {
  constexpr int STEP = POINTWISE_THREADS * N;
  int64_t first = blockIdx.x * (int64_t)(POINTWISE_PACKS * STEP), whole = n - n % N;
  if (!wide) {
#pragma unroll 1
    for (int j = 0; j < POINTWISE_PACKS * N; j++) {
      int64_t i = first + j * POINTWISE_THREADS + threadIdx.x;
      if (i < n) one(i);
    }
    return;
  }
  int64_t mine = first + (int64_t)threadIdx.x * N;
#pragma unroll 1
  for (int round = 0; round < POINTWISE_PACKS; round += FLIGHT, mine += FLIGHT * STEP) {
    decltype(load(mine)) loaded[FLIGHT];
#pragma unroll
    for (int j = 0; j < FLIGHT; j++)
      if (mine + j * STEP < whole) loaded[j] = load(mine + j * STEP);
#pragma unroll
    for (int j = 0; j < FLIGHT; j++)
      if (mine + j * STEP < whole) finish(mine + j * STEP, loaded[j]);
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < n - whole) one(whole + threadIdx.x);
}

// out[i] = f(x[i]) in f32, rounded once to Out. `out` may be `x`.
template <class Out, class X, class F> DEV void map_each(Out* out, const X* x, int64_t n, F f) {
  constexpr int N = FEW<Out, X>;
  pointwise<N, 4>(
      n, aligned_few<N>(out) && aligned_few<N>(x), [=](int64_t i) { return load_few<N>(x + i); },
      [=](int64_t i, const Few<X, N>& v) {
        Few<Out, N> y;
        for (int k = 0; k < N; k++) y.x[k] = from_float<Out>(f(to_float(v.x[k])));
        store_few<N>(out + i, y);
      },
      [=](int64_t i) { out[i] = from_float<Out>(f(to_float(x[i]))); });
}

// out[i] = f(a[i], b[i]) in f32, rounded once to Out. `out` may be `a` or `b`.
template <class A, class B, int N> struct Pair { Few<A, N> a; Few<B, N> b; };
template <class Out, class B, class F> DEV void zip_each(Out* out, const Out* a, const B* b, int64_t n, F f) {
  constexpr int N = FEW<Out, B>;
  pointwise<N, 2>(
      n, aligned_few<N>(out) && aligned_few<N>(a) && aligned_few<N>(b),
      [=](int64_t i) { return Pair<Out, B, N>{load_few<N>(a + i), load_few<N>(b + i)}; },
      [=](int64_t i, const Pair<Out, B, N>& v) {
        Few<Out, N> y;
        for (int k = 0; k < N; k++) y.x[k] = from_float<Out>(f(to_float(v.a.x[k]), to_float(v.b.x[k])));
        store_few<N>(out + i, y);
      },
      [=](int64_t i) { out[i] = from_float<Out>(f(to_float(a[i]), to_float(b[i]))); });
}
