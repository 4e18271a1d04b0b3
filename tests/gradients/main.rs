//! Gradients through the real machinery: graphs are traced, differentiated, cut, placed and run on the host device, and
//! every parameter's gradient is held against finite differences of the loss in f64, against f32 and bf16, and against
//! every other cut.
//!
//! The arena is refilled with NaN before every run, so that reading what was never written shows.

mod cases;
mod cuts;
mod machine;
#[path = "../common/serial.rs"]
mod serial;

use cases::{Case, all};
use half::bf16;
use hydra::base::DType;
use machine::{Cut, Machine, Outcome, draw_inputs, draw_weights};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Coordinates of one parameter that are moved: all of a small one, a spread of a large one.
const SAMPLE: usize = 24;
/// Half the distance of a central difference: the cube root of f64's epsilon balances rounding against truncation.
const MOVE: f64 = 6e-6;
/// Of the greatest gradient: truncation is about MOVE squared times third derivatives of up to a few hundred.
const SLOPE_TOLERANCE: f64 = 3e-7;
/// Of the greatest gradient: sums of up to a thousand f32 products, through two layers and a softmax.
const F32_TOLERANCE: f64 = 1e-4;
/// Of a gradient's length where every tensor is rounded to bf16, up to 2^-9 of an element each time: a dozen roundings
/// on the way, which add up as random ones do, of sums that may cancel.
const BF16_TOLERANCE: f64 = 2e-2;
/// The same as a part of all gradients together: one that is small beside them is the rest of what cancelled.
const BF16_PART: f64 = 2e-3;
/// Below this a gradient counts as none where a slope is expected.
const FLAT: f64 = 1e-7;

/// Checks one case: slopes, a second microbatch on top, f32, bf16, recomputation in the last shard.
fn check(case: &Case, computed: bool) {
    let what = format!("{}, {}", case.name, if computed { "operands computed" } else { "operands are parameters" });
    let graph = |dtype| case.graph(dtype, computed).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut machine = Machine::new(graph(DType::F64), Cut::whole(2), 1);
    let weights = draw_weights(&machine.graph);
    let inputs = vec![draw_inputs(&machine.graph, 0)];
    let once = machine.run(&weights, &inputs, &[0]);
    let gradients = sums(&machine, &once);
    slopes(&what, case, &mut machine, weights.clone(), &inputs, &gradients);

    let mut twice = Machine::new(graph(DType::F64), Cut::whole(2), 2);
    let out = twice.run(&weights, &[inputs[0].clone(), inputs[0].clone()], &[0, 0]);
    let doubled: Vec<Vec<f64>> = gradients.iter().map(|g| g.iter().map(|g| 2.0 * g).collect()).collect();
    // A product that starts from what is there rounds in another order.
    near(&format!("{what}: accumulated"), &machine, &sums(&twice, &out), &doubled, 1e-13);

    let mut again = Machine::new(graph(DType::F64), Cut { recompute: true, ..Cut::whole(2) }, 1);
    assert_eq!(again.run(&weights, &inputs, &[0]), once, "{what}: recomputed");

    let mut single = Machine::new(graph(DType::F32), Cut::whole(2), 1);
    // The same numbers in another type.
    let in_f32 = [draw_inputs(&single.graph, 0)];
    let out = single.run(&weights, &in_f32, &[0]);
    near(&format!("{what}: f32"), &machine, &sums(&single, &out), &gradients, F32_TOLERANCE);

    // As for kernels, which may write a product over what joins it.
    let mut placed = graph(DType::F32);
    placed.scratch = true;
    let mut placed = Machine::new(placed, Cut { recompute: true, ..Cut::whole(2) }, 1);
    assert_eq!(placed.run(&weights, &in_f32, &[0]), out, "{what}: placed as for kernels");

    // A maximum of sums is another one's once they are rounded.
    if computed && case.family() == "max_pool" {
        return;
    }
    let round = |w: &Vec<f64>| w.iter().map(|&x| bf16::from_f64(x).to_f64()).collect();
    let weights: Vec<Vec<f64>> = weights.iter().map(round).collect();
    let once = machine.run(&weights, &inputs, &[0]);
    let gradients = sums(&machine, &once);
    let mut half = Machine::new(graph(DType::Bf16), Cut::whole(2), 1);
    let out = half.run(&weights, &[draw_inputs(&half.graph, 0)], &[0]);
    along(&format!("{what}: bf16"), &machine, &sums(&half, &out), &gradients);
}

/// Compares gradients that many roundings have made noisy: each as a whole.
fn along(what: &str, machine: &Machine, got: &[Vec<f64>], want: &[Vec<f64>]) {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let all = length(&mut want.iter().flatten().copied());
    for (p, (got, want)) in got.iter().zip(want).enumerate() {
        let (apart, whole) = (length(&mut got.iter().zip(want).map(|(g, w)| g - w)), length(&mut want.iter().copied()));
        let name = &machine.graph.parameters[p].name;
        assert!(
            apart <= BF16_TOLERANCE * whole + BF16_PART * all,
            "{what}: the gradient of {name} is {apart:.1e} off, {whole:.1e} long, all together {all:.1e}"
        );
    }
}

