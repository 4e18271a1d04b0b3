//! Launches of `kernels/transpose.cu`.
//!
//! Which kernel moves what is decided here, by `arrange` and `form_of`: pure functions of axes.

use super::launch::Launch;
use super::operands::Operands;
use super::queue::Queue;
use crate::base::{Error, Result};

/// Threads of a block.
const THREADS: u32 = 256;
/// Units that each of them gathers.
const UNITS: usize = 4;
/// Axes that kernels take.
const AXES: usize = 6;
/// Bytes of a line of a tile.
const LINE_BYTES: usize = 128;
/// Axes shorter than this would leave most of a tile empty.
const SHORT: usize = 16;

/// An axis of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    size: usize,
    /// From one element to the next in the input, in elements.
    stride: usize,
}

/// The output's axes, without those of size 1 and with neighbours merged where they are neighbours in the input too.
fn arrange(axes_in: &[usize], axes: &[usize]) -> Vec<Axis> {
    let mut strides = vec![1; axes_in.len()];
    for i in (0..axes_in.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * axes_in[i + 1];
    }
    let mut merged: Vec<Axis> = Vec::new();
    for &a in axes.iter().filter(|&&a| axes_in[a] != 1) {
        let axis = Axis { size: axes_in[a], stride: strides[a] };
        match merged.last_mut() {
            Some(before) if before.stride == axis.size * axis.stride => {
                *before = Axis { size: before.size * axis.size, stride: axis.stride };
            }
            _ => merged.push(axis),
        }
    }
    merged
}

/// How axes are moved.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    /// As they lie.
    Copy,
    /// Unit by unit of so many bytes; sizes and strides are in units.
    Gather { unit: usize, axes: Vec<Axis> },
    /// Tile by tile: `rows` is the output's last axis, `cols` the input's.
    Tile { rows: Axis, cols: Axis, col_stride: usize, others: Vec<(Axis, usize)> },
}

/// The form for arranged axes of elements of `elem` bytes, at addresses that are multiples of `aligned` bytes. The
/// stride beside an axis or its name is the output's.
fn form_of(axes: Vec<Axis>, elem: usize, aligned: usize) -> Form {
    let [.., last] = axes[..] else { return Form::Copy };
    if axes.len() == 1 {
        return Form::Copy;
    }
    if last.stride == 1 {
        let fits = |unit: &usize| {
            aligned.is_multiple_of(*unit)
                && (last.size * elem).is_multiple_of(*unit)
                && axes[..axes.len() - 1].iter().all(|axis| (axis.stride * elem).is_multiple_of(*unit))
        };
        let unit = [16, 8, 4].into_iter().filter(|&unit| unit > elem).find(fits).unwrap_or(elem);
        let mut axes: Vec<Axis> = axes.iter().map(|a| Axis { stride: a.stride * elem / unit, ..*a }).collect();
        *axes.last_mut().expect("there are two or more") = Axis { size: last.size * elem / unit, stride: 1 };
        return Form::Gather { unit, axes };
    }
    let side = axes.iter().position(|a| a.stride == 1).expect("the input's last axis that is longer than 1");
    if last.size < SHORT || axes[side].size < SHORT {
        return Form::Gather { unit: elem, axes };
    }
    let out_stride = |k: usize| axes[k + 1..].iter().map(|a| a.size).product();
    let others = (0..axes.len() - 1).filter(|&k| k != side).map(|k| (axes[k], out_stride(k))).collect();
    Form::Tile { rows: last, cols: axes[side], col_stride: out_stride(side), others }
}

/// `out` is `x` with output axis i being input axis `axes[i]`.
pub(super) fn transpose(q: &mut Queue, o: &Operands, axes: &[usize]) -> Result<()> {
    let (elems, elem) = (o.out_elems(0), o.out_dtype(0).bytes() as usize);
    if elems == 0 {
        return Ok(());
    }
    let (out, x) = (o.output(0), o.input(0));
    let arranged = arrange(o.in_axes(0), axes);
    if arranged.len() > AXES {
        return Err(Error::bad(format!("transpose: {} axes, kernels take {AXES}", arranged.len())));
    }
    let aligned = 1 << (out.0 | x.0).trailing_zeros().min(4);
    match form_of(arranged, elem, aligned) {
        Form::Copy => q.copy(out, x, (elems * elem) as u64),
        Form::Gather { unit, axes } => {
            let kernel = match unit {
                2 => "transpose_gather_2",
                4 => "transpose_gather_4",
                8 => "transpose_gather_8",
                _ => "transpose_gather_16",
            };
            let units = elems * elem / unit;
            let grid = [units.div_ceil(THREADS as usize * UNITS), 1, 1];
            let launch = Launch::new(kernel, grid, THREADS).ptr(out).ptr(x).long(units);
            q.launch(launch.bytes(&gather_bytes(&axes)?, 8))
        }
        Form::Tile { rows, cols, col_stride, others } => {
            let kernel = if elem == 2 { "transpose_tile_2" } else { "transpose_tile_4" };
            let tiles = |axis: Axis| axis.size.div_ceil(LINE_BYTES / elem);
            let blocks = others.iter().map(|(axis, _)| axis.size).product::<usize>() * tiles(rows) * tiles(cols);
            let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(out).ptr(x);
            q.launch(launch.bytes(&tile_bytes(rows, cols, col_stride, &others)?, 8))
        }
    }
}

