//! Convolution against seven plain loops in f64, on awkward shapes.

use super::*;
use crate::device::host::testing::{assert_close, normal, poison, same_in_all_pools};

/// (batch, in channels, height, width, out channels, kernel h, kernel w, stride, padding)
type Row = (usize, usize, usize, usize, usize, usize, usize, usize, usize);

const SHAPES: &[Row] = &[
    (1, 1, 1, 1, 1, 1, 1, 1, 0),
    (1, 1, 1, 1, 2, 3, 3, 1, 1),
    (2, 3, 1, 7, 5, 1, 3, 1, 1),
    (1, 2, 1, 1, 3, 7, 7, 2, 3), // the filter is larger than the image
    (2, 2, 3, 2, 3, 7, 5, 1, 3), // so is it here, and the rows of the window differ
    (3, 5, 7, 7, 7, 1, 1, 1, 0), // whole images grouped in a tile
    (2, 3, 13, 13, 4, 3, 3, 1, 1),
    (2, 3, 13, 7, 4, 3, 3, 2, 1),
    (2, 3, 13, 13, 4, 3, 3, 3, 0),
    (1, 3, 33, 31, 9, 7, 7, 2, 3),
    (2, 3, 13, 13, 4, 1, 1, 2, 0),
    (2, 3, 12, 12, 4, 1, 1, 1, 1),
    (1, 17, 23, 29, 33, 1, 1, 1, 0), // the image itself is the matrix
    (1, 17, 31, 33, 5, 3, 3, 1, 1),  // tiles end inside a row
    (1, 33, 9, 9, 65, 3, 3, 1, 2),
    (2, 2, 5, 5, 2, 2, 2, 2, 0),
    (1, 2, 5, 5, 2, 2, 2, 4, 3), // windows that touch nothing but padding
    (0, 2, 5, 5, 2, 3, 3, 1, 1),
    (2, 2, 2, 2, 2, 3, 3, 1, 0), // no window fits: no outputs
    (2, 0, 3, 3, 2, 3, 3, 1, 1),
    (2, 2, 3, 3, 0, 3, 3, 1, 1),
    (37, 40, 7, 7, 50, 3, 3, 1, 1), // several groups of images, uneven
    (3, 300, 4, 4, 3, 3, 3, 1, 1),
    (16, 1, 29, 31, 2, 3, 3, 1, 1), // a thread a tile, two tiles an image, which end inside a row
    (16, 1, 61, 63, 2, 3, 3, 2, 1),
    (16, 2, 29, 31, 2, 1, 1, 1, 0),
    (200, 2, 7, 6, 3, 1, 1, 1, 0), // a thread a tile, several images each
    (200, 2, 7, 6, 3, 3, 3, 2, 1),
    (1, 2, 47, 53, 3, 3, 3, 1, 1), // all threads a tile, two tiles an image
    (1, 2, 47, 53, 3, 1, 1, 1, 0),
    (16, 1, 3, 1100, 2, 3, 3, 1, 1), // tiles inside a row
    (16, 1, 2, 1100, 2, 2, 3, 2, 2),
    (2, 130, 5, 5, 65, 3, 3, 1, 1), // weights of which all threads sum the gradient together: one tile, and two
    (1, 910, 13, 13, 9, 3, 3, 1, 1),
    (1000, 0, 3, 3, 1, 1, 1, 1, 0), // nothing of something
    (1000, 1, 3, 3, 0, 1, 1, 1, 0),
    (1, 1, 0, 3, 1, 3, 3, 1, 2),
    (0, 1, 3, 3, 1, 1, 1, 1, 0),
];

fn sizes_of(
    &(batch, in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding): &Row,
) -> ConvSizes {
    let fits = |len: usize, kernel: usize| (len + 2 * padding).checked_sub(kernel).map_or(0, |free| free / stride + 1);
    let (out_height, out_width) = (fits(height, kernel_h), fits(width, kernel_w));
    let window = Window { kernel: [kernel_h, kernel_w], stride, padding };
    ConvSizes { batch, in_channels, height, width, out_channels, out_height, out_width, window }
}

/// Calls `visit(index in x, index in weight, index in out)` for every product of a convolution.
fn products(s: &ConvSizes, mut visit: impl FnMut(usize, usize, usize)) {
    let Window { kernel: [kernel_h, kernel_w], stride, padding } = s.window;
    for n in 0..s.batch {
        for o in 0..s.out_channels {
            for (oy, ox) in (0..s.out_height).flat_map(|oy| (0..s.out_width).map(move |ox| (oy, ox))) {
                let out = ((n * s.out_channels + o) * s.out_height + oy) * s.out_width + ox;
                for c in 0..s.in_channels {
                    for (ky, kx) in (0..kernel_h).flat_map(|ky| (0..kernel_w).map(move |kx| (ky, kx))) {
                        let y = (oy * stride + ky) as isize - padding as isize;
                        let x = (ox * stride + kx) as isize - padding as isize;
                        if y < 0 || x < 0 || y >= s.height as isize || x >= s.width as isize {
                            continue;
                        }
                        let image = ((n * s.in_channels + c) * s.height + y as usize) * s.width + x as usize;
                        visit(image, ((o * s.in_channels + c) * kernel_h + ky) * kernel_w + kx, out);
                    }
                }
            }
        }
    }
}

