//! Policies by what each promises on views made by hand, and against each other in a toy executor.

mod toy;

use super::*;
use crate::base::philox::Sequence;
use toy::{Toy, Unit};

/// Idle models of these remaining seconds, whose next unit takes 1 second and fetches nothing.
fn models(remaining_secs: &[f64]) -> Vec<ModelView> {
    let model = |(id, &remaining_secs)| ModelView {
        claim: Claim::Idle,
        remaining_secs,
        unit_secs: 1.0,
        ..ModelView::away(id as ModelId)
    };
    remaining_secs.iter().enumerate().map(model).collect()
}

/// Idle devices of these speeds, with links of 16 bytes per second.
fn devices(speeds: &[f64]) -> Vec<DeviceView> {
    let device = |(id, &speed)| DeviceView {
        id: id as DeviceId,
        speed,
        held: vec![],
        claimed: 0,
        busy_secs: 0.0,
        h2d_bytes_per_sec: 16.0,
        h2d_secs: 0.0,
        gradients_secs: 0.0,
    };
    speeds.iter().enumerate().map(device).collect()
}

fn view<'a>(models: &'a [ModelView], devices: &'a [DeviceView]) -> View<'a> {
    View { device: 0, choices: 0, last: None, models, devices, shared_bytes_per_sec: None }
}

/// Asserts what each of some policies chooses.
fn check(view: &View, want: &[(&str, Option<ModelId>)]) {
    for &(name, want) in want {
        assert_eq!(by_name(name, 1).unwrap().choose(view), want, "{name}");
    }
}

#[test]
fn policies_have_their_names() {
    for (name, _) in POLICIES {
        assert_eq!(by_name(name, 7).unwrap().name(), name);
    }
    assert!(by_name("LRTF", 7).is_none());
}

#[test]
fn remaining_time_and_order_decide() {
    let two = devices(&[1.0, 1.0]);
    let mut some = models(&[3.0, 5.0, 2.0, 5.0, 9.0, 1.0]);
    (some[4].claim, some[5].claim) = (Claim::By(1), Claim::Away);
    let at = view(&some, &two);
    check(&at, &[("sharded-lrtf", Some(1)), ("locality-lrtf", Some(1)), ("srtf", Some(2)), ("fifo", Some(0))]);
    // Of equals, the one that is here already.
    (some[3].last_device, some[1].last_device) = (Some(0), Some(1));
    check(&view(&some, &two), &[("sharded-lrtf", Some(3)), ("locality-lrtf", Some(3))]);
    // A model in this device's own queue is a candidate, and one that lives elsewhere is none.
    (some[4].claim, some[0].pinned) = (Claim::By(0), Some(1));
    check(&view(&some, &two), &[("sharded-lrtf", Some(4)), ("locality-lrtf", Some(4)), ("fifo", Some(1))]);
    let mut equal = models(&[2.0; 4]);
    equal[2].last_device = Some(0);
    check(&view(&equal, &two), &[("srtf", Some(2)), ("sharded-lrtf", Some(2))]);
    let none = models(&[]);
    check(&view(&none, &two), &POLICIES.map(|(name, _)| (name, None)));
}

#[test]
fn round_robin_cycles() {
    let one = devices(&[1.0]);
    let mut five = models(&[1.0; 5]);
    five[2].claim = Claim::Away;
    let mut last = None;
    let mut chosen = vec![];
    for _ in 0..9 {
        last = RoundRobin.choose(&View { last, ..view(&five, &one) });
        chosen.push(last.unwrap());
    }
    assert_eq!(chosen, [0, 1, 3, 4, 0, 1, 3, 4, 0]);
}

#[test]
fn random_repeats_and_spreads() {
    let one = devices(&[1.0]);
    let mut eight = models(&[1.0; 8]);
    eight[3].claim = Claim::Away;
    let at = |choices| View { choices, ..view(&eight, &one) };
    let run = |seed| -> Vec<ModelId> { (0..7000).map(|i| Random { seed }.choose(&at(i)).unwrap()).collect() };
    let first = run(5);
    assert_eq!(first, run(5));
    assert_ne!(first, run(6));
    // 1,000 of each are expected, with a deviation of 29.
    let count = |id| first.iter().filter(|&&chosen| chosen == id).count();
    assert!((0..8).all(|id| if id == 3 { count(id) == 0 } else { (880..1120).contains(&count(id)) }), "{first:?}");
    // The high word of the counter counts too.
    let far: Vec<_> = (0..64).map(|i| Random { seed: 5 }.choose(&at(i + (1 << 32))).unwrap()).collect();
    assert_ne!(first[..64], far);
}

