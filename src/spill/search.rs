//! The search for a plan: every number of shards with each cut rule, and for each the few ways to place state that are
//! worth having.
//!
//! It works on stand-ins (see `stand_in`).

use super::cut::Balanced;
use super::estimate::{Draft, disk_secs, estimate_secs};
use super::estimate_anywhere::{chain_secs, estimate_anywhere_secs};
use super::found::{FEW_PIECES, Fastest, Found, arena_of};
use super::memory::{BoundaryTier, Choice, VisitBytes, arena_map, bytes_at_rest, have_large, resting_counts};
use super::model::Model;
use super::plan::{Anywhere, PlanOptions, Recompute, Spread};
use super::shard::ShardPrograms;
use super::stand_in::{Shards, Timed};
use super::store::{OnDisk, home_bytes};
use crate::base::{Error, Result};
use crate::device::sim::CostModel;
use std::collections::HashSet;
use std::ops::Range;

/// One search, and what it has found so far.
pub struct Search<'a> {
    model: &'a Model,
    options: &'a PlanOptions,
    cost: &'a CostModel,
    shards: Timed<'a>,
    /// Of the cut that is looked at.
    visits: Vec<VisitBytes>,
    /// The fastest that fit.
    pub fastest: Fastest,
    /// Of those that fit on the device and have no home for their state: the one that needs the least host memory with
    /// the disk as it is, and how much that is.
    pub homeless: Option<(u64, Found)>,
    /// And the one that needs the least of a disk beside the host memory as it is, and how much, if any disk would do.
    pub diskless: Option<(u64, Found)>,
    /// The one of the smallest arena.
    pub smallest: Option<Found>,
}

impl<'a> Search<'a> {
    /// A search that has found nothing yet.
    pub fn new(model: &'a Model, options: &'a PlanOptions, cost: &'a CostModel) -> Self {
        Search {
            model,
            options,
            cost,
            shards: Timed::new(model, cost),
            visits: Vec::new(),
            fastest: Fastest::new(options.recompute),
            homeless: None,
            diskless: None,
            smallest: None,
        }
    }

    /// Looks at every cut.
    ///
    /// # Errors
    /// When the options' own cut is none of the model.
    pub fn run(&mut self) -> Result<()> {
        // The cuts must not depend on what was measured this time, or the smallest budget would change from run to run.
        for cut in self.cuts(&CostModel::nominal())? {
            self.try_cut(&cut);
        }
        Ok(())
    }

    /// The cuts to try, each once; `cost` weighs the layers.
    fn cuts(&mut self, cost: &CostModel) -> Result<Vec<Vec<Range<usize>>>> {
        let (options, layers) = (self.options, self.model.layers());
        if let Some(cut) = &options.cut {
            let whole = cut.first().is_some_and(|r| r.start == 0) && cut.last().is_some_and(|r| r.end == layers);
            if !whole || cut.iter().any(|r| r.is_empty()) || cut.windows(2).any(|w| w[0].end != w[1].start) {
                return Err(Error::bad(format!("the cut {cut:?} does not divide {layers} layers")));
            }
            return Ok(vec![cut.clone()]);
        }
        let single = self.build(&(0..layers).map(|l| l..l + 1).collect::<Vec<_>>(), |_| false, false).programs;
        let secs: Vec<f64> = single.iter().map(|s| s.forward_secs(cost) + s.backward_secs(cost)).collect();
        let bytes: Vec<f64> = single.iter().map(|s| s.layout.weight_bytes as f64).collect();
        let (by_secs, by_bytes) = (Balanced::new(&secs, layers), Balanced::new(&bytes, layers));
        let mut seen = HashSet::new();
        let mut cuts = Vec::new();
        // Every count up to 16, then about ten in each doubling: more shards than that differ little.
        let counts = (1..=layers).filter(|&n| n <= 16 || n == layers || n % (n.ilog2() as usize * n / 64).max(1) == 0);
        for n in counts {
            for cut in [by_secs.cut(n), by_bytes.cut(n)] {
                if seen.insert(cut.clone()) {
                    cuts.push(cut);
                }
            }
        }
        Ok(cuts)
    }

    /// The shards of a cut, of which those are kept for which `keep` says so.
    fn build(&mut self, cut: &[Range<usize>], keep: impl Fn(usize) -> bool, twice: bool) -> Shards {
        let mut shards = Shards::default();
        for (s, layers) in cut.iter().enumerate() {
            self.shards.add(&mut shards, layers.clone(), keep(s), twice);
        }
        shards
    }

