//! More memory, fewer bytes: shards that weight slots keep are not fetched again, to the byte.

use super::models::Chain;
use hydra::base::LaneKind;
use hydra::device::sim::CostModel;
use hydra::engine::{SimulateOptions, Simulation, simulate};
use hydra::graph::{ALIGNMENT, Area};
use hydra::sched::by_name;
use hydra::spill::{
    ArenaMap, FleetDevice, FleetMap, FleetModel, Home, Placed, PlanOptions, ShardPrograms, Updates, plan_anywhere,
};
use std::sync::Arc;

const STEPS: u64 = 5;
const SHARDS: usize = 4;

/// Equal models of four shards that run anywhere, updated by the host, with `slots` weight slots.
fn placed(models: usize, devices: usize, slots: usize) -> Vec<Placed> {
    let model = Chain::equal(SHARDS, 257, 33).model();
    let options = PlanOptions {
        updates: Updates { moments: 0, clips: true },
        slots,
        cut: Some((0..SHARDS).map(|l| l..l + 1).collect()),
        ..PlanOptions::default()
    };
    let of =
        |i| FleetModel { name: format!("model {i}"), model: model.clone(), options: options.clone(), steps: STEPS };
    let devices = vec![FleetDevice { budget: None, cost: slow_link() }; devices];
    let mut placed = plan_anywhere(&(0..models).map(of).collect::<Vec<_>>(), &devices).expect("no budget").placed;
    // Planned as if gradients were clipped, which leaves updates to the host.
    placed.iter_mut().for_each(|p| Arc::make_mut(&mut p.plan).updates.clips = false);
    placed
}

/// A weight takes longer to arrive than to be used.
fn slow_link() -> CostModel {
    let mut cost = CostModel::stated(1e12, 1e12, 1e9);
    cost.host_update_bytes_per_sec = 1e12;
    cost
}

/// Bytes that one weight slot adds to an arena.
fn slot_bytes(placed: &[Placed]) -> u64 {
    placed[0].plan.shards.iter().map(ShardPrograms::slot_bytes).max().expect("shards").next_multiple_of(ALIGNMENT)
}

fn slots(map: &FleetMap) -> Vec<usize> {
    map.maps[0].iter().map(|m| m.weight_slots.at.len()).collect()
}

fn run(placed: &[Placed], arena_bytes: Vec<u64>) -> Simulation {
    let costs = vec![slow_link(); arena_bytes.len()];
    let options = SimulateOptions {
        arena_bytes,
        policy: by_name("sharded-lrtf", 1),
        ..SimulateOptions::new(vec![STEPS; placed.len()], costs)
    };
    simulate(placed, options).expect("nothing fails")
}

fn bytes(simulation: &Simulation, kind: LaneKind) -> u64 {
    simulation.sums.iter().filter(|s| s.lane.kind == kind).map(|s| s.bytes).sum()
}

#[test]
fn each_budget_holds_as_many_shards_as_it_has_bytes_for() {
    let placed = placed(3, 4, 2);
    let (least, slot) = (FleetMap::new(&placed, 1).arena_bytes[0], slot_bytes(&placed));
    let entry = placed[0].plan.shards[0].boundary_bytes.next_multiple_of(ALIGNMENT);
    let all = least + 10 * slot;
    let budgets = [0, least + slot - 1, least + slot, all - slot + 1, all, all + 2 * entry - 1, u64::MAX].map(Some);
    let budgets = [&budgets[..], &[None]].concat();
    let map = FleetMap::within(&placed, &budgets);
    // Ten weight slots more, and in what is too little for another one up to nine entries: the three boundaries of each
    // model.
    assert_eq!(slots(&map), [2, 2, 3, 11, 12, 12, 12, 12]);
    let between = ((slot - 1) / entry) as usize;
    assert!((1..9).contains(&between));
    let (asked, entries) = (FleetMap::new(&placed, 1).maps[0][0].activations.len(), |m: &ArenaMap| m.activations.len());
    assert_eq!(
        map.maps[0].iter().map(entries).collect::<Vec<_>>(),
        [0, between, 0, 0, 0, 1, 9, 9].map(|more| asked + more)
    );
    let bytes = [
        least,
        least + between as u64 * entry,
        least + slot,
        all - slot,
        all,
        all + entry,
        all + 9 * entry,
        all + 9 * entry,
    ];
    assert_eq!(map.arena_bytes, bytes);
    // The bytes that were used are the budget that gives the same map, and a model that comes later takes slots away.
    let arenas: Vec<Option<u64>> = map.arena_bytes.iter().map(|&bytes| Some(bytes)).collect();
    assert_eq!(FleetMap::within(&placed, &arenas), map);
    let fewer = FleetMap::within(&placed[..2], &arenas);
    assert_eq!(slots(&fewer), [2, 2, 3, 8, 8, 8, 8, 8]);
    assert!(map.arena_bytes.iter().zip(&fewer.arena_bytes).all(|(all, fewer)| fewer <= all));
}

