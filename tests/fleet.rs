//! Promise 1 with many models and devices: whatever the policy, the number of devices and the company, each model
//! computes the bits of its lone, unconstrained run. One that is cancelled or fails takes nothing of that away.

mod common;

use common::small::Small;
use common::{Outcome, difference, gather_of, stated};
use hydra::base::Error;
use hydra::data::{Batch, InputSpec, Source};
use hydra::device::host::HostSpec;
use hydra::device::sim::CostModel;
use hydra::device::{DeviceSpec, DiskSpec, FleetMemory, start_fleet};
use hydra::engine::{Engine, SimulateOptions, Simulation, TurnOptions, plan_alone, simulate};
use hydra::nn::Pretrained;
use hydra::sched::{Claim, LocalityLrtf, LocalityTuning, MOST_MODELS, POLICIES, Policy, View, by_name};
use hydra::spill::{
    Baseline, FleetDevice, FleetMap, FleetModel, Home, HomeBudgets, OnDisk, Placed, PlanOptions, Recompute, Spread,
    find_homes, place_baseline, plan_anywhere, plan_at_home, plan_fleet, plan_pipelined,
};
use hydra::train::{Fleet, FleetObserver, ModelToTrain, Observer, Optimizer, StepReport, TrainOptions, Weights};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A model of the mixed six, and how it is trained.
struct Entry {
    name: &'static str,
    small: Small,
    options: TrainOptions,
}

fn sgd() -> Optimizer {
    Optimizer::Sgd { lr: 0.02, momentum: 0.9, nesterov: false, weight_decay: 0.01 }
}

/// Four GPTs and two ResNets of unequal depth, steps, microbatches, optimizers and clipping; of two a part is frozen.
fn six() -> Vec<Entry> {
    let base = |steps: u64, seed: u64, batch: usize, microbatch: usize| TrainOptions {
        seed,
        batch,
        microbatch,
        valid_every: 3,
        patience_secs: 20.0,
        ..TrainOptions::new(steps)
    };
    let entry = |name, small, options| Entry { name, small, options };
    let frozen = |starts: &[&str]| starts.iter().map(|start| start.to_string()).collect();
    vec![
        entry("deep", Small::gpt(24, 2, 6, 13, 0.1), base(5, 1, 4, 2)),
        entry(
            "wide",
            Small::gpt(40, 4, 3, 9, 0.1),
            TrainOptions { clip: Some(0.3), frozen: frozen(&["transformer.w", "transformer.h.0"]), ..base(4, 2, 3, 1) },
        ),
        entry(
            "images",
            Small::resnet(&[8, 12], &[2, 1], [16, 12]),
            TrainOptions { optimizer: sgd(), frozen: frozen(&["resnet.encoder.stages.0"]), ..base(6, 3, 4, 4) },
        ),
        entry("short", Small::gpt(16, 1, 1, 7, 0.0), base(7, 4, 2, 2)),
        entry(
            "plain",
            Small::gpt(16, 2, 2, 8, 0.2),
            TrainOptions {
                optimizer: Optimizer::Sgd { lr: 0.05, momentum: 0.0, nesterov: false, weight_decay: 0.0 },
                ..base(4, 5, 2, 1)
            },
        ),
        entry("pictures", Small::resnet(&[6], &[1], [9, 9]), TrainOptions { clip: Some(1.0), ..base(5, 6, 3, 3) }),
    ]
}

/// What each computes alone, on a device with all the memory it wants.
fn alone(entries: &[Entry]) -> Vec<Outcome> {
    entries.iter().map(|e| e.small.train(&e.options).expect("nothing fails")).collect()
}

#[derive(Default)]
struct Collect {
    outcome: Outcome,
    /// Of its steps.
    secs: f64,
    /// Fails after this many steps.
    fails_after: Option<u64>,
}

impl Observer for Collect {
    fn step(&mut self, report: &StepReport) -> hydra::base::Result<()> {
        self.outcome.losses.push(report.result.loss.to_bits());
        self.outcome.norms.push(report.result.grad_norm.to_bits());
        self.secs += report.result.secs;
        match self.fails_after {
            Some(steps) if report.result.step + 1 >= steps => Err(Error::bad("had enough")),
            _ => Ok(()),
        }
    }

    fn valid(&mut self, _: u64, loss: f32, _: f64) -> hydra::base::Result<()> {
        self.outcome.valid.push(loss.to_bits());
        Ok(())
    }
}

/// Observers that look at what the devices are at.
struct Looking<'a> {
    collects: &'a mut [Collect],
    devices: usize,
    takes_turns: bool,
    /// How often it has looked, and how many units it has seen on their way.
    looked: usize,
    ahead: usize,
    /// A model that is cancelled after two steps, in the middle of the next.
    cancels: Option<usize>,
}

impl FleetObserver for Looking<'_> {
    fn of_model(&mut self, model: usize) -> &mut dyn Observer {
        &mut self.collects[model]
    }

    fn task_ended(&mut self, engine: &Engine) {
        let states: Vec<_> = engine.device_states().collect();
        assert_eq!(states.len(), self.devices);
        let units = states.iter().filter_map(|s| s.runs).filter(|task| task.what.is_unit());
        let models: Vec<u16> = units.map(|task| task.model).collect();
        let once = |m: &u16| models.iter().filter(|other| *other == m).count() == 1;
        assert!(!self.takes_turns || models.iter().all(once), "one unit of a model at a time: {states:?}");
        self.looked += 1;
        self.ahead += states.iter().filter(|s| s.runs.is_some() && s.next.is_some()).count();
    }

    fn between(&mut self, fleet: &mut Fleet) -> hydra::base::Result<()> {
        match self.cancels.filter(|&model| fleet.steps_done(model) >= 2) {
            Some(model) => fleet.cancel(model, Error::bad("had enough")),
            None => Ok(()),
        }
    }
}

fn fleet_models(entries: &[Entry], recompute: Recompute, slots: usize) -> Vec<FleetModel> {
    entries
        .iter()
        .map(|e| FleetModel {
            name: e.name.into(),
            model: e.small.model(&e.options),
            options: PlanOptions { updates: e.options.updates(), recompute, slots, ..PlanOptions::default() },
            steps: e.options.steps,
        })
        .collect()
}

