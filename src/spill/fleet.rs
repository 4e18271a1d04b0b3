//! Several models on several devices: where each one's tensors lie in every device's arena and in the host's store.
//!
//! A model at home on devices has stretches of its own there. Models whose shards run anywhere have none but for a few
//! numbers: they share slots and rings whose entries hold the largest shard and the largest boundary tensor of any of
//! them. The workspace is shared by all, since a device runs one unit at a time. What a budget leaves over becomes
//! further weight slots, which keep shards for their next visit, and entries for boundary activations.

use super::memory::{ArenaMap, BoundaryTier, Bump, Choice, Tenant, arena_map_of, update_room};
use super::model::Model;
use super::plan::Plan;
use super::shard::ShardPrograms;
use super::slots::SlotMap;
use crate::base::align_up;
use crate::graph::ALIGNMENT;
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
    /// Its plan. Anywhere, nothing of it stays on a device: neither state, nor boundary tensors, nor what a backward
    /// reads.
    pub plan: Arc<Plan>,
    /// Where its shards run.
    pub home: Home,
    /// Models of one line run one after another, so those at home on a device lie over each other there.
    pub line: usize,
}

impl Placed {
    /// A model alone on the first device.
    pub fn alone(model: Arc<Model>, plan: Arc<Plan>) -> Placed {
        let home = Home::On(vec![0; plan.shards.len()]);
        Placed { model, plan, home, line: 0 }
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
    /// Where each model's part of the disk tier begins.
    pub disks: Vec<u64>,
    /// Bytes of the disk tier.
    pub disk_bytes: u64,
}

impl FleetMap {
    /// Lays `models` out on so many devices, in as few bytes as their plans allow.
    pub fn new(models: &[Placed], devices: usize) -> FleetMap {
        FleetMap::within(models, &vec![Some(0); devices])
    }