/// Three models of which none is critical, each with 16 bytes of weights to fetch for the next unit: one second.
fn free_choice() -> Vec<ModelView> {
    let mut three = models(&[20.0, 30.0, 25.0]);
    three.iter_mut().for_each(|model| (model.weight_bytes, model.remaining_bytes) = (16, 64));
    three
}

#[test]
fn locality_prefers_what_is_here() {
    let (mut three, mut one) = (free_choice(), devices(&[1.0]));
    check(&view(&three, &one), &[("locality-lrtf", Some(1))]);
    one[0].held = vec![(0, 9), (2, 0)];
    check(&view(&three, &one), &[("locality-lrtf", Some(2)), ("sharded-lrtf", Some(1))]);
    // While the queue runs longer than the copies take, nothing is gained by it.
    (one[0].claimed, one[0].busy_secs) = (1, 1.0);
    check(&view(&three, &one), &[("locality-lrtf", Some(1))]);
    // With copies before it, it is: 0.5 of 1.5 seconds are waited for.
    one[0].h2d_secs = 0.5;
    check(&view(&three, &one), &[("locality-lrtf", Some(2))]);
    // What needs no copy does not wait for those of others either: 4 seconds of 5 are waited for, and 5 of 9 with the
    // longest.
    (one[0].h2d_secs, three[1].unit_secs) = (5.0, 4.0);
    check(&view(&three, &one), &[("locality-lrtf", Some(2))]);
    three[1].unit_secs = 1.0;
    // A boundary tensor of 2 bytes is 1/8 of a second: within the tolerance. One of 8 bytes is not.
    one = devices(&[1.0]);
    three.iter_mut().for_each(|model| model.boundary_bytes = 2);
    three[0].here_bytes = 2;
    check(&view(&three, &one), &[("locality-lrtf", Some(1))]);
    three.iter_mut().for_each(|model| model.boundary_bytes = 8);
    three[0].here_bytes = 8;
    check(&view(&three, &one), &[("locality-lrtf", Some(0))]);
}

#[test]
fn locality_does_not_wait_for_what_is_not_at_home() {
    let (mut three, one) = (free_choice(), devices(&[1.0]));
    // All weights arrive after a second; those of the longest are updated half a second later.
    three[1].weights_ready_secs = 1.5;
    check(&view(&three, &one), &[("locality-lrtf", Some(2)), ("sharded-lrtf", Some(1))]);
    (three[2].boundary_bytes, three[2].boundary_ready_secs) = (1, 1.5);
    check(&view(&three, &one), &[("locality-lrtf", Some(0))]);
    // What the model has left on this device is here.
    three[2].here_bytes = 1;
    check(&view(&three, &one), &[("locality-lrtf", Some(2))]);
    // Waits that are to come make a chain longer: with 60 seconds of them the last one is critical.
    three[2].here_bytes = 0;
    three[2].remaining_wait_secs = 60.0;
    check(&view(&three, &one), &[("locality-lrtf", Some(2))]);
}

