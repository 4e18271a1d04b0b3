//! What no schedule of given plans can beat: the work of each model, for the bounds of `sched`.

use super::tables::fetched_bytes;
use crate::device::sim::CostModel;
use crate::sched::{Bounds, DeviceRates, ModelWork, Part};
use crate::spill::{ArenaMap, BoundaryTier, FleetMap, Home, Placed, ShardPrograms, update_state_bytes};

/// What no schedule of these plans can beat: arithmetic as planned, and the bytes that must cross however shards are
/// spread. A step fetches every shard once, since an update by the host makes copies stale, and again for its backward
/// where all devices' slots together cannot have kept it. `pipelines`: a unit may begin before the one that it follows
/// has ended.
pub fn bounds_of(
    placed: &[Placed],
    map: &FleetMap,
    steps: &[u64],
    costs: &[CostModel],
    shared: Option<f64>,
    pipelines: bool,
) -> Bounds {
    let links = |cost: &CostModel| DeviceRates {
        h2d_bytes_per_sec: cost.h2d_bytes_per_sec,
        d2h_bytes_per_sec: cost.d2h_bytes_per_sec,
    };
    let devices: Vec<DeviceRates> = costs.iter().map(links).collect();
    let best = |of: fn(&CostModel) -> f64| costs.iter().map(of).fold(0.0, f64::max);
    let rates = Rates {
        h2d: best(|c| c.h2d_bytes_per_sec).min(shared.unwrap_or(f64::INFINITY)),
        d2h: best(|c| c.d2h_bytes_per_sec).min(shared.unwrap_or(f64::INFINITY)),
        host: costs[0].host_update_bytes_per_sec,
    };
    let work = |((p, &steps), maps): ((&Placed, &u64), &Vec<ArenaMap>)| {
        let slots = maps
            .iter()
            .map(|m| m.weight_slots.at.len() - m.resting)
            .sum::<usize>()
            .max(p.plan.choice.slots * costs.len());
        let (down, up) = least_bytes(p, slots, maps.iter().map(|m| m.activations.len()).sum());
        let [first_secs, turn_secs, last_secs] = wait_secs(p, &rates);
        let pipelined = p.plan.choice.pipelined || pipelines && p.home == Home::Anywhere;
        let ends = if steps > 0 { 1.0 } else { 0.0 };
        ModelWork {
            parts: parts(p, steps as f64, costs, pipelined),
            first_secs: ends * first_secs,
            turns_secs: steps.saturating_sub(1) as f64 * turn_secs,
            last_secs: ends * last_secs,
            h2d_bytes: steps * down,
            d2h_bytes: steps * up,
        }
    };
    Bounds::new(&placed.iter().zip(steps).zip(&map.maps).map(work).collect::<Vec<_>>(), &devices, shared)
}

/// The greatest rates of any link, and the host's, in bytes per second.
struct Rates {
    h2d: f64,
    d2h: f64,
    host: f64,
}

/// Least seconds before a model's first unit, between two steps, and after its last unit, in which it can run nowhere.
fn wait_secs(placed: &Placed, rates: &Rates) -> [f64; 3] {
    let plan = &placed.plan;
    let shard = &plan.shards[0];
    let program = shard.forward.as_ref().or(shard.backward.as_ref());
    let inputs = program.map_or(0, |p| p.inputs.iter().map(|used| used.bytes).sum());
    let (changing, frozen) = fetched_bytes(&placed.model, &shard.layout);
    let first = (changing + frozen + inputs) as f64 / rates.h2d;
    if plan.choice.rests(0) {
        return [first, 0.0, 0.0];
    }
    if plan.choice.updates_on_device(0) {
        // Where it was updated the next step can begin; what goes home, or with clipping the update too, may come later.
        return [first, 0.0, 0.0];
    }
    // In pieces that overlap: all of the gradient leaves, then at least a piece is updated and comes back.
    let piece = plan.pieces(0).into_iter().map(|r| r.end - r.start).min().unwrap_or(0);
    let update_bytes = placed.model.update_bytes(piece, plan.updates.moments);
    let home = shard.layout.gradient_bytes as f64 / rates.d2h + update_bytes as f64 / rates.host;
    [first, home + piece as f64 / rates.h2d, home]
}

