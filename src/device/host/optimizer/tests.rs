//! Optimizer updates against torch's formulas in f64, and against the same operations one element at a time.

use super::*;
use crate::device::host::testing::{assert_close, normal, same_in_all_pools};

const LENS: [usize; 8] = [0, 1, 31, 33, 1023, CHUNK, CHUNK + 1, 3 * CHUNK + 77];

fn step_of(step: u64) -> AdamwStep {
    AdamwStep::new(step, 3e-3 / step as f64, (0.9, 0.95), 1e-8, 0.1, 0.7)
}

/// weight, m, v after five steps.
fn five_adamw_steps<T: Real>(len: usize) -> Vec<Vec<T>> {
    let (mut weight, mut m, mut v) = (normal::<T>(len, 1), vec![T::ZERO; len], vec![T::ZERO; len]);
    for step in 1..=5 {
        adamw(&mut weight, &mut m, &mut v, &normal(len, 10 + step), &step_of(step));
    }
    vec![weight, m, v]
}

/// torch.optim.AdamW (`_single_tensor_adamw`), one element at a time, in f64.
fn torch_adamw(weight: &mut f64, m: &mut f64, v: &mut f64, grad: f64, step: u64) {
    let s = step_of(step);
    let grad = grad * s.grad_scale;
    *weight *= 1.0 - s.lr * s.weight_decay;
    *m += (1.0 - s.beta1) * (grad - *m);
    *v = *v * s.beta2 + (1.0 - s.beta2) * grad * grad;
    let (correction1, correction2) = (1.0 - s.beta1.powf(step as f64), 1.0 - s.beta2.powf(step as f64));
    let denominator = v.sqrt() / correction2.sqrt() + s.epsilon;
    *weight -= s.lr / correction1 * (*m / denominator);
}

#[test]
fn adamw_is_torchs() {
    for len in LENS {
        let (mut weight, mut m, mut v) = (normal::<f64>(len, 1), vec![0.0; len], vec![0.0; len]);
        for step in 1..=5 {
            for (i, grad) in normal::<f64>(len, 10 + step).into_iter().enumerate() {
                torch_adamw(&mut weight[i], &mut m[i], &mut v[i], grad, step);
            }
        }
        let single = same_in_all_pools(|| five_adamw_steps::<f32>(len));
        let double = same_in_all_pools(|| five_adamw_steps::<f64>(len));
        for (i, want) in [weight, m, v].iter().enumerate() {
            // Five steps of about a dozen roundings, each half an ulp (6e-8 and 1.1e-16) of values of order 1.
            assert_close(&single[i], want, 1e-6, "f32");
            assert_close(&double[i], want, 1e-14, "f64");
        }
    }
}

#[test]
fn adamw_is_its_written_sequence() {
    let len = CHUNK + 33;
    let (mut weight, mut m, mut v, grad) =
        (normal::<f32>(len, 1), normal::<f32>(len, 2), normal::<f32>(len, 3), normal::<f32>(len, 4));
    v.iter_mut().for_each(|v| *v *= *v);
    let start = (weight.clone(), m.clone(), v.clone());
    let step = step_of(3);
    adamw(&mut weight, &mut m, &mut v, &grad, &step);
    let c = step.constants::<f32>();
    for i in 0..len {
        let g = grad[i] * c.grad_scale;
        let d = g - start.1[i];
        let want_m = f32::mul_add(c.one_minus_beta1, d, start.1[i]);
        let s = c.one_minus_beta2 * g;
        let u = c.beta2 * start.2[i];
        let want_v = f32::mul_add(s, g, u);
        let e = f32::mul_add(f32::sqrt(want_v), c.root_correction, c.epsilon);
        let q = want_m / e;
        let want = f32::mul_add(c.minus_step_size, q, start.0[i] * c.keep);
        assert_eq!([want, want_m, want_v].map(f32::to_bits), [weight[i], m[i], v[i]].map(f32::to_bits), "element {i}");
    }
}

#[test]
fn cuts_do_not_change_bits() {
    let len = CHUNK + 1023;
    let whole = five_adamw_steps::<f32>(len);
    let (mut weight, mut m, mut v) = (normal::<f32>(len, 1), vec![0.0; len], vec![0.0; len]);
    for step in 1..=5 {
        let grad = normal(len, 10 + step);
        let mut start = 0;
        for cut in [0, 1, 7, 100, 1000, 4096, len] {
            let range = start..cut;
            let constants = step_of(step).constants();
            adamw_serial(
                &mut weight[range.clone()],
                &mut m[range.clone()],
                &mut v[range.clone()],
                &grad[range],
                &constants,
            );
            start = cut;
        }
    }
    assert_eq!(bytemuck::cast_slice::<f32, u32>(&whole[0]), bytemuck::cast_slice::<f32, u32>(&weight));
}

