// A row of a matrix shared out over threads. Included by the kernels that need it, after gpu.cuh.
// In packs, a thread's values lie side by side, 16 bytes at a time, and neighbouring threads take neighbouring packs.
// Rows whose width or address 16-byte accesses cannot take go value by value, neighbouring threads at neighbouring
// columns.
#pragma once

// The column of a thread's value i.
template <class T, bool PACKED> DEV int column_of(int i, int thread, int threads) {
  constexpr int N = Pack<T>::N;
  return PACKED ? (i / N * threads + thread) * N + i % N : i * threads + thread;
}

// A thread's pack p of a row. Columns from `cols` on read as 0 and are not written. In packs, `cols` is a multiple of a
// pack.
template <bool PACKED, class T> DEV Pack<T> load_part(const T* row, int p, int64_t cols, int thread, int threads) {
  constexpr int N = Pack<T>::N;
  Pack<T> to = {};
  if (PACKED) {
    int c = column_of<T, true>(p * N, thread, threads);
    if (c < cols) to = load_pack(row + c);
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) {
      int c = column_of<T, false>(p * N + j, thread, threads);
      to.x[j] = c < cols ? row[c] : from_float<T>(0);
    }
  }
  return to;
}
// A pack as the four words that it is loaded in: a bf16 takes half a register, and one instruction makes it an f32.
template <class T> DEV float of_pack(const uint4& pack, int i) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
  if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
  else return i % 2 ? unpack_bf16(words[i / 2]).y : unpack_bf16(words[i / 2]).x;
}
DEV uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
template <class T> DEV uint4 to_pack(const float (&x)[Pack<T>::N]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) {
      words[w] = __float_as_uint(x[w]);
    } else {
      bf162 pair = __floats2bfloat162_rn(x[2 * w], x[2 * w + 1]);
      memcpy(&words[w], &pair, 4);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A pack as load_part gives it; and f32 values of one into their places.
template <bool PACKED, class T> DEV uint4 load_words(const T* row, int p, int64_t cols, int thread, int threads) {
  if constexpr (PACKED) {
    int c = column_of<T, true>(p * Pack<T>::N, thread, threads);
    return c < cols ? load16(row + c) : make_uint4(0, 0, 0, 0);
  } else {
    Pack<T> pack = load_part<false>(row, p, cols, thread, threads);
    uint4 words;
    memcpy(&words, &pack, sizeof words);
    return words;
  }
}
template <bool PACKED, class T>
DEV void store_words(T* row, const float (&from)[Pack<T>::N], int p, int64_t cols, int thread, int threads) {
  if constexpr (PACKED) {
    int c = column_of<T, true>(p * Pack<T>::N, thread, threads);
    if (c < cols) store16(row + c, to_pack<T>(from));
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::N; j++) {
      int c = column_of<T, false>(p * Pack<T>::N + j, thread, threads);
      if (c < cols) row[c] = from_float<T>(from[j]);
    }
  }
}

// C values of a row, kept as they lie in memory.
template <class T, int C> struct Part {
  static constexpr int N = Pack<T>::N, PACKS = C / N;
  uint4 packs[PACKS];
  DEV float at(int i) const { return of_pack<T>(packs[i / N], i % N); }
  template <bool PACKED> DEV void load(const T* row, int64_t cols, int thread, int threads) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) packs[p] = load_words<PACKED>(row, p, cols, thread, threads);
  }
  // From here on values are read out of the packs anew, so that they take no f32 registers in between.
  DEV void forget_floats() {
#pragma unroll
    for (int p = 0; p < PACKS; p++) forget(packs[p].x), forget(packs[p].y), forget(packs[p].z), forget(packs[p].w);
  }
};

// The f32 values that belong to the columns of a row of T.
template <class T, bool PACKED, int C>
DEV void store_floats(float* row, const float (&from)[C], int64_t cols, int thread, int threads) {
  constexpr int STEP = PACKED ? Pack<float>::N : 1;
#pragma unroll
  for (int i = 0; i < C; i += STEP) {
    int c = column_of<T, PACKED>(i, thread, threads);
    if (c >= cols) continue;
    if (PACKED) store_pack(row + c, Pack<float>{from[i], from[i + 1 % C], from[i + 2 % C], from[i + 3 % C]});
    else row[c] = from[i];
  }
}

template <class T, bool PACKED, int C>
DEV void load_floats(float (&to)[C], const float* row, int64_t cols, int thread, int threads) {
  constexpr int STEP = PACKED ? Pack<float>::N : 1;
#pragma unroll
  for (int i = 0; i < C; i += STEP) {
    int c = column_of<T, PACKED>(i, thread, threads);
    if (c >= cols) continue;
    if (PACKED) {
      Pack<float> pack = load_pack(row + c);
#pragma unroll
      for (int j = 0; j < STEP; j++) to[i + j] = pack.x[j];
    } else {
      to[i] = row[c];
    }
  }
}

// The 16-byte packs of a row at any address: `head` elements lie before the first, the rest from `tail` on.
template <class T> struct Packs {
  int head, packs, tail;
  DEV Packs(const T* row, int cols) {
    int before = (int)((16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / sizeof(T));
    head = before < cols ? before : cols;
    packs = (cols - head) / Pack<T>::N;
    tail = head + packs * Pack<T>::N;
  }
  // For two rows at once. Where they lie apart by other than a multiple of 16 bytes, packs of the one are none of the
  // other.
  DEV Packs(const T* row, const T* other, int cols) : Packs(row, cols) {
    if ((reinterpret_cast<uintptr_t>(row) ^ reinterpret_cast<uintptr_t>(other)) & 15)
      head = cols, packs = 0, tail = cols;
  }
};

// Over a block of whole warps, the same order every time. `warps` is shared, one float a warp; another barrier lies
// between two uses of it.
DEV float block_sum(float x, float* warps) {
  int lane = threadIdx.x % 32;
  x = warp_sum(x);
  if (lane == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < (int)blockDim.x / 32 ? warps[lane] : 0.0f);
}