    fn try_cut(&mut self, cut: &[Range<usize>]) {
        let (options, n) = (self.options, cut.len());
        let twice = options.recompute == Recompute::Always;
        let anywhere = options.spread.is_anywhere();
        // Shards that keep what their backward reads, or those that are told to; and shards that compute it again.
        let told = options.kept.as_ref().filter(|_| !anywhere);
        let kept = match told {
            Some(keep) => Some(self.build(cut, |s| keep.get(s) == Some(&true), twice)),
            None => (!anywhere && !twice).then(|| self.build(cut, |_| true, twice)),
        };
        let may_again = told.is_none() && (options.recompute != Recompute::Never || n == 1);
        let again = may_again.then(|| self.build(cut, |_| false, twice));
        let Some(either) = kept.as_ref().or(again.as_ref()) else { return };
        if !anywhere {
            self.visits = VisitBytes::of(self.model, &either.programs, options.updates.moments, options.slots.min(n));
        }
        for choice in if anywhere { self.choices_anywhere(n) } else { self.choices(n) } {
            kept.iter().chain(&again).rev().for_each(|shards| self.offer(shards, &choice));
            if let (Some(kept), Some(again)) = (&kept, &again) {
                self.offer_mixed(kept, again, &choice);
            }
        }
    }

    /// The ways to place state that are worth trying for a cut into `n`, smallest first.
    fn choices(&self, n: usize) -> Vec<Choice> {
        let (slots, microbatches) = (self.options.slots.min(n), self.model.microbatches);
        let deep = slots > 1;
        let spread = self.options.spread;
        let told_updates = self.options.visiting_updates.filter(|_| !spread.is_stages()).map_or(0, |told| told.min(n));
        let mut choices = Vec::new();
        for resident in [false, true] {
            let lone = self.model.layers() == 1;
            let pointless = !resident && n == 1 && !lone && self.options.resident.is_none();
            if self.options.resident.is_some_and(|r| r != resident) || pointless {
                continue;
            }
            for stay in [false, true] {
                if self.options.boundaries_stay.is_some_and(|s| s != stay) {
                    continue;
                }
                let tier = |entries| if stay { BoundaryTier::Device } else { BoundaryTier::Host { entries } };
                // Single entries leave no room to copy beside the arithmetic: small, and only for small budgets.
                let depths: &[(usize, usize, usize, usize)] =
                    if !deep { &[(1, 2, 2, 1)] } else { &[(1, 2, 2, 1), (1, 3, 3, 2), (2, 3, 3, 2)] };
                let evens: &[bool] = if !resident && !spread.is_pipelined() && have_large(&self.visits, slots) {
                    &[false, true]
                } else {
                    &[false]
                };
                for (&(gradient_slots, activations, gradients, input_entries), &even_slots) in
                    depths.iter().flat_map(|depth| evens.iter().map(move |even| (depth, even)))
                {
                    choices.push(Choice {
                        even_slots,
                        resident,
                        resting: if resident { 0 } else { self.options.resting.unwrap_or(0).min(n - 1) },
                        slots,
                        gradient_slots: gradient_slots.min(n),
                        activations: tier(activations),
                        gradients: tier(gradients.min(microbatches + 1)),
                        input_entries,
                        visiting_updates: if resident { 0 } else { told_updates },
                        update_pieces: usize::MAX,
                        crosses: spread.is_stages(),
                        pipelined: spread.is_pipelined(),
                        ..Choice::default()
                    });
                }
            }
        }
        choices
    }

    /// The ways for a model whose shards run anywhere, smallest first.
    fn choices_anywhere(&self, n: usize) -> Vec<Choice> {
        let slots = self.options.slots;
        // With four entries of a ring what comes in need not wait for what goes out.
        const DEPTHS: [(usize, usize, usize, usize); 5] =
            [(1, 2, 2, 1), (2, 2, 2, 1), (1, 3, 3, 2), (2, 3, 3, 2), (2, 4, 4, 2)];
        let depths = if slots == 1 { &DEPTHS[..1] } else { &DEPTHS };
        let of = |visiting_updates: usize| {
            depths.iter().map(move |&(gradient_slots, activations, gradients, input_entries)| Choice {
                slots,
                even_slots: true,
                gradient_slots,
                activations: BoundaryTier::Host { entries: activations },
                gradients: BoundaryTier::Host { entries: gradients },
                input_entries,
                visiting_updates,
                update_pieces: usize::MAX,
                ..Choice::default()
            })
        };
        of(0).chain(of(n)).collect()
    }

