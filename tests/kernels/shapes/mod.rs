//! Sizes that kernels find awkward, by family: tails of every tile, rows that are not aligned, one of everything.

mod attention;
mod conv;
mod elementwise;
mod image;
mod linear;
mod norm;

use super::cases::Table;

/// Adds every case.
pub fn all(t: &mut Table) {
    attention::cases(t);
    conv::cases(t);
    elementwise::cases(t);
    image::cases(t);
    linear::cases(t);
    norm::cases(t);
}