fn plan(entries: &[Entry], devices: usize, budget: Option<u64>, recompute: Recompute, slots: usize) -> Vec<Placed> {
    plan_by(&stated(), entries, devices, budget, recompute, slots)
}

fn plan_by(
    cost: &CostModel,
    entries: &[Entry],
    devices: usize,
    budget: Option<u64>,
    recompute: Recompute,
    slots: usize,
) -> Vec<Placed> {
    let devices = vec![FleetDevice { budget, cost: cost.clone() }; devices];
    plan_fleet(&fleet_models(entries, recompute, slots), &devices, HomeBudgets::default()).expect("a plan").placed
}

/// Devices to which updates with state that visits are worth their copies, or not.
fn hosts() -> [CostModel; 2] {
    [stated(), CostModel { host_update_bytes_per_sec: 1e6, ..stated() }]
}

/// Whether devices make updates of models that clip, and of models that do not.
fn updates_on_devices(entries: &[Entry], placed: &[Placed]) -> [bool; 2] {
    let any = |clips: bool| {
        let of = |(e, p): (&Entry, &Placed)| e.options.clip.is_some() == clips && p.plan.choice.visiting_updates > 0;
        entries.iter().zip(placed).any(of)
    };
    [any(true), any(false)]
}

fn fleet_model<'a>(entry: &'a Entry, placed: &Placed) -> ModelToTrain<'a> {
    ModelToTrain {
        weights: Weights::Random,
        placed: placed.clone(),
        source: entry.small.source(entry.options.batch, entry.options.seed),
        valid: Some(entry.small.held_out(entry.options.batch)),
        options: entry.options.clone(),
    }
}

/// Device 0 has an eighth more than what is needed, the others all that is wanted.
fn budgets(placed: &[Placed], devices: usize) -> Vec<Option<u64>> {
    let least = FleetMap::new(placed, devices).arena_bytes;
    (0..devices).map(|d| (d == 0).then(|| least[0] * 9 / 8)).collect()
}

/// Runs the six as `placed`, taking turns, and gives what each computed, or why it ended.
fn run(
    entries: &[Entry],
    placed: &[Placed],
    devices: usize,
    policy: &str,
    slots: usize,
    fails: Option<usize>,
) -> Vec<Result<Outcome, String>> {
    run_policy(entries, placed, devices, by_name(policy, 9).expect("a built-in policy"), slots, fails)
}

/// The same with a policy of one's own.
fn run_policy(
    entries: &[Entry],
    placed: &[Placed],
    devices: usize,
    policy: Box<dyn Policy>,
    slots: usize,
    fails: Option<usize>,
) -> Vec<Result<Outcome, String>> {
    // One of the policies has more memory, in which shards stay.
    let map = match policy.name() {
        "locality-lrtf" => FleetMap::within(placed, &budgets(placed, devices)),
        _ => FleetMap::new(placed, devices),
    };
    let turns = TurnOptions {
        policy,
        units: slots,
        costs: vec![stated(); devices],
        shared_bytes_per_sec: None,
        arena_bytes: map.arena_bytes,
        room_bytes: Vec::new(),
    };
    run_with(entries, placed, devices, Some(turns), Vec::new(), fails)
}

/// The same with turns or without, in lines or all at once.
fn run_with(
    entries: &[Entry],
    placed: &[Placed],
    devices: usize,
    turns: Option<TurnOptions>,
    lines: Vec<Vec<usize>>,
    fails: Option<usize>,
) -> Vec<Result<Outcome, String>> {
    let map = match &turns {
        Some(turns) => {
            FleetMap::within(placed, &turns.arena_bytes.iter().map(|&bytes| Some(bytes)).collect::<Vec<_>>())
        }
        None => FleetMap::new(placed, devices),
    };
    let specs: Vec<DeviceSpec> =
        (0..devices).map(|_| HostSpec { threads: Some(1), ..HostSpec::default() }.into()).collect();
    let memory = FleetMemory {
        arena_bytes: map.arena_bytes.clone(),
        host_bytes: map.host_bytes,
        poison: true,
        disk: disk(map.disk_bytes),
        ..FleetMemory::default()
    };
    let device = start_fleet(&specs, memory).expect("memory and threads");
    let models = entries.iter().zip(placed).map(|(e, placed)| fleet_model(e, placed)).collect();
    let takes_turns = turns.as_ref().is_some_and(|turns| !turns.policy.pipelines());
    // With one slot nothing is fetched beside what runs.
    let one_slot = turns.as_ref().is_some_and(|turns| turns.units == 1);
    // Behind an update on the device the next unit may stand even so.
    let alone = one_slot && takes_turns && placed.iter().all(|p| p.plan.choice.visiting_updates == 0);
    let mut fleet = Fleet::new(models, device, turns).expect("a fleet");
    let in_line = lines.len() == 1;
    if !lines.is_empty() {
        fleet.run_in_order(lines).expect("each model is in a line");
    }
    let mut collects: Vec<Collect> = entries.iter().map(|_| Collect::default()).collect();
    let mut observer = Looking { collects: &mut collects, devices, takes_turns, looked: 0, ahead: 0, cancels: fails };
    let began = Instant::now();
    fleet.run(&mut observer, &AtomicBool::new(false)).expect("no device fails");
    let Looking { looked, ahead, .. } = observer;
    // Of models that run one after another each second is one model's, and none before the first begins.
    let (secs, most) = (collects.iter().map(|c| c.secs).sum::<f64>(), began.elapsed().as_secs_f64());
    assert!(!in_line || secs <= most, "{secs} s of steps in {most} s");
    assert!(
        looked > 100 && (ahead > 0 || one_slot) && (ahead == 0 || !alone),
        "looked {looked} times, saw {ahead} units on their way"
    );
    let touched: Vec<u64> = (0..devices as u16).map(|d| fleet.engine().high_water_bytes(d)).collect();
    assert!(touched.iter().zip(&map.arena_bytes).all(|(t, b)| t <= b), "{touched:?} of {:?}", map.arena_bytes);
    collects
        .into_iter()
        .enumerate()
        .map(|(i, collect)| match fleet.take_failure(i) {
            Some(error) => Err(error.to_string()),
            None => {
                let mut outcome = collect.outcome;
                gather_of(fleet.engine(), i, &mut outcome);
                Ok(outcome)
            }
        })
        .collect()
}

