//! Products: every tail of every tile, in both layouts, with and without what is fused behind.

use crate::cases::{CLASSES, Table, after, linear, residual};
use hydra::graph::{Activation, WeightLayout};

/// (rows, inputs, outputs): tails of the tiles and of the steps along k, one row, rows of every alignment, a k that is
/// cut.
const SIZES: [[usize; 3]; 9] = [
    [1, 64, 24],
    [7, 1, 9],
    [17, 40, 257],
    [33, 129, 1],
    [65, 31, 127],
    [127, 8, 33],
    [129, 72, 136],
    [2, 1000, 15],
    [700, 3, 5],
];

/// Adds the cases.
pub fn cases(t: &mut Table) {
    let activations = Activation::ALL;
    for (i, sizes) in SIZES.into_iter().enumerate() {
        for (j, layout) in [WeightLayout::InOut, WeightLayout::OutIn].into_iter().enumerate() {
            let (activation, bias) = (activations[(i + 2 * j) % activations.len()], i % 3 > 0);
            let [rows, inputs, outputs] = sizes;
            t.add(format!("linear {rows}x{inputs}x{outputs} {layout:?} {activation:?} bias {bias}"), move |s| {
                linear(s, sizes, layout, activation, bias)
            });
            let bias = (i + j) % 2 > 0;
            t.add(format!("linear {rows}x{inputs}x{outputs} {layout:?} residual bias {bias}"), move |s| {
                residual(s, sizes, layout, bias)
            });
            let before = activations[1 + (i + j) % (activations.len() - 1)];
            t.add(format!("linear {rows}x{inputs}x{outputs} {layout:?} after {before:?}"), move |s| {
                after(s, sizes, layout, before, false)
            });
        }
    }
    // The bias' gradient beside its weight's: three parts of rows, the last with fewer, and two tiles of columns.
    // Without a head, so that in bf16 rows of 261 logits lie 264 apart.
    for (layout, outputs) in [(WeightLayout::InOut, 264), (WeightLayout::InOut, 261), (WeightLayout::OutIn, 261)] {
        t.add(format!("linear 70x520x{outputs} {layout:?} bias true"), move |s| {
            linear(s, [70, 520, outputs], layout, Activation::None, true)
        })
        .head = (outputs == 264).then_some(CLASSES);
    }
    // The same where the bias' gradient comes after.
    t.add("linear 70x40x261 OutIn bias true", move |s| {
        linear(s, [70, 40, 261], WeightLayout::OutIn, Activation::None, true)
    })
    .head = None;
}