#[test]
fn locality_hurries_critical_models() {
    let (mut three, mut two) = (free_choice(), devices(&[1.0, 1.0]));
    two[0].held = vec![(0, 0)];
    // Half of 75 seconds are to come: 37.5, and 30 and a turn are less.
    check(&view(&three, &two), &[("locality-lrtf", Some(0))]);
    // Now 38 seconds are to come, and no model but the second takes 37.
    (three[1].remaining_secs, three[2].remaining_secs) = (37.0, 19.0);
    check(&view(&three, &two), &[("locality-lrtf", Some(1))]);
    // 608 bytes take as long as 38 seconds of arithmetic do.
    (three[1].remaining_secs, three[2].remaining_bytes) = (30.0, 608);
    check(&view(&three, &two), &[("locality-lrtf", Some(2)), ("sharded-lrtf", Some(1))]);
    // Half of them do over a shared link of half the rate.
    [0, 0, 304].into_iter().zip(&mut three).for_each(|(bytes, model)| model.remaining_bytes = bytes);
    check(&View { shared_bytes_per_sec: Some(8.0), ..view(&three, &two) }, &[("locality-lrtf", Some(2))]);
    // Of two chains of as many bytes, the one with more arithmetic.
    three.iter_mut().for_each(|model| model.remaining_bytes = 1600);
    two[0].held.clear();
    check(&view(&three, &two), &[("locality-lrtf", Some(1))]);
}

#[test]
fn locality_shares_the_host_link() {
    let (mut three, mut four) = (free_choice(), devices(&[1.0; 4]));
    three.iter_mut().for_each(|model| model.remaining_secs *= 10.0);
    four.iter_mut().for_each(|device| (device.claimed, device.busy_secs) = (1, 1.0));
    four[0].held = vec![(0, 0)];
    four[2].h2d_secs = 0.25;
    four[3].h2d_secs = 0.25;
    three[1].pinned = Some(1);
    // 16 bytes arrive in a second over links of their own, and as 1/3 of 48 bytes per second; but not as 1/3 of 24.
    let shared = |rate| View { shared_bytes_per_sec: rate, ..view(&three, &four) };
    check(&shared(None), &[("locality-lrtf", Some(2))]);
    check(&shared(Some(48.0)), &[("locality-lrtf", Some(2))]);
    check(&shared(Some(24.0)), &[("locality-lrtf", Some(0))]);
}

#[test]
fn a_slow_device_leaves_the_critical_model() {
    let (mut two, mut unequal) = (models(&[100.0, 3.0]), devices(&[0.25, 1.0]));
    (unequal[1].claimed, unequal[1].busy_secs) = (1, 1.0);
    // Here it would end after 4 seconds, there after 2.
    check(&view(&two, &unequal), &[("locality-lrtf", Some(1)), ("sharded-lrtf", Some(0))]);
    unequal[1].busy_secs = 3.5;
    check(&view(&two, &unequal), &[("locality-lrtf", Some(0))]);
    // With nothing else to do it waits, but only while something runs.
    (unequal[1].busy_secs, two[1].claim) = (1.0, Claim::Away);
    check(&view(&two, &unequal), &[("locality-lrtf", None)]);
    (unequal[1].claimed, unequal[1].busy_secs) = (0, 0.0);
    check(&view(&two, &unequal), &[("locality-lrtf", Some(0))]);
    // What lives here is not left; what this device's queue can hand on after 4 seconds is, since 5 are less than 8.
    (unequal[1].claimed, unequal[1].busy_secs, two[0].pinned) = (1, 1.0, Some(0));
    check(&view(&two, &unequal), &[("locality-lrtf", Some(0))]);
    (unequal[0].claimed, unequal[0].busy_secs, two[0].pinned, two[0].claim) = (1, 4.0, None, Claim::By(0));
    check(&view(&two, &unequal), &[("locality-lrtf", None)]);
    // Nor where the boundary tensor, which leaves when the queue has run, takes 4 seconds: 9 there, 8 here.
    (two[0].boundary_bytes, two[0].here_bytes, two[0].last_device) = (64, 64, Some(0));
    check(&view(&two, &unequal), &[("locality-lrtf", Some(0))]);
}