/// The arithmetic of so many steps in the parts that run on one device each: programs, a microbatch at a time, and
/// updates on devices. `pipelined`: microbatches go on from unit to unit, so that not all of a step is one chain, but
/// one microbatch through all units and the others through the longest.
fn parts(placed: &Placed, steps: f64, costs: &[CostModel], pipelined: bool) -> Vec<Part> {
    let Placed { model, plan, home, .. } = placed;
    let by_device = |secs: &dyn Fn(&CostModel) -> f64| {
        let mut all: Vec<f64> = Vec::with_capacity(costs.len());
        for (d, cost) in costs.iter().enumerate() {
            let twin = costs[..d].iter().position(|other| other == cost);
            all.push(twin.map_or_else(|| secs(cost), |twin| all[twin]));
        }
        all
    };
    let microbatches = steps * model.microbatches as f64;
    let one_device = match home {
        Home::On(devices) => devices.iter().all(|d| *d == devices[0]),
        Home::Anywhere => costs.len() == 1,
    };
    let (mut runs, mut updates) = (Vec::new(), Vec::new());
    for (s, shard) in plan.shards.iter().enumerate() {
        let pinned = match home {
            Home::On(devices) => Some(devices[s]),
            Home::Anywhere => None,
        };
        for program in shard.forward.iter().chain(&shard.backward) {
            // It is handed to the device once for every microbatch.
            let secs = by_device(&|cost| cost.program_secs(program) + cost.hand_over_secs);
            let chain_times = if pipelined { steps } else { microbatches };
            runs.push(Part { secs, times: microbatches, chain_times, pinned });
        }
        if plan.choice.updates_on_device(s) && shard.own_bytes() > 0 {
            let secs = by_device(&|cost| model.device_settle_secs(shard.own_bytes(), plan.updates.moments, cost));
            // Beside others' backwards on other devices, but for the first shard's: the next step begins with that.
            let in_chain = !pipelined && (one_device || s == 0);
            updates.push(Part { secs, times: steps, chain_times: if in_chain { steps } else { 0.0 }, pinned });
        }
    }
    if let Some(longest) = runs.iter_mut().max_by(|a, b| a.least_secs(|_| 1.0).total_cmp(&b.least_secs(|_| 1.0))) {
        longest.chain_times = microbatches;
    }
    runs.append(&mut updates);
    runs
}

/// Least bytes of a step to devices that have so many weight slots in all, and from them.
fn least_bytes(placed: &Placed, slots: usize, entries: usize) -> (u64, u64) {
    let plan = &placed.plan;
    if plan.choice.resident {
        return (0, 0);
    }
    let visiting = &plan.shards[plan.choice.resting..];
    // What they borrow of shards at rest need not come from the host.
    let changing = |s: &ShardPrograms| match plan.choice.resting > 0 {
        true => s.own_bytes(),
        false => fetched_bytes(&placed.model, &s.layout).0,
    };
    let frozen = |s: &ShardPrograms| fetched_bytes(&placed.model, &s.layout).1;
    let bytes = |s: &ShardPrograms| changing(s) + frozen(s);
    // Kept at best: as many shards as there are slots, the largest.
    let beyond_slots = |mut sizes: Vec<u64>| -> u64 {
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().skip(slots).sum()
    };
    let again = beyond_slots(visiting.iter().filter(|s| !s.idles_back()).map(bytes).collect());
    // What a device has updated may stay for the next step too, and what nobody updates.
    let (here, by_host) = visiting.split_at(plan.choice.visiting_updates.min(visiting.len()));
    let stays = here.iter().map(bytes).chain(by_host.iter().map(frozen));
    let all = by_host.iter().map(changing).sum::<u64>() + beyond_slots(stays.collect());
    let weights = here.iter().map(|s| s.own_bytes()).sum::<u64>();
    let gradients = by_host.iter().map(|s| s.layout.gradient_bytes).sum::<u64>();
    let state_of = |s: usize| update_state_bytes(&placed.model, &plan.shards, plan.updates.moments, s);
    let state = (plan.choice.resting..).take(here.len()).map(state_of).sum::<u64>();
    // An activation goes home and comes back for the next shard's backward, but for those that entries can have kept
    // until then. A gradient may be read where it was made, and stays there.
    let read_back = plan.shards.windows(2).filter(|pair| !pair[1].idles_back()).map(|pair| pair[0].boundary_bytes);
    let mut boundaries: Vec<u64> =
        read_back.flat_map(|bytes| std::iter::repeat_n(bytes, placed.model.microbatches)).collect();
    boundaries.sort_unstable_by(|a, b| b.cmp(a));
    let crosses = match plan.choice.activations {
        BoundaryTier::Host { .. } => boundaries.iter().skip(entries).sum(),
        BoundaryTier::Device => 0,
    };
    (all + again + state + crosses, weights + gradients + state + crosses)
}