/// A disk tier of so many bytes, if any.
fn disk(bytes: u64) -> Option<DiskSpec> {
    (bytes > 0).then(|| DiskSpec { path: std::env::temp_dir(), bytes, bytes_per_sec: None })
}

/// The same with as much of their state on the disk as can be.
fn on_disk(placed: &[Placed], devices: usize) -> Vec<Placed> {
    let most = FleetMap::new(placed, devices).host_bytes;
    let homes = |i: u64| find_homes(placed, HomeBudgets { host: Some(most * i / 64), disk: u64::MAX }).ok();
    let placed = (0..64).find_map(homes).expect("a disk helps");
    assert!(placed.iter().any(|p| p.plan.choice.on_disk == OnDisk::Weights));
    placed
}

fn check(what: &str, entries: &[Entry], got: &[Result<Outcome, String>], want: &[Outcome]) {
    for ((entry, got), want) in entries.iter().zip(got).zip(want) {
        let got = got.as_ref().unwrap_or_else(|e| panic!("{what}, {}: {e}", entry.name));
        assert_eq!(difference(got, want), None, "{what}, {}", entry.name);
    }
}

/// The smallest budget with which all six fit, anywhere.
fn smallest(entries: &[Entry]) -> u64 {
    let alone = |e: &Entry| {
        let (updates, spread) = (e.options.updates(), Spread::anywhere(1));
        let options = PlanOptions { updates, spread, ..PlanOptions::default() };
        hydra::spill::Plan::new(&e.small.model(&e.options), &options, &stated()).expect("a plan").smallest_device_bytes
    };
    entries.iter().map(alone).max().expect("six")
}

#[test]
fn every_policy_on_any_number_of_devices_gives_the_bits_of_lone_runs() {
    let entries = six();
    let want = alone(&entries);
    let budget = smallest(&entries) * 5 / 4;
    let whole = |e: &Entry| {
        let (_, plan) = e.small.plan(&e.options).expect("a plan");
        plan.arena.bytes > budget
    };
    assert!(entries.iter().filter(|e| whole(e)).count() >= 2, "two of the six are larger than any device");
    let [fast, slow] = hosts();
    // With room for state that visits.
    let roomy = budget * 8 / 5;
    for (devices, cost, budget) in [(1, &fast, budget), (2, &fast, budget), (2, &slow, roomy), (3, &fast, budget)] {
        let placed = plan_by(cost, &entries, devices, Some(budget), Recompute::Auto, 2);
        assert!(placed.iter().all(|p| p.home == Home::Anywhere), "they do not fit");
        let updates = updates_on_devices(&entries, &placed);
        assert!(*cost == fast || updates == [true; 2], "{updates:?}");
        for (policy, _) in POLICIES {
            let got = run(&entries, &placed, devices, policy, 2, None);
            check(&format!("{devices} devices, {policy}"), &entries, &got, &want);
        }
    }
}

/// Budgets of host memory from all that is wanted down to the least that will do.
#[test]
fn what_is_on_the_disk_does_not_show() {
    let entries = six();
    let want = alone(&entries);
    let placed = plan(&entries, 2, Some(smallest(&entries) * 5 / 4), Recompute::Auto, 2);
    let needs = |placed: &[Placed]| FleetMap::new(placed, 2).host_bytes;
    let homes = |host: u64| find_homes(&placed, HomeBudgets { host: Some(host), disk: u64::MAX });
    let most = needs(&placed);
    let least = (0..64).map(|i| most * i / 64).find(|&host| homes(host).is_ok()).expect("a disk helps");
    assert!(least < 3 * most / 4, "{least} of {most}");
    let mut seen = BTreeSet::new();
    for part in [0, 1, 2, 4] {
        let host = least + (most - least) * part / 5;
        let placed = homes(host).expect("a budget in between");
        assert!(needs(&placed) <= host);
        seen.extend(placed.iter().map(|p| p.plan.choice.on_disk));
        for policy in ["sharded-lrtf", "locality-lrtf"] {
            let got = run(&entries, &placed, 2, policy, 2, None);
            check(&format!("{host} bytes of host memory, {policy}"), &entries, &got, &want);
        }
    }
    assert_eq!(seen.len(), OnDisk::ALL.len(), "{seen:?}");
}

/// What is frozen is fetched less often, and before what is trained nothing comes back: bounds know of both.
#[test]
fn no_schedule_of_partly_frozen_models_is_below_its_bound() {
    let blocks = |n: usize| (0..n).map(|i| format!("transformer.h.{i}."));
    for (frozen, link) in [(3, 1e7), (3, 1e8), (6, 1e7), (6, 1e8)] {
        let options = TrainOptions {
            batch: 4,
            microbatch: 2,
            frozen: blocks(frozen).chain(["transformer.w".to_string()]).collect(),
            ..TrainOptions::new(5)
        };
        let entries = [Entry { name: "deep", small: Small::gpt(64, 2, 6, 120, 0.1), options }];
        for budget in [4, 5, 6].map(|quarters| smallest(&entries) * quarters / 4) {
            let placed = plan(&entries, 1, Some(budget), Recompute::Auto, 2);
            let options = SimulateOptions {
                policy: by_name("sharded-lrtf", 1),
                ..SimulateOptions::new(vec![5], vec![CostModel::stated(1e10, 1e9, link)])
            };
            let simulation = simulate(&placed, options).expect("a simulation");
            let gap = simulation.bounds.gap(simulation.makespan_secs);
            assert!(
                gap > -1e-9,
                "{frozen} blocks, {link} bytes a second, {budget} bytes: {gap} of {:?}",
                simulation.bounds
            );
        }
    }
}

