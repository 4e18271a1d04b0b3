//! Whole trainings on the cuda device over the emulator: PyTorch's cases, the same bits however a model is cut, on
//! however many GPUs and in whatever order streams run, bf16 beside f32, and the layer that a NaN came from.

mod common;

use common::small::{Driver, Small};
use common::{Case, Collect, Outcome, difference, distance, gather_of, stated};
use hydra::base::{DType, Error};
use hydra::device::cuda::{CudaConfig, CudaDevice, Emulated, Facts, LogicalDevice};
use hydra::device::{Completion, CopySpan, Device, DeviceSpec, FleetMemory, Memory, Span, Task, Ticket, start_fleet};
use hydra::engine::{Stored, TurnOptions, plan_alone};
use hydra::graph::LowRank;
use hydra::sched::by_name;
use hydra::spill::{Baseline, FleetDevice, FleetMap, FleetModel, Home, OnDisk, Placed, PlanOptions, Recompute, Spread};
use hydra::spill::{place_baseline, plan_anywhere, plan_at_home};
use hydra::train::{Fleet, ModelToTrain, Observer, Optimizer, TrainOptions, Weights};
use std::sync::atomic::AtomicBool;

fn emulated(arch: u32, seed: u32) -> DeviceSpec {
    DeviceSpec::Emulated { arch, seed, threads: Some(1) }
}

/// Logical devices, each by its GPU and the bytes of its arena.
fn devices(devices: &[(usize, u64)]) -> Vec<LogicalDevice> {
    devices.iter().map(|&(gpu, arena_bytes)| LogicalDevice { gpu, arena_bytes }).collect()
}

/// Two GPUs of one compute capability and unlike models.
fn two_gpus(arch: u32) -> Vec<Facts> {
    let second = Facts { name: "another".into(), multiprocessors: 7, ..Emulated::facts_of(1, arch) };
    vec![Emulated::facts_of(0, arch), second]
}

