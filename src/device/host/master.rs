//! bf16 weights with their f32 masters: the weight is the master rounded, the remainder its lower half, and both
//! together are exact.
//!
//! With `bits` the master's: `weight = (bits + 0x8000) >> 16`, the nearest bf16 with ties away from zero, and
//! `remainder = bits & 0xFFFF`. Back: the upper half is the weight, less one where the remainder's top bit says that it
//! was rounded up. So the master is kept without keeping its upper half twice, and a device sees a weight that is
//! rounded, not cut off.
//!
//! A NaN stays one in the weight as well, whatever its lower half: every NaN becomes the same, since rounding up could
//! carry others into a zero of the other sign, and since what an operation leaves in a NaN differs from machine to
//! machine. Infinities are exact; so are finite masters that round to infinity, half a place below it.

use super::optimizer::{AdamwStep, SgdStep, adamw_serial, sgd_serial};
use super::parallel::{expect_len, simd};
use rayon::prelude::*;

/// Elements whose masters are put together at a time: few enough for the stack.
const PIECE: usize = 2048;

/// The weight and the remainder of a master.
#[inline(always)]
pub fn split(master: f32) -> (u16, u16) {
    let bits = if master.is_nan() { 0x7FC0_0000 } else { master.to_bits() };
    (((bits + 0x8000) >> 16) as u16, bits as u16)
}

/// The master of a weight and its remainder.
#[inline(always)]
pub fn join(weight: u16, remainder: u16) -> f32 {
    let high = weight.wrapping_sub(remainder >> 15);
    f32::from_bits(u32::from(high) << 16 | u32::from(remainder))
}

/// [`super::optimizer::adamw`] on masters. All slices are equally long.
pub fn adamw(weight: &mut [u16], remainder: &mut [u16], m: &mut [f32], v: &mut [f32], grad: &[f32], step: &AdamwStep) {
    for (name, len) in [("remainder", remainder.len()), ("m", m.len()), ("v", v.len()), ("grad", grad.len())] {
        expect_len("master adamw", name, len, weight.len());
    }
    let constants = step.constants();
    weight
        .par_chunks_mut(PIECE)
        .zip(remainder.par_chunks_mut(PIECE))
        .zip(m.par_chunks_mut(PIECE))
        .zip(v.par_chunks_mut(PIECE))
        .zip(grad.par_chunks(PIECE))
        .for_each(|((((weight, remainder), m), v), grad)| {
            with_masters(weight, remainder, |masters| adamw_serial(masters, m, v, grad, &constants));
        });
}

/// [`super::optimizer::sgd`] on masters: `momentum_buffer` is as long as `weight`, or empty when `momentum` is 0.
pub fn sgd(weight: &mut [u16], remainder: &mut [u16], momentum_buffer: &mut [f32], grad: &[f32], step: &SgdStep) {
    for (name, len) in [("remainder", remainder.len()), ("grad", grad.len())] {
        expect_len("master sgd", name, len, weight.len());
    }
    let pieces = weight.par_chunks_mut(PIECE).zip(remainder.par_chunks_mut(PIECE)).zip(grad.par_chunks(PIECE));
    if step.momentum == 0.0 {
        pieces.for_each(|((weight, remainder), grad)| {
            with_masters(weight, remainder, |masters| sgd_serial(masters, &mut [], grad, step));
        });
        return;
    }
    expect_len("master sgd", "momentum_buffer", momentum_buffer.len(), grad.len());
    pieces.zip(momentum_buffer.par_chunks_mut(PIECE)).for_each(|(((weight, remainder), grad), buffer)| {
        with_masters(weight, remainder, |masters| sgd_serial(masters, buffer, grad, step));
    });
}

