//! Convolutions.

use crate::cases::{Table, conv2d};

/// Adds the cases.
pub fn cases(t: &mut Table) {
    for (x, weight, bias, stride, padding) in [
        // A first layer: 3 channels and a large filter.
        ([2, 3, 13, 13], [70, 3, 7, 7], true, 2, 3),
        // Tails of every tile.
        ([1, 17, 7, 7], [33, 17, 3, 3], false, 1, 1),
        ([2, 65, 9, 5], [129, 65, 1, 3], true, 1, 1),
        // One tap: planes of whole groups, planes that are not, one pixel, a stride.
        ([2, 40, 8, 8], [72, 40, 1, 1], true, 1, 0),
        ([3, 33, 2, 4], [65, 33, 1, 1], false, 1, 0),
        ([3, 24, 7, 7], [16, 24, 1, 1], true, 1, 0),
        ([3, 65, 1, 1], [127, 65, 1, 1], true, 1, 0),
        ([2, 8, 1, 1], [16, 8, 1, 1], false, 1, 0),
        ([2, 16, 9, 10], [8, 16, 1, 1], false, 2, 0),
        // Strips of pixels that end within a plane, and several steps of channels.
        ([3, 100, 20, 20], [70, 100, 1, 1], true, 1, 0),
        ([5, 33, 12, 6], [130, 33, 1, 1], false, 1, 0),
        // And a stride of 2, whose gradient is spread over even rows and columns: of an even and an odd number of rows.
        ([4, 70, 20, 24], [50, 70, 1, 1], true, 2, 0),
        ([5, 66, 7, 16], [40, 66, 1, 1], false, 2, 0),
        // Boxes of pixels: parts of rows, of images and of the batch; two steps of channels; words of 16 to 2 bytes;
        // classes of a stride with taps and without.
        ([5, 80, 14, 14], [136, 80, 3, 3], true, 1, 1),
        ([3, 43, 9, 7], [144, 43, 3, 3], true, 1, 1),
        ([2, 64, 6, 40], [64, 64, 3, 3], true, 1, 1),
        ([2, 46, 20, 17], [45, 46, 5, 3], false, 1, 2),
        ([4, 64, 13, 12], [48, 64, 3, 3], true, 2, 1),
        ([4, 48, 13, 16], [48, 48, 1, 1], true, 2, 0),
        ([3, 48, 11, 13], [80, 48, 3, 5], false, 3, 2),
        // Strides that divide nothing, and pixels that no tap reaches.
        ([2, 16, 13, 12], [8, 16, 3, 3], false, 2, 1),
        ([1, 8, 9, 9], [8, 8, 2, 2], true, 3, 0),
        ([1, 5, 16, 11], [9, 5, 4, 4], true, 4, 0),
        ([2, 3, 4, 4], [3, 3, 2, 2], false, 7, 2),
        // Filters larger than the image, and one column.
        ([2, 5, 3, 3], [9, 5, 5, 5], true, 2, 2),
        ([3, 9, 7, 1], [5, 9, 3, 1], true, 1, 0),
        // What takes the other tiles, on four multiprocessors: 128 x 224 and 64 x 224 pixels on Hopper, then 64 x 256;
        // square tiles elsewhere.
        ([5, 32, 5, 17], [72, 32, 3, 3], true, 1, 1),
        ([5, 32, 7, 26], [40, 32, 3, 3], false, 1, 1),
        ([5, 32, 9, 29], [40, 32, 3, 3], true, 1, 1),
        ([2, 16, 14, 14], [128, 16, 3, 3], true, 1, 1),
        // Of weight gradients: 64 x 384, 128 x 256; of one tap, 256 columns, and flat tiles.
        ([2, 32, 8, 8], [72, 32, 3, 1], false, 1, 1),
        ([1, 512, 2, 2], [192, 512, 5, 5], false, 1, 2),
        ([2, 130, 8, 8], [40, 130, 1, 1], true, 1, 0),
        ([5, 24, 10, 20], [40, 24, 1, 1], false, 1, 0),
        // One tap with channels that are too few for Hopper's own: square tiles, and flat ones of the weight's
        // gradient.
        ([2, 24, 16, 16], [128, 24, 1, 1], true, 1, 0),
        ([2, 130, 8, 8], [24, 130, 1, 1], false, 1, 0),
        // Sums over many pixels: parts of the weight gradient, then of the bias gradient.
        ([4, 2, 33, 31], [3, 2, 3, 3], true, 1, 1),
        ([3, 1, 127, 65], [2, 1, 1, 1], true, 1, 0),
    ] {
        conv2d(t, x, weight, bias, stride, padding);
    }
}
