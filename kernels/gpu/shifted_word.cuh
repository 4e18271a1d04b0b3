// Reading 16 bytes of bf16 that start at any multiple of 2.
#pragma once

// The two aligned words that they lie in, `shift` bytes before them, are read: the second only where `bytes` reach into
// it, none where there are 0 bytes. They are shifted when they are there. What the words hold beside the `bytes` is
// another row's or nobody's, and dropped.
struct ShiftedWord {
  uint4 low, high;

  DEV static int shift_of(const bf16* from) { return reinterpret_cast<uintptr_t>(from) & 15; }

  DEV void fetch(const bf16* from, int shift, int bytes) {
    const uint4* word = reinterpret_cast<const uint4*>(from - shift / 2);
    low = bytes > 0 ? load_whole_word(word) : make_uint4(0, 0, 0, 0);
    high = bytes > 16 - shift ? load_whole_word(word + 1) : make_uint4(0, 0, 0, 0);
  }

  DEV uint4 value(int shift, int bytes) const {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < 6; i++) w[i] = shift & 8 ? w[i + 2] : w[i];
    for (int i = 0; i < 5; i++) w[i] = shift & 4 ? w[i + 1] : w[i];
    for (int i = 0; i < 4; i++) {
      if (shift & 2) w[i] = w[i] >> 16 | w[i + 1] << 16;
      int kept = bytes - 4 * i; // of this word: 4 or more, 2, or none
      w[i] = kept >= 4 ? w[i] : kept == 2 ? w[i] & 0xFFFF : 0;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};
