// What the attention kernels share: sizes, which keys a query sees, the running softmax, dropout of weights.
//
// Sizes: B batch, H heads, Hkv heads of k and v, Tq queries, Tk keys, D width. q (B, Tq, H, D), k, v (B, Tk, Hkv, D);
// q_pitch and kv_pitch are the elements from one position to the next, more than H D or Hkv D where q, k and v are
// parts of one packed tensor. Scores are kept in units of log2: s = q k^T scale log2(e), so that exp(x) is one exp2.
#pragma once

struct AttentionSizes {
  int batch, heads, kv_heads, queries, keys, width;
  int q_pitch, kv_pitch;
  int causal;          // query i sees keys 0..i alone
  float scale;
  uint32_t op;         // keys dropout's random numbers
  uint32_t drop_below; // a weight whose word is below it is dropped; 0 where nothing is
  float keep_scale;    // what the others are multiplied by: 1 / (1 - p)
};

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.69314718055994531f;
constexpr float NOTHING = -INFINITY;

// A head of one sequence.
struct Head {
  int batch, head, kv_head;
  int64_t row;   // its first query among all (B, H, Tq): where its lse begins
  DEV Head(const AttentionSizes& s, int batch, int head)
      : batch(batch), head(head), kv_head(head / (s.heads / s.kv_heads)),
        row(((int64_t)batch * s.heads + head) * s.queries) {}
  // Element (0, 0) of the head in q and d_q, in k, v, d_k and d_v, in out and d_out.
  DEV int64_t query(const AttentionSizes& s) const {
    return (int64_t)batch * s.queries * s.q_pitch + (int64_t)head * s.width;
  }
  DEV int64_t key(const AttentionSizes& s) const {
    return (int64_t)batch * s.keys * s.kv_pitch + (int64_t)kv_head * s.width;
  }
  DEV int64_t out(const AttentionSizes& s) const { return ((int64_t)batch * s.queries * s.heads + head) * s.width; }
};

// Keys that any query below `end` sees.
DEV int keys_seen(const AttentionSizes& s, int end) { return s.causal && end < s.keys ? end : s.keys; }

// Which of the keys from `key` on a sequence's mask shows, for a warp: a lane loads one of each 32, so that all loads
// are on their way at once, and what the lanes have becomes words of bits, the same in each.
template <int KEYS> struct Shown {
  int32_t words[KEYS / 32];   // loaded, then voted
  DEV void load(const int32_t* mask, int key, int keys, int lane) {
#pragma unroll
    for (int i = 0; i < KEYS / 32; i++) {
      int at = key + 32 * i + lane;
      words[i] = mask && at < keys ? mask[at] : 0;
    }
  }
  DEV void vote() {
#pragma unroll
    for (int i = 0; i < KEYS / 32; i++) words[i] = (int32_t)__ballot_sync(~0u, words[i] != 0);
  }
  DEV void show_all() {
#pragma unroll
    for (int i = 0; i < KEYS / 32; i++) words[i] = -1;
  }
  DEV bool all() const {
    int32_t both = -1;
#pragma unroll
    for (int i = 0; i < KEYS / 32; i++) both &= words[i];
    return both == -1;
  }
  // Key 8 j + 2 t + e: a lane's in an accumulator of scores whose rows are queries.
  DEV bool hides(int j, int t, int e) const { return !((uint32_t)words[j / 4] >> 2 * t >> (8 * (j % 4) + e) & 1); }
};

// Of four keys from `key` on, for one thread, as bits: those that are there and that the mask, where there is one,
// shows.
DEV uint32_t shown_of_4(const AttentionSizes& s, const int32_t* mask, int key) {
  int32_t words[4];
  uint32_t shown = 0;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    words[c] = key + c < s.keys;
    if (mask && key + c < s.keys) words[c] = mask[key + c];
  }
#pragma unroll
  for (int c = 0; c < 4; c++) shown |= (uint32_t)(words[c] != 0) << c;
  return shown;
}

// exp2 of what lies below a maximum that may be minus infinity: a row that has seen no key yet.
DEV float shift_of(float max) { return max == NOTHING ? 0.0f : max; }
// In log2, plus infinity where no key is seen: exp2(score - that) is 0 for every score.
DEV float log2_sum(float lse) { return lse == NOTHING ? INFINITY : lse * LOG2_E; }

// Which of 4 weights in a row dropout keeps, as bits from the lowest up; the first is element `at` of (B, H, Tq, Tk).
DEV uint32_t kept_of_4(const AttentionSizes& s, const Now* now, uint64_t at) {
  uint32_t skip = at % 4, kept = 0;
#pragma unroll 1
  for (uint32_t block = 0; 4 * block < skip + 4; block++) {
    Words words = random_words(now, s.op, at / 4 + block);
#pragma unroll
    for (int i = 0; i < 4; i++) kept |= (uint32_t)(words.w[i] >= s.drop_below) << (4 * block + i);
  }
  return kept >> skip & 15;
}