#[test]
fn a_critical_model_is_followed_on_another_device() {
    let pipelines = LocalityLrtf { pipelines: true, ..LocalityLrtf::default() };
    // The first model's unit runs on the other device, in four microbatches, and ends in 0.75 seconds.
    let (mut two, mut devices) = (models(&[100.0, 3.0]), devices(&[1.0, 1.0]));
    (two[0].claim, two[0].microbatches, two[0].last_device, two[0].boundary_bytes) = (Claim::By(1), 4, Some(1), 1);
    (devices[1].claimed, devices[1].busy_secs) = (1, 0.75);
    (two[0].remaining_chain_secs, two[0].first_ready_secs, two[0].boundary_ready_secs) = (40.0, 0.0, 0.75);
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(0));
    check(&view(&two, &devices), &POLICIES.map(|(name, _)| (name, Some(1))));
    // Half a second later its last microbatch would be waited for: 1 of 1.5 seconds is less than 7/8 of what the other
    // model offers.
    (two[0].boundary_ready_secs, devices[1].busy_secs) = (1.25, 1.25);
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(1));
    // Not where this device's queue runs until then; but again where the first microbatch comes later still.
    (devices[0].claimed, devices[0].busy_secs) = (1, 0.5);
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(0));
    two[0].first_ready_secs = 0.75;
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(1));
    two[0].first_ready_secs = 0.0;
    // A model that ends in time needs no second device; nor can one that goes on in one piece have it, or one that is
    // at home elsewhere.
    two[0].remaining_secs = 1.0;
    two[0].remaining_chain_secs = 0.4;
    two[1].remaining_secs = 9.0;
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(1));
    (two[0].remaining_secs, two[0].microbatches) = (100.0, 1);
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(1));
    (two[0].microbatches, two[0].pinned) = (4, Some(1));
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(1));
    // With nothing else to do it is better to wait a while, unless the other device ends the unit as soon.
    (two[0].pinned, two[1].claim, two[0].boundary_ready_secs, devices[1].busy_secs) = (None, Claim::Away, 9.0, 9.0);
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(0));
    devices[1].busy_secs = 8.0;
    assert_eq!(pipelines.choose(&view(&two, &devices)), None);
    // Its own successor a device leaves to one that is free before and ends it sooner.
    (two[0].claim, two[0].last_device, two[0].first_ready_secs) = (Claim::By(0), Some(0), 0.25);
    two[0].here_bytes = 1;
    (two[0].boundary_ready_secs, devices[0].busy_secs, devices[1].busy_secs) = (1.0, 1.0, 0.5);
    assert_eq!(pipelines.choose(&view(&two, &devices)), None);
    devices[1].busy_secs = 1.25;
    assert_eq!(pipelines.choose(&view(&two, &devices)), Some(0));
}

/// A model of `steps` steps over `shards` shards. The first `shards - 1` units run forward, the next ones backward, and
/// take three times as long.
fn model(steps: usize, shards: u16, forward_secs: f64, weight_bytes: u64) -> Vec<Unit> {
    let unit = |shard: u16, updates: bool| Unit {
        shard,
        secs: if updates { 3.0 * forward_secs } else { forward_secs },
        weight_bytes,
        boundary_bytes: if updates { weight_bytes / 5 } else { weight_bytes / 10 },
        updates,
    };
    let forward = (0..shards - 1).map(|shard| unit(shard, false));
    let step: Vec<Unit> = forward.chain((0..shards).rev().map(|shard| unit(shard, true))).collect();
    step.repeat(steps)
}

/// A random set of 1.5 to 3 models a device. A unit's copy takes about `copies` times as long as its arithmetic.
fn workload(seed: u64, copies: f64) -> Toy {
    let mut numbers = Sequence::new(seed, 0);
    let count = 2 + numbers.below(7);
    let models = count * 3 / 2 + numbers.below(count * 3 / 2 + 1);
    let mut random_model = || {
        let forward_secs = 0.5 + numbers.uniform();
        let weight_bytes = (1.8e6 * copies * (0.5 + numbers.uniform())) as u64;
        model(3 + numbers.below(6) as usize, 2 + numbers.below(4) as u16, forward_secs, weight_bytes)
    };
    let models = (0..models).map(|_| random_model()).collect();
    Toy { models, devices: vec![(1.0, 1e6); count as usize], shared_rate: None, slots: 2 }
}

/// Equal devices with free copies.
fn free_copies(models: Vec<Vec<Unit>>, devices: usize) -> Toy {
    Toy { models, devices: vec![(1.0, f64::INFINITY); devices], shared_rate: None, slots: 2 }
}