/// A bound that a lone model meets has no copy in it that nobody makes, be it of a few bytes behind what is frozen.
#[test]
fn a_lone_model_that_stays_meets_its_bound() {
    for frozen in [&[][..], &["model.layers.1."], &["model.embed_tokens", "model.layers.0."]] {
        let frozen = frozen.iter().map(|start| start.to_string()).collect();
        let options = TrainOptions { batch: 4, microbatch: 4, frozen, ..TrainOptions::new(1) };
        let entries = [Entry { name: "odd", small: Small::llama(12, 2, 2, 17), options }];
        // No bound counts the loss and the norms that leave last.
        let cost = CostModel { d2h_bytes_per_sec: 1e15, ..CostModel::stated(1e8, 1e8, 1e8) };
        let simulation = simulate_at_home(&entries, cost, 1);
        let gap = simulation.bounds.gap(simulation.makespan_secs);
        assert!(gap.abs() < 1e-9, "{:?}: {gap} of {:?}", entries[0].options.frozen, simulation.bounds);
    }
}

/// Devices of which one is faster with one model than with another.
#[test]
fn no_schedule_on_unlike_devices_is_below_its_bound() {
    let entry = |name, small, (batch, microbatch), steps| {
        let options = TrainOptions { batch, microbatch, ..TrainOptions::new(steps) };
        Entry { name, small, options }
    };
    let few_tokens = |steps| entry("few tokens", Small::gpt(64, 2, 2, 1, 0.0), (1, 1), steps);
    let many_tokens = |steps| entry("many tokens", Small::gpt(64, 2, 2, 48, 0.0), (4, 2), steps);
    // Slow memory, fast memory, and slow arithmetic.
    let rates = [(1e9, 1e8), (1e9, 1e12), (1e8, 1e12)];
    let mut greatest = BTreeSet::new();
    for (entries, devices) in [
        (vec![few_tokens(400), many_tokens(2)], &[0, 1][..]),
        (vec![many_tokens(1), few_tokens(200)], &[1, 0]),
        (vec![few_tokens(20), many_tokens(1), few_tokens(30), many_tokens(2)], &[2, 1]),
        (vec![few_tokens(9), many_tokens(3), few_tokens(50)], &[0, 1, 2]),
        // Updates on one device beside backwards on the other.
        (vec![few_tokens(5)], &[0, 0]),
        (vec![few_tokens(5)], &[0, 2]),
    ] {
        let models = fleet_models(&entries, Recompute::Auto, 2);
        let cost = |&d: &usize| CostModel::stated(rates[d].0, rates[d].1, 1e12);
        let costs: Vec<CostModel> = devices.iter().map(cost).collect();
        let fleet: Vec<FleetDevice> =
            costs.iter().map(|cost| FleetDevice { budget: None, cost: cost.clone() }).collect();
        let moving = plan_anywhere(&models, &fleet).expect("a plan").placed;
        let fine = plan_pipelined(&models, &fleet).expect("a plan").map(|plan| plan.placed);
        let own = |pipelines| Box::new(LocalityLrtf { pipelines, ..LocalityLrtf::default() }) as Box<dyn Policy>;
        let mut runs = Vec::new();
        for (name, baseline) in Baseline::NAMES {
            let lined = place_baseline(baseline, &models, &fleet, plan_alone).expect("no budget");
            runs.push((name, lined.placed, lined.lines, None));
        }
        for (name, new) in POLICIES {
            runs.push((name, moving.clone(), Vec::new(), Some(new(1))));
        }
        runs.extend(fine.map(|fine| ("pipelined", fine, Vec::new(), Some(own(true)))));
        for (name, placed, lines, policy) in runs {
            let options = SimulateOptions {
                policy,
                lines,
                ..SimulateOptions::new(models.iter().map(|m| m.steps).collect(), costs.clone())
            };
            let simulation = simulate(&placed, options).expect("a simulation");
            let gap = simulation.bounds.gap(simulation.makespan_secs);
            assert!(gap > -1e-9, "devices {devices:?}, {name}: {gap} of {:?}", simulation.bounds);
            greatest.insert(format!("{:?}", simulation.bounds.greatest));
        }
    }
    assert!(greatest.len() > 1, "{greatest:?}");
}

/// Simulates so many steps of one model that stays on one device.
fn simulate_at_home(entries: &[Entry; 1], cost: CostModel, steps: u64) -> Simulation {
    let devices = [FleetDevice { budget: None, cost: cost.clone() }];
    let staying = plan_at_home(&fleet_models(entries, Recompute::Auto, 2), &devices).expect("a plan");
    let options = SimulateOptions::new(vec![steps], vec![cost]);
    simulate(&staying.expect("no budget").0, options).expect("a simulation")
}

#[test]
fn what_handing_tasks_over_takes_counts_in_the_bound() {
    let options = TrainOptions { batch: 8, microbatch: 1, ..TrainOptions::new(20) };
    let entries = [Entry { name: "many", small: Small::gpt(16, 1, 1, 7, 0.0), options }];
    let cost = CostModel { hand_over_secs: 1e-2, ..stated() };
    let simulation = simulate_at_home(&entries, cost, 20);
    let (bound, makespan) = (simulation.bounds.secs, simulation.makespan_secs);
    // The others are its updates'.
    assert!((0.4 * makespan..=makespan).contains(&bound), "{bound} of {makespan} seconds");
}

#[test]
fn slots_recomputation_and_homes_do_not_show() {
    let entries = six();
    let want = alone(&entries);
    let budget = smallest(&entries) * 3 / 2;
    for (slots, recompute) in [(1, Recompute::Auto), (3, Recompute::Auto), (2, Recompute::Always)] {
        let placed = plan(&entries, 2, Some(budget * slots as u64), recompute, slots);
        let got = run(&entries, &placed, 2, "locality-lrtf", slots, None);
        check(&format!("{slots} slots, {recompute:?}"), &entries, &got, &want);
    }
    let devices = vec![FleetDevice { budget: None, cost: stated() }; 2];
    let (placed, _) =
        plan_at_home(&fleet_models(&entries, Recompute::Auto, 2), &devices).expect("a plan").expect("room");
    check("at home", &entries, &run(&entries, &placed, 2, "sharded-lrtf", 2, None), &want);
    // Some that stay beside some that move.
    let mixed: Vec<Placed> = plan(&entries, 2, Some(budget), Recompute::Auto, 2)
        .into_iter()
        .zip(placed)
        .enumerate()
        .map(|(i, (moves, stays))| if i % 2 == 0 { moves } else { stays })
        .collect();
    check("mixed", &entries, &run(&entries, &mixed, 2, "round-robin", 2, None), &want);
}