/// Puts the masters of a piece together, lets `update` change them, and splits them again.
fn with_masters(weight: &mut [u16], remainder: &mut [u16], update: impl FnOnce(&mut [f32])) {
    let mut masters = [0.0; PIECE];
    let masters = &mut masters[..weight.len()];
    simd(
        #[inline(always)]
        || {
            for ((master, &weight), &remainder) in masters.iter_mut().zip(&*weight).zip(&*remainder) {
                *master = join(weight, remainder);
            }
        },
    );
    update(masters);
    simd(
        #[inline(always)]
        || {
            for ((&master, weight), remainder) in masters.iter().zip(weight).zip(remainder) {
                (*weight, *remainder) = split(master);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::optimizer;
    use crate::device::host::testing::{normal, same_in_all_pools};

    /// The weight is the nearest bf16, and nothing is lost.
    fn check(master: f32) {
        let (weight, remainder) = split(master);
        assert_eq!(join(weight, remainder).to_bits(), master.to_bits(), "{master:e}");
        let (weight, unit) = (f64::from(f32::from_bits(u32::from(weight) << 16)), f64::from(f32::MIN_POSITIVE) / 128.0);
        let step = |x: f64| (2f64.powi(x.abs().log2().floor() as i32 - 7)).max(unit);
        if weight.is_finite() && master != 0.0 {
            let apart = (weight - f64::from(master)).abs();
            assert!(apart <= 0.5 * step(f64::from(master)), "{master:e} became {weight:e}");
        }
    }

    #[test]
    fn every_remainder_of_awkward_upper_halves() {
        for high in [0x0000u32, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x4049, 0x7F00, 0x7F7E, 0x7F7F] {
            for sign in [0, 0x8000] {
                (0..=0xFFFFu32).for_each(|low| check(f32::from_bits((high | sign) << 16 | low)));
            }
        }
    }

    #[test]
    fn every_upper_half_of_awkward_remainders() {
        for low in [0x0000u32, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
            for high in 0..=0xFFFFu32 {
                let master = f32::from_bits(high << 16 | low);
                if master.is_nan() {
                    let (weight, remainder) = split(master);
                    assert!(f32::from_bits(u32::from(weight) << 16).is_nan(), "{high:#x} {low:#x}");
                    assert!(join(weight, remainder).is_nan());
                    assert_eq!(split(join(weight, remainder)), (weight, remainder), "splitting again changes nothing");
                } else {
                    check(master);
                }
            }
        }
    }

    #[test]
    fn updates_are_those_of_the_masters() {
        for len in [0, 1, 33, PIECE, 2 * PIECE + 77] {
            let halves = |masters: &[f32]| -> (Vec<u16>, Vec<u16>) { masters.iter().map(|&x| split(x)).unzip() };
            let start = normal::<f32>(len, 1);
            let joined = |weight: Vec<u16>, remainder: Vec<u16>| -> Vec<f32> {
                weight.into_iter().zip(remainder).map(|(w, r)| join(w, r)).collect()
            };
            let got = same_in_all_pools(|| {
                let (mut weight, mut remainder) = halves(&start);
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                for step in 1..=3 {
                    let step = AdamwStep::new(step, 3e-3, (0.9, 0.95), 1e-8, 0.1, 0.7);
                    adamw(&mut weight, &mut remainder, &mut m, &mut v, &normal(len, 2), &step);
                }
                for (momentum, first) in [(0.0, true), (0.9, true), (0.9, false)] {
                    let step =
                        SgdStep { lr: 0.05, momentum, nesterov: true, weight_decay: 0.1, grad_scale: 0.5, first };
                    let buffer = if momentum == 0.0 { &mut [][..] } else { &mut m[..] };
                    sgd(&mut weight, &mut remainder, buffer, &normal(len, 3), &step);
                }
                vec![joined(weight, remainder), m, v]
            });
            let (mut masters, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
            for step in 1..=3 {
                let step = AdamwStep::new(step, 3e-3, (0.9, 0.95), 1e-8, 0.1, 0.7);
                optimizer::adamw(&mut masters, &mut m, &mut v, &normal(len, 2), &step);
            }
            for (momentum, first) in [(0.0, true), (0.9, true), (0.9, false)] {
                let step = SgdStep { lr: 0.05, momentum, nesterov: true, weight_decay: 0.1, grad_scale: 0.5, first };
                let buffer = if momentum == 0.0 { &mut [][..] } else { &mut m[..] };
                optimizer::sgd(&mut masters, buffer, &normal(len, 3), &step);
            }
            assert_eq!(got, [masters, m, v], "{len}");
        }
    }
}
