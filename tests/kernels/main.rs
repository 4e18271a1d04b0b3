//! Every kernel against the host device, on the emulator or a GPU: whole programs of one op, a head and a loss, forward
//! and gradient.
//!
//! The oracle is the host: in f64 for f32, in bf16 for bf16. The arena is filled with NaN before each run and inputs
//! are drawn anew, and the order of threads, blocks and streams is drawn from a seed. Cases are those of
//! tests/gradients and, with sizes that finite differences would take too long for, those of the files beside this one,
//! each in fewer orders. `HYDRA_KERNEL_TESTS=full` runs all in every order on every architecture, `brief` each about
//! once; `HYDRA_KERNEL_TESTS_DEVICE=cuda` runs on a GPU instead, for which the binary can be carried to another machine
//! (see docs/gpu.md). Without either it says that it skips.

#[cfg(any(feature = "cuda", feature = "emulator"))]
mod bits;
#[path = "../gradients/cases.rs"]
#[allow(dead_code, reason = "shared with the gradients' tests")]
mod cases;
#[cfg(any(feature = "cuda", feature = "emulator"))]
mod covered;
#[path = "../common/device.rs"]
mod device;
#[path = "../gradients/machine.rs"]
#[allow(dead_code, reason = "shared with the gradients' tests")]
mod machine;
mod optimizer;
#[path = "../common/serial.rs"]
mod serial;
mod shapes;

use cases::{Case, Table};
use device::{Asked, asked};
use hydra::base::DType;
use hydra::device::DeviceSpec;
use machine::{Cut, Machine, Outcome, draw_inputs, draw_weights};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The devices of one run, each with its name; none where what was asked for is not there. On the emulator three orders
/// of each architecture for the ordinary run, all for the full one: between them the paths of every GPU, and six
/// orders.
fn devices() -> Vec<(String, DeviceSpec)> {
    let default = if cfg!(feature = "emulator") { "emulated" } else { "cuda" };
    let spec = match asked(Some(default)) {
        Asked::Device(spec) => spec,
        Asked::Missing | Asked::Nothing => return Vec::new(),
    };
    if let DeviceSpec::Cuda { .. } = spec {
        keep_context();
        return vec![("cuda".into(), spec)];
    }
    let orders: Vec<(u32, u32)> = match extent() {
        Extent::Brief => vec![(80, 2), (90, 3)],
        Extent::Full => [80, 90].into_iter().flat_map(|arch| (0..8).map(move |seed| (arch, seed))).collect(),
        Extent::Ordinary => vec![(80, 0), (90, 1), (80, 2), (90, 3), (80, 5), (90, 8)],
    };
    let emulated =
        |(arch, seed)| (format!("arch {arch}, seed {seed}"), DeviceSpec::Emulated { arch, seed, threads: Some(1) });
    orders.into_iter().map(emulated).collect()
}

/// How much is run.
#[derive(Clone, Copy, PartialEq)]
enum Extent {
    /// Each case once, on one architecture or the other: for builds that check every access.
    Brief,
    /// Small cases in six orders, three of each architecture; large ones in two, one of each.
    Ordinary,
    /// Every case in every order on every architecture.
    Full,
}

fn extent() -> Extent {
    match std::env::var("HYDRA_KERNEL_TESTS").as_deref() {
        Ok("brief") => Extent::Brief,
        Ok("full") => Extent::Full,
        Ok(other) => panic!("HYDRA_KERNEL_TESTS is {other:?}, want \"brief\" or \"full\""),
        Err(_) => Extent::Ordinary,
    }
}

/// Holds the GPU open until the process ends: each case starts a device of its own, and the last one to go would take
/// the context with it.
fn keep_context() {
    #[cfg(feature = "cuda")]
    {
        static OPEN: std::sync::OnceLock<std::sync::Mutex<hydra::device::cuda::Gpu>> = std::sync::OnceLock::new();
        OPEN.get_or_init(|| std::sync::Mutex::new(hydra::device::cuda::Gpu::open(0).expect("the GPU opens")));
    }
}

/// What each case is run in.
const BOTH: [DType; 2] = [DType::F32, DType::Bf16];

/// How far a run may be from f64's, as the norm of the difference over the norm.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        // f32's rounding, through an op, a head of up to a thousand inputs and a softmax, forward and back.
        DType::F32 => 2e-5,
        // Eight bits of mantissa: now and then a result is rounded to the other neighbour, and every op after it sees
        // that.
        _ => 1e-2,
    }
}

/// What a step gave, as numbers: losses, gradients by parameter, states.
struct Numbers {
    losses: Vec<f64>,
    gradients: Vec<(String, Vec<f64>)>,
    states: Vec<f64>,
}

fn numbers(machine: &Machine, outcome: &Outcome) -> Numbers {
    let named =
        |(p, _, bytes): &(usize, usize, Vec<u8>)| (machine.graph.parameters[*p].name.clone(), machine.decode(bytes));
    Numbers {
        losses: outcome.losses.clone(),
        gradients: outcome.gradients.iter().map(named).collect(),
        states: machine.decode(&outcome.states),
    }
}