/// Follows wherever it may, the longest model first; where it may not, it takes the first candidate.
struct Eager;

impl Policy for Eager {
    fn name(&self) -> &str {
        "eager"
    }

    fn pipelines(&self) -> bool {
        true
    }

    fn choose(&self, view: &View) -> Option<u16> {
        let longest = view.followers().max_by(|a, b| a.remaining_secs.total_cmp(&b.remaining_secs));
        longest.or_else(|| view.candidates().next()).map(|model| model.id)
    }
}

#[test]
fn units_that_follow_each_other_on_several_devices_give_the_bits_of_lone_runs() {
    let entries = six();
    let want = alone(&entries);
    let [fast, slow] = hosts();
    let least = smallest(&entries);
    let (tight, roomy) = (Some(least * 5 / 4), Some(least * 8 / 5));
    for (devices, slots, budget, cost) in
        [(2, 2, tight, &fast), (2, 2, roomy, &slow), (3, 2, None, &fast), (3, 1, None, &fast)]
    {
        let models = fleet_models(&entries, Recompute::Auto, slots);
        let spec = vec![FleetDevice { budget, cost: cost.clone() }; devices];
        let placed = plan_anywhere(&models, &spec).expect("a plan").placed;
        let updates = updates_on_devices(&entries, &placed);
        assert!(*cost == fast || updates == [true; 2], "{updates:?}");
        let tuning = LocalityTuning {
            tolerance: 0.6,
            critical_tolerance: 0.05,
            critical_turns: 0.0,
            copy_price: 4.0,
            least_copies: 1.0,
            depth: 1000.0,
            leaves: false,
            urgency: vec![vec![0.25, 4.0, 1.0]; 2],
        };
        let policies: [Box<dyn Policy>; 4] = [
            Box::new(Eager),
            Box::new(LocalityLrtf { pipelines: true, ..LocalityLrtf::default() }),
            Box::new(LocalityLrtf { pipelines: true, tuning: tuning.clone() }),
            Box::new(LocalityLrtf { pipelines: false, tuning }),
        ];
        for policy in policies {
            let what = format!("{devices} devices, {slots} slots, {}", policy.name());
            check(&what, &entries, &run_policy(&entries, &placed, devices, policy, slots, None), &want);
        }
        let mut got = run_policy(&entries, &placed, devices, Box::new(Eager), slots, Some(0));
        assert_eq!(got[0].as_ref().err().map(String::as_str), Some("had enough"));
        got[0] = Ok(want[0].clone());
        check("one fails in a pipeline", &entries, &got, &want);
    }
}

/// Gives a device to no other model as long as one has units.
struct Hog(u16);

impl Policy for Hog {
    fn name(&self) -> &str {
        "hog"
    }

    fn choose(&self, view: &View) -> Option<u16> {
        let hogs = view.models.iter().any(|m| m.id == self.0 && m.claim != Claim::Away);
        view.candidates().map(|m| m.id).find(|&id| !hogs || id == self.0)
    }
}

/// When it ends, no unit of another model is on its way whose end would have a device asked for its next.
#[test]
fn one_that_fails_with_all_places_taken_hands_them_on() {
    let entries = six();
    let want = alone(&entries);
    let placed = plan(&entries, 1, Some(smallest(&entries) * 5 / 4), Recompute::Auto, 2);
    for fails in 0..entries.len() {
        let mut got = run_policy(&entries, &placed, 1, Box::new(Hog(fails as u16)), 2, Some(fails));
        assert_eq!(got[fails].as_ref().err().map(String::as_str), Some("had enough"));
        got[fails] = Ok(want[fails].clone());
        check(&format!("{} hogs", entries[fails].name), &entries, &got, &want);
    }
}

#[test]
fn one_that_fails_leaves_the_others_bits_alone() {
    let entries = six();
    let want = alone(&entries);
    let placed = plan(&entries, 2, Some(smallest(&entries) * 5 / 4), Recompute::Auto, 2);
    for fails in [0, 2] {
        let mut got = run(&entries, &placed, 2, "sharded-lrtf", 2, Some(fails));
        assert_eq!(got[fails].as_ref().err().map(String::as_str), Some("had enough"));
        got[fails] = Ok(want[fails].clone());
        check(&format!("{} fails", entries[fails].name), &entries, &got, &want);
    }
}

/// A source and what it reads, which others may read too.
struct Reading {
    source: Box<dyn Source>,
    _reads: Arc<()>,
}

impl Source for Reading {
    fn spec(&self) -> &InputSpec {
        self.source.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> hydra::base::Result<()> {
        self.source.fill(index, batch)
    }

    fn batches_per_epoch(&self) -> u64 {
        self.source.batches_per_epoch()
    }
}

/// The same model, training and held-out data of which are read from `reads`.
fn reading<'a>(fleet_model: ModelToTrain<'a>, reads: &Arc<()>) -> ModelToTrain<'a> {
    let wrap = |source| Box::new(Reading { source, _reads: Arc::clone(reads) }) as Box<dyn Source>;
    ModelToTrain { source: wrap(fleet_model.source), valid: fleet_model.valid.map(wrap), ..fleet_model }
}

/// Adds the last of the six once the first has done a step, then one whose weights are another model's, and cancels
/// another a step later.
struct Changes<'a> {
    foreign: &'a Pretrained,
    entries: &'a [Entry],
    placed: &'a [Placed],
    collects: Vec<Collect>,
    added: bool,
    cancels: usize,
    /// What each of the first models reads.
    reads: &'a [Arc<()>],
}

