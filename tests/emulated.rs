//! Whole trainings on the cuda device over the emulator: PyTorch's cases, the same bits however a model is cut and whatever order
//! streams run in, bf16 beside f32, and the layer that a NaN came from.

mod common;

use common::small::{Driver, Small};
use common::{Case, Outcome, distance};
use hydra::base::{DType, Error};
use hydra::device::cuda::{CudaConfig, CudaDevice, Emulated};
use hydra::device::{CopySpan, Device, DeviceSpec, Memory, Span, Task};
use hydra::engine::Stored;
use hydra::spill::{PlanOptions, Recompute};
use hydra::train::TrainOptions;

fn emulated(arch: u32, seed: u32) -> DeviceSpec {
    DeviceSpec::Emulated { arch, seed, threads: Some(1) }
}

/// A case of PyTorch's: losses and weights within its tolerances, and the same bits under the smallest budget and another order.
fn check_fixture(name: &str, arch: u32) {
    let case = Case::open(name);
    let options = TrainOptions { device: emulated(arch, 0), ..case.options() };
    let whole = case.train(&options).expect("unconstrained run");
    let expected = case.expected();
    let limit = |key: &str| case.spec["tolerance"][key].as_f64().expect("a number");
    let floats = |bits: &[u32]| bits.iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>();
    let off = distance(&floats(&whole.losses), &expected["losses"]);
    assert!(off < limit("losses"), "{name}: losses are off by {off:e}");
    for (tensor, want) in expected.iter().filter_map(|(k, v)| Some((k.strip_prefix("after.")?, v))) {
        let off = distance(&floats(&whole.tensors[tensor]), want);
        assert!(off < limit("weights"), "{name}: {tensor} is off by {off:e}");
    }
    let (_, plan) = case.plan(&options).expect("plan");
    for (budget, seed) in [(plan.smallest_device_bytes, 3), (plan.arena.bytes * 6 / 10, 6)] {
        let budget = budget.max(plan.smallest_device_bytes);
        let spilled = TrainOptions {
            plan: PlanOptions { device_budget: Some(budget), ..PlanOptions::default() },
            device: emulated(arch, seed),
            ..options.clone()
        };
        let (_, plan) = case.plan(&spilled).expect("plan under a budget");
        assert!(plan.arena.bytes <= budget && plan.shards.len() > 1, "{name}: {} shards", plan.shards.len());
        assert!(case.train(&spilled).expect("spilled run") == whole, "{name}: other bits under {budget} bytes");
    }
}

#[test]
fn gpt2_as_pytorch() {
    check_fixture("gpt2", 80);
}

#[test]
fn resnet_bottleneck_as_pytorch() {
    check_fixture("resnet", 90);
}

#[test]
fn resnet_basic_as_pytorch() {
    check_fixture("resnet-basic", 90);
}

/// One model in one dtype: resident in order, then under plans and orders of streams that have nothing in common.
fn check_bits(small: &Small, dtype: DType, batch: usize) {
    let train = |plan: PlanOptions, arch, seed| -> Outcome {
        let options = TrainOptions {
            seed: 7,
            batch,
            microbatch: batch / 2,
            dtype,
            clip: Some(0.5),
            plan,
            device: emulated(arch, seed),
            poison: true,
            valid_every: 2,
            ..TrainOptions::new(3)
        };
        small.train(&options).expect("a run")
    };
    let base = PlanOptions::default();
    let spilled = PlanOptions { resident: Some(false), ..base.clone() };
    for arch in [80, 90] {
        let want = train(PlanOptions { resident: Some(true), ..base.clone() }, arch, 0);
        let all = [
            (
                PlanOptions { boundaries_stay: Some(false), recompute: Recompute::Always, slots: 1, ..spilled.clone() },
                3,
            ),
            (PlanOptions { boundaries_stay: Some(false), slots: 2, ..spilled.clone() }, 4),
            (PlanOptions { boundaries_stay: Some(true), slots: 3, ..spilled.clone() }, 9),
        ];
        for (plan, seed) in all {
            assert!(
                train(plan.clone(), arch, seed) == want,
                "{dtype}, arch {arch}, seed {seed}: other bits under {plan:?}"
            );
        }
    }
}