/// out without and with bias, d_x, d_w overwritten and accumulated, d_b overwritten and accumulated.
fn by_loops(s: &ConvSizes, x: &[f64], w: &[f64], b: &[f64], d_y: &[f64], d_w0: &[f64], d_b0: &[f64]) -> Vec<Vec<f64>> {
    let (mut out, mut d_x, mut d_w) = (vec![0.0; d_y.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
    products(s, |i, k, o| {
        out[o] += x[i] * w[k];
        d_x[i] += d_y[o] * w[k];
        d_w[k] += d_y[o] * x[i];
    });
    let channel = |o: usize| o / s.out_plane() % s.out_channels;
    let mut d_b = vec![0.0; s.out_channels];
    d_y.iter().enumerate().for_each(|(o, d_y)| d_b[channel(o)] += d_y);
    let biased = out.iter().enumerate().map(|(o, out)| out + b[channel(o)]).collect();
    let add = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f64>>();
    let (more_w, more_b) = (add(&d_w, d_w0), add(&d_b, d_b0));
    vec![out, biased, d_x, d_w, more_w, d_b, more_b]
}

fn bodies<T: Real>(s: &ConvSizes, x: &[T], w: &[T], b: &[T], d_y: &[T], d_w0: &[T], d_b0: &[T]) -> Vec<Vec<T>> {
    let (mut out, mut biased, mut d_x) = (poison::<T>(d_y.len()), poison::<T>(d_y.len()), poison::<T>(x.len()));
    let shared = &mut SharedScratch::default();
    forward(&mut out, x, w, None, s, shared);
    forward(&mut biased, x, w, Some(b), s, shared);
    grad_input(&mut d_x, d_y, w, s, shared);
    let (mut d_w, mut more_w) = (poison::<T>(w.len()), d_w0.to_vec());
    grad_weight(&mut d_w, d_y, x, false, s, shared);
    grad_weight(&mut more_w, d_y, x, true, s, shared);
    let (mut d_b, mut more_b) = (poison::<T>(b.len()), d_b0.to_vec());
    grad_bias(&mut d_b, d_y, false, s);
    grad_bias(&mut more_b, d_y, true, s);
    vec![out, biased, d_x, d_w, more_w, d_b, more_b]
}

fn check<T: Real>(s: &ConvSizes, tolerance: f64) {
    let lens = [
        s.batch * s.in_channels * s.plane(),
        s.out_channels * s.filter_elems(),
        s.out_channels,
        s.batch * s.out_channels * s.out_plane(),
        s.out_channels * s.filter_elems(),
        s.out_channels,
    ];
    let [x, w, b, d_y, d_w0, d_b0] = std::array::from_fn(|i| normal::<f64>(lens[i], i as u64));
    let want = by_loops(s, &x, &w, &b, &d_y, &d_w0, &d_b0);
    let [x, w, b, d_y, d_w0, d_b0] = std::array::from_fn(|i| normal::<T>(lens[i], i as u64));
    let got = same_in_all_pools(|| bodies(s, &x, &w, &b, &d_y, &d_w0, &d_b0));
    let names = ["out", "out with bias", "d_x", "d_w", "d_w accumulated", "d_b", "d_b accumulated"];
    for ((got, want), name) in got.iter().zip(&want).zip(names) {
        assert_close(got, want, tolerance, &format!("{name} of {s:?}"));
    }
}

#[test]
fn is_the_plain_loop() {
    for row in SHAPES {
        let sizes = sizes_of(row);
        // Sums of up to a few thousand products of normals, each rounded, beside their greatest element.
        check::<f32>(&sizes, 1e-5);
        check::<f64>(&sizes, 1e-13);
    }
}

#[test]
fn tiles_cover_every_position_once() {
    for row in SHAPES {
        let sizes = sizes_of(row);
        for room in [Room { bytes: 1, columns: 128 }, ROOM_OF_ONE, ROOM_OF_ALL] {
            let tiling = Tiling::new::<f32>(&sizes, room);
            let mut seen = vec![0; sizes.batch * sizes.out_plane()];
            for tile in (0..tiling.image_groups()).flat_map(|group| tiling.tiles_of(group)) {
                for image in tile.images {
                    tile.positions.clone().for_each(|at| seen[image * sizes.out_plane() + at] += 1);
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{sizes:?} {room:?}");
        }
    }
}