impl FleetObserver for Changes<'_> {
    fn of_model(&mut self, model: usize) -> &mut dyn Observer {
        &mut self.collects[model]
    }

    fn between(&mut self, fleet: &mut Fleet) -> hydra::base::Result<()> {
        for (model, reads) in self.reads.iter().enumerate().filter(|(model, _)| fleet.failure(*model).is_some()) {
            assert_eq!(Arc::strong_count(reads), 1, "model {model} has ended, and reads on");
        }
        let last = self.entries.len() - 1;
        if !self.added && fleet.steps_done(0) >= 1 {
            self.added = true;
            let home = Home::On(vec![0; self.placed[0].plan.shards.len()]);
            let at_home = ModelToTrain {
                placed: Placed { home, ..self.placed[0].clone() },
                ..fleet_model(&self.entries[0], &self.placed[0])
            };
            let refused = fleet.wait_add(at_home).expect_err("it would move what the others keep on the device");
            assert!(refused.to_string().contains("at home on devices"), "{refused}");
            let number = fleet.wait_add(fleet_model(&self.entries[last], &self.placed[last]))?;
            assert_eq!(number, last);
            let misfit = fleet_model(&self.entries[0], &self.placed[0]);
            let number = fleet.wait_add(ModelToTrain { weights: Weights::Pretrained(self.foreign), ..misfit })?;
            assert_eq!(number, self.entries.len());
            self.collects.push(Collect::default());
        }
        if fleet.steps_done(self.cancels) >= 2 {
            fleet.cancel(self.cancels, Error::bad("not wanted any more"))?;
        }
        Ok(())
    }
}

#[test]
fn models_that_come_go_and_fail_leave_the_others_bits_alone() {
    let entries = six();
    let want = alone(&entries);
    let (cancels, fails, last) = (1, 2, 5);
    let foreign = hydra::nn::open(&common::fixture("gpt2").join("model")).expect("a model");
    let [fast, slow] = hosts();
    let ways = [("sharded-lrtf", false, &fast), ("random", false, &slow), ("sharded-lrtf", true, &slow)];
    for (policy, disk_tier, cost) in ways {
        let placed = plan_by(cost, &entries, 2, Some(smallest(&entries) * 8 / 5), Recompute::Auto, 2);
        let updates = updates_on_devices(&entries, &placed);
        assert!(*cost == fast || updates == [true; 2], "{updates:?}");
        let placed = if disk_tier { on_disk(&placed, 2) } else { placed };
        let map = FleetMap::new(&[&placed[..], &placed[..1]].concat(), 2);
        let there = FleetMap::new(&placed[..last], 2);
        let memory = FleetMemory {
            arena_bytes: map.arena_bytes.clone(),
            host_bytes: there.host_bytes,
            poison: true,
            disk: disk(there.disk_bytes),
            ..FleetMemory::default()
        };
        let specs = vec![HostSpec { threads: Some(1), ..HostSpec::default() }.into(); 2];
        let device = start_fleet(&specs, memory).expect("memory and threads");
        let reads: Vec<Arc<()>> = (0..last).map(|_| Arc::default()).collect();
        let models =
            entries.iter().zip(&placed).zip(&reads).map(|((e, p), reads)| reading(fleet_model(e, p), reads)).collect();
        let turns = TurnOptions {
            policy: by_name(policy, 4).expect("a built-in policy"),
            units: 2,
            costs: vec![stated(); 2],
            shared_bytes_per_sec: None,
            arena_bytes: map.arena_bytes.clone(),
            room_bytes: map.arena_bytes.clone(),
        };
        let mut fleet = Fleet::new(models, device, Some(turns)).expect("a fleet");
        let mut changes = Changes {
            foreign: &foreign,
            entries: &entries,
            placed: &placed,
            collects: entries.iter().map(|_| Collect::default()).collect(),
            added: false,
            cancels,
            reads: &reads,
        };
        changes.collects[fails].fails_after = Some(3);
        fleet.run(&mut changes, &AtomicBool::new(false)).expect("no device fails");
        assert!(changes.added && fleet.is_over());
        assert!(reads.iter().all(|reads| Arc::strong_count(reads) == 1), "what has ended reads nothing");
        let misfit = fleet.take_failure(entries.len()).map(|e| e.to_string());
        assert!(misfit.as_ref().is_some_and(|e| e.contains("tensor")), "{misfit:?}");
        assert!(changes.collects.pop().is_some_and(|c| c.outcome.losses.is_empty()), "nothing of it ran");
        for (i, collect) in changes.collects.into_iter().enumerate() {
            let failure = fleet.take_failure(i).map(|e| e.to_string());
            let expected = if i == cancels {
                Some("not wanted any more")
            } else if i == fails {
                Some("had enough")
            } else {
                None
            };
            assert_eq!(failure.as_deref(), expected, "{policy}, {}", entries[i].name);
            if failure.is_none() {
                let mut outcome = collect.outcome;
                gather_of(fleet.engine(), i, &mut outcome);
                assert_eq!(difference(&outcome, &want[i]), None, "{policy}, {}", entries[i].name);
            }
        }
    }
}

#[test]
fn baselines_give_the_bits_of_lone_runs() {
    let entries = six();
    let want = alone(&entries);
    let models = fleet_models(&entries, Recompute::Auto, 2);
    for (name, baseline) in Baseline::NAMES {
        for devices in [1, 2, 3] {
            // All the memory that they want; then so little that stages recompute, and spill.
            for share in [None, Some(0.7), Some(0.3)] {
                if share.is_some() && (baseline == Baseline::TaskParallel || baseline == Baseline::OneAtATime) {
                    continue;
                }
                let devices_of = |budget| vec![FleetDevice { budget, cost: stated() }; devices];
                let mut lined = place_baseline(baseline, &models, &devices_of(None), plan_alone).expect("no budget");
                if let Some(share) = share {
                    let needs = FleetMap::new(&lined.placed, devices).arena_bytes.into_iter().max().expect("a device");
                    let budget = (needs as f64 * share) as u64;
                    match place_baseline(baseline, &models, &devices_of(Some(budget)), plan_alone) {
                        Ok(tight) => lined = tight,
                        // One device holds what two would: the smallest plan may be larger than the share.
                        Err(error) => assert!(matches!(error, Error::OutOfBudget { .. }), "{error}"),
                    }
                }
                let what = format!("{name} on {devices} devices, {share:?} of the memory");
                let got = run_with(&entries, &lined.placed, devices, None, lined.lines.clone(), None);
                check(&what, &entries, &got, &want);
                if devices == 2 {
                    let placed = on_disk(&lined.placed, devices);
                    let got = run_with(&entries, &placed, devices, None, lined.lines, None);
                    check(&format!("{what}, state on disk"), &entries, &got, &want);
                }
            }
        }
    }
}