#[test]
fn gpt_has_the_same_bits_however_it_is_cut() {
    let small = Small::gpt(32, 2, 2, 17, 0.1);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

#[test]
fn resnet_has_the_same_bits_however_it_is_cut() {
    let small = Small::resnet(&[8, 16], &[1, 1], [17, 15]);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

/// The host's f32 run against bf16 on the emulator, fifty steps: within 2 % of the loss at every step, the stated band.
#[test]
fn bf16_follows_f32() {
    for small in [Small::gpt(32, 2, 2, 16, 0.0), Small::resnet(&[8, 8], &[1, 1], [9, 9])] {
        let losses = |dtype, device| -> Vec<f32> {
            let options = TrainOptions { seed: 5, batch: 4, microbatch: 4, dtype, device, ..TrainOptions::new(50) };
            let outcome = small.train(&options).expect("a run");
            outcome.losses.iter().map(|&b| f32::from_bits(b)).collect()
        };
        let (want, got) = (losses(DType::F32, DeviceSpec::default()), losses(DType::Bf16, emulated(90, 0)));
        for (step, (want, got)) in want.iter().zip(&got).enumerate() {
            assert!((want - got).abs() < 0.02 * want, "step {step}: bf16 has {got}, f32 {want}");
        }
    }
}

/// Products with factors rounded to tf32 are other bits and nearly the same losses.
#[test]
fn tf32_is_close_to_f32() {
    let small = Small::gpt(32, 2, 2, 16, 0.0);
    let losses = |tf32| -> Vec<f32> {
        let options =
            TrainOptions { seed: 5, batch: 4, microbatch: 4, tf32, device: emulated(90, 0), ..TrainOptions::new(6) };
        let outcome = small.train(&options).expect("a run");
        outcome.losses.iter().map(|&b| f32::from_bits(b)).collect()
    };
    let (f32, tf32) = (losses(false), losses(true));
    assert!(f32 != tf32, "tf32 changed nothing");
    assert!(f32.iter().zip(&tf32).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{f32:?} {tf32:?}");
}

/// An infinite weight ends the run at its step, names its layer, and leaves the weights as they were.
#[test]
fn what_is_not_finite_is_named() {
    let small = Small::gpt(16, 2, 2, 9, 0.0);
    for resident in [true, false] {
        let options = TrainOptions {
            seed: 2,
            batch: 4,
            microbatch: 2,
            plan: PlanOptions { resident: Some(resident), ..PlanOptions::default() },
            device: emulated(80, 2),
            patience_secs: 60.0,
            ..TrainOptions::new(4)
        };
        let (model, plan) = small.plan(&options).expect("a plan");
        let config = CudaConfig { arenas: vec![plan.arena.bytes], host_bytes: plan.host.bytes, ..Default::default() };
        let device = CudaDevice::new(Box::new(Emulated::new(80, 2).expect("an emulator")), &config).expect("a device");
        let mut driver = Driver::new(&small, (model, plan), Box::new(device), &options);
        let model = std::sync::Arc::clone(driver.engine.model(0));
        let parameter = model.train.parameters.iter().position(|p| p.layers[0] == 2).expect("a block has parameters");
        let mut values = driver.engine.read_parameter(0, Stored::Weight, parameter);
        values.fill(f32::INFINITY);
        driver.engine.write_parameter(0, Stored::Weight, parameter, &values);
        let other = driver.engine.read_parameter(0, Stored::Weight, 0);
        driver.begin(0, |_| ()).expect("a step begins");
        let error = driver.engine.wait_step(0).expect_err("the loss is not finite");
        let name = &model.train.layers[2].name;
        assert!(matches!(error, Error::BadInput(_)), "{error}");
        assert!(error.to_string().contains(name), "{name} is not in: {error}");
        let _ = driver.engine.wait_home(0);
        assert_eq!(driver.engine.read_parameter(0, Stored::Weight, 0), other, "a weight changed, resident {resident}");
    }
}

/// Several logical devices on one GPU, each with its own arena; and a copy that forgot its ticket goes wrong under some order.
#[test]
fn streams_run_in_any_order_that_tickets_allow() {
    let copy = |from: (Memory, u64), to: (Memory, u64)| {
        let span = |(memory, offset)| Span { memory, offset, bytes: 64 };
        Task::Copy(vec![CopySpan { from: span(from), to: span(to) }])
    };
    let run = |seed: u32, with_tickets: bool| -> u8 {
        let config = CudaConfig { arenas: vec![4096, 4096], host_bytes: 4096, poison: true, ..Default::default() };
        let mut device =
            CudaDevice::new(Box::new(Emulated::new(80, seed).expect("an emulator")), &config).expect("a device");
        device.write_host(0, &[7; 64]);
        // Up to the second device, and down again from there, by lanes 4 and 5.
        let up = device.submit(4, copy((Memory::Host, 0), (Memory::Device(1), 128)), &[]);
        let after: &[_] = if with_tickets { &[up] } else { &[] };
        device.submit(5, copy((Memory::Device(1), 128), (Memory::Host, 512)), after);
        for _ in 0..2 {
            device.next_completion(10.0).expect("two copies end").result.expect("they succeed");
        }
        let mut back = [0];
        device.read_host(512, &mut back);
        assert_eq!((device.high_water_bytes(0), device.high_water_bytes(1)), (0, 192));
        back[0]
    };
    assert!((0..16).all(|seed| run(seed, true) == 7));
    assert!((0..16).any(|seed| run(seed, false) != 7), "no order shows a missing ticket");
}

#[test]
fn what_does_not_fit_and_what_fails_are_errors() {
    let driver = || Box::new(Emulated::new(80, 0).expect("an emulator"));
    let config = |arenas: Vec<u64>| CudaConfig { arenas, host_bytes: 4096, ..Default::default() };
    let refused = |result: hydra::base::Result<CudaDevice>| result.err().expect("refused").to_string();
    assert!(refused(CudaDevice::new(driver(), &config(vec![1 << 40]))).contains("the arenas need"));
    assert!(refused(CudaDevice::new(driver(), &config(vec![]))).contains("at least one"));
    // A completion that is withheld is a stall for the engine; here it is just never told.
    let mut device =
        CudaDevice::new(driver(), &CudaConfig { withhold: Some((1, 1)), ..config(vec![4096]) }).expect("a device");
    let span = |memory| Span { memory, offset: 0, bytes: 64 };
    let task = Task::Copy(vec![CopySpan { from: span(Memory::Host), to: span(Memory::Device(0)) }]);
    device.submit(1, task, &[]);
    assert!(device.next_completion(0.2).is_none());
}