    fn draft<'s>(&self, shards: &'s Shards, choice: &'s Choice) -> Draft<'s>
    where
        'a: 's,
    {
        Draft { model: self.model, shards, choice, updates: self.options.updates, cost: self.cost }
    }

    fn fits(&self, arena_bytes: u64) -> bool {
        self.options.device_budget.is_none_or(|budget| arena_bytes <= budget)
    }

    /// How much of its state is at home on the disk, if all has a home. Of those that have none, what the ones need that
    /// need least is kept.
    fn home(&mut self, found: &Found) -> Option<OnDisk> {
        let options = self.options;
        let Some(host) = options.homes.host else { return Some(options.on_disk.unwrap_or(OnDisk::Nothing)) };
        let bytes = |on_disk: OnDisk| home_bytes(self.draft(&found.shards, &found.choice).tenant(), on_disk);
        let homes: Vec<(u64, u64)> = match options.on_disk {
            None => OnDisk::ALL.into_iter().map(bytes).collect(),
            // However large that disk is.
            Some(told) => vec![(bytes(told).0, 0)],
        };
        let host_bytes = homes.iter().filter(|(_, disk)| *disk <= options.homes.disk).map(|(host, _)| *host).min();
        let disk_bytes = homes.iter().filter(|(bytes, _)| *bytes <= host).map(|(_, disk)| *disk).min();
        if host_bytes.is_some_and(|bytes| bytes <= host) {
            let level = homes.iter().position(|(bytes, _)| *bytes <= host).map(|level| OnDisk::ALL[level]);
            return options.on_disk.or(level);
        }
        let keep = |least: &mut Option<(u64, Found)>, needs: Option<u64>| {
            if let Some(needs) = needs.filter(|needs| least.as_ref().is_none_or(|(least, _)| needs < least)) {
                *least = Some((needs, found.clone()));
            }
        };
        keep(&mut self.homeless, host_bytes);
        keep(&mut self.diskless, disk_bytes);
        None
    }

    /// Looks at a choice, and at what follows from it.
    fn offer(&mut self, shards: &Shards, choice: &Choice) {
        self.offer_one(shards, choice);
        self.offer_resting(shards, choice);
        if choice.visiting_updates > 0 && !self.options.spread.is_anywhere() {
            let with = Choice { update_pieces: FEW_PIECES, ..choice.clone() };
            self.offer_one(shards, &with);
            self.offer_resting(shards, &with);
        }
        self.offer_visiting_updates(shards, choice);
    }

    fn offer_one(&mut self, shards: &Shards, choice: &Choice) {
        let draft = self.draft(shards, choice);
        let arena = arena_of(draft.tenant(), self.options.spread);
        // The smallest must not depend on the budget, as what a mixed plan keeps does.
        let keeps = |s: &ShardPrograms| s.kept;
        let inner = &shards.programs[..shards.programs.len() - 1];
        let is_mixed = self.options.kept.is_none() && inner.iter().any(keeps) && !inner.iter().all(keeps);
        let is_smallest = !is_mixed && self.smallest.as_ref().is_none_or(|s| arena.bytes < s.arena.bytes);
        if !is_smallest && !self.fits(arena.bytes) {
            return;
        }
        let (estimated_secs, too_long_secs) = match self.options.spread {
            Spread::One | Spread::Stages { .. } => (estimate_secs(draft, &arena), 0.0),
            Spread::Anywhere(want) => (estimate_anywhere_secs(draft, want.devices), too_long_secs(draft, want)),
        };
        let rank_secs = estimated_secs + too_long_secs;
        let found = |arena| Found { shards: shards.clone(), choice: choice.clone(), arena, estimated_secs, rank_secs };
        if is_smallest {
            self.smallest = Some(found(arena.clone()));
        }
        if !self.fits(arena.bytes) {
            return;
        }
        let mut found = found(arena);
        if !self.fastest.wants(&found) {
            return;
        }
        let Some(on_disk) = self.home(&found) else { return };
        // Not all of the shorter is hidden behind the longer.
        let disk = disk_secs(draft, on_disk);
        let more = (disk - estimated_secs).max(0.0) + 0.1 * disk.min(estimated_secs);
        found.estimated_secs += more;
        found.rank_secs += more;
        if self.fastest.wants(&found) {
            self.fastest.keep(found);
        }
    }