/// With a byte less than what a refusal names there is another, which names the same; with that every arena keeps to
/// it.
#[test]
fn baselines_keep_to_the_budget_that_a_refusal_names() {
    let entry = |name, small, steps, batch| Entry {
        name,
        small,
        options: TrainOptions { batch, microbatch: batch, ..TrainOptions::new(steps) },
    };
    // One of much state and one of much workspace beside one that takes a device of its own: an arena with the most of
    // each would be too large.
    let unlike = vec![
        entry("state", Small::gpt(48, 2, 2, 5, 0.0), 2, 1),
        entry("workspace", Small::gpt(16, 2, 1, 40, 0.0), 2, 24),
        entry("long", Small::gpt(16, 1, 1, 7, 0.0), 5000, 1),
    ];
    for (entries, (name, baseline)) in [six(), unlike].iter().flat_map(|e| Baseline::NAMES.map(|named| (e, named))) {
        for (devices, recompute, slots) in
            [(1, Recompute::Auto, 2), (2, Recompute::Auto, 1), (2, Recompute::Never, 2), (3, Recompute::Always, 2)]
        {
            let models = fleet_models(entries, recompute, slots);
            let place = |budget| {
                let devices = vec![FleetDevice { budget: Some(budget), cost: stated() }; devices];
                place_baseline(baseline, &models, &devices, plan_alone)
            };
            let refused = |budget| match place(budget) {
                Err(Error::OutOfBudget { message, smallest_device_bytes }) => {
                    assert!(message.contains(&format!("memory = {smallest_device_bytes}")), "{message}");
                    smallest_device_bytes
                }
                other => panic!("{name}: not refused with {budget} bytes: {other:?}"),
            };
            let needs = refused(1000);
            assert_eq!(refused(needs - 1), needs, "{name} on {devices} devices");
            let lined = place(needs).expect("what the refusal named");
            let arenas = FleetMap::new(&lined.placed, devices).arena_bytes;
            assert!(arenas.iter().all(|&bytes| bytes <= needs), "{name} on {devices} devices: {arenas:?} of {needs}");
            assert_eq!(lined.smallest_device_bytes, needs, "{name} on {devices} devices");
        }
    }
}

/// Notes what remains of each model whenever it is asked.
struct Spy(Arc<Mutex<Vec<Vec<f64>>>>);

impl Policy for Spy {
    fn name(&self) -> &str {
        "spy"
    }

    fn choose(&self, view: &View) -> Option<u16> {
        let remaining = view.models.iter().map(|m| m.remaining_secs).collect();
        self.0.lock().expect("nothing panics").push(remaining);
        LocalityLrtf::default().choose(view)
    }
}

/// Wants no more after so many steps.
struct Sated {
    after: u64,
    done: u64,
}

impl Observer for Sated {
    fn step(&mut self, report: &StepReport) -> hydra::base::Result<()> {
        self.done = report.result.step + 1;
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> hydra::base::Result<()> {
        Ok(())
    }

    fn wants_end(&mut self) -> bool {
        self.done >= self.after
    }
}

#[test]
fn policies_count_no_steps_that_were_done_before_or_that_nobody_wants() {
    let options = TrainOptions { valid_every: 100, ..TrainOptions::new(12) };
    let entries =
        ["sated", "resumed"].map(|name| Entry { name, small: Small::gpt(16, 2, 2, 8, 0.0), options: options.clone() });
    let devices = [FleetDevice { budget: None, cost: stated() }];
    let placed = plan_anywhere(&fleet_models(&entries, Recompute::Auto, 2), &devices).expect("no budget").placed;
    let map = FleetMap::new(&placed, 1);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let turns = TurnOptions {
        policy: Box::new(Spy(Arc::clone(&seen))),
        units: 2,
        costs: vec![stated()],
        shared_bytes_per_sec: None,
        arena_bytes: map.arena_bytes.clone(),
        room_bytes: Vec::new(),
    };
    let memory = FleetMemory { arena_bytes: map.arena_bytes, host_bytes: map.host_bytes, ..FleetMemory::default() };
    let device = start_fleet(&[DeviceSpec::default()], memory).expect("memory and threads");
    let models = entries.iter().zip(&placed).map(|(e, placed)| fleet_model(e, placed)).collect();
    let mut fleet = Fleet::new(models, device, Some(turns)).expect("a fleet");
    fleet.start_at(1, 6).expect("not begun");
    let (mut sated, mut other) = (Sated { after: 2, done: 0 }, Collect::default());
    let mut observers: Vec<&mut dyn Observer> = vec![&mut sated, &mut other];
    fleet.run(&mut observers, &AtomicBool::new(false)).expect("nothing fails");
    // One more step was begun before the last that it wanted had ended.
    assert_eq!((sated.done, fleet.steps_done(1)), (3, 12));
    let seen = seen.lock().expect("nothing panics");
    let (first, last) = (&seen[0], &seen[seen.len() - 1]);
    assert!((first[0] / first[1] - 2.0).abs() < 1e-6, "12 steps and 6: {first:?}");
    assert!(last[0] == 0.0 && last[1] > 0.0, "{last:?}");
}

#[test]
fn more_models_than_have_numbers_are_refused() {
    let entries = &six()[..1];
    let one = plan(entries, 1, None, Recompute::Auto, 2).remove(0);
    let count = MOST_MODELS + 1;
    let options = SimulateOptions::new(vec![1; count], vec![stated()]);
    let error = simulate(&vec![one; count], options).err().expect("refused").to_string();
    assert!(error.contains("65537 models; at most 65536 can run together"), "{error}");
}

/// Chooses what it may not, or nothing.
struct Wayward(Option<u16>);

impl Policy for Wayward {
    fn name(&self) -> &str {
        "wayward"
    }

