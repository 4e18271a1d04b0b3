// Elementwise ops, and the position table's addition to every sequence of a batch.
//   add                out[i] = a[i] + b[i]; out may be a or b.
//   scale              out[i] = x[i] * by; out may be x.
//   copy               out[i] = x[i], converted; an accumulator is added to when now->accumulate says so.
//   zero               an accumulator is set to 0 unless now->accumulate says that it holds a sum already.
//   dropout            out[i] = x[i] * scale where word i of the op's Philox stream is at least `limit`, else x[i] * 0; out may be x
//                      (Srivastava et al. 2014). The words are those of base/philox.rs: the same elements drop as on the host.
//   add_position       out[b,t,c] = x[b,t,c] + table[t,c]; x, out (batch, T, C), table (P, C), P >= T; out may be x.
//   add_position_grad  d_table[t,c] = sum over b, in order, of d_y[b,t,c]; f32; rows from T on get 0; an accumulator is added to.
//   shift              out[b,t+by,c] = x[b,t,c], 0 where no t gives t + by; x (batch, T, C), out (batch, T', C). Given are plane = T * C,
//                      out_plane = T' * C and by * C, all in elements.
// bf16 operands are computed in f32 and rounded once. Every element has one writer and a fixed order, so results do not
// depend on the grid. add, scale, copy, zero, dropout, shift: blocks of 256 threads, 4 packs of 16 bytes a thread
// (gpu/pointwise.cuh), one pass.
//
// Bytes an element (f32 / bf16): add 12 / 6, scale 8 / 4, copy 8 / 4 (6 between types), shift 8 / 4, zero 4, dropout 8 / 4,
// add_position 8 / 4 and the table once, add_position_grad 4 / 2 and the table once. All but dropout are loads and
// stores alone: expected at 90-95 % of the copy rate. Dropout spends ten Philox rounds, some 65 integer instructions,
// on four elements: at the copy rate of an H200 that takes about half of the integer pipes in f32 and all of them in
// bf16, so the same share is expected in f32 and about 80 % in bf16.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

