// What every matrix product kernel shares: where a block works and what becomes of a sum. Included by gpu.cuh, on both sides.
//   out (m, n) = act(a b + bias); a is stored (m, k) or, transposed, (k, m); b is stored (k, n) or, transposed, (n, k).
#pragma once

// Tiles in bands of 8 tile rows, walked down and then right, so that what runs at one time shares rows and columns in the L2.
constexpr int GEMM_BAND = 8;
struct GemmTile { int row, col; };
DEV GemmTile gemm_tile(int index, int tiles_m, int tiles_n) {
  int band = index / (GEMM_BAND * tiles_n), in_band = index % (GEMM_BAND * tiles_n);
  int height = min(GEMM_BAND, tiles_m - band * GEMM_BAND);
  return {band * GEMM_BAND + in_band % height, in_band / height};
}

// What becomes of a sum. With `partials` it is one of several over parts of k and goes there, (parts, m, n), for gemm_finish.
// Otherwise `bias` (n) is added, `pre` (m, n) gets the result and `out` (m, n) its activation; each of bias and pre may be null.
// `add`: the sum joins what `out` holds.
template <class Out> struct GemmEnd {
  Out* out;
  Out* pre;
  float* partials;
  const Out* bias;
  int activation;
  bool add;
  int64_t m, n;

  DEV float bias_at(int64_t col) const { return bias && !partials && col < n ? to_float(bias[col]) : 0.0f; }

  // One element, `biased` being the sum and bias_at(col). The caller has checked row and col.
  DEV void put(int64_t row, int64_t col, float biased) const {
    int64_t at = row * n + col;
    if (partials) { partials[at] = biased; return; }
    if (pre) pre[at] = from_float<Out>(biased);
    float value = activate(activation, biased);
    if (add) value += to_float(out[at]);
    out[at] = from_float<Out>(value);
  }
};

// Part `part` of a product that is cut along k. `now` may be null where the output does not accumulate.
template <class Out>
DEV GemmEnd<Out> gemm_end(Out* out, Out* pre, float* partials, const Out* bias, const Now* now, int accumulator, int activation,
                          int m, int n, int part) {
  if (partials) partials += (int64_t)part * m * n;
  return {out, pre, partials, bias, activation, accumulator && now->accumulate, m, n};
}
