//! Axes in another order, copied.

use super::real::Real;

/// `out` is `x`, of shape `axes_in`, with output axis i being input axis `axes[i]`.
pub fn transpose<T: Real>(out: &mut [T], x: &[T], axes_in: &[usize], axes: &[usize]) {
    if out.is_empty() {
        return;
    }
    let mut strides_in = vec![1; axes_in.len()];
    for i in (0..axes_in.len().saturating_sub(1)).rev() {
        strides_in[i] = strides_in[i + 1] * axes_in[i + 1];
    }
    let sizes: Vec<usize> = axes.iter().map(|&a| axes_in[a]).collect();
    let strides: Vec<usize> = axes.iter().map(|&a| strides_in[a]).collect();
    let mut index = vec![0; sizes.len()];
    let mut from = 0;
    for value in out {
        *value = x[from];
        // Count up like an odometer, last axis fastest.
        for axis in (0..sizes.len()).rev() {
            index[axis] += 1;
            from += strides[axis];
            if index[axis] < sizes[axis] {
                break;
            }
            from -= strides[axis] * sizes[axis];
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_axes() {
        let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut out = vec![f32::NAN; 24];
        transpose(&mut out, &x, &[2, 3, 4], &[2, 0, 1]);
        for (i, &v) in out.iter().enumerate() {
            let (c, a, b) = (i / 6, i / 3 % 2, i % 3);
            assert_eq!(v, x[a * 12 + b * 4 + c]);
        }
        let mut back = vec![f32::NAN; 24];
        transpose(&mut back, &out, &[4, 2, 3], &[1, 2, 0]);
        assert_eq!(back, x);
        transpose::<f32>(&mut [], &[], &[0, 3], &[1, 0]);
        let mut scalar = [0.0];
        transpose(&mut scalar, &[7.0f32], &[], &[]);
        assert_eq!(scalar, [7.0]);
    }
}
