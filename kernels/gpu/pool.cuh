// What pooling's kernels share: sizes, which places a window has and which windows a place.
#pragma once

struct Sizes { int height, width, kernel_h, kernel_w, stride, padding, out_height, out_width; };

// From `first` up to before `end`.
struct Range {
  int first, end;
  DEV int len() const { return end > first ? end - first : 0; }
};

// Rows, or columns, of a plane that are inside of window number `out`.
DEV Range inside(int out, int stride, int padding, int kernel, int size) {
  int first = out * stride - padding, end = first + kernel;
  return {first > 0 ? first : 0, end < size ? end : size};
}

// Windows that row, or column, `at` of a plane is inside of.
DEV Range covering(int at, int stride, int padding, int kernel, int out_size) {
  int past = at + padding - kernel + 1, last = (at + padding) / stride;
  return {past > 0 ? (past + stride - 1) / stride : 0, last < out_size ? last + 1 : out_size};
}
