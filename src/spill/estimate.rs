//! A quick estimate of a step, to choose between plans: units in their order, fetches ahead as far as slots allow.
//!
//! The executor on a simulated device gives the exact prediction of the plan that is chosen; this recurrence only
//! ranks.

use super::memory::{BoundaryTier, Choice, update_state_bytes};
use super::model::Model;
use super::shard::ShardPrograms;
use super::stand_in::Shards;
use super::store::count_pieces;
use crate::device::sim::CostModel;

/// Estimated seconds of a training step. `clips`: no update before the last gradient.
pub fn estimate_secs(
    model: &Model,
    shards: &Shards,
    choice: &Choice,
    moments: usize,
    clips: bool,
    cost: &CostModel,
) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let (n, m) = (shards.len(), model.microbatches as f64);
    let units: Vec<(usize, f64)> = (0..n.saturating_sub(1))
        .map(|s| (s, m * secs[s][0]))
        .chain((0..n).rev().map(|s| (s, m * secs[s][1])))
        .collect();
    let update_here = |own: u64| cost.device_settle_secs(model.update_bytes(own, moments), model.wide_bytes(own));
    let update_by_host = |own: u64| cost.host_settle_secs(model.update_bytes(own, moments), model.wide_bytes(own));
    if choice.resident {
        let update = update_here(model.layout.parameter_bytes);
        return update + units.iter().map(|u| u.1).sum::<f64>() + boundary_secs(model, shards, choice, cost) * 0.1;
    }
    let resting = choice.resting;
    // Those before this shard are updated on the device.
    let by_host = (resting + choice.visiting_updates).min(n);
    let updated_here = |s: usize| (resting..by_host).contains(&s);
    let state_bytes = |s: usize| update_state_bytes(model, shards, moments, s);
    // Accumulators that leave for the shard that owns their parameter, and come to it.
    let mut shared = vec![(0, 0); n];
    for (s, shard) in shards.iter().enumerate() {
        for parameter in shard.layout.shared.iter().map(|u| u.parameter) {
            let (at, bytes) = (&model.layout.parameter[parameter], model.gradient_bytes(parameter));
            let owner = shards.iter().position(|o| o.layout.own.contains(at)).filter(|&owner| owner != s);
            if let Some(owner) = owner {
                shared[s].0 += bytes;
                shared[owner].1 += bytes;
            }
        }
    }
    let fetch = |s: usize| cost.copy_secs + shards[s].fetch_bytes() as f64 / cost.h2d_bytes_per_sec;
    let updated_secs =
        |s: usize| 2.0 * cost.copy_secs + (shards[s].own_bytes() + state_bytes(s)) as f64 / cost.d2h_bytes_per_sec;
    // With clipping what the device updates waits for the norm at home, but for what its slots hold.
    let waits_at_home = |s: usize| clips && updated_here(s) && s - resting >= choice.gradient_slots;
    let leave = |s: usize| match choice.rests(s) {
        true => 0.0,
        false if updated_here(s) && !waits_at_home(s) => {
            let updated = if clips { 0.0 } else { updated_secs(s) };
            updated + shared[s].0 as f64 / cost.d2h_bytes_per_sec
        }
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
    // The host's updates, and the device's of shards that rest.
    let late: Vec<f64> = shards[by_host..].iter().map(|s| update_by_host(s.own_bytes())).collect();
    let updates: f64 = late.iter().sum();
    let here: f64 = shards[..resting].iter().map(|s| update_here(s.own_bytes())).sum();
    let slots = choice.slots.min(n - resting);
    // With clipping a step is reckoned from when the norm is known: forward follows the updates, which go from shard to
    // shard.
    let (mut compute, mut h2d, mut d2h) = (0.0f64, 0.0f64, 0.0f64);
    // Ends of visits that took a slot, and when what used gradient slots had left, and slots of state that visits.
    let (mut ends, mut left, mut states_left) = (Vec::<f64>::new(), Vec::<f64>::new(), Vec::<f64>::new());
    let room_of =
        |left: &[f64]| if left.len() >= choice.gradient_slots { left[left.len() - choice.gradient_slots] } else { 0.0 };
    // Seconds in which the lane home works, and of the step.
    let (mut leaving, mut turn) = (0.0, 0.0);
    // Where the device updates what visits, the next step begins, or ends, while that still leaves.
    for _ in 0..if by_host > resting { 2 } else { 1 } {
        (leaving, compute) = (0.0, compute - turn + if clips { here } else { 0.0 });
        h2d -= turn;
        d2h -= turn;
        ends.iter_mut().chain(&mut left).chain(&mut states_left).for_each(|end| *end -= turn);
        let mut updated = 0.0;
        // When the last gradient that the host updates has left.
        let mut home = 0.0f64;
        for (u, &(s, secs)) in units.iter().enumerate() {
            let backward = u + 1 >= n;
            let hit = choice.rests(s)
                || (backward && shards[s].idles_back())
                // Around the turn the last shards are still in their slots.
                || (u >= n && u - (n - 1) < slots)
                // What the device has updated last is still in its slot in the next step.
                || (!backward && updated_here(s) && s - resting < slots);
            if !hit {
                let free = if ends.len() >= slots { ends[ends.len() - slots] } else { 0.0 };
                if clips && u < n && !updated_here(s) {
                    updated += late[s - by_host];
                }
                // Pieces of the shard arrive while others are updated.
                h2d = (h2d.max(free) + fetch(s)).max(updated);
            }
            let ready = if hit { 0.0 } else { h2d };
            let mut slot_leaves = 0.0;
            // Of its state what has room comes beside the arithmetic before, the rest piece by piece.
            let visit = |h2d: &mut f64, compute: f64, room: f64, bytes: u64| {
                let secs = cost.copy_secs + bytes as f64 / cost.h2d_bytes_per_sec;
                let pieces = count_pieces(shards[s].own_bytes(), choice.slots, true) as usize;
                let ahead = secs * choice.update_pieces.min(pieces) as f64 / pieces as f64;
                let came = h2d.max(room) + ahead;
                *h2d = if ahead < secs { came.max(compute) + secs - ahead } else { came };
                compute.max(*h2d) + update_here(shards[s].own_bytes())
            };
            if clips && u < n && updated_here(s) {
                let gradient = if waits_at_home(s) { shards[s].layout.gradient_bytes } else { 0 };
                compute = visit(&mut h2d, compute, room_of(&states_left), state_bytes(s) + gradient);
                d2h = d2h.max(compute) + updated_secs(s);
                leaving += updated_secs(s);
                states_left.push(d2h);
                slot_leaves = d2h;
            }
            let room = if backward && !choice.rests(s) { room_of(&left) } else { 0.0 };
            compute = compute.max(ready).max(room) + secs + exposed(u, s);
            if choice.rests(s) {
                continue;
            }
            if backward && updated_here(s) && !clips {
                compute = visit(&mut h2d, compute, room, state_bytes(s) + shared[s].1);
            }
            if backward {
                d2h = d2h.max(compute) + leave(s);
                leaving += leave(s);
                home = if updated_here(s) { home } else { d2h };
                left.push(d2h);
            }
            // New weights are in their slot until they have left.
            ends.push(if backward && updated_here(s) && !clips { d2h } else { compute.max(slot_leaves) });
        }
        // Without clipping, each update has from when its own gradient is there until the shard's next forward.
        let before: f64 = units[..units.len() - n].iter().take(by_host).map(|u| u.1).sum();
        turn = match (clips, late.first()) {
            (true, _) => home.max(compute),
            (false, None) => compute + here,
            (false, Some(late)) if by_host == 0 => home + late,
            (false, Some(late)) => (home.max(compute + here) + late - before - here).max(compute + here),
        };
    }
    let links = boundary_secs(model, shards, choice, cost);
    // Cores that units, copies and the host's arithmetic share.
    let visits =
        units.iter().enumerate().filter(|&(u, &(s, _))| !(choice.rests(s) || u + 1 >= n && shards[s].idles_back()));
    let state: u64 = (resting..by_host).map(|s| 2 * state_bytes(s)).sum();
    let crossings = |s: usize| if s >= by_host { 1 } else { 2 * u64::from(waits_at_home(s)) };
    let gradients: u64 = (resting..n).map(|s| crossings(s) * shards[s].layout.gradient_bytes).sum();
    let weights: u64 = shards[resting..by_host].iter().map(ShardPrograms::own_bytes).sum();
    let moved = visits.map(|(_, &(s, _))| shards[s].fetch_bytes()).sum::<u64>() + gradients + weights + state;
    let arithmetic = units.iter().map(|u| u.1).sum::<f64>() + updates + here;
    let shared = cost.cores.map_or(0.0, |_| arithmetic + cost.copy_core_secs(moved, units.len() + n));
    // A part of the boundary copies shows.
    turn.max(updates).max(leaving).max(h2d + links).max(shared) + 0.25 * links
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
/// hidden. With the optimizer's moments, and whether it clips.
pub fn estimate_anywhere_secs(
    model: &Model,
    shards: &Shards,
    choice: &Choice,
    (moments, clips): (usize, bool),
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
    let own = model.layout.parameter_bytes;
    let (traffic, wide) = (model.update_bytes(own, moments), model.wide_bytes(own));
    let own = own as f64;
    let state: f64 = (0..n).map(|s| update_state_bytes(model, shards, moments, s) as f64).sum();
    // Every visit comes twice, but the last shard's, and those of shards that idle in the backward.
    let once: f64 = shards.iter().filter(|s| s.idles_back()).map(|s| s.fetch_bytes() as f64).sum();
    let mut h2d = 2.0 * weights - last - once + 3.0 * boundaries + inputs;
    let mut d2h = 2.0 * boundaries;
    let mut host = 0.0;
    if choice.visiting_updates > 0 {
        (h2d, d2h) = (h2d + state, d2h + own + state);
        if clips {
            // They wait at home for the norm.
            (h2d, d2h) = (h2d + gradients, d2h + gradients);
        }
        compute += traffic as f64 / cost.device_update_bytes_per_sec;
    } else {
        d2h += gradients;
        // The host's threads serve all devices, where these have no cores of their own.
        let shared = if cost.cores.is_some() { 1.0 } else { devices as f64 };
        host = shared * cost.host_settle_secs(traffic, wide);
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
        let leaves = if choice.visiting_updates > 0 && !clips { own } else { gradients };
        exposed += copies(leaves, cost.d2h_bytes_per_sec, n);
    }
    busiest + exposed + 0.05 * (lanes.iter().sum::<f64>() - busiest)
}

/// Estimated seconds of a step of a model that runs anywhere, if it never waits for a device: each microbatch goes on
/// from unit to unit, and the next step begins when the first shard is updated.
pub fn chain_secs(model: &Model, shards: &Shards, choice: &Choice, moments: usize, cost: &CostModel) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let last = shards.len() - 1;
    let units = || (0..last).map(|s| secs[s][0]).chain((0..=last).map(|s| secs[s][1]));
    let longest = units().fold(0.0, f64::max);
    let microbatches = units().sum::<f64>() + (model.microbatches - 1) as f64 * longest;
    if choice.visiting_updates > 0 {
        return microbatches;
    }
    let leaves_secs = shards[0].layout.gradient_bytes as f64 / cost.d2h_bytes_per_sec;
    let update_bytes = model.update_bytes(shards[0].own_bytes(), moments) as f64;
    microbatches + leaves_secs + update_bytes / cost.host_update_bytes_per_sec
}
