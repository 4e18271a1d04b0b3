//! Whether a convolution has the same bits by every kernel that its shape may be given to.
//!
//! Which one computes it hangs on how many multiprocessors there are: with few it is warpgroup products on Hopper, with
//! many `mma.sync`, in tiles of one size or another. No result may depend on that. A process knows one number, so this
//! one starts itself once for each, and compares what they say.

use crate::cases::Table;
use crate::device::{Asked, asked};
use crate::machine::{Cut, Machine, draw_inputs, draw_weights};
use crate::{Extent, extent, shapes};
use hydra::base::DType;
use hydra::device::DeviceSpec;
use hydra::device::cuda::MULTIPROCESSORS_VARIABLE;
use hydra::device::cuda::launched;
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;

/// What a line of a run begins with that tells a result's bits.
const BITS: &str = "bits of ";
/// And the one that tells the kernels.
const KERNELS: &str = "kernels ";
/// Set for a process that is to print its bits.
const PRINTS: &str = "HYDRA_KERNEL_TESTS_PRINT_BITS";

/// The device of both runs: on the emulator a Hopper GPU, which has more kernels to choose from.
fn spec() -> Option<DeviceSpec> {
    match asked(Some(if cfg!(feature = "emulator") { "emulated" } else { "cuda" })) {
        Asked::Device(spec) => Some(spec),
        Asked::Missing | Asked::Nothing => None,
    }
}

/// Runs every convolution and prints what `run` reads.
fn print_bits(spec: &DeviceSpec) {
    let mut table = Table::default();
    shapes::all(&mut table);
    for case in table.0.iter().filter(|case| case.family() == "conv2d") {
        let graph = case.graph(DType::Bf16, true).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let mut machine = Machine::on(spec, graph, Cut::whole(2), 2);
        let weights = draw_weights(&machine.graph);
        let inputs: Vec<_> = (0..2).map(|m| draw_inputs(&machine.graph, m)).collect();
        let outcome = machine.run(&weights, &inputs, &[0, 1]);
        let mut hasher = DefaultHasher::new();
        outcome.losses.iter().for_each(|loss| loss.to_bits().hash(&mut hasher));
        (&outcome.gradients, &outcome.states).hash(&mut hasher);
        println!("\n{BITS}{}: {:016x}", case.name, hasher.finish());
    }
    let names: Vec<&str> = launched().into_iter().map(|(_, name)| name).collect();
    println!("\n{KERNELS}{}", names.join(" "));
}

/// What a run with as many multiprocessors says: bits by case, and kernels.
fn run(multiprocessors: Option<&str>) -> (Vec<String>, BTreeSet<String>) {
    let mut command = Command::new(std::env::current_exe().expect("this test has a program"));
    command.args(["--exact", "bits::convolutions_have_the_same_on_any_number_of_multiprocessors", "--nocapture"]);
    command.env(PRINTS, "1");
    match multiprocessors {
        Some(number) => command.env(MULTIPROCESSORS_VARIABLE, number),
        None => command.env_remove(MULTIPROCESSORS_VARIABLE),
    };
    let run = command.output().expect("the same program starts again");
    let text = String::from_utf8_lossy(&run.stdout);
    let why = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "with {multiprocessors:?} multiprocessors:\n{text}\n{why}");
    let bits = text.lines().filter_map(|line| line.strip_prefix(BITS)).map(str::to_string).collect();
    let kernels = text.lines().find_map(|line| line.strip_prefix(KERNELS)).expect("they are told at the end");
    (bits, kernels.split(' ').map(str::to_string).collect())
}

#[test]
fn convolutions_have_the_same_on_any_number_of_multiprocessors() {
    let Some(spec) = spec() else { return };
    if std::env::var_os(PRINTS).is_some() {
        return print_bits(&spec);
    }
    // A brief run is one in which every access is checked: that kernels hold on all numbers there, others see.
    if extent() == Extent::Brief && matches!(spec, DeviceSpec::Emulated { .. }) {
        return;
    }
    // All of a GPU's own, or as many as one of Hopper has.
    let many = if let DeviceSpec::Cuda { .. } = spec { None } else { Some("132") };
    let ((few_bits, few_kernels), (many_bits, many_kernels)) = (run(Some("4")), run(many));
    assert!(few_bits.len() > 30, "cases were not found: {few_bits:?}");
    assert_eq!(few_bits, many_bits);
    // Each is of others' making: else this compares a kernel with itself.
    let alone =
        |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).filter(|name| name.starts_with("conv2d")).count();
    let (few, many) = (alone(&few_kernels, &many_kernels), alone(&many_kernels, &few_kernels));
    println!("{} convolutions; kernels that only one number launches: {few}, {many}", few_bits.len());
    assert!(few > 0, "{few_kernels:?} with few multiprocessors, {many_kernels:?} with many");
}
