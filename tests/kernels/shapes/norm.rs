//! Normalizations and losses.

use crate::cases::{Table, cross_entropy_in_parts, mean_squared_error};
use hydra::graph::RotaryScaling;

/// Adds the cases.
pub fn cases(t: &mut Table) {
    // Rows of one warp, of several, of a block; in packs and one by one; more rows than a block's groups take at once.
    for (rows, cols) in
        [(7, 256), (65, 264), (3, 512), (9, 768), (5, 776), (3, 1024), (2, 1032), (3, 1280), (2, 4107), (300, 40)]
    {
        t.add(format!("layernorm {rows}x{cols}"), move |s| {
            let (x, weight, bias) = (s.leaf("x", [rows, cols])?, s.leaf("weight", [cols])?, s.leaf("bias", [cols])?);
            s.b.layernorm(x, weight, bias, 1e-5)
        });
        t.add(format!("rmsnorm {rows}x{cols}"), move |s| {
            let (x, weight) = (s.leaf("x", [rows, cols])?, s.leaf("weight", [cols])?);
            s.b.rmsnorm(x, weight, 1e-5)
        });
    }
    // Rows of a warp of every length, one and two at a time; more rows of the gradient than a warp, or a block, has on
    // their way.
    for (rows, cols) in [(5, 1536), (3, 1600), (2, 1992), (3, 2048), (17, 2056), (9, 4104), (5, 8192), (8500, 8)] {
        t.add(format!("layernorm {rows}x{cols}"), move |s| {
            let (x, weight, bias) = (s.leaf("x", [rows, cols])?, s.leaf("weight", [cols])?, s.leaf("bias", [cols])?);
            s.b.layernorm(x, weight, bias, 1e-5)
        });
    }
    // Rows that no block keeps.
    for cols in [5121, 10_248, 20_484] {
        t.add(format!("layernorm 2x{cols}"), move |s| {
            let (x, weight, bias) = (s.leaf("x", [2, cols])?, s.leaf("weight", [cols])?, s.leaf("bias", [cols])?);
            s.b.layernorm(x, weight, bias, 1e-5)
        });
    }
    // Blocks of a row; of several sequences, not all of as many; of several positions, the last of fewer; of more pairs
    // than are kept at once.
    for (b, len, heads, width, rest) in [
        (1, 3, 40, 128, 1024),
        (2, 1025, 1, 64, 0),
        (1, 2, 1, 1032, 8),
        (1, 4, 3, 10, 7),
        (9, 33, 2, 16, 8),
        (1, 203, 2, 16, 24),
        (3, 67, 1, 10, 3),
        (5, 41, 1, 520, 0),
    ] {
        t.add(format!("rotary {b}x{len}, {heads} heads of {width} and {rest}"), move |s| {
            let x = s.leaf("x", [b, len, heads * width + rest])?;
            s.b.rotary(x, heads, width, 10_000.0)
        });
    }
    for scaling in [
        RotaryScaling::Linear { factor: 3.0 },
        RotaryScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, positions: 8192 },
        RotaryScaling::Yarn { factor: 4.0, low: 1.0, high: 32.0, positions: 4096, whole: true, stretch: 1.2 },
        RotaryScaling::Yarn { factor: 4.0, low: 0.3, high: 2.5, positions: 40, whole: false, stretch: 0.9 },
    ] {
        t.add(format!("rotary with {scaling:?}"), move |s| {
            let x = s.leaf("x", [1, 41, 3 * 64])?;
            s.b.rotary_scaled(x, 2, 64, 500_000.0, scaling)
        });
    }
    for (rows, classes) in [(2, 6), (9, 1000), (3, 4099), (1, 50_257)] {
        t.add(format!("cross_entropy {rows}x{classes}"), move |s| {
            let (x, y) = (s.leaf("x", [rows, classes])?, s.leaf("y", [rows, classes])?);
            s.b.add(x, y)
        })
        .head = None;
    }
    // A width for each kind of product, logits that lie further apart, and column sums beside a product.
    for (sizes, part) in [([43, 40, 261], 16), ([150, 64, 264], 64), ([70, 512, 40], 32)] {
        cross_entropy_in_parts(t, sizes, part);
    }
    // Rows of a warp, of a block, and of one whose threads go round; more rows than the loss' sum has threads.
    for (rows, cols) in [(9, 64), (17, 1000), (3, 1028), (2, 4099), (1, 20_000), (1030, 3)] {
        mean_squared_error(t, rows, cols);
    }
}