fn size_bytes(size: usize) -> Result<[u8; 4]> {
    let size = i32::try_from(size).map_err(|_| Error::bad(format!("transpose: an axis of {size} elements")))?;
    Ok(size.to_ne_bytes())
}

/// `Axes` in the kernels.
fn gather_bytes(axes: &[Axis]) -> Result<[u8; 32 + 8 * AXES]> {
    let mut bytes = [0; 32 + 8 * AXES];
    bytes[..4].copy_from_slice(&size_bytes(axes.len())?);
    for (k, axis) in axes.iter().enumerate() {
        bytes[4 + 4 * k..][..4].copy_from_slice(&size_bytes(axis.size)?);
        bytes[32 + 8 * k..][..8].copy_from_slice(&axis.stride.to_ne_bytes());
    }
    Ok(bytes)
}

/// `Tiles` in the kernels.
fn tile_bytes(
    rows: Axis,
    cols: Axis,
    col_stride: usize,
    others: &[(Axis, usize)],
) -> Result<[u8; 48 + 16 * (AXES - 2)]> {
    let mut bytes = [0; 48 + 16 * (AXES - 2)];
    for (k, size) in [rows.size, cols.size, others.len()].into_iter().chain(others.iter().map(|o| o.0.size)).enumerate()
    {
        bytes[4 * k..][..4].copy_from_slice(&size_bytes(size)?);
    }
    bytes[32..40].copy_from_slice(&rows.stride.to_ne_bytes());
    bytes[40..48].copy_from_slice(&col_stride.to_ne_bytes());
    for (k, (axis, out_stride)) in others.iter().enumerate() {
        bytes[48 + 8 * k..][..8].copy_from_slice(&axis.stride.to_ne_bytes());
        bytes[48 + 8 * (AXES - 2 + k)..][..8].copy_from_slice(&out_stride.to_ne_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(size: usize, stride: usize) -> Axis {
        Axis { size, stride }
    }

    #[test]
    fn kernels_have_the_same_blocks() {
        let source = include_str!("../../../kernels/transpose.cu");
        for (name, value) in [("THREADS", THREADS as usize), ("UNITS", UNITS), ("AXES", AXES)] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        assert!(source.contains(&format!("constexpr int SIDE = {LINE_BYTES} / sizeof(Unit)")));
    }

    #[test]
    fn axes_that_stay_together_are_one() {
        assert_eq!(arrange(&[2, 3, 4], &[0, 1, 2]), [axis(24, 1)]);
        assert_eq!(arrange(&[2, 3, 1, 4], &[1, 2, 0, 3]), [axis(3, 4), axis(2, 12), axis(4, 1)]);
        assert_eq!(arrange(&[2, 3, 4, 5], &[2, 3, 0, 1]), [axis(20, 1), axis(6, 20)]);
        assert_eq!(arrange(&[1, 1], &[1, 0]), []);
        assert_eq!(arrange(&[], &[]), []);
    }

    #[test]
    fn forms() {
        let form = |axes_in: &[usize], axes: &[usize], elem| form_of(arrange(axes_in, axes), elem, 16);
        assert_eq!(form(&[7, 1], &[1, 0], 4), Form::Copy);
        // Heads: (B, T, H, D) to (B, H, T, D).
        let heads = Form::Gather { unit: 16, axes: vec![axis(2, 480), axis(12, 8), axis(5, 96), axis(8, 1)] };
        assert_eq!(form(&[2, 5, 12, 64], &[0, 2, 1, 3], 2), heads);
        let odd = Form::Gather { unit: 4, axes: vec![axis(3, 5), axis(2, 15), axis(5, 1)] };
        assert_eq!(form(&[2, 3, 5], &[1, 0, 2], 4), odd);
        assert_eq!(
            form(&[2, 40, 50], &[0, 2, 1], 4),
            Form::Tile { rows: axis(40, 50), cols: axis(50, 1), col_stride: 40, others: vec![(axis(2, 2000), 2000)] }
        );
        // Channels to the front of an image of three.
        assert_eq!(
            form(&[2, 100, 3], &[0, 2, 1], 2),
            Form::Gather { unit: 2, axes: vec![axis(2, 300), axis(3, 1), axis(100, 3)] }
        );
    }
}
