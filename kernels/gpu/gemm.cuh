// What every matrix product kernel shares: where a block works and what becomes of a sum.
//   out (m, n) = act(a b + bias), a b + bias + residual, or (a b) act'(pre); a is stored (m, k) or, transposed, (k, m);
//   b is stored (k, n) or, transposed, (n, k).
#pragma once

// Tiles in bands of 16 tile rows, walked down and then right, so that what runs at one time shares rows and columns in
// the L2.
constexpr int GEMM_BAND = 16;
struct GemmTile { int row, col; };
DEV GemmTile gemm_tile(int index, int tiles_m, int tiles_n) {
  int band = index / (GEMM_BAND * tiles_n), in_band = index % (GEMM_BAND * tiles_n);
  int height = min(GEMM_BAND, tiles_m - band * GEMM_BAND);
  return {band * GEMM_BAND + in_band % height, in_band / height};
}

// Eight neighbours, as 16-byte words.
struct Octet { float v[8]; };
DEV Octet load_octet(const float* p) {
  Octet o;
  Pack<float> low = load_pack(p), high = load_pack(p + 4);
  for (int i = 0; i < 4; i++) o.v[i] = low.x[i], o.v[4 + i] = high.x[i];
  return o;
}
DEV Octet load_octet(const bf16* p) {
  Octet o;
  Pack<bf16> all = load_pack(p);
  for (int i = 0; i < 8; i++) o.v[i] = to_float(all.x[i]);
  return o;
}
DEV void store_octet(float* p, const Octet& o) {
  for (int i = 0; i < 8; i += 4)
    store16(p + i, make_uint4(__float_as_uint(o.v[i]), __float_as_uint(o.v[i + 1]), __float_as_uint(o.v[i + 2]),
                              __float_as_uint(o.v[i + 3])));
}
DEV void store_octet(bf16* p, const Octet& o) {
  store16(p, make_uint4(pack_bf16(o.v[0], o.v[1]), pack_bf16(o.v[2], o.v[3]), pack_bf16(o.v[4], o.v[5]),
                        pack_bf16(o.v[6], o.v[7])));
}

// What becomes of sums. With `partials` (parts, m, n) they are those of one part of k, kept for gemm_finish. Otherwise
// `bias` (n) is added, `pre` (m, n) gets the result and `out` (m, n) its activation; each of bias and pre may be null.
// With an `activation` from ACTIVATION_GRAD on, `pre` is read instead, and the sum becomes the gradient of what that
// activation was given. Then `addend` (m, n) is added, where there is one: a residual, or what `out` holds. `out` may
// lie over what is read: an element is read by who writes it. Rows of out, pre and addend are `pitch` apart; what lies
// between n and the next multiple of 8 there may be overwritten.
template <class Out> struct GemmEnd {
  typedef Out Element;
  Out* out;
  Out* pre;
  float* partials;
  const Out* bias;
  const Out* addend;
  int activation;
  int64_t m, n, pitch;

  DEV bool reads_pre() const { return activation >= ACTIVATION_GRAD; }

  // The end of one part of k.
  DEV GemmEnd part(int part) const {
    GemmEnd end = *this;
    if (partials) end.partials += part * m * n, end.bias = nullptr;
    return end;
  }

  DEV float bias_at(int64_t col) const { return bias ? to_float(bias[col]) : 0.0f; }
  // Of eight columns, of which the first is there.
  DEV Octet bias_octet(int64_t col) const {
    Octet o = {};
    if (bias && col + 8 <= n) return load_octet(bias + col);
    if (bias)
      for (int i = 0; i < 8; i++)
        if (col + i < n) o.v[i] = bias_at(col + i);
    return o;
  }

  // One element that is there, bias_at(col) being in it.
  DEV void put(int64_t row, int64_t col, float v) const {
    if (partials) { partials[row * n + col] = v; return; }
    int64_t at = row * pitch + col;
    if (reads_pre()) {
      v = through_activation(activation - ACTIVATION_GRAD, v, to_float(pre[at]));
    } else {
      if (pre) pre[at] = from_float<Out>(v);
      if (activation != ACTIVATION_NONE) v = activate(activation, v);
    }
    out[at] = from_float<Out>(addend ? v + to_float(addend[at]) : v);
  }

  // Whether rows start at multiples of 16 bytes.
  DEV bool octets() const { return n % 8 == 0 || (pitch % 8 == 0 && !partials); }

  // Eight elements, of which the first is there, where there are octets().
  DEV void put_octet(int64_t row, int64_t col, Octet o) const {
    if (partials) { store_octet(partials + row * n + col, o); return; }
    int64_t at = row * pitch + col;
    if (reads_pre()) {
      through_each(activation - ACTIVATION_GRAD, o.v, load_octet(pre + at).v);
    } else {
      if (pre) store_octet(pre + at, o);
      activate_each(activation, o.v);
    }
    if (addend) {
      Octet other = load_octet(addend + at);
      for (int i = 0; i < 8; i++) o.v[i] += other.v[i];
    }
    store_octet(out + at, o);
  }

  // A warp's sums, ROWS by COLS from (row0, col0) on, that it has staged in shared memory, PITCH floats a row. What is
  // not there is passed over. Lanes take octets of rows that start at multiples of 16 bytes, and of others single
  // elements, so that a store is one stretch all the same.
  template <int ROWS, int COLS, int PITCH> DEV void put_staged(const float* staged, int64_t row0, int64_t col0) const {
    int lane = threadIdx.x % 32, rows_left = (int)min((int64_t)ROWS, m - row0);
    if (octets()) {
      constexpr int ACROSS = COLS / 8;
      int64_t col = col0 + lane % ACROSS * 8;
      if (col >= n) return;
      Octet biases = bias_octet(col);
#pragma unroll 1
      for (int row = lane / ACROSS; row < rows_left; row += 32 / ACROSS) {
        Octet sums = load_octet(staged + row * PITCH + lane % ACROSS * 8);
        for (int i = 0; i < 8; i++) sums.v[i] += biases.v[i];
        put_octet(row0 + row, col, sums);
      }
    } else {
#pragma unroll 1
      for (int across = lane; across < COLS && col0 + across < n; across += 32) {
        float bias = bias_at(col0 + across);
#pragma unroll 1
        for (int row = 0; row < rows_left; row++) put(row0 + row, col0 + across, staged[row * PITCH + across] + bias);
      }
    }
  }
};

// `now` may be null where the output does not accumulate; where it does there is no residual.
template <class Out>
DEV GemmEnd<Out> gemm_end(Out* out, Out* pre, float* partials, const Out* bias, const Out* residual, const Now* now,
                          int accumulator, int activation, int m, int n, int pitch) {
  return {out, pre, partials, bias, adds_to(accumulator, now) ? out : residual, activation, m, n, pitch};
}
