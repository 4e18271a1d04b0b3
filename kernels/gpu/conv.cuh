// The geometry of a convolution: where the elements of its gathered matrices lie.
//
// Each of the three products of a convolution multiplies a plain matrix with a gathered one, whose element at (step,
// column) is a pixel of an image, or 0 outside it. The pixel's place is the sum of a place for the step and a place for
// the column:
//   forward          column = output pixel (n, oh, ow);        step = channel and tap of the filter
//   data gradient    column = input pixel (n, h, w);           step = output channel and tap
//   weight gradient  column = input channel and tap;           step = output pixel
// so that nothing is divided in the innermost loop, and padding is one comparison for each axis.
#pragma once

// Conv's sizes, as device/cuda/conv.rs passes them. x (batch, in_channels, height, width), weight (out_channels,
// in_channels, kernel_h, kernel_w), out (batch, out_channels, out_height, out_width).
struct ConvSizes {
  int batch, in_channels, height, width;
  int out_channels, out_height, out_width;
  int kernel_h, kernel_w, stride, padding;
};

// An offset in elements, and a row and column of an image. Places are added; a sum outside the image is padding.
struct alignas(16) Place { int64_t offset; int row, col; };
// A row that no place brings back into an image: that of columns and steps beyond the last.
constexpr int NOWHERE = -(1 << 30);

DEV bool inside(const Place& a, const Place& b, int height, int width) {
  return (unsigned)(a.row + b.row) < (unsigned)height && (unsigned)(a.col + b.col) < (unsigned)width;
}

// Quotient and remainder of a / b for 0 <= a: by 32-bit arithmetic, a fifth of the instructions, wherever it is enough.
struct Divided { int64_t quotient; int remainder; };
DEV Divided divided(int64_t a, int b) {
  if (a <= 0x7FFFFFFF) return {(int)a / b, (int)a % b};
  return {a / b, (int)(a % b)};
}

// Pixels in the order of memory: image, row, column of the grid of `rows` x `cols` pixels.
struct Pixel { int64_t image; int row, col; };
DEV Pixel pixel_at(int64_t index, int rows, int cols) {
  Divided line = divided(index, cols), image = divided(line.quotient, rows);
  return {image.quotient, image.remainder, line.remainder};
}

// The forward pass, or one class of the data gradient, as a gather from source images into target pixels.
//
// The data gradient of a stride s falls into s * s classes, by row and column of the target pixel modulo s: a pixel of
// one class is reached by the same taps, every s-th of each axis, and by no other, so that each class is a convolution
// of stride 1 with a part of the filter, and nothing is multiplied by an inserted zero.
struct Gather {
  int batch, source_channels, source_height, source_width;
  int channels, height, width;       // of the target
  int rows, cols;                    // target pixels of this class, in an image
  int first_row, first_col,
      apart;  // pixel (a, b) of the class is (first_row + a * apart, first_col + b * apart) of the image
  int taps_h, taps_w;                // taps of this class
  int tap_row, tap_col,
      tap_apart;  // tap (i, j) of the class is (tap_row + i * tap_apart, tap_col + j * tap_apart) of the filter
  int kernel_w, taps;                // columns, and all taps, of the filter
  int scale, sign, row,
      col;  // (a, b) under tap (i, j) reads source (row + a * scale + i * sign, col + b * scale + j * sign)

  DEV int64_t columns() const { return (int64_t)batch * rows * cols; }
  DEV int tap(int i, int j) const { return (tap_row + i * tap_apart) * kernel_w + tap_col + j * tap_apart; }
  // Offset of a target pixel in channel 0 of its image, NCHW.
  DEV int64_t target(const Pixel& p) const {
    int64_t plane = p.image * channels * height + first_row + p.row * apart;
    return plane * width + first_col + p.col * apart;
  }
};

DEV Gather forward_gather(const ConvSizes& s) {
  return {s.batch,
          s.in_channels,
          s.height,
          s.width,
          s.out_channels,
          s.out_height,
          s.out_width,
          s.out_height,
          s.out_width,
          0,
          0,
          1,
          s.kernel_h,
          s.kernel_w,
          0,
          0,
          1,
          s.kernel_w,
          s.kernel_h * s.kernel_w,
          s.stride,
          1,
          -s.padding,
          -s.padding};
}

// Class `residue` of min(stride, height) * min(stride, width) classes.
DEV Gather grad_input_gather(const ConvSizes& s, int residue) {
  int across = s.stride < s.width ? s.stride : s.width;
  int h = residue / across, w = residue % across;
  int tap_row = (h + s.padding) % s.stride, tap_col = (w + s.padding) % s.stride;
  int taps_h = tap_row < s.kernel_h ? (s.kernel_h - tap_row - 1) / s.stride + 1 : 0;
  int taps_w = tap_col < s.kernel_w ? (s.kernel_w - tap_col - 1) / s.stride + 1 : 0;
  return {s.batch,
          s.out_channels,
          s.out_height,
          s.out_width,
          s.in_channels,
          s.height,
          s.width,
          (s.height - h - 1) / s.stride + 1,
          (s.width - w - 1) / s.stride + 1,
          h,
          w,
          s.stride,
          taps_h,
          taps_w,
          tap_row,
          tap_col,
          s.stride,
          s.kernel_w,
          s.kernel_h * s.kernel_w,
          1,
          -1,
          (h + s.padding) / s.stride,
          (w + s.padding) / s.stride};
}

// A block's part of a gather: its class, its first target pixel and its first channel. Blocks of one tile of pixels lie
// side by side, one for each tile of channels, so that the gathered pixels are read once from memory and then from the
// L2 cache.
struct GatherTile { Gather gather; int64_t pixel; int channel; };
template <bool GRAD> DEV GatherTile gather_tile(const ConvSizes& s, int channels_a_tile, int pixels_a_tile) {
  int channel_tiles = ((GRAD ? s.in_channels : s.out_channels) + channels_a_tile - 1) / channels_a_tile;
  int64_t tile = blockIdx.x / channel_tiles;
  int channel = (int)(blockIdx.x % channel_tiles) * channels_a_tile;
  if (!GRAD) return {forward_gather(s), tile * pixels_a_tile, channel};
  Gather first = grad_input_gather(s, 0);      // the class with the most pixels
  int64_t tiles = (first.columns() + pixels_a_tile - 1) / pixels_a_tile;
  return {grad_input_gather(s, (int)(tile / tiles)), tile % tiles * pixels_a_tile, channel};
}
