//! Several models on several devices: where each one's tensors lie in every device's arena and in the host's store.
//!
//! A model at home on devices has stretches of its own there. Models whose shards run anywhere have none but for a few numbers: they share
//! slots and rings whose entries hold the largest shard and the largest boundary tensor of any of them. The workspace is shared by all, since
//! a device runs one unit at a time.

use super::memory::{ArenaMap, BoundaryTier, Tape, arena_map_of};
use super::model::Model;
use super::plan::Plan;
use super::shard::ShardPrograms;
use crate::device::norm_scratch_bytes;
use std::sync::Arc;

/// Where a model's shards run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Home {
    /// Each on whichever device takes it; state is at home in the host's store.
    Anywhere,
    /// Each on the device of this number, by shard.
    On(Vec<u16>),
}

/// A model with its plan and its home.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The model.
    pub model: Arc<Model>,
    /// Its plan. Anywhere, nothing of it stays on a device: neither state, nor boundary tensors, nor what a backward reads.
    pub plan: Arc<Plan>,
    /// Where its shards run.
    pub home: Home,
}

impl Placed {
    /// A model alone on the first device.
    pub fn alone(model: Arc<Model>, plan: Arc<Plan>) -> Placed {
        let home = Home::On(vec![0; plan.shards.len()]);
        Placed { model, plan, home }
    }

    /// Whether shard `s` may run on `device`.
    pub fn visits(&self, s: usize, device: u16) -> bool {
        match &self.home {
            Home::Anywhere => true,
            Home::On(devices) => devices[s] == device,
        }
    }
}

/// Where everything of a set of models lies.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetMap {
    /// How each model sees each device's arena: by model, then by device. Nothing lies on devices that it never visits.
    pub maps: Vec<Vec<ArenaMap>>,
    /// Bytes of each device's arena.
    pub arena_bytes: Vec<u64>,
    /// Where each model's part of the host's store begins.
    pub stores: Vec<u64>,
    /// Bytes of the host's store.
    pub host_bytes: u64,
}

impl FleetMap {
    /// Lays `models` out on so many devices.
    pub fn new(models: &[Placed], devices: usize) -> FleetMap {
        let mut maps: Vec<Vec<ArenaMap>> = models.iter().map(|_| Vec::with_capacity(devices)).collect();
        let mut arena_bytes = Vec::with_capacity(devices);
        for device in 0..devices as u16 {
            let of_device = device_maps(models, device);
            arena_bytes.push(of_device.iter().map(|m| m.bytes).max().unwrap_or(0));
            maps.iter_mut().zip(of_device).for_each(|(maps, map)| maps.push(map));
        }
        let mut tape = Tape::default();
        let stores = models.iter().map(|m| tape.take(m.plan.host.bytes)).collect();
        FleetMap { maps, arena_bytes, stores, host_bytes: tape.end }
    }
}

/// How each model sees one device's arena.
fn device_maps(models: &[Placed], device: u16) -> Vec<ArenaMap> {
    let mut tape = Tape::default();
    let workspace = |m: &Placed| {
        let here = m.plan.shards.iter().enumerate().filter(|(s, _)| m.visits(*s, device));
        here.map(|(_, shard)| shard.workspace_bytes()).max().unwrap_or(0)
    };
    let mut maps: Vec<ArenaMap> = models
        .iter()
        .map(|Placed { model, plan, home }| match home {
            Home::On(devices) if devices.contains(&device) => {
                let here = |s: usize| devices.get(s) == Some(&device);
                let map = arena_map_of(model, &plan.shards, &plan.choice, plan.moments, &here);
                let base = tape.take(map.workspace);
                map.shifted(base, 0)
            }
            _ => ArenaMap::default(),
        })
        .collect();
    let anywhere: Vec<usize> = (0..models.len()).filter(|&m| models[m].home == Home::Anywhere).collect();
    lay_out_shared(models, &anywhere, &mut tape, &mut maps);
    let bytes = models.iter().map(workspace).max().unwrap_or(0);
    let at = tape.take(bytes);
    for map in &mut maps {
        (map.workspace, map.bytes) = (at, tape.end);
    }
    maps
}

/// Lays out what the models `anywhere` have on a device: losses and norms of each, slots and rings for all.
fn lay_out_shared(models: &[Placed], anywhere: &[usize], tape: &mut Tape, maps: &mut [ArenaMap]) {
    if anywhere.is_empty() {
        return;
    }
    let of = |bytes: &dyn Fn(&Placed, usize) -> u64| {
        let all = anywhere.iter().flat_map(|&m| (0..models[m].plan.shards.len()).map(move |s| (&models[m], s)));
        all.map(|(m, s)| bytes(m, s)).max().unwrap_or(0)
    };
    let shard = |m: &Placed, s: usize, bytes: fn(&ShardPrograms) -> u64| bytes(&m.plan.shards[s]);
    let entries = |tier: BoundaryTier| match tier {
        BoundaryTier::Host { entries } => entries,
        BoundaryTier::Device => unreachable!("a model that runs anywhere keeps nothing on a device"),
    };
    let most = |count: &dyn Fn(&Plan) -> usize| anywhere.iter().map(|&m| count(&models[m].plan)).max().unwrap_or(0);
    let on_device = anywhere.iter().any(|&m| models[m].plan.choice.updates_on_device);
    let boundary = of(&|m, s| m.plan.shards[s].boundary_bytes);
    let scratch = of(&|m, s| match m.plan.choice.updates_on_device && m.model.train.scratch {
        true => norm_scratch_bytes(&m.model.segments(&m.plan.shards[s].layout.own, |_| true)),
        false => 0,
    });
    let shared = ArenaMap {
        norm_scratch: tape.take(scratch),
        inputs: tape.take_many(most(&|p| p.choice.input_entries), of(&|m, s| shard(m, s, ShardPrograms::input_bytes))),
        weight_slots: tape.take_many(most(&|p| p.choice.slots), of(&|m, s| shard(m, s, ShardPrograms::slot_bytes))),
        gradient_slots: tape.take_many(
            most(&|p| p.choice.gradient_slots),
            of(&|m, s| m.plan.visiting_gradients_at(s) + m.plan.visiting_gradient_bytes(&m.model, s)),
        ),
        update_states: match on_device {
            true => {
                tape.take_many(most(&|p| p.choice.gradient_slots), of(&|m, s| m.plan.update_state_bytes(&m.model, s)))
            }
            false => Vec::new(),
        },
        activations: tape.take_many(most(&|p| entries(p.choice.activations)), boundary),
        gradients: tape.take_many(most(&|p| entries(p.choice.gradients)), boundary),
        ..ArenaMap::default()
    };
    for &m in anywhere {
        let Placed { model, plan, .. } = &models[m];
        let (microbatches, parameters) = (model.microbatches as u64, model.train.parameters.len() as u64);
        maps[m] = ArenaMap {
            losses: [0, 1].map(|_| tape.take(4 * microbatches)),
            norms: [0, 1].map(|_| if on_device { tape.take(8 * parameters) } else { 0 }),
            states_at: plan.shards.iter().map(ShardPrograms::states_at).collect(),
            saved: vec![Vec::new(); plan.shards.len()],
            ..shared.clone()
        };
    }
}
