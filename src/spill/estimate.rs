//! A quick estimate of a step, to choose between plans: units in their order, fetches ahead as far as slots allow.
//!
//! The executor on a simulated device gives the exact prediction of the plan that is chosen; this recurrence only
//! ranks.

use super::memory::{BoundaryTier, Choice};
use super::model::Model;
use super::shard::ShardPrograms;
use super::stand_in::Shards;
use crate::device::sim::CostModel;

/// Estimated seconds of a training step. `clips`: no update before the last gradient.
pub fn estimate_secs(model: &Model, shards: &Shards, choice: &Choice, clips: bool, cost: &CostModel) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let (n, m) = (shards.len(), model.microbatches as f64);
    let units: Vec<(usize, f64)> = (0..n.saturating_sub(1))
        .map(|s| (s, m * secs[s][0]))
        .chain((0..n).rev().map(|s| (s, m * secs[s][1])))
        .collect();
    // Of the wide elements; a bf16 weight and its remainder are as many bytes together.
    let parameter_bytes = (model.layout.parameter_bytes * model.layout.wide_ratio) as f64;
    if choice.resident {
        let update = parameter_bytes * 7.0 / cost.device_update_bytes_per_sec;
        return update + units.iter().map(|u| u.1).sum::<f64>() + boundary_secs(model, shards, choice, cost) * 0.1;
    }
    let resting = choice.resting;
    let fetch = |s: usize| cost.copy_secs + shards[s].fetch_bytes() as f64 / cost.h2d_bytes_per_sec;
    let leave = |s: usize| match choice.rests(s) {
        true => 0.0,
        false => cost.copy_secs + shards[s].layout.gradient_bytes as f64 / cost.d2h_bytes_per_sec,
    };
    // A ring with an entry for what comes in and one for what goes out has none for the next microbatch's: arithmetic
    // waits for the copies.
    let copy = |s: usize| cost.copy_secs + shards[s].boundary_bytes as f64 / cost.h2d_bytes_per_sec;
    let exposed = |u: usize, s: usize| {
        let tier = if u + 1 < n { choice.activations } else { choice.gradients };
        let both_ways = s > 0 && s + 1 < n && matches!(tier, BoundaryTier::Host { entries: ..=2 });
        if both_ways { m * copy(s - 1).max(copy(s)) } else { 0.0 }
    };
    // The host's updates and the device's, of shards that rest.
    let update = |s: usize, rate: f64| (shards[s].own_bytes() * model.layout.wide_ratio) as f64 * 7.0 / rate;
    let late: Vec<f64> = (resting..n).map(|s| update(s, cost.host_update_bytes_per_sec)).collect();
    let updates: f64 = late.iter().sum();
    let here: f64 = (0..resting).map(|s| update(s, cost.device_update_bytes_per_sec)).sum();
    let slots = choice.slots.min(n - resting);
    // With clipping a step is reckoned from when the norm is known: forward follows the updates, which go from shard to
    // shard.
    let (mut compute, mut h2d, mut d2h) = (if clips { here } else { 0.0 }, 0.0f64, 0.0f64);
    let mut updated = 0.0;
    // Ends of visits that took a slot.
    let mut ends: Vec<f64> = Vec::new();
    let mut left: Vec<f64> = Vec::new();
    for (u, &(s, secs)) in units.iter().enumerate() {
        // Around the turn the last shards are still in their slots.
        let backward = u + 1 >= n;
        let hit = choice.rests(s) || (backward && shards[s].idles_back()) || (u >= n && u - (n - 1) < slots);
        if !hit {
            let free = if ends.len() >= slots { ends[ends.len() - slots] } else { 0.0 };
            if clips && u < n {
                updated += late[s - resting];
            }
            // Pieces of the shard arrive while others are updated.
            h2d = (h2d.max(free) + fetch(s)).max(updated);
        }
        let ready = if hit { 0.0 } else { h2d };
        let room = if backward && !choice.rests(s) && left.len() >= choice.gradient_slots {
            left[left.len() - choice.gradient_slots]
        } else {
            0.0
        };
        compute = compute.max(ready).max(room) + secs + exposed(u, s);
        if !choice.rests(s) {
            ends.push(compute);
        }
        if backward && !choice.rests(s) {
            d2h = d2h.max(compute) + leave(s);
            left.push(d2h);
        }
    }
    // Without, each update has from when its own gradient is there until the shard's next forward.
    let before: f64 = units[..units.len() - n].iter().take(resting).map(|u| u.1).sum();
    let turn = match (clips, resting) {
        (true, _) => d2h.max(compute),
        (false, 0) => d2h + late[0],
        (false, _) => (d2h.max(compute + here) + late[0] - before - here).max(compute + here),
    };
    let links = boundary_secs(model, shards, choice, cost);
    // Cores that units, copies and the host's arithmetic share.
    let visits =
        units.iter().enumerate().filter(|&(u, &(s, _))| !(choice.rests(s) || u + 1 >= n && shards[s].idles_back()));
    let own: u64 = shards[resting..].iter().map(ShardPrograms::own_bytes).sum();
    let moved = visits.map(|(_, &(s, _))| shards[s].fetch_bytes()).sum::<u64>() + own;
    let arithmetic = units.iter().map(|u| u.1).sum::<f64>() + updates + here;
    let shared = cost.cores.map_or(0.0, |_| arithmetic + cost.copy_core_secs(moved, units.len() + n));
    // A part of the boundary copies shows.
    turn.max(updates).max(h2d + links).max(shared) + 0.25 * links
}