/// A case of PyTorch's: losses and weights within its tolerances, and the same bits under the smallest budget and
/// another order.
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
    let tight = [(plan.smallest_device_bytes, 3, OnDisk::Nothing), (plan.arena.bytes * 6 / 10, 6, OnDisk::Weights)];
    for (budget, seed, on_disk) in tight {
        let budget = budget.max(plan.smallest_device_bytes);
        let spilled = TrainOptions {
            plan: PlanOptions { device_budget: Some(budget), on_disk: Some(on_disk), ..PlanOptions::default() },
            device: emulated(arch, seed),
            disk: Some(std::env::temp_dir()),
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
fn llama_as_pytorch() {
    check_fixture("llama", 90);
}

#[test]
fn qwen3_as_pytorch() {
    check_fixture("qwen3", 90);
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
    check_bits_beside(small, dtype, batch, None);
}

/// The same of what may be adapters.
fn check_bits_beside(small: &Small, dtype: DType, batch: usize, low_rank: Option<LowRank>) {
    let train = |plan: PlanOptions, clip, arch, seed| -> Outcome {
        let options = TrainOptions {
            seed: 7,
            batch,
            microbatch: batch / 2,
            dtype,
            low_rank: low_rank.clone(),
            clip,
            plan,
            device: emulated(arch, seed),
            poison: true,
            valid_every: 2,
            ..TrainOptions::new(3)
        };
        small.train(&options).expect("a run")
    };
    let base = PlanOptions::default();
    let layers = small.model(&TrainOptions::new(1)).layers();
    let spilled = PlanOptions { resident: Some(false), ..base.clone() };
    for arch in [80, 90] {
        let resident = PlanOptions { resident: Some(true), ..base.clone() };
        let one_each = || Some((0..layers).map(|l| l..l + 1).collect());
        let want = train(resident.clone(), Some(0.5), arch, 0);
        let all = [
            (
                PlanOptions { boundaries_stay: Some(false), recompute: Recompute::Always, slots: 1, ..spilled.clone() },
                3,
            ),
            (PlanOptions { boundaries_stay: Some(false), slots: 2, ..spilled.clone() }, 4),
            (PlanOptions { boundaries_stay: Some(true), slots: 3, ..spilled.clone() }, 9),
            (PlanOptions { resting: Some(2), cut: one_each(), ..spilled.clone() }, 6),
            (PlanOptions { resting: Some(1), visiting_updates: Some(2), cut: one_each(), ..spilled.clone() }, 7),
        ];
        for (plan, seed) in all {
            assert!(
                train(plan.clone(), Some(0.5), arch, seed) == want,
                "{dtype}, arch {arch}, seed {seed}: other bits under {plan:?}"
            );
        }
        // Without clipping updates need not wait: of one shard at rest, of two that visit.
        let plan = PlanOptions { resting: Some(1), visiting_updates: Some(2), cut: one_each(), ..spilled.clone() };
        assert!(
            train(plan.clone(), None, arch, 5) == train(resident, None, arch, 0),
            "{dtype}, arch {arch}: other bits under {plan:?}"
        );
    }
}

/// Gradients that nobody sums up go elsewhere than those beside them.
#[test]
fn what_is_trained_beside_frozen_parameters_gets_the_same_gradients() {
    for (arch, dtype) in [(80, DType::F32), (90, DType::Bf16)] {
        let device = emulated(arch, 3);
        let options = TrainOptions {
            seed: 3,
            batch: 4,
            microbatch: 2,
            loss_rows: Some(8),
            dtype,
            device,
            poison: true,
            ..TrainOptions::new(1)
        };
        let gpt = Small::gpt(32, 2, 2, 17, 0.1);
        gpt.check_frozen(&options, &["transformer.wte", "transformer.h.0"]);
        // Of a norm and of products the weight without the bias, and the other way round.
        gpt.check_frozen(
            &options,
            &["transformer.h.1.ln_1.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.h.0.attn.c_attn.weight"],
        );
        Small::resnet(&[8], &[1], [9, 9]).check_frozen(&options, &["resnet.embedder"]);
    }
}

#[test]
fn gpt_has_the_same_bits_however_it_is_cut() {
    let small = Small::gpt(32, 2, 2, 17, 0.1);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

#[test]
fn llama_has_the_same_bits_however_it_is_cut() {
    let small = Small::llama(32, 4, 2, 17);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

#[test]
fn resnet_has_the_same_bits_however_it_is_cut() {
    let small = Small::resnet(&[8, 16], &[1, 1], [17, 15]);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

#[test]
fn denoiser_has_the_same_bits_however_it_is_cut() {
    let small = Small::denoiser(27, 2, 31);
    check_bits(&small, DType::F32, 4);
    check_bits(&small, DType::Bf16, 4);
}

/// Adapters as narrow as a product's least step, and narrower.
#[test]
fn low_rank_adapters_have_the_same_bits_however_they_are_cut() {
    let targets = ["c_attn", "c_fc", "c_proj"].map(String::from).to_vec();
    let low_rank = |rank| LowRank { rank, alpha: 6.0, dropout: 0.1, targets: targets.clone() };
    let small = Small::gpt(32, 2, 2, 17, 0.1);
    check_bits_beside(&small, DType::F32, 4, Some(low_rank(3)));
    check_bits_beside(&small, DType::Bf16, 4, Some(low_rank(8)));
}

/// The host's f32 run against bf16 on the emulator, fifty steps: within 2 % of the loss at every step, the stated band.
#[test]
fn bf16_follows_f32() {
    for small in [Small::gpt(32, 2, 2, 16, 0.0), Small::llama(32, 4, 2, 16), Small::resnet(&[8, 8], &[1, 1], [9, 9])] {
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
    for (resident, dtype) in [(true, DType::F32), (false, DType::F32), (true, DType::Bf16)] {
        let options = TrainOptions {
            dtype,
            seed: 2,
            batch: 4,
            microbatch: 2,
            plan: PlanOptions { resident: Some(resident), ..PlanOptions::default() },
            device: emulated(80, 2),
            patience_secs: 60.0,
            ..TrainOptions::new(4)
        };
        let (model, plan) = small.plan(&options).expect("a plan");
        let host_bytes = plan.host.bytes;
        let config = CudaConfig { devices: devices(&[(0, plan.arena.bytes)]), host_bytes, ..Default::default() };
        let device = CudaDevice::emulated(vec![Emulated::facts_of(0, 80)], 2, &config).expect("a device");
        let mut driver = Driver::new(&small, (model, plan), Box::new(device), &options);
        let model = std::sync::Arc::clone(driver.engine.model(0));
        let parameter = model.train.parameters.iter().position(|p| p.layers[0] == 2).expect("a block has parameters");
        let mut values = driver.engine.read_parameter(0, Stored::Weight, parameter).unwrap();
        values.fill(f32::INFINITY);
        driver.engine.write_parameter(0, Stored::Weight, parameter, &values).unwrap();
        let other = driver.engine.read_parameter(0, Stored::Weight, 0).unwrap();
        driver.begin(0, |_| ()).expect("a step begins");
        let error = driver.engine.wait_step(0).expect_err("the loss is not finite");
        let name = &model.train.layers[2].name;
        assert!(matches!(error, Error::NotFinite { step: 0, .. }), "{error}");
        assert!(error.to_string().contains(name), "{name} is not in: {error}");
        let _ = driver.engine.wait_home(0);
        assert_eq!(
            driver.engine.read_parameter(0, Stored::Weight, 0).unwrap(),
            other,
            "a weight changed, resident {resident}"
        );
    }
}

/// A copy of 64 bytes.
fn copy(from: (Memory, u64), to: (Memory, u64)) -> Task {
    let span = |(memory, offset)| Span { memory, offset, bytes: 64 };
    Task::Copy(vec![CopySpan { from: span(from), to: span(to) }])
}

/// A device of two logical ones on `gpus`, with a little memory each.
fn two_devices(facts: Vec<Facts>, gpus: [usize; 2], seed: u32) -> CudaDevice {
    let devices = devices(&gpus.map(|gpu| (gpu, 4096)));
    let config = CudaConfig { devices, host_bytes: 4096, poison: true, threads: Some(1), ..Default::default() };
    CudaDevice::emulated(facts, seed, &config).expect("a device")
}

/// Queues a copy.
fn submit(device: &mut dyn Device, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
    // SAFETY: the emulator's streams run on the thread that waits, one copy at a time: in the wrong order they move the
    // wrong bytes, and no more.
    unsafe { device.submit(lane, task, after) }
}

/// Writes into the host's store.
fn write(device: &mut dyn Device, offset: u64, bytes: &[u8]) {
    // SAFETY: nothing runs unless this thread waits.
    unsafe { device.write_host(offset, bytes) }
}

/// Reads the host's store.
fn read(device: &dyn Device, offset: u64, bytes: &mut [u8]) {
    // SAFETY: as above.
    unsafe { device.read_host(offset, bytes) }
}

fn ends(device: &mut CudaDevice, count: usize) -> Vec<Completion> {
    (0..count).map(|_| device.next_completion(10.0).expect("a copy ends")).collect()
}

/// Several logical devices on one GPU, each with its own arena; and a copy that forgot its ticket goes wrong under some
/// order.
#[test]
fn streams_run_in_any_order_that_tickets_allow() {
    let run = |seed: u32, with_tickets: bool| -> u8 {
        let mut device = two_devices(vec![Emulated::facts_of(0, 80)], [0, 0], seed);
        write(&mut device, 0, &[7; 64]);
        // Up to the second device, and down again from there, by lanes 4 and 5.
        let up = submit(&mut device, 4, copy((Memory::Host, 0), (Memory::Device(1), 128)), &[]);
        let after: &[_] = if with_tickets { &[up] } else { &[] };
        submit(&mut device, 5, copy((Memory::Device(1), 128), (Memory::Host, 512)), after);
        ends(&mut device, 2).into_iter().for_each(|end| end.result.expect("it succeeds"));
        let mut back = [0];
        read(&device, 512, &mut back);
        assert_eq!((device.high_water_bytes(0), device.high_water_bytes(1)), (0, 192));
        back[0]
    };
    assert!((0..16).all(|seed| run(seed, true) == 7));
    assert!((0..16).any(|seed| run(seed, false) != 7), "no order shows a missing ticket");
}

/// Through the first GPU's memory and the second's and back: a wait between streams of two GPUs orders them, and times
/// say so.
#[test]
fn gpus_wait_for_each_other() {
    // As two clocks are read: the zero of each is known to a moment in which a thread may be interrupted.
    const APART_SECS: f64 = 2e-3;
    let run = |seed: u32, with_tickets: bool| -> u8 {
        let mut device = two_devices(two_gpus(80), [0, 1], seed);
        write(&mut device, 0, &[7; 64]);
        write(&mut device, 512, &[1; 64]);
        let before_secs = device.now_secs();
        let (first, second) = (Memory::Device(0), Memory::Device(1));
        let mut tickets = Vec::new();
        for (lane, task) in [
            (1, copy((Memory::Host, 0), (first, 0))),
            (2, copy((first, 0), (Memory::Host, 512))),
            (4, copy((Memory::Host, 512), (second, 64))),
            (5, copy((second, 64), (Memory::Host, 1024))),
        ] {
            let after = if with_tickets { tickets.last().copied() } else { None };
            tickets.push(submit(&mut device, lane, task, after.as_slice()));
        }
        let done = ends(&mut device, 4);
        let times = |t| done.iter().find(|d| d.ticket == t).map(|d| (d.start_secs, d.end_secs)).expect("all ended");
        let mut last_end = before_secs;
        for &ticket in tickets.iter().filter(|_| with_tickets) {
            let (start, end) = times(ticket);
            assert!(last_end - APART_SECS < start && start <= end, "{ticket:?} at {start} to {end}, after {last_end}");
            last_end = end;
        }
        assert!(done.iter().all(|d| d.result.is_ok() && d.end_secs < device.now_secs() + APART_SECS));
        let mut back = [0];
        read(&device, 1024, &mut back);
        back[0]
    };
    assert!((0..16).all(|seed| run(seed, true) == 7));
    assert!((0..16).any(|seed| run(seed, false) == 1), "no order shows that the second GPU did not wait");
}

#[test]
fn what_touches_another_gpus_memory_is_refused() {
    // The device refuses tasks, from one arena to another too.
    let mut device = two_devices(two_gpus(80), [0, 1], 0);
    submit(&mut device, 1, copy((Memory::Device(0), 0), (Memory::Device(1), 64)), &[]);
    let error = ends(&mut device, 1).remove(0).result.expect_err("another GPU's").to_string();
    assert!(
        error.contains("GPU 0 (emulated)") && error.contains("device 1") && error.contains("GPU 1 (another)"),
        "{error}"
    );
    // On one GPU the same is a copy like any other.
    let mut device = two_devices(two_gpus(80), [1, 1], 0);
    submit(&mut device, 1, copy((Memory::Device(0), 0), (Memory::Device(1), 64)), &[]);
    assert!(ends(&mut device, 1).remove(0).result.is_ok());
}

#[test]
fn stretches_that_do_not_fit_are_errors() {
    let span = |memory, offset, bytes| Span { memory, offset, bytes };
    for (from, to, want) in [
        (span(Memory::Host, 0, 64), span(Memory::Device(0), 0, 32), "a copy of 64 bytes to where 32 are meant"),
        (span(Memory::Host, 0, 64), span(Memory::Device(0), 4095, 64), "bytes 4095..4159 of device 0"),
        (span(Memory::Host, 0, 64), span(Memory::Device(0), u64::MAX - 3, 64), "of device 0, whose arena has 4096"),
    ] {
        let mut device = two_devices(two_gpus(80), [0, 1], 0);
        submit(&mut device, 1, Task::Copy(vec![CopySpan { from, to }]), &[]);
        let error = ends(&mut device, 1).remove(0).result.expect_err("it does not fit").to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn what_does_not_fit_and_what_fails_are_errors() {
    let start = |config: &CudaConfig| CudaDevice::emulated(vec![Emulated::facts_of(0, 80)], 0, config);
    let config = |list: &[(usize, u64)]| CudaConfig { devices: devices(list), host_bytes: 4096, ..Default::default() };
    let refused = |result: hydra::base::Result<CudaDevice>| result.err().expect("refused").to_string();
    assert!(refused(start(&config(&[(0, 1 << 40)]))).contains("the arenas on it need"));
    assert!(refused(start(&config(&[]))).contains("at least one"));
    assert!(refused(start(&config(&[(0, 64), (1, 64)]))).contains("device 1"));
    // A completion that is withheld is a stall for the engine; here it is just never told.
    let mut device = start(&CudaConfig { withhold: Some((1, 1)), ..config(&[(0, 4096)]) }).expect("a device");
    submit(&mut device, 1, copy((Memory::Host, 0), (Memory::Device(0), 0)), &[]);
    assert!(device.next_completion(0.2).is_none());
}

#[test]
fn a_gpu_that_is_too_small_or_of_another_kind_is_named() {
    let small = Facts { memory_bytes: 8192, ..two_gpus(80).remove(1) };
    let start = |list: &[(usize, u64)], second: &Facts| {
        let gpus = vec![Emulated::facts_of(0, 80), second.clone()];
        let config = CudaConfig { devices: devices(list), host_bytes: 64, threads: Some(1), ..Default::default() };
        CudaDevice::emulated(gpus, 0, &config).map(|_| ()).map_err(|e| e.to_string())
    };
    let has = "GPU 1 (another) has 8192 bytes of memory, the arenas on it need";
    let check = |list: &[(usize, u64)], needs: u64| {
        let error = start(list, &small).expect_err("too much");
        assert!(error.contains(&format!("{has} {needs}")), "{error}");
    };
    check(&[(0, 64), (1, 8193)], 8193);
    check(&[(1, 4096), (0, 1 << 20), (1, 4097)], 8193);
    assert_eq!(start(&[(1, 4096), (0, 1 << 20), (1, 4096)], &small), Ok(()));
    assert!(CudaDevice::emulated(Vec::new(), 0, &CudaConfig::default()).is_err(), "none");
    // Where kernels differ so would bits.
    let error = start(&[(0, 64), (1, 64)], &Emulated::facts_of(1, 90)).expect_err("unlike");
    assert!(error.contains("GPU 0 (emulated) has compute capability 8.0, GPU 1 (emulated) has 9.0"), "{error}");
    let memory = FleetMemory { arena_bytes: vec![64; 2], host_bytes: 64, ..FleetMemory::default() };
    assert!(start_fleet(&[emulated(80, 0), emulated(90, 0)], memory.clone()).is_err());
    // In a fleet each emulated device is a GPU of its own: an arena does not reach from one to the next.
    let mut fleet = start_fleet(&[emulated(80, 0), emulated(80, 0)], memory).expect("alike");
    submit(fleet.as_mut(), 1, copy((Memory::Device(0), 0), (Memory::Device(1), 0)), &[]);
    let error = fleet.next_completion(10.0).expect("it ends").result.expect_err("another GPU's").to_string();
    assert!(error.contains("GPU 0") && error.contains("GPU 1"), "{error}");
}

/// A model of a mix, and how it is trained.
struct Member {
    small: Small,
    options: TrainOptions,
}

/// A GPT in f32 that drops out, one in bf16 with clipping, and a ResNet with running statistics.
fn three(arch: u32) -> Vec<Member> {
    let base = |steps, seed, batch, microbatch| TrainOptions {
        seed,
        batch,
        microbatch,
        valid_every: 2,
        patience_secs: 60.0,
        device: emulated(arch, 0),
        ..TrainOptions::new(steps)
    };
    let sgd = Optimizer::Sgd { lr: 0.02, momentum: 0.9, nesterov: false, weight_decay: 0.01 };
    let member = |small, options| Member { small, options };
    vec![
        member(Small::gpt(16, 2, 3, 9, 0.1), base(3, 1, 2, 1)),
        member(Small::gpt(24, 3, 2, 7, 0.0), TrainOptions { dtype: DType::Bf16, clip: Some(0.3), ..base(2, 2, 3, 3) }),
        member(Small::resnet(&[6, 8], &[1, 1], [9, 8]), TrainOptions { optimizer: sgd, ..base(3, 3, 2, 2) }),
    ]
}

fn fleet_models(members: &[Member]) -> Vec<FleetModel> {
    let options = |m: &Member| PlanOptions { updates: m.options.updates(), ..PlanOptions::default() };
    let model = |(i, m): (usize, &Member)| FleetModel {
        name: format!("model {i}"),
        model: m.small.model(&m.options),
        options: options(m),
        steps: m.options.steps,
    };
    members.iter().enumerate().map(model).collect()
}

/// Trains the members as `placed` on logical devices that lie on `gpus` of `facts`, and gives what each computed:
/// taking turns by `policy`, or without in `lines`.
fn train(
    members: &[Member],
    placed: &[Placed],
    (facts, gpus, seed): (Vec<Facts>, &[usize], u32),
    policy: Option<&str>,
    lines: &[Vec<usize>],
) -> Vec<Outcome> {
    let map = FleetMap::new(placed, gpus.len());
    let logical: Vec<_> = gpus.iter().copied().zip(map.arena_bytes.iter().copied()).collect();
    let (devices, host_bytes) = (devices(&logical), map.host_bytes);
    let config = CudaConfig { devices, host_bytes, poison: true, threads: Some(1), ..Default::default() };
    let device = CudaDevice::emulated(facts, seed, &config).expect("a device");
    let models = members.iter().zip(placed).map(|(m, placed)| ModelToTrain {
        weights: Weights::Random,
        placed: placed.clone(),
        source: m.small.source(m.options.batch, m.options.seed),
        valid: Some(m.small.held_out(m.options.batch)),
        options: m.options.clone(),
    });
    let turns = policy.map(|policy| TurnOptions {
        policy: by_name(policy, 9).expect("a built-in policy"),
        units: 2,
        costs: vec![stated(); gpus.len()],
        shared_bytes_per_sec: None,
        arena_bytes: map.arena_bytes.clone(),
        room_bytes: Vec::new(),
    });
    let mut fleet = Fleet::new(models.collect(), Box::new(device), turns).expect("a fleet");
    if !lines.is_empty() {
        fleet.run_in_order(lines.to_vec()).expect("each model is in a line");
    }
    let mut collects: Vec<Collect> = members.iter().map(|_| Collect::default()).collect();
    let mut observers: Vec<&mut dyn Observer> = collects.iter_mut().map(|c| c as &mut dyn Observer).collect();
    fleet.run(&mut observers, &AtomicBool::new(false)).expect("no device fails");
    let touched: Vec<u64> = (0..gpus.len() as u16).map(|d| fleet.engine().high_water_bytes(d)).collect();
    assert!(touched.iter().zip(&map.arena_bytes).all(|(t, b)| (1..=*b).contains(t)), "{touched:?} of {map:?}");
    let outcome = |(i, collect): (usize, Collect)| {
        let failure = fleet.take_failure(i).map(|e| e.to_string());
        assert_eq!(failure, None, "model {i}");
        let mut outcome = collect.0;
        gather_of(fleet.engine(), i, &mut outcome);
        outcome
    };
    collects.into_iter().enumerate().map(outcome).collect()
}

/// Two GPUs, two logical devices on one, or one device that spills: the bits of each model alone on a GPU with all the
/// memory it wants.
#[test]
fn a_mix_of_models_has_the_same_bits_on_any_gpus() {
    let members = three(90);
    let want: Vec<Outcome> = members.iter().map(|m| m.small.train(&m.options).expect("a run")).collect();
    let check = |what: &str, got: Vec<Outcome>| {
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(difference(got, want), None, "{what}, model {i}");
        }
    };
    let models = fleet_models(&members);
    // Nothing may need more of a device than the largest of them when it spills as far as it can.
    let alone = |m: &FleetModel| {
        let options = PlanOptions { spread: Spread::anywhere(1), ..m.options.clone() };
        hydra::spill::Plan::new(&m.model, &options, &stated()).expect("a plan").smallest_device_bytes
    };
    let budget = models.iter().map(alone).max().map(|bytes| bytes * 5 / 4);
    let anywhere = |devices| {
        let devices = vec![FleetDevice { budget, cost: stated() }; devices];
        plan_anywhere(&models, &devices).expect("a plan").placed
    };
    let (one, two) = (anywhere(1), anywhere(2));
    assert!(two.iter().all(|p| p.home == Home::Anywhere && p.plan.shards.len() > 1), "they spill");
    let one_gpu = || vec![Emulated::facts_of(0, 90)];
    for policy in ["sharded-lrtf", "locality-lrtf"] {
        let got = |placed: &[Placed], on| train(&members, placed, on, Some(policy), &[]);
        check(&format!("{policy}, two GPUs"), got(&two, (two_gpus(90), &[0, 1], 3)));
        check(&format!("{policy}, two devices on a GPU"), got(&two, (one_gpu(), &[0, 0], 4)));
        check(&format!("{policy}, one device"), got(&one, (one_gpu(), &[0], 5)));
    }
    // Three devices on two GPUs, the way of the program; models that stay; and one model's stages on both GPUs.
    let three = anywhere(3);
    check("three on two", train(&members, &three, (two_gpus(90), &[0, 1, 0], 6), Some("round-robin"), &[]));
    let free = vec![FleetDevice { budget: None, cost: stated() }; 2];
    let (stay, _) = plan_at_home(&models, &free).expect("a plan").expect("room");
    check("at home", train(&members, &stay, (two_gpus(90), &[0, 1], 7), Some("sharded-lrtf"), &[]));
    let staged = place_baseline(Baseline::Gpipe, &models, &free, plan_alone).expect("a plan");
    check("stages", train(&members, &staged.placed, (two_gpus(90), &[0, 1], 8), None, &staged.lines));
}