    /// Lays models out on devices with these budgets: what one has left over becomes weight slots, until there is one
    /// for every shard that runs anywhere, and then entries for boundary activations; `None` is room for all. Where the
    /// budget is too small the map is as [`FleetMap::new`]'s, and larger than it.
    pub fn within(models: &[Placed], budgets: &[Option<u64>]) -> FleetMap {
        let mut maps: Vec<Vec<ArenaMap>> = models.iter().map(|_| Vec::with_capacity(budgets.len())).collect();
        let mut arena_bytes = Vec::with_capacity(budgets.len());
        // Devices that are no model's home have the same map, if they have the same budget.
        let is_home = |device: usize| {
            models.iter().any(|m| matches!(&m.home, Home::On(homes) if homes.contains(&(device as u16))))
        };
        for (device, &budget) in budgets.iter().enumerate() {
            let twin = (0..device).find(|&d| budgets[d] == budget && !is_home(d)).filter(|_| !is_home(device));
            let of_device = match twin {
                Some(twin) => maps.iter().map(|maps| maps[twin].clone()).collect(),
                None => filled_maps(models, device as u16, budget),
            };
            arena_bytes.push(of_device.iter().map(|m| m.bytes).max().unwrap_or(0));
            maps.iter_mut().zip(of_device).for_each(|(maps, map)| maps.push(map));
        }
        let mut bump = Bump::default();
        let stores = models.iter().map(|m| bump.take(m.plan.host.bytes)).collect();
        let mut disk = Bump::default();
        let disks = models.iter().map(|m| disk.take(m.plan.host.disk_bytes)).collect();
        FleetMap { maps, arena_bytes, stores, host_bytes: bump.end, disks, disk_bytes: disk.end }
    }
}

/// Slots and entries of a device beyond those that plans ask for.
#[derive(Clone, Copy, Debug, Default)]
struct Spare {
    /// For weights.
    slots: usize,
    /// For boundary activations.
    entries: usize,
}

/// Boundary activations that a device keeps at most beyond what plans ask for: they are looked through one by one.
const MOST_SPARE_ENTRIES: usize = 256;

/// How each model sees one device's arena, with as many weight slots as its budget has room for, and in what is left
/// then boundary activations.
fn filled_maps(models: &[Placed], device: u16, budget: Option<u64>) -> Vec<ArenaMap> {
    let least = device_maps(models, device, Spare::default());
    let wanted = wanted(models);
    let bytes = least.iter().map(|m| m.bytes).max().unwrap_or(0);
    let mut room = budget.map_or(u64::MAX, |budget| budget.saturating_sub(bytes));
    let mut fill = |wanted: usize, bytes: &dyn Fn(&ShardPrograms) -> u64| {
        let largest = anywhere(models).flat_map(|m| m.plan.shards.iter().map(bytes)).max().unwrap_or(0);
        // Each begins at a multiple of the alignment, and so does what comes after it: each costs as much.
        let each = align_up(largest, ALIGNMENT).max(1);
        let count = (room / each).min(wanted as u64);
        room -= count * each;
        count as usize
    };
    let slots = fill(wanted.slots, &ShardPrograms::slot_bytes);
    let entries = fill(wanted.entries, &|shard| shard.boundary_bytes);
    if slots + entries == 0 { least } else { device_maps(models, device, Spare { slots, entries }) }
}

/// The models whose shards run anywhere.
fn anywhere(models: &[Placed]) -> impl Iterator<Item = &Placed> {
    models.iter().filter(|m| m.home == Home::Anywhere)
}

/// As many as would keep all that may be fetched again: every shard that runs anywhere, and all activations of a step
/// of each model. With single slots there are none: no double buffering means that nothing of a shard moves while
/// another computes.
fn wanted(models: &[Placed]) -> Spare {
    let shards: usize = anywhere(models).map(|m| m.plan.shards.len()).sum();
    let boundaries = |m: &Placed| (m.plan.shards.len() - 1) * m.model.microbatches;
    match anywhere(models).map(|m| m.plan.choice.slots).max() {
        None | Some(1) => Spare::default(),
        Some(slots) => Spare {
            slots: shards.saturating_sub(slots),
            entries: anywhere(models).map(boundaries).sum::<usize>().min(MOST_SPARE_ENTRIES),
        },
    }
}

/// How each model sees one device's arena.
fn device_maps(models: &[Placed], device: u16, spare: Spare) -> Vec<ArenaMap> {
    let mut bump = Bump::default();
    let mut maps = vec![ArenaMap::default(); models.len()];
    let own = |placed: &Placed| match &placed.home {
        Home::On(devices) if devices.contains(&device) => {
            let here = |s: usize| devices.get(s) == Some(&device);
            Some(arena_map_of(placed.plan.tenant(&placed.model), &here))
        }
        _ => None,
    };
    // Of models that never run together on this device each has its arena to itself.
    let own_maps: Vec<Option<ArenaMap>> = models.iter().map(own).collect();
    let mut lines_here = models.iter().zip(&own_maps).filter(|(_, map)| map.is_some()).map(|(m, _)| m.line);
    let first = lines_here.next();
    if models.iter().all(|m| m.home != Home::Anywhere) && lines_here.all(|line| Some(line) == first) {
        return own_maps.into_iter().map(Option::unwrap_or_default).collect();
    }
    let lines = models.iter().map(|m| m.line).max().map_or(0, |most| most + 1);
    for line in 0..lines {
        let (base, mut end) = (bump.end, bump.end);
        for ((map, own), _) in maps.iter_mut().zip(&own_maps).zip(models).filter(|(_, m)| m.line == line) {
            if let Some(own) = own {
                bump.end = base;
                let at = bump.take(own.workspace);
                *map = own.clone().shifted(at, 0);
                end = end.max(bump.end);
            }
        }
        bump.end = end;
    }
    let movers: Vec<usize> = (0..models.len()).filter(|&m| models[m].home == Home::Anywhere).collect();
    let tenants: Vec<Tenant> = movers.iter().map(|&m| models[m].plan.tenant(&models[m].model)).collect();
    let shards: usize = tenants.iter().map(|t| t.shards.len()).sum();
    let asked = tenants.iter().map(|t| t.choice.slots).max().unwrap_or(0);
    // No more slots than there is to put in them.
    let slots = asked.min(shards) + spare.slots;
    for (m, map) in movers.into_iter().zip(shared_maps(&tenants, slots, spare.entries, &mut bump)) {
        maps[m] = map;
    }
    let workspace = |m: &Placed| {
        let here = m.plan.shards.iter().enumerate().filter(|(s, _)| m.visits(*s, device));
        here.map(|(_, shard)| shard.workspace_bytes()).max().unwrap_or(0)
    };
    let at = bump.take(models.iter().map(workspace).max().unwrap_or(0));
    for map in &mut maps {
        (map.workspace, map.bytes) = (at, bump.end);
    }
    maps
}

/// Maps the arena of a model that runs anywhere, if it were alone.
pub(super) fn anywhere_map(of: Tenant) -> ArenaMap {
    let mut bump = Bump::default();
    let slots = of.choice.slots.min(of.shards.len());
    let mut map = shared_maps(&[of], slots, 0, &mut bump).remove(0);
    map.workspace = bump.take(of.shards.iter().map(ShardPrograms::workspace_bytes).max().unwrap_or(0));
    ArenaMap { bytes: bump.end, ..map }
}

/// Lays out what models that run anywhere have on a device: losses and norms of each, so many weight slots and rings
/// for all.
fn shared_maps(tenants: &[Tenant], slots: usize, spare_entries: usize, bump: &mut Bump) -> Vec<ArenaMap> {
    let of = |bytes: &dyn Fn(&Tenant, usize) -> u64| {
        tenants.iter().flat_map(|t| (0..t.shards.len()).map(move |s| bytes(t, s))).max().unwrap_or(0)
    };
    let most = |count: &dyn Fn(&Choice) -> usize| tenants.iter().map(|t| count(t.choice)).max().unwrap_or(0);
    let entries = |tier: BoundaryTier| match tier {
        BoundaryTier::Host { entries } => entries,
        BoundaryTier::Device => unreachable!("a model that runs anywhere keeps nothing on a device"),
    };
    let scratch = of(&|t, s| match t.model.train.scratch && t.choice.updates_on_device(s) {
        true => t.norm_scratch_bytes(s),
        false => 0,
    });
    let shards = tenants.iter().map(|t| t.shards.len()).max().unwrap_or(0);
    let gradients = of(&|t, s| t.shards[s].layout.gradient_bytes);
    let updates = || tenants.iter().map(|t| update_room(*t));
    let update_slot_bytes = updates().map(|(_, bytes)| bytes).max().unwrap_or(0);
    let boundary = of(&|t, s| t.shards[s].boundary_bytes);
    let shared = ArenaMap {
        norm_scratch: bump.take(scratch),
        inputs: bump.take_many(most(&|c| c.input_entries), of(&|t, s| t.shards[s].input_bytes())),
        weight_slots: SlotMap::for_all(bump, of(&|t, s| t.shards[s].slot_bytes()), shards, slots),
        gradient_slots: SlotMap::for_all(bump, gradients, shards, most(&|c| c.gradient_slots)),
        update_slots: bump.take_many(updates().map(|(count, _)| count).max().unwrap_or(0), update_slot_bytes),
        update_slot_bytes,
        activations: bump.take_many(most(&|c| entries(c.activations)) + spare_entries, boundary),
        gradients: bump.take_many(most(&|c| entries(c.gradients)), boundary),
        ..ArenaMap::default()
    };
    let of_each = |t: &Tenant| ArenaMap {
        losses: [0, 1].map(|_| bump.take(4 * t.model.microbatches as u64)),
        norms: [0, 1].map(|_| match t.choice.visiting_updates {
            0 => bump.take(0),
            _ => bump.take(8 * t.model.layout.order.len() as u64),
        }),
        states_at: t.shards.iter().map(ShardPrograms::states_at).collect(),
        saved: vec![Vec::new(); t.shards.len()],
        ..shared.clone()
    };
    tenants.iter().map(of_each).collect()
}