/// Each parameter's gradient: its uses' accumulators, added.
fn sums(machine: &Machine, outcome: &Outcome) -> Vec<Vec<f64>> {
    let mut sums: Vec<Vec<f64>> = machine.graph.parameters.iter().map(|p| vec![0.0; p.shape.elems()]).collect();
    for (parameter, _, gradient) in &outcome.gradients {
        sums[*parameter].iter_mut().zip(machine.decode(gradient)).for_each(|(sum, g)| *sum += g);
    }
    sums
}

fn slopes(
    what: &str,
    case: &Case,
    machine: &mut Machine,
    mut weights: Vec<Vec<f64>>,
    inputs: &[Vec<Vec<u8>>],
    gradients: &[Vec<f64>],
) {
    let loss = |machine: &mut Machine, weights: &[Vec<f64>]| machine.run(weights, inputs, &[0]).losses[0];
    assert!(loss(machine, &weights).is_finite(), "{what}: the loss is not finite");
    for p in 0..weights.len() {
        let name = machine.graph.parameters[p].name.clone();
        let (elems, scale) = (weights[p].len(), greatest(&gradients[p]));
        let flat = case.flat || name.starts_with("flat");
        assert!(flat == (scale < FLAT) || elems == 0, "{what}: the greatest gradient of {name} is {scale}");
        // A stride that shares no factor with usual sizes walks through all rows and columns.
        let at = |i: usize| if elems <= SAMPLE { i } else { i * 7919 % elems };
        for i in (0..elems.min(SAMPLE)).map(at) {
            let here = weights[p][i];
            weights[p][i] = here + MOVE;
            let above = loss(machine, &weights);
            weights[p][i] = here - MOVE;
            let below = loss(machine, &weights);
            weights[p][i] = here;
            let (slope, got) = ((above - below) / (2.0 * MOVE), gradients[p][i]);
            let apart = (slope - got).abs();
            assert!(
                apart <= SLOPE_TOLERANCE * scale.max(1e-2),
                "{what}: gradient of {name}[{i}] is {got}, the slope {slope}"
            );
        }
    }
}

fn near(what: &str, machine: &Machine, got: &[Vec<f64>], want: &[Vec<f64>], tolerance: f64) {
    for (p, (got, want)) in got.iter().zip(want).enumerate() {
        let (name, scale) = (&machine.graph.parameters[p].name, greatest(want).max(1e-3));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * scale, "{what}: gradient of {name}[{i}] is {g}, want {w}");
        }
    }
}

fn greatest(x: &[f64]) -> f64 {
    // `max` would pass over a NaN.
    x.iter().fold(0.0, |most: f64, x| if x.is_nan() { f64::NAN } else { most.max(x.abs()) })
}

/// Runs the cases whose names begin with one of `families`; every family has a test, which `no_case_is_left_out`
/// checks.
fn family(families: &[&str]) {
    let cases: Vec<Case> = all().into_iter().filter(|c| families.contains(&c.family())).collect();
    assert!(!cases.is_empty(), "no case of {families:?}");
    // All cases run, so that one run shows all that is wrong.
    let failed = |case: &Case, computed| catch_unwind(AssertUnwindSafe(|| check(case, computed))).is_err();
    let failures = cases.iter().filter(|case| failed(case, false) | failed(case, true)).count();
    assert_eq!(failures, 0, "cases of {families:?} failed, as printed above");
}

/// What each test below runs.
const FAMILIES: [&[&str]; 8] = [
    &["embedding", "add_position"],
    &["linear"],
    &["activation", "glu", "add", "scale", "dropout"],
    &["layernorm", "rmsnorm", "rotary", "batchnorm"],
    &["attention"],
    &["cross_entropy", "mean_squared_error"],
    &["conv2d", "max_pool", "avg_pool", "global_avg_pool"],
    &["reshape", "transpose", "shift", "parameter"],
];

#[test]
fn no_case_is_left_out() {
    for case in all() {
        assert!(FAMILIES.iter().any(|f| f.contains(&case.family())), "no test runs {}", case.name);
    }
}

#[test]
fn lookups() {
    family(FAMILIES[0]);
}

#[test]
fn linear() {
    family(FAMILIES[1]);
}

#[test]
fn elementwise() {
    family(FAMILIES[2]);
}

#[test]
fn norms() {
    family(FAMILIES[3]);
}

#[test]
fn attention() {
    family(FAMILIES[4]);
}

#[test]
fn losses() {
    family(FAMILIES[5]);
}

#[test]
fn images() {
    family(FAMILIES[6]);
}

#[test]
fn shapes_and_parameters() {
    family(FAMILIES[7]);
}