#[test]
fn single_slots_and_models_at_home_leave_memory_alone() {
    let single = placed(3, 1, 1);
    assert_eq!(FleetMap::within(&single, &[None]), FleetMap::new(&single, 1));
    let at_home = |p: &Placed| Placed { home: Home::On(vec![0; SHARDS]), ..p.clone() };
    let at_home: Vec<Placed> = placed(3, 1, 2).iter().map(at_home).collect();
    assert_eq!(FleetMap::within(&at_home, &[None]), FleetMap::new(&at_home, 1));
}

#[test]
fn what_slots_keep_is_not_fetched_again() {
    let placed = placed(1, 1, 2);
    let (least, slot) = (FleetMap::new(&placed, 1).arena_bytes[0], slot_bytes(&placed));
    let shards = &placed[0].plan.shards;
    assert!(placed[0].plan.choice.visiting_updates == 0 && placed[0].model.microbatches == 1);
    // Boundary tensors stay in the rings' entries: a model that is alone fetches weights and its batch.
    let batch: u64 =
        shards.iter().flat_map(|s| s.forward.iter().chain(&s.backward)).map(|p| p.bytes(Area::Inputs)).sum();
    let weights: u64 = shards.iter().map(ShardPrograms::fetch_bytes).sum();
    let mut before = f64::INFINITY;
    for more in 0..=2 {
        let simulation = run(&placed, vec![least + more as u64 * slot]);
        // Around the turn the last shards are still in their slots.
        let again: u64 = shards[..SHARDS - 2 - more].iter().map(ShardPrograms::fetch_bytes).sum();
        assert_eq!(bytes(&simulation, LaneKind::HostToDevice), STEPS * (weights + again + batch), "{more} more slots");
        // Where gradients leave for longer than that, nothing of it shows.
        assert!(simulation.makespan_secs <= before, "{more} more slots: {} s", simulation.makespan_secs);
        assert!(simulation.bounds.gap(simulation.makespan_secs) >= 0.0);
        before = simulation.makespan_secs;
    }
}

#[test]
fn an_updated_shard_comes_back_while_gradients_leave() {
    let placed = placed(1, 1, 2);
    let least = run(&placed, FleetMap::new(&placed, 1).arena_bytes);
    let all = run(&placed, FleetMap::within(&placed, &[None]).arena_bytes);
    // With few slots a step's weights arrive, then its gradients leave, as many bytes and each longer than the
    // arithmetic. With all, the next step's weights arrive while this one's gradients leave, but for the first shard's,
    // a quarter. The first step's and the last's have nothing beside them.
    assert!(all.makespan_secs < 0.85 * least.makespan_secs, "{} of {} s", all.makespan_secs, least.makespan_secs);
}

#[test]
fn what_is_read_for_the_last_time_where_it_was_made_does_not_go_home() {
    let placed = placed(1, 1, 2);
    let simulation = run(&placed, FleetMap::new(&placed, 1).arena_bytes);
    let shards = &placed[0].plan.shards;
    // Boundary gradients are read by the next unit, and so is the last activation; the others are gone by the time that
    // their backward is claimed. A loss leaves too.
    let activations: u64 = shards[..SHARDS - 2].iter().map(|s| s.boundary_bytes).sum();
    let gradients: u64 = shards.iter().map(ShardPrograms::own_bytes).sum();
    assert_eq!(bytes(&simulation, LaneKind::DeviceToHost), STEPS * (activations + gradients + 4));
}