#[test]
fn first_step_moves_by_the_learning_rate() {
    // With both corrections and no decay the first step is lr * sign(grad), whatever the gradient's size.
    for grad in [1e-3f32, 7.0, -1e4] {
        let (mut weight, mut m, mut v) = ([1f32], [0f32], [0f32]);
        adamw(&mut weight, &mut m, &mut v, &[grad], &AdamwStep::new(1, 0.125, (0.9, 0.999), 1e-12, 0.0, 1.0));
        assert!((f64::from(weight[0]) - (1.0 - 0.125 * f64::from(grad.signum()))).abs() < 1e-6, "{grad}");
    }
}

/// weight and buffer after four steps.
fn four_sgd_steps<T: Real>(len: usize, momentum: f64, nesterov: bool, weight_decay: f64) -> Vec<Vec<T>> {
    // The buffer starts as NaN: the first step must not read it.
    let buffer_len = if momentum == 0.0 { 0 } else { len };
    let (mut weight, mut buffer) = (normal::<T>(len, 1), vec![T::from_f64(f64::NAN); buffer_len]);
    for step in 0..4 {
        let sizes = SgdStep { lr: 0.05, momentum, nesterov, weight_decay, grad_scale: 0.5, first: step == 0 };
        sgd(&mut weight, &mut buffer, &normal(len, 10 + step), &sizes);
    }
    vec![weight, buffer]
}

#[test]
fn sgd_is_torchs() {
    for len in LENS {
        for (momentum, nesterov, weight_decay) in
            [(0.0, false, 0.0), (0.0, false, 0.1), (0.9, false, 0.0), (0.9, false, 0.1), (0.9, true, 0.1)]
        {
            let mut weight = normal::<f64>(len, 1);
            let mut buffer: Vec<Option<f64>> = vec![None; len];
            for step in 0..4 {
                for (i, grad) in normal::<f64>(len, 10 + step).into_iter().enumerate() {
                    // torch.optim.SGD (`_single_tensor_sgd`), dampening 0.
                    let mut grad = 0.5 * grad + weight_decay * weight[i];
                    if momentum != 0.0 {
                        let kept = buffer[i].map_or(grad, |kept| kept * momentum + grad);
                        buffer[i] = Some(kept);
                        grad = if nesterov { grad + momentum * kept } else { kept };
                    }
                    weight[i] -= 0.05 * grad;
                }
            }
            let single = same_in_all_pools(|| four_sgd_steps::<f32>(len, momentum, nesterov, weight_decay));
            let double = same_in_all_pools(|| four_sgd_steps::<f64>(len, momentum, nesterov, weight_decay));
            // Four steps of five roundings of values of order 1 to 10.
            assert_close(&single[0], &weight, 1e-6, "f32 weight");
            assert_close(&double[0], &weight, 1e-14, "f64 weight");
            let buffer: Vec<f64> = buffer.into_iter().flatten().collect();
            assert_close(&single[1], &buffer, 1e-6, "f32 buffer");
            assert_close(&double[1], &buffer, 1e-14, "f64 buffer");
        }
    }
}

#[test]
fn sum_squares_is_its_written_order() {
    for len in [0, 1, 31, 33, 4095, 4096, 4097, 5 * 4096 + 33, SUM_GROUP * SUM_BLOCK + 4097] {
        let x = normal::<f32>(len, 1);
        let got = same_in_all_pools(|| vec![vec![sum_squares(&x)]])[0][0];
        let mut want = 0.0f64;
        for block in x.chunks(4096) {
            let mut lanes = [0.0f64; 32];
            for (i, &x) in block.iter().enumerate() {
                lanes[i % 32] += f64::from(x) * f64::from(x);
            }
            for width in [16, 8, 4, 2, 1] {
                for i in 0..width {
                    lanes[i] += lanes[i + width];
                }
            }
            want += lanes[0];
        }
        assert_eq!(got.to_bits(), want.to_bits(), "{len}");
    }
    // No square is lost to the range of f32.
    assert_eq!(sum_squares(&[1e30f32, 1e-30]), f64::from(1e30f32) * f64::from(1e30f32));
}

#[test]
fn sums_and_finiteness() {
    for len in LENS {
        let (mut acc, x) = (normal::<f32>(len, 1), normal::<f32>(len, 2));
        let want: Vec<f32> = acc.iter().zip(&x).map(|(a, b)| a + b).collect();
        add_assign(&mut acc, &x);
        assert_eq!(acc, want);
        assert!(is_finite(&acc), "{len}");
        for at in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|&at| at < len) {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = x.clone();
                x[at] = bad;
                assert!(!is_finite(&x), "{bad} at {at} of {len}");
            }
        }
    }
    assert!(is_finite(&[f32::MAX, f32::MIN, -0.0, 1e-45]) && is_finite(&[f64::MAX; 100]));
}