#[test]
fn hydras_picture_takes_six() {
    let unit = |shard, updates| Unit { shard, secs: 1.0, weight_bytes: 0, boundary_bytes: 0, updates };
    let one = vec![unit(0, false), unit(1, false), unit(1, true), unit(0, true)];
    let toy = free_copies(vec![one; 3], 2);
    for policy in [&ShardedLrtf as &dyn Policy, &LocalityLrtf::default()] {
        assert_eq!(toy.run(policy).makespan, 6.0, "{}", policy.name());
    }
}

#[test]
fn the_longest_first_and_the_shortest_first() {
    // One step over one shard is a unit of 3 seconds: a chain of 24 seconds and four of 6 on two devices.
    let toy = free_copies([8, 2, 2, 2, 2].map(|steps| model(steps, 1, 1.0, 0)).to_vec(), 2);
    assert_eq!(toy.run(&ShardedLrtf).makespan, 24.0);
    assert_eq!(toy.run(&Srtf).makespan, 36.0);
}

#[test]
fn equal_models_fill_devices_that_do_not_divide_them() {
    for (count, devices) in [(3, 2), (12, 8), (16, 8)] {
        let toy = free_copies(vec![model(10, 4, 1.0, 0); count], devices);
        assert_eq!(toy.run(&ShardedLrtf).makespan, (150 * count / devices) as f64);
        // Asked by number, a busy device takes what an idle one could run.
        let by_number = if count % devices == 0 { 150 * count / devices } else { 300 };
        assert_eq!(toy.run_asking(&ShardedLrtf, |_| 0.0).makespan, by_number as f64);
    }
}

#[test]
fn with_free_copies_locality_is_lrtf() {
    for seed in 0..300 {
        let toy = workload(seed, 0.0);
        assert_eq!(toy.run(&LocalityLrtf::default()), toy.run(&ShardedLrtf), "{seed}");
        let fast = Toy { devices: vec![(3.0, 1e6); toy.devices.len()], ..workload(seed, 0.0) };
        assert_eq!(fast.run(&LocalityLrtf::default()), fast.run(&ShardedLrtf), "{seed}");
    }
}

/// Asserts the median of locality's makespan over LRTF's in 200 random workloads, changed as `change` says, and the
/// greatest.
fn check_against_lrtf(what: &str, copies: f64, change: impl Fn(&mut Toy), median_below: f64, all_below: f64) {
    let ratio = |seed| {
        let mut toy = workload(seed, copies);
        change(&mut toy);
        toy.run(&LocalityLrtf::default()).makespan / toy.run(&ShardedLrtf).makespan
    };
    let mut ratios: Vec<f64> = (0..200).map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let (median, greatest) = (ratios[100], ratios[199]);
    assert!(median < median_below && greatest < all_below, "{what} {copies}: median {median}, greatest {greatest}");
}

#[test]
fn locality_beats_lrtf_where_copies_are_exposed() {
    let shared = |toy: &mut Toy| toy.shared_rate = Some(0.5e6 * toy.devices.len() as f64);
    for (copies, median, all, shared_median, shared_all) in [
        (0.25, 1.001, 1.03, 0.99, 1.03),
        (0.5, 1.0, 1.07, 0.94, 1.07),
        (1.0, 0.99, 1.07, 0.9, 1.09),
        (2.0, 0.99, 1.05, 0.89, 1.01),
        (4.0, 0.97, 1.04, 0.89, 0.98),
    ] {
        check_against_lrtf("own links", copies, |_| (), median, all);
        check_against_lrtf("shared link", copies, shared, shared_median, shared_all);
    }
}

#[test]
fn locality_beats_lrtf_on_unequal_devices() {
    let one_slow = |toy: &mut Toy| toy.devices[0].0 = 0.5;
    let half_slow = |toy: &mut Toy| toy.devices.iter_mut().step_by(2).for_each(|device| device.0 = 0.25);
    for (copies, one, all_of_one, half, all_of_half) in [(0.0, 0.995, 1.03, 0.75, 1.0), (1.0, 0.97, 1.06, 0.81, 1.0)] {
        check_against_lrtf("one slow", copies, one_slow, one, all_of_one);
        check_against_lrtf("half slow", copies, half_slow, half, all_of_half);
    }
}
