//! Shapes of contiguous row-major tensors.

use super::{Error, Result};
use std::fmt;

/// The sizes of a tensor's axes, outermost first. A scalar has no axes and one element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Shape(pub Vec<usize>);

impl Shape {
    /// Makes a shape from its axes.
    pub fn new(axes: impl Into<Vec<usize>>) -> Self {
        Shape(axes.into())
    }

    /// The axes.
    pub fn axes(&self) -> &[usize] {
        &self.0
    }

    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.0.iter().product()
    }

    /// Number of elements, or an error where the product does not fit.
    ///
    /// # Errors
    /// When the product of the axes overflows.
    pub fn checked_elems(&self) -> Result<usize> {
        self.0
            .iter()
            .try_fold(1usize, |n, &axis| n.checked_mul(axis))
            .filter(|&n| n <= isize::MAX as usize / 8)
            .ok_or_else(|| Error::bad(format!("shape {self} has more elements than fit in memory")))
    }

    /// Size of the last axis; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.0[..self.0.len().saturating_sub(1)].iter().product()
    }

    /// The coordinates of element number `flat` in row-major order, such as `(2, 5)`.
    pub fn position(&self, mut flat: usize) -> String {
        let mut coordinates: Vec<String> = Vec::with_capacity(self.0.len());
        for &axis in self.0.iter().rev() {
            coordinates.push((flat % axis.max(1)).to_string());
            flat /= axis.max(1);
        }
        coordinates.reverse();
        format!("({})", coordinates.join(", "))
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(axes: [usize; N]) -> Self {
        Shape(axes.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("scalar");
        }
        let axes: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&axes.join("x"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_prints() {
        let s = Shape::from([2, 3, 5]);
        assert_eq!((s.elems(), s.rows(), s.cols()), (30, 6, 5));
        assert_eq!(s.to_string(), "2x3x5");
        let scalar = Shape::default();
        assert_eq!((scalar.elems(), scalar.rows(), scalar.cols()), (1, 1, 1));
        assert!(Shape::from([usize::MAX, 2]).checked_elems().is_err());
        assert_eq!(Shape::from([0, 7]).elems(), 0);
        assert_eq!(
            (s.position(29), s.position(7), scalar.position(0)),
            ("(1, 2, 4)".into(), "(0, 1, 2)".into(), "()".into())
        );
    }
}