/// Two microbatches, so that gradients are written and then added to.
fn run(spec: &DeviceSpec, case: &Case, computed: bool, dtype: DType) -> Numbers {
    let graph = case.graph(dtype, computed).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    // Elsewhere the loss comes with its gradient, as in training.
    let recompute = case.family() == "cross_entropy";
    let mut machine = Machine::on(spec, graph, Cut { recompute, ..Cut::whole(2) }, 2);
    let weights = draw_weights(&machine.graph);
    let inputs: Vec<_> = (0..2).map(|m| draw_inputs(&machine.graph, m)).collect();
    let outcome = machine.run(&weights, &inputs, &[0, 1]);
    numbers(&machine, &outcome)
}

/// The length of a vector.
fn length(x: impl Iterator<Item = f64>) -> f64 {
    x.fold(0.0, |sum, x| sum + x * x).sqrt()
}

/// `all` is the length of everything that the run computed of this kind: what is small because it cancels is only as
/// good as that.
fn near(what: &str, got: &[f64], want: &[f64], all: f64, tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let apart = length(got.iter().zip(want).map(|(g, w)| g - w));
    let size = length(want.iter().copied());
    assert!(apart <= tolerance * (size + 0.1 * all + 1e-3), "{what}: off by {apart:e} of {size:e}, {all:e} in all");
}

fn check(case: &Case, computed: bool, dtypes: &[DType], devices: &[(String, DeviceSpec)]) {
    for &dtype in dtypes {
        // In bf16 the host rounds where the kernels do, so what is left is the order of sums, and a product's own
        // factors.
        let oracle = if dtype == DType::F32 { DType::F64 } else { dtype };
        let want = run(&DeviceSpec::default(), case, computed, oracle);
        let all = length(want.gradients.iter().flat_map(|(_, g)| g.iter().copied()));
        // Kernels in f32 are those of every architecture.
        let once = dtype == DType::F32 && extent() == Extent::Brief && devices.len() > 1;
        for (device, spec) in if once { &devices[..1] } else { devices } {
            let what = format!("{}, computed {computed}, {dtype}, {device}", case.name);
            if let DeviceSpec::Cuda { .. } = spec {
                // A kernel that does not end takes the process with it, and all that would be said later.
                println!("{what} ..");
            }
            let got = run(spec, case, computed, dtype);
            near(&format!("{what}: losses"), &got.losses, &want.losses, 0.0, tolerance(dtype));
            near(&format!("{what}: states"), &got.states, &want.states, 0.0, tolerance(dtype));
            for ((name, got), (_, want)) in got.gradients.iter().zip(&want.gradients) {
                near(&format!("{what}: gradient of {name}"), got, want, all, tolerance(dtype));
            }
        }
    }
}

/// Runs the cases whose names begin with one of `families`; all of them, so that one run shows all that is wrong.
fn family(families: &[&str]) {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let mut large = Table::default();
    shapes::all(&mut large);
    let of_families = |cases: Vec<Case>| cases.into_iter().filter(|c| families.contains(&c.family())).collect();
    let (small, large): (Vec<Case>, Vec<Case>) = (of_families(cases::all()), of_families(large.0));
    assert!(!small.is_empty(), "no case of {families:?}");
    let failed = |case: &Case, computed, dtypes: &[_], devices: &[_]| {
        let began = std::time::Instant::now();
        let failed = catch_unwind(AssertUnwindSafe(|| check(case, computed, dtypes, devices))).is_err();
        println!("{:.2} s {}, computed {computed}", began.elapsed().as_secs_f64(), case.name);
        failed
    };
    let extent = extent();
    // Where every access is checked a case runs on one architecture or the other in turn, but large convolutions all on
    // Hopper, which has a kernel for many a shape; large ones every third in f32. Unless all orders are asked for, what
    // is large, or on what the batch brings, whose gradient nobody wants, runs in two.
    let in_turn = |at: usize| &devices[at % 2..at % 2 + 1];
    let mut failures = 0;
    for (at, c) in small.iter().enumerate() {
        let (few, many) = match extent {
            _ if devices.len() < 2 => (&devices[..], &devices[..]),
            Extent::Brief => (&devices[..0], in_turn(at)),
            Extent::Ordinary => (&devices[2..4], &devices[..]),
            Extent::Full => (&devices[..], &devices[..]),
        };
        failures += usize::from((!few.is_empty() && failed(c, false, &BOTH, few)) | failed(c, true, &BOTH, many));
    }
    let dtypes = |at: usize| if extent == Extent::Brief && !at.is_multiple_of(3) { &BOTH[1..] } else { &BOTH[..] };
    let some = |at: usize, case: &Case| match extent {
        _ if devices.len() < 2 => &devices[..],
        Extent::Brief if case.family() == "conv2d" => &devices[at % 2..],
        Extent::Brief => in_turn(at),
        Extent::Ordinary => &devices[2..4],
        Extent::Full => &devices[..],
    };
    let large = large.iter().enumerate();
    failures += large
        .filter(|&(at, c)| {
            let failed = |computed| failed(c, computed, dtypes(at), some(at, c));
            failed(true) | (extent == Extent::Full && failed(false))
        })
        .count();
    assert_eq!(failures, 0, "cases of {families:?} failed, as printed above");
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    covered::note();
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
    let mut table = Table(cases::all());
    shapes::all(&mut table);
    for case in table.0 {
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
