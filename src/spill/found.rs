//! What a search has found, and which of it is to be had.

use super::fleet::anywhere_map;
use super::memory::{ArenaMap, BoundaryTier, Choice, Tenant, arena_map};
use super::model::Model;
use super::plan::{Plan, PlanOptions, Recompute, Spread};
use super::stand_in::Shards;
use super::store::host_map;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Plans of each kind that are kept: estimates are rough, and the executor can look at so many.
const OF_A_KIND: usize = 10;

/// Estimates are taken to be no further than this times from the truth: a plan that is slower by more is not looked at
/// again.
const CLOSE: f64 = 1.5;

/// The share of an estimate below which a plan is looked at beside one that leaves all state at rest.
const REST: f64 = 0.95;

/// Pieces of state for each gradient slot where there is no room for all of a shard's: one that comes, one in use, one
/// that leaves.
pub(super) const FEW_PIECES: usize = 3;

/// The arena that a plan would have.
pub(super) fn arena_of(of: Tenant, spread: Spread) -> ArenaMap {
    match spread {
        Spread::One | Spread::Stages { .. } => arena_map(of),
        Spread::Anywhere(_) => anywhere_map(of),
    }
}

/// What plans have in common among which estimates are truest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    updates: Updater,
    even_slots: bool,
    boundaries_stay: bool,
}

/// Who updates what visits: with the state that comes to the device in few pieces or `whole`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Updater {
    Host,
    Both { whole: bool },
    Device { whole: bool },
}

/// A choice that the search has looked at.
#[derive(Clone)]
pub struct Found {
    /// Its shards.
    pub shards: Shards,
    /// Where state lives.
    pub choice: Choice,
    /// The device's arena.
    pub arena: ArenaMap,
    /// Estimated seconds of a step.
    pub estimated_secs: f64,
    /// What is to be small: those seconds, and those by which its chain and its longest unit are too long.
    pub rank_secs: f64,
}

impl Found {
    /// The plan, of stand-ins.
    pub fn plan(self, model: &Model, options: &PlanOptions, smallest_device_bytes: u64) -> Plan {
        let moments = options.updates.moments;
        let of = Tenant { model, shards: &self.shards.programs, choice: &self.choice, moments };
        debug_assert_eq!(self.arena, arena_of(of, options.spread));
        Plan {
            host: host_map(of),
            shards: self.shards.programs,
            choice: self.choice,
            arena: self.arena,
            updates: options.updates,
            smallest_device_bytes,
            estimated_secs: self.estimated_secs,
        }
    }

    fn kind(&self) -> Kind {
        let choice = &self.choice;
        let whole = choice.update_pieces != FEW_PIECES;
        Kind {
            updates: match choice.updates_on_device(self.shards.programs.len() - 1) {
                _ if choice.visiting_updates == 0 => Updater::Host,
                false => Updater::Both { whole },
                true => Updater::Device { whole },
            },
            even_slots: choice.even_slots,
            boundaries_stay: [choice.activations, choice.gradients] == [BoundaryTier::Device; 2],
        }
    }

    /// Its shards, and the bytes of its arena.
    fn sizes(&self) -> (usize, u64) {
        (self.shards.programs.len(), self.arena.bytes)
    }

    /// Whether both have about as many shards: two numbers in each doubling are told apart, and each below 5.
    fn is_as_fine_as(&self, other: &Found) -> bool {
        let fineness = |found: &Found| (found.shards.programs.len().pow(2)).ilog2();
        fineness(self) == fineness(other)
    }
}

/// The fastest found, by estimate: of each kind a few, each of another fineness.
pub struct Fastest {
    recompute: Recompute,
    kinds: BTreeMap<Kind, Vec<Found>>,
}

impl Fastest {
    /// Of plans that recompute so.
    pub fn new(recompute: Recompute) -> Fastest {
        Fastest { recompute, kinds: BTreeMap::new() }
    }

    /// Whether a plan is one of them, so far.
    pub fn wants(&self, found: &Found) -> bool {
        let Some(kept) = self.kinds.get(&found.kind()) else { return true };
        match kept.iter().find(|other| other.is_as_fine_as(found)) {
            Some(twin) => self.order(found, twin).is_lt(),
            None => kept.len() < OF_A_KIND || kept.last().is_some_and(|last| self.order(found, last).is_lt()),
        }
    }

    /// Keeps a plan that it [`Fastest::wants`].
    pub fn keep(&mut self, found: Found) {
        let kind = found.kind();
        let mut kept = self.kinds.remove(&kind).unwrap_or_default();
        kept.retain(|other| !other.is_as_fine_as(&found));
        let place = kept.partition_point(|other| self.exact_order(other, &found).is_le());
        kept.insert(place, found);
        kept.truncate(OF_A_KIND);
        self.kinds.insert(kind, kept);
    }

    /// Whether one of them takes less than these seconds.
    pub fn is_below(&self, secs: f64) -> bool {
        self.kinds.values().flatten().any(|found| found.estimated_secs < secs)
    }

    /// Those that might be the fastest of all, the best by estimate first.
    pub fn into_candidates(self) -> Vec<Found> {
        let mut all: Vec<&Found> = self.kinds.values().flatten().collect();
        all.sort_by(|a, b| self.exact_order(a, b));
        let best = all.iter().copied().reduce(|best, found| if self.order(found, best).is_lt() { found } else { best });
        let Some(best) = best else { return Vec::new() };
        let alone = self.is_at_rest(best);
        // What is at rest is left so, but where the host's help is worth more: it updates beside the arithmetic.
        let most_secs = if alone { REST * best.estimated_secs } else { CLOSE * best.estimated_secs };
        let is_close = |found: &&Found| found.estimated_secs <= most_secs && !std::ptr::eq::<Found>(*found, best);
        std::iter::once(best).chain(all.iter().copied().filter(is_close)).cloned().collect()
    }

    /// Whether all its state is at home on the device, and nothing is computed twice that need not be.
    fn is_at_rest(&self, found: &Found) -> bool {
        let shards = &found.shards.programs;
        let recomputes = shards[..shards.len() - 1].iter().any(|s| !s.kept);
        found.choice.resident && (!recomputes || self.recompute == Recompute::Always)
    }

    /// Which of two plans is to be had: less is better. What fits whole is left at rest, with the fewest shards; else
    /// the fastest wins, and of two that are as fast the one with fewer shards, then fewer bytes.
    fn order(&self, a: &Found, b: &Found) -> Ordering {
        let apart = a.rank_secs / b.rank_secs.max(1e-12) - 1.0;
        match self.rank(a).cmp(&self.rank(b)) {
            Ordering::Equal if apart.abs() < 1e-3 => a.sizes().cmp(&b.sizes()),
            Ordering::Equal => apart.total_cmp(&0.0),
            unequal => unequal,
        }
    }

    /// The same with seconds as they are, to sort by.
    fn exact_order(&self, a: &Found, b: &Found) -> Ordering {
        let by_secs = a.rank_secs.total_cmp(&b.rank_secs);
        self.rank(a).cmp(&self.rank(b)).then(by_secs).then(a.sizes().cmp(&b.sizes()))
    }

    fn rank(&self, found: &Found) -> (bool, usize) {
        if self.is_at_rest(found) { (false, found.shards.programs.len()) } else { (true, 0) }
    }
}