/// Seconds of h2d that boundary tensors in host memory cost.
fn boundary_secs(model: &Model, shards: &[ShardPrograms], choice: &Choice, cost: &CostModel) -> f64 {
    let bytes: u64 = shards.iter().map(|s| s.boundary_bytes).sum::<u64>() * model.microbatches as u64;
    let visits = |tier: BoundaryTier| match tier {
        BoundaryTier::Device => 0.0,
        BoundaryTier::Host { .. } => 1.0,
    };
    let crossings = 2.0 * visits(choice.activations) + visits(choice.gradients);
    crossings * bytes as f64 / cost.h2d_bytes_per_sec
}

/// Estimated seconds of device time of a step of a model whose shards run on any of so many `devices`, among others
/// that fill every gap: its busiest lane decides. A little of the other lanes is added, since not everything can be
/// hidden.
pub fn estimate_anywhere_secs(
    model: &Model,
    shards: &Shards,
    choice: &Choice,
    moments: usize,
    devices: usize,
    cost: &CostModel,
) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let (n, m) = (shards.len(), model.microbatches as f64);
    let mut compute: f64 = secs.iter().map(|[forward, backward]| m * (forward + backward)).sum();
    let boundaries: f64 = shards.iter().map(|s| s.boundary_bytes as f64).sum::<f64>() * m;
    let weights: f64 = shards.iter().map(|s| s.fetch_bytes() as f64).sum();
    let last = shards[n - 1].fetch_bytes() as f64;
    let gradients: f64 = shards.iter().map(|s| s.layout.gradient_bytes as f64).sum();
    let inputs: f64 = shards.iter().map(|s| 2.0 * m * s.input_bytes() as f64).sum();
    let own = model.layout.parameter_bytes as f64;
    let wide = own * model.layout.wide_ratio as f64;
    let remainder = if model.has_remainders() { own } else { 0.0 };
    // Every visit comes twice, but the last shard's, and those of shards that idle in the backward.
    let once: f64 = shards.iter().filter(|s| s.idles_back()).map(|s| s.fetch_bytes() as f64).sum();
    let mut h2d = 2.0 * weights - last - once + 3.0 * boundaries + inputs;
    let mut d2h = 2.0 * boundaries;
    let traffic = 2.0 * (own + remainder) + wide * (1.0 + 2.0 * moments as f64);
    let mut host = 0.0;
    if choice.updates_on_device {
        let state = wide * moments as f64 + remainder;
        (h2d, d2h) = (h2d + state, d2h + own + state);
        compute += traffic / cost.device_update_bytes_per_sec;
    } else {
        d2h += gradients;
        // The host's threads serve all devices, where these have no cores of their own.
        let shared = if cost.cores.is_some() { 1.0 } else { devices as f64 };
        host = shared * cost.host_settle_secs(traffic as u64, wide as u64);
    }
    if cost.cores.is_some() {
        // Units, copies and the host's arithmetic take turns on the same cores.
        compute += host + cost.copy_core_secs((h2d + d2h) as u64, 8 * n);
    }
    let copies = |bytes: f64, per_sec: f64, count: usize| bytes / per_sec + count as f64 * cost.copy_secs;
    let lanes = [compute, copies(h2d, cost.h2d_bytes_per_sec, 5 * n), copies(d2h, cost.d2h_bytes_per_sec, 3 * n), host];
    let busiest = lanes.into_iter().fold(0.0, f64::max);
    let ring = matches!(choice.activations, BoundaryTier::Host { entries: ..=2 });
    // With single entries copies and arithmetic take turns.
    let mut exposed = if ring && n > 1 { copies(boundaries, cost.h2d_bytes_per_sec, n) } else { 0.0 };
    // With three, what comes in waits for what goes out; a guess that this shows one time in ten.
    if matches!(choice.activations, BoundaryTier::Host { entries: 3 }) && n > 1 {
        exposed += 0.1 * copies(boundaries, cost.h2d_bytes_per_sec, n);
    }
    // One entry for the batch's tensors is in use until the unit before has ended.
    if choice.input_entries == 1 && choice.slots > 1 {
        exposed += copies(inputs, cost.h2d_bytes_per_sec, 1);
    }
    // With one gradient slot a backward waits for the gradients of the one before to leave.
    if choice.gradient_slots == 1 && choice.slots > 1 {
        exposed += copies(if choice.updates_on_device { own } else { gradients }, cost.d2h_bytes_per_sec, n);
    }
    busiest + exposed + 0.05 * (lanes.iter().sum::<f64>() - busiest)
}

/// Estimated seconds of a step of a model that runs anywhere, if it never waits for a device: each microbatch goes on
/// from unit to unit, and the next step begins when the first shard is updated.
pub fn chain_secs(model: &Model, shards: &Shards, choice: &Choice, cost: &CostModel) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let last = shards.len() - 1;
    let units = || (0..last).map(|s| secs[s][0]).chain((0..=last).map(|s| secs[s][1]));
    let longest = units().fold(0.0, f64::max);
    let microbatches = units().sum::<f64>() + (model.microbatches - 1) as f64 * longest;
    if choice.updates_on_device {
        return microbatches;
    }
    let first = shards[0].layout.gradient_bytes as f64;
    microbatches + first * (1.0 / cost.d2h_bytes_per_sec + 7.0 / cost.host_update_bytes_per_sec)
}
