//! Pooling and batch normalization.

use crate::cases::Table;

/// Adds the cases.
pub fn cases(t: &mut Table) {
    // Planes summed as columns and by themselves; one piece of a plane, several; rows that are not aligned.
    for (n, c, h, w) in
        [(65, 8, 1, 1), (7, 300, 1, 1), (33, 4, 7, 7), (5, 3, 15, 17), (3, 2, 16, 16), (7, 2, 28, 28), (2, 1, 97, 101)]
    {
        t.add(format!("batchnorm {n}x{c}x{h}x{w}"), move |s| {
            let x = s.leaf("x", [n, c, h, w])?;
            s.b.batchnorm(x, "norm", 1e-3, 0.1)
        });
    }
    // Planes in strips, several planes a block, more windows than overlap in one go, windows that lie in the padding,
    // large windows of rows that no block has room for.
    for (x, kernel, stride, padding) in [
        ([2, 3, 13, 13], 3, 2, 1),
        ([2, 2, 33, 31], 7, 2, 3),
        ([1, 65, 8, 9], 2, 3, 0),
        ([1, 2, 121, 117], 3, 2, 1),
        ([1, 1, 90, 171], 5, 1, 2),
        ([11, 300, 5, 7], 3, 1, 1),
        ([3, 700, 4, 4], 2, 2, 0),
        ([1, 1, 3, 7000], 3, 2, 1),
        ([1, 1, 6, 2250], 6, 6, 0),
    ] {
        t.add(format!("max_pool {x:?} kernel {kernel} stride {stride} padding {padding}"), move |s| {
            let x = s.leaf("x", x)?;
            s.b.max_pool(x, kernel, stride, padding)
        });
        t.add(format!("avg_pool {x:?} kernel {kernel} stride {stride} padding {padding}"), move |s| {
            let x = s.leaf("x", x)?;
            s.b.avg_pool(x, [kernel, kernel], stride, padding)
        });
    }
    for (n, c, h, w) in [(3, 700, 7, 7), (2, 5, 56, 56), (1, 3, 1, 9), (5, 7, 2, 1)] {
        t.add(format!("global_avg_pool {n}x{c}x{h}x{w}"), move |s| {
            let x = s.leaf("x", [n, c, h, w])?;
            s.b.global_avg_pool(x)
        });
    }
}