    /// The same with some shards at rest: as many as fit, and as many as take the fewest bytes.
    fn offer_resting(&mut self, shards: &Shards, choice: &Choice) {
        let (options, n) = (self.options, shards.programs.len());
        let pointless = choice.resident || choice.pipelined || choice.crosses || n == 1;
        let told = options.resident.is_some() || options.resting.is_some();
        if pointless || told || options.spread.is_anywhere() {
            return;
        }
        let with = |resting: usize| Choice { resting, ..choice.clone() };
        let at_rest = bytes_at_rest(&self.visits);
        // What rests alone may be too much already.
        let within = |search: &Self, resting: usize, most: u64| {
            let map = || arena_of(search.draft(shards, &with(resting)).tenant(), options.spread);
            at_rest[resting] <= most && map().bytes <= most
        };
        let starts = resting_counts(&self.visits, choice);
        // With updates on the device they take no fewer bytes than without.
        if choice.visiting_updates == 0 || options.visiting_updates.is_some() {
            for &start in &starts {
                let smaller = self.smallest.as_ref().map_or(u64::MAX, |s| s.arena.bytes.saturating_sub(1));
                if within(self, start, smaller) {
                    self.offer_one(shards, &with(start));
                }
            }
        }
        let Some(budget) = options.device_budget else { return };
        let Some(i) = starts.iter().rposition(|&start| within(self, start, budget)) else { return };
        let (mut most, mut too_many) = (starts[i], starts.get(i + 1).copied().unwrap_or(n));
        while most + 1 < too_many {
            let middle = usize::midpoint(most, too_many);
            if within(self, middle, budget) { most = middle } else { too_many = middle }
        }
        self.offer_one(shards, &with(most));
    }

    /// The same with some of the shards that visit updated on the device instead of by the host, whose updates may take
    /// longest of all, or of which a step waits for the first.
    fn offer_visiting_updates(&mut self, shards: &Shards, choice: &Choice) {
        let options = self.options;
        let told = options.visiting_updates.is_some() || options.spread.is_anywhere();
        if told || choice.resident || choice.slots == 1 || choice.pipelined || choice.crosses {
            return;
        }
        // Nothing can be gained on what already takes no longer than this arithmetic.
        let arithmetic = self.model.microbatches as f64 * shards.secs.iter().flatten().sum::<f64>();
        if self.fastest.is_below(1.02 * arithmetic) {
            return;
        }
        let n = shards.programs.len();
        let mut counts = vec![1, 2, n / 4, n / 2, 3 * n / 4, n];
        counts.retain(|&count| count > 0 && count <= n);
        counts.sort_unstable();
        counts.dedup();
        for visiting_updates in counts {
            for update_pieces in [usize::MAX, FEW_PIECES] {
                let with = Choice { visiting_updates, update_pieces, ..choice.clone() };
                self.offer_one(shards, &with);
                self.offer_resting(shards, &with);
            }
        }
    }

    /// Keeps the activations of as many shards as fit, those first that save most seconds a byte.
    fn offer_mixed(&mut self, kept: &Shards, again: &Shards, choice: &Choice) {
        let Some(budget) = self.options.device_budget else { return };
        let bytes = |shards: &Shards| arena_map(self.draft(shards, choice).tenant()).bytes;
        if bytes(kept) <= budget || bytes(again) > budget {
            return;
        }
        let worth = |s: usize| {
            let saved = kept.programs[s].forward.as_ref().map_or(0, |p| p.bytes(crate::graph::Area::Saved)).max(1);
            (again.secs[s][1] - kept.secs[s][1]) / saved as f64
        };
        let mut order: Vec<usize> = (0..kept.programs.len().saturating_sub(1)).collect();
        order.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(b.cmp(&a)));
        let mut mixed = again.clone();
        let take = |mixed: &mut Shards, from: &Shards, s: usize| {
            mixed.programs[s] = from.programs[s].clone();
            mixed.secs[s] = from.secs[s];
        };
        for s in order {
            take(&mut mixed, kept, s);
            if bytes(&mixed) > budget {
                take(&mut mixed, again, s);
            }
        }
        self.offer(&mixed, choice);
    }
}

/// By how much the chain and the longest unit of a model that runs anywhere take longer than is wanted.
fn too_long_secs(draft: Draft, want: Anywhere) -> f64 {
    let longest = || draft.shards.secs.iter().map(|s| s[1]).fold(0.0, f64::max);
    let late = want.chain_secs.map_or(0.0, |want| (chain_secs(draft) - want).max(0.0));
    late + want.unit_secs.map_or(0.0, |want| (draft.model.microbatches as f64 * longest() - want).max(0.0))
}
