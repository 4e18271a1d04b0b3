// What every matrix product kernel shares: where a block works and what becomes of a sum.
//   out (m, n) = act(a b + bias); a is stored (m, k) or, transposed, (k, m); b is stored (k, n) or, transposed, (n, k).
#pragma once

// Tiles in bands of 16 tile rows, walked down and then right, so that what runs at one time shares rows and columns in the L2.
constexpr int GEMM_BAND = 16;
struct GemmTile { int row, col; };
DEV GemmTile gemm_tile(int index, int tiles_m, int tiles_n) {
  int band = index / (GEMM_BAND * tiles_n), in_band = index % (GEMM_BAND * tiles_n);
  int height = min(GEMM_BAND, tiles_m - band * GEMM_BAND);
  return {band * GEMM_BAND + in_band % height, in_band / height};
}

// Eight neighbours of a row, of which `count` are there; `whole` where all are, and rows start at multiples of 16 bytes.
DEV void load_octet(float (&v)[8], const float* p, int64_t count, bool whole) {
  if (whole) {
    Pack<float> low = load_pack(p), high = load_pack(p + 4);
    for (int i = 0; i < 4; i++) v[i] = low.x[i], v[4 + i] = high.x[i];
  } else {
    for (int i = 0; i < 8; i++) v[i] = i < count ? p[i] : 0.0f;
  }
}
DEV void load_octet(float (&v)[8], const bf16* p, int64_t count, bool whole) {
  if (whole) {
    Pack<bf16> all = load_pack(p);
    for (int i = 0; i < 8; i++) v[i] = to_float(all.x[i]);
  } else {
    for (int i = 0; i < 8; i++) v[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}
DEV uint4 float_bits(float a, float b, float c, float d) {
  return make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d));
}
DEV void store_octet(float* p, const float (&v)[8], int64_t count, bool whole) {
  if (whole) {
    store16(p, float_bits(v[0], v[1], v[2], v[3]));
    store16(p + 4, float_bits(v[4], v[5], v[6], v[7]));
  } else {
    for (int i = 0; i < 8; i++) if (i < count) p[i] = v[i];
  }
}
DEV void store_octet(bf16* p, const float (&v)[8], int64_t count, bool whole) {
  if (whole) {
    store16(p, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])));
  } else {
    for (int i = 0; i < 8; i++) if (i < count) p[i] = from_float<bf16>(v[i]);
  }
}

// What becomes of sums. With `partials` (parts, m, n) they are those of one part of k, kept for gemm_finish. Otherwise `bias` (n) is added, `pre` (m, n) gets
// the result and `out` (m, n) its activation; each of bias and pre may be null. `add`: the sum joins what `out` holds.
template <class Out> struct GemmEnd {
  Out* out;
  Out* pre;
  float* partials;
  const Out* bias;
  int activation;
  bool add;
  int64_t m, n;

  DEV bool whole() const { return n % 8 == 0; }

  // The end of one part of k.
  DEV GemmEnd part(int part) const {
    GemmEnd end = *this;
    if (partials) end.partials += part * m * n;
    return end;
  }

  // The bias of 8 columns from `col` on, 0 where there is none.
  DEV void bias_octet(float (&v)[8], int64_t col) const {
    bool there = bias && !partials && col < n;
    load_octet(v, there ? bias + col : bias, there ? n - col : 0, there && whole());
  }

  // The 8 sums of `row` from `col` on, a multiple of 8. Rows and columns that are not there are passed over.
  DEV void put_octet(int64_t row, int64_t col, float (&v)[8], const float (&biases)[8]) const {
    if (row >= m || col >= n) return;
    int64_t at = row * n + col, count = n - col;
    if (partials) { store_octet(partials + at, v, count, whole()); return; }
    for (int i = 0; i < 8; i++) v[i] += biases[i];
    if (pre) store_octet(pre + at, v, count, whole());
    if (activation != ACTIVATION_NONE)
      for (int i = 0; i < 8; i++) v[i] = activate(activation, v[i]);
    if (add) {
      float old[8];
      load_octet(old, out + at, count, whole());
      for (int i = 0; i < 8; i++) v[i] += old[i];
    }
    store_octet(out + at, v, count, whole());
  }
};

// `now` may be null where the output does not accumulate.
template <class Out>
DEV GemmEnd<Out> gemm_end(Out* out, Out* pre, float* partials, const Out* bias, const Now* now, int accumulator, int activation, int m, int n) {
  return {out, pre, partials, bias, activation, accumulator && now->accumulate, m, n};
}