    fn choose(&self, view: &View) -> Option<u16> {
        // At first what anybody would; a device that is asked while all is free would have nothing to go wrong with.
        if view.choices == 0 { view.candidates().next().map(|m| m.id) } else { self.0 }
    }
}

#[test]
fn a_policy_that_chooses_what_it_may_not_is_named() {
    let entries = six();
    let placed = plan(&entries, 2, Some(smallest(&entries) * 5 / 4), Recompute::Auto, 2);
    for (chooses, says) in [
        (Some(0), "policy wayward: chose model 0 for device 1, which is busy on another device"),
        (Some(77), "policy wayward: chose model 77 for device 1, of models 0 to 5"),
        (None, "policy wayward: chose nothing, though nothing runs and models ["),
    ] {
        let options = SimulateOptions {
            policy: Some(Box::new(Wayward(chooses))),
            ..SimulateOptions::new(vec![2; entries.len()], vec![stated(); 2])
        };
        let error = simulate(&placed, options).err().expect("refused").to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// Where nothing runs nothing can change: it is told at once, whatever a device's patience.
#[test]
fn a_policy_that_chooses_nothing_is_not_waited_for() {
    let entries = six();
    let placed = plan(&entries, 2, Some(smallest(&entries) * 5 / 4), Recompute::Auto, 2);
    let map = FleetMap::new(&placed, 2);
    let arena_bytes = map.arena_bytes.clone();
    let memory = FleetMemory { arena_bytes, host_bytes: map.host_bytes, ..FleetMemory::default() };
    let specs = vec![HostSpec { threads: Some(1), ..HostSpec::default() }.into(); 2];
    let device = start_fleet(&specs, memory).expect("memory and threads");
    let turns = TurnOptions {
        policy: Box::new(Wayward(None)),
        units: 2,
        costs: vec![stated(); 2],
        shared_bytes_per_sec: None,
        arena_bytes: map.arena_bytes,
        room_bytes: Vec::new(),
    };
    let models: Vec<ModelToTrain> = entries.iter().zip(&placed).map(|(e, placed)| fleet_model(e, placed)).collect();
    let patience_secs = models[0].options.patience_secs;
    let mut fleet = Fleet::new(models, device, Some(turns)).expect("a fleet");
    let mut collects: Vec<Collect> = entries.iter().map(|_| Collect::default()).collect();
    let mut observers: Vec<&mut dyn Observer> = collects.iter_mut().map(|c| c as &mut dyn Observer).collect();
    let began = Instant::now();
    let error = fleet.run(&mut observers, &AtomicBool::new(false)).expect_err("nothing runs").to_string();
    let says = "policy wayward: chose nothing, though nothing runs and models [0, 1, 2, 3, 4, 5] have units to give";
    assert_eq!(error, says);
    assert!(began.elapsed().as_secs_f64() < 0.5 * patience_secs);
}

/// Turns, arenas and lines of other devices or models than there are.
#[test]
fn what_does_not_fit_the_devices_or_the_models_is_refused() {
    let entries = &six()[..2];
    let placed = plan(entries, 2, None, Recompute::Auto, 2);
    let map = FleetMap::new(&placed, 2);
    let arenas = map.arena_bytes.clone();
    let turns = |costs, arena_bytes: &[u64], room_bytes: &[u64]| TurnOptions {
        policy: by_name("fifo", 0).expect("a built-in policy"),
        units: 2,
        costs,
        shared_bytes_per_sec: None,
        arena_bytes: arena_bytes.to_vec(),
        room_bytes: room_bytes.to_vec(),
    };
    let costs = || vec![stated(); 2];
    for (turns, says) in [
        (Some(turns(Vec::new(), &arenas, &[])), "turns: costs are those of no device"),
        (Some(turns(costs(), &arenas[..1], &[])), "turns: arena_bytes are of 1 devices, there are 2"),
        (Some(turns(costs(), &arenas, &arenas[..1])), "turns: room_bytes are of 1 devices, there are 2"),
        (None, "model 0: runs anywhere, and nobody chooses a device"),
    ] {
        let memory = FleetMemory { arena_bytes: arenas.clone(), host_bytes: map.host_bytes, ..FleetMemory::default() };
        let device = start_fleet(&[DeviceSpec::default(), DeviceSpec::default()], memory).expect("memory and threads");
        let models = entries.iter().zip(&placed).map(|(e, placed)| fleet_model(e, placed)).collect();
        assert_eq!(Fleet::new(models, device, turns).expect_err("refused").to_string(), says);
    }

    let home = Home::On(vec![2; placed[0].plan.shards.len()]);
    let away = vec![Placed { home, ..placed[0].clone() }, placed[1].clone()];
    let of = |placed: &[Placed], lines: &[&[usize]], arena_bytes: &[u64]| {
        let options = SimulateOptions {
            arena_bytes: arena_bytes.to_vec(),
            policy: by_name("fifo", 0),
            lines: lines.iter().map(|line| line.to_vec()).collect(),
            ..SimulateOptions::new(vec![2; 2], costs())
        };
        simulate(placed, options).err().map(|error| error.to_string())
    };
    assert_eq!(of(&placed, &[&[1], &[0]], &arenas), None);
    for lines in [&[&[5][..], &[0, 1]][..], &[&[]], &[&[0, 1], &[0]], &[&[1]]] {
        let says = format!("lines {lines:?} do not have each of 2 models once");
        assert_eq!(of(&placed, lines, &arenas), Some(says));
    }
    assert_eq!(of(&placed, &[], &[1, 2, 3]).as_deref(), Some("arena_bytes are of 3 devices, there are 2"));
    assert_eq!(of(&away, &[], &arenas).as_deref(), Some("model 0: is at home on device 2, of 2 devices"));
}
