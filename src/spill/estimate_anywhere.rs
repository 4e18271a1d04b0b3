//! A quick estimate of what a model that runs anywhere takes of devices, to choose between its plans.

use super::estimate::Draft;
use super::memory::BoundaryTier;
use super::stand_in::Shards;

/// Estimated seconds of device time of a step of a model whose shards run on any of so many `devices`, among others
/// that fill every gap: its busiest lane decides. A little of the other lanes is added, since not everything can be
/// hidden.
pub(super) fn estimate_anywhere_secs(draft: Draft, devices: usize) -> f64 {
    let Draft { model, shards: Shards { programs: shards, secs }, choice, updates, cost } = draft;
    let (n, m) = (shards.len(), model.microbatches as f64);
    let mut compute: f64 = secs.iter().map(|[forward, backward]| m * (forward + backward)).sum();
    let boundaries: f64 = shards.iter().map(|s| s.boundary_bytes as f64).sum::<f64>() * m;
    let weights: f64 = shards.iter().map(|s| s.fetch_bytes() as f64).sum();
    let last = shards[n - 1].fetch_bytes() as f64;
    let gradients: f64 = shards.iter().map(|s| s.layout.gradient_bytes as f64).sum();
    let inputs: f64 = shards.iter().map(|s| 2.0 * m * s.input_bytes() as f64).sum();
    let own_bytes = model.layout.parameter_bytes;
    let own = own_bytes as f64;
    let state: f64 = (0..n).map(|s| draft.update_state_bytes(s) as f64).sum();
    // Every visit comes twice, but the last shard's, and those of shards that idle in the backward.
    let once: f64 = shards.iter().filter(|s| s.idles_back()).map(|s| s.fetch_bytes() as f64).sum();
    let mut h2d = 2.0 * weights - last - once + 3.0 * boundaries + inputs;
    let mut d2h = 2.0 * boundaries;
    let mut host = 0.0;
    if choice.visiting_updates > 0 {
        (h2d, d2h) = (h2d + state, d2h + own + state);
        if updates.clips {
            // They wait at home for the norm.
            (h2d, d2h) = (h2d + gradients, d2h + gradients);
        }
        compute += model.update_bytes(own_bytes, updates.moments) as f64 / cost.device_update_bytes_per_sec;
    } else {
        d2h += gradients;
        // The host's threads serve all devices, where these have no cores of their own.
        let shared = if cost.cores.is_some() { 1.0 } else { devices as f64 };
        host = shared * model.host_settle_secs(own_bytes, updates.moments, cost);
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
        let leaves = if choice.visiting_updates > 0 && !updates.clips { own } else { gradients };
        exposed += copies(leaves, cost.d2h_bytes_per_sec, n);
    }
    busiest + exposed + 0.05 * (lanes.iter().sum::<f64>() - busiest)
}

/// Estimated seconds of a step of a model that runs anywhere, if it never waits for a device: each microbatch goes on
/// from unit to unit, and the next step begins when the first shard is updated.
pub(super) fn chain_secs(draft: Draft) -> f64 {
    let Draft { model, shards: Shards { programs: shards, secs }, choice, updates, cost } = draft;
    let last = shards.len() - 1;
    let units = || (0..last).map(|s| secs[s][0]).chain((0..=last).map(|s| secs[s][1]));
    let longest = units().fold(0.0, f64::max);
    let microbatches = units().sum::<f64>() + (model.microbatches - 1) as f64 * longest;
    if choice.visiting_updates > 0 {
        return microbatches;
    }
    let leaves_secs = shards[0].layout.gradient_bytes as f64 / cost.d2h_bytes_per_sec;
    let update_bytes = model.update_bytes(shards[0].own_bytes(), updates.moments) as f64;
    microbatches + leaves_secs + update_bytes / cost.host_update_bytes_per_sec
}