template <class T> DEV void add_all(T* out, const T* a, const T* b, int64_t n) {
  zip_each(out, a, b, n, [](float x, float y) { return x + y; });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_f32(float* out, const float* a, const float* b, int64_t n) {
  add_all(out, a, b, n);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_bf16(bf16* out, const bf16* a, const bf16* b, int64_t n) {
  add_all(out, a, b, n);
}
GPU_EXPORT(add_f32)
GPU_EXPORT(add_bf16)

template <class T> DEV void scale_all(T* out, const T* x, int64_t n, float by) {
  map_each(out, x, n, [=](float v) { return v * by; });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    scale_f32(float* out, const float* x, int64_t n, float by) {
  scale_all(out, x, n, by);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    scale_bf16(bf16* out, const bf16* x, int64_t n, float by) {
  scale_all(out, x, n, by);
}
GPU_EXPORT(scale_f32)
GPU_EXPORT(scale_bf16)

// A copy between types, or into an accumulator; a plain copy is the driver's.
template <class X> DEV void copy_into(float* out, const X* x, int64_t n, int accumulator, const Now* now) {
  if (adds_to(accumulator, now)) {
    zip_each(out, out, x, n, [](float sum, float more) { return sum + more; });
  } else {
    map_each(out, x, n, [](float v) { return v; });
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    copy_f32(float* out, const float* x, int64_t n, int accumulator, const Now* now) {
  copy_into(out, x, n, accumulator, now);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    copy_bf16_to_f32(float* out, const bf16* x, int64_t n, int accumulator, const Now* now) {
  copy_into(out, x, n, accumulator, now);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS) copy_f32_to_bf16(bf16* out, const float* x, int64_t n) {
  map_each(out, x, n, [](float v) { return v; });
}
GPU_EXPORT(copy_f32)
GPU_EXPORT(copy_bf16_to_f32)
GPU_EXPORT(copy_f32_to_bf16)

extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS) zero_f32(float* out, int64_t n, const Now* now) {
  if (now->accumulate) return;
  constexpr int N = FEW<float>;
  pointwise<N, 4>(
      n, aligned_few<N>(out), [](int64_t) { return 0.0f; },
      [=](int64_t i, float) { store_few<N>(out + i, Few<float, N>{}); }, [=](int64_t i) { out[i] = 0.0f; });
}
GPU_EXPORT(zero_f32)

// Elements of x go as they are, so T may be any type of their size.
template <class T> DEV void shift_rows(T* out, const T* x, int64_t n, int64_t plane, int64_t out_plane, int64_t by) {
  constexpr int N = FEW<T>;
  // Where element i of the output comes from, below 0 if from nowhere. A pack comes from one place where all three are
  // multiples of it.
  auto from = [=](int64_t i) {
    int64_t b = i / out_plane, e = i - b * out_plane - by;
    return e >= 0 && e < plane ? b * plane + e : (int64_t)-1;
  };
  pointwise<N, 4>(
      n, aligned_few<N>(out) && aligned_few<N>(x) && plane % N == 0 && out_plane % N == 0 && by % N == 0,
      [=](int64_t i) {
        int64_t at = from(i);
        return at < 0 ? Few<T, N>{} : load_few<N>(x + at);
      },
      [=](int64_t i, const Few<T, N>& v) { store_few<N>(out + i, v); },
      [=](int64_t i) {
        int64_t at = from(i);
        out[i] = at < 0 ? from_float<T>(0) : x[at];
      });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    shift_f32(float* out, const float* x, int64_t n, int64_t plane, int64_t out_plane, int64_t by) {
  shift_rows(out, x, n, plane, out_plane, by);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    shift_bf16(bf16* out, const bf16* x, int64_t n, int64_t plane, int64_t out_plane, int64_t by) {
  shift_rows(out, x, n, plane, out_plane, by);
}
GPU_EXPORT(shift_f32)
GPU_EXPORT(shift_bf16)

template <class T>
DEV void drop_all(T* out, const T* x, int64_t n, uint32_t limit, float scale, uint32_t stream, const Now* now) {
  constexpr int N = FEW<T>;
  const Now here = *now;
  pointwise<N, 4>(
      n, aligned_few<N>(out) && aligned_few<N>(x), [=](int64_t i) { return load_few<N>(x + i); },
      [=](int64_t i, const Few<T, N>& v) {
        Few<T, N> y;
        for (int four = 0; four < N; four += 4) {
          Words words = random_words(&here, stream, (i + four) / 4);
          for (int k = 0; k < 4; k++)
            y.x[four + k] = from_float<T>(to_float(v.x[four + k]) * (words.w[k] >= limit ? scale : 0.0f));
        }
        store_few<N>(out + i, y);
      },
      [=](int64_t i) {
        Words words = random_words(&here, stream, i / 4);
        uint32_t word = i % 4 == 0 ? words.w[0] : i % 4 == 1 ? words.w[1] : i % 4 == 2 ? words.w[2] : words.w[3];
        out[i] = from_float<T>(to_float(x[i]) * (word >= limit ? scale : 0.0f));
      });
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    dropout_f32(float* out, const float* x, int64_t n, uint32_t limit, float scale, uint32_t stream, const Now* now) {
  drop_all(out, x, n, limit, scale, stream, now);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    dropout_bf16(bf16* out, const bf16* x, int64_t n, uint32_t limit, float scale, uint32_t stream, const Now* now) {
  drop_all(out, x, n, limit, scale, stream, now);
}
GPU_EXPORT(dropout_f32)
GPU_EXPORT(dropout_bf16)

// Sequences of a batch that a thread takes at once: as many loads in flight. The table's pack is read once for all of
// them.
constexpr int SEQUENCES = 4;

// One thread a pack of the table and SEQUENCES sequences. `plane` = T * C elements of a sequence; blocks along a plane
// first.
template <class T> DEV void add_table(T* out, const T* x, const T* table, int64_t batch, int64_t plane) {
  constexpr int N = FEW<T>;
  unsigned along = (unsigned)((plane + POINTWISE_THREADS * N - 1) / (POINTWISE_THREADS * N));
  int64_t first = (int64_t)(blockIdx.x % along) * (POINTWISE_THREADS * N),
          b = (int64_t)(blockIdx.x / along) * SEQUENCES;
  int here = batch - b < SEQUENCES ? (int)(batch - b) : SEQUENCES;
  x += b * plane;
  out += b * plane;
  if (aligned_few<N>(out) && aligned_few<N>(x) && aligned_few<N>(table) && plane % N == 0) {
    int64_t i = first + threadIdx.x * N;
    if (i >= plane) return;
    Few<T, N> t = load_few<N>(table + i), v[SEQUENCES];
    x += i;
    out += i;
#pragma unroll
    for (int s = 0; s < SEQUENCES; s++)
      if (s < here) v[s] = load_few<N>(x + s * plane);
#pragma unroll
    for (int s = 0; s < SEQUENCES; s++) {
      if (s >= here) return;
      Few<T, N> y;
      for (int k = 0; k < N; k++) y.x[k] = from_float<T>(to_float(v[s].x[k]) + to_float(t.x[k]));
      store_few<N>(out + s * plane, y);
    }
    return;
  }
#pragma unroll 1
  for (int j = 0; j < N; j++) {
    int64_t i = first + j * POINTWISE_THREADS + threadIdx.x;
    if (i >= plane) return;
    float t = to_float(table[i]);
#pragma unroll 1
    for (int s = 0; s < here; s++) out[s * plane + i] = from_float<T>(to_float(x[s * plane + i]) + t);
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_position_forward_f32(float* out, const float* x, const float* table, int64_t batch, int64_t plane) {
  add_table(out, x, table, batch, plane);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_position_forward_bf16(bf16* out, const bf16* x, const bf16* table, int64_t batch, int64_t plane) {
  add_table(out, x, table, batch, plane);
}
GPU_EXPORT(add_position_forward_f32)
GPU_EXPORT(add_position_forward_bf16)

// Rows of a batch that are read ahead of their sum.
constexpr int AHEAD = 8;

// One thread a pack of 4 elements of the table, through the batch in order. `table_elems` = P * C, `plane` = T * C.
template <class T>
DEV void sum_sequences(float* d_table, const T* d_y, int64_t batch, int64_t plane, int64_t table_elems, int accumulator,
                       const Now* now) {
  constexpr int N = FEW<float>;
  bool adds = adds_to(accumulator, now);
  int64_t i = ((int64_t)blockIdx.x * POINTWISE_THREADS + threadIdx.x) * N;
  if (i + N <= plane && aligned_few<N>(d_table) && aligned_few<N>(d_y) && plane % N == 0) {
    Few<float, N> sum{};
    if (adds) sum = load_few<N>(d_table + i);
    for (int64_t b = 0; b < batch; b += AHEAD) {
      Few<T, N> d[AHEAD];
#pragma unroll
      for (int s = 0; s < AHEAD; s++)
        if (b + s < batch) d[s] = load_few<N>(d_y + (b + s) * plane + i);
#pragma unroll
      for (int s = 0; s < AHEAD; s++) {
        if (b + s >= batch) break;
        for (int k = 0; k < N; k++) sum.x[k] += to_float(d[s].x[k]);
      }
    }
    store_few<N>(d_table + i, sum);
    return;
  }
#pragma unroll 1
  for (int64_t e = i; e < i + N && e < table_elems; e++) {
    float sum = adds ? d_table[e] : 0.0f;
#pragma unroll 4
    for (int64_t b = 0; e < plane && b < batch; b++) sum += to_float(d_y[b * plane + e]);
    d_table[e] = sum;
  }
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_position_grad_f32(float* d_table, const float* d_y, int64_t batch, int64_t plane, int64_t table_elems,
                          int accumulator, const Now* now) {
  sum_sequences(d_table, d_y, batch, plane, table_elems, accumulator, now);
}
extern "C" __global__ void __launch_bounds__(POINTWISE_THREADS)
    add_position_grad_bf16(float* d_table, const bf16* d_y, int64_t batch, int64_t plane, int64_t table_elems,
                           int accumulator, const Now* now) {
  sum_sequences(d_table, d_y, batch, plane, table_elems, accumulator, now);
}
GPU_EXPORT(add_position_grad_f32)
GPU_EXPORT(add_position_grad_bf16)
