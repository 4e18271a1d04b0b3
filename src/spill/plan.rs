//! The plan: the cut, what stays on the device, what is recomputed; the fastest by a cost model among those that fit the budgets.
//!
//! The search tries every number of shards with each cut rule, and for each the few ways to place state that are worth having. A plan
//! never decides a bit of the result, only time and bytes.

use super::cut::{CutRule, balanced, max_fill};
use super::estimate::{estimate_anywhere_secs, estimate_secs};
use super::fleet::anywhere_map;
use super::memory::{ArenaMap, BoundaryTier, Choice, HostMap, arena_map, host_map};
use super::model::Model;
use super::shard::ShardPrograms;
use crate::base::{Error, Result, align_up, format_bytes};
use crate::device::sim::CostModel;
use crate::graph::ALIGNMENT;
use std::collections::HashSet;
use std::ops::Range;

/// Whether a shard's forward is computed again in its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Recompute {
    /// Only where memory forces it.
    #[default]
    Auto,
    /// Everywhere, the last shard included, whatever the cut: so that compared schedules do equal work.
    Always,
    /// Nowhere; refused where that does not fit.
    Never,
}

/// What a plan must keep to.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    /// Bytes of the device's arena; `None` is as many as the fastest plan wants.
    pub device_budget: Option<u64>,
    /// Bytes of the host's store.
    pub host_budget: Option<u64>,
    /// Weight slots; 1 is no double buffering.
    pub slots: usize,
    /// Recomputation.
    pub recompute: Recompute,
    /// Moments that the optimizer keeps for each parameter: 2 for AdamW, 1 for SGD with momentum, else 0.
    pub moments: usize,
    /// A cut to use instead of searching.
    pub cut: Option<Vec<Range<usize>>>,
    /// For each shard of `cut`, whether its forward is kept instead of recomputed.
    pub kept: Option<Vec<bool>>,
    /// A cut rule to use instead of trying the balanced ones.
    pub rule: Option<CutRule>,
    /// Force state to stay on the device, or to leave it.
    pub resident: Option<bool>,
    /// Force boundary tensors to stay on the device, or to leave it.
    pub boundaries_stay: Option<bool>,
    /// For a model among others, whose shards may each run on another of so many devices: nothing stays on a device after a visit.
    pub anywhere: Option<usize>,
    /// Shards are at home on several devices.
    pub crosses: bool,
    /// Microbatches go through the shards one behind the other, instead of all through one before the next.
    pub pipelined: bool,
    /// Whether gradients are clipped by their global norm: no update before the last gradient.
    pub clips: bool,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions {
            device_budget: None,
            host_budget: None,
            slots: 2,
            recompute: Recompute::Auto,
            moments: 2,
            cut: None,
            kept: None,
            rule: None,
            resident: None,
            boundaries_stay: None,
            anywhere: None,
            crosses: false,
            pipelined: false,
            clips: false,
        }
    }
}

/// A model's plan for one device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The shards, in order.
    pub shards: Vec<ShardPrograms>,
    /// Where state lives.
    pub choice: Choice,
    /// The device's arena.
    pub arena: ArenaMap,
    /// The host's store.
    pub host: HostMap,
    /// Moments kept for each parameter.
    pub moments: usize,
    /// The smallest device budget for which there is a plan under the same options.
    pub smallest_device_bytes: u64,
    /// Estimated seconds of a step, by which it was chosen.
    pub estimated_secs: f64,
}

impl Plan {
    /// The fastest plan that fits.
    ///
    /// # Errors
    /// [`Error::OutOfBudget`] when none fits, with a table of what the smallest needs.
    pub fn new(model: &Model, options: &PlanOptions, cost: &CostModel) -> Result<Plan> {
        if options.slots == 0 {
            return Err(Error::bad("slots is 0; at least 1 is needed"));
        }
        let mut search = Search { model, options, cost, best: None, smallest: None };
        // The cuts must not depend on what was measured this time, or the smallest budget would change from run to run.
        for cut in cuts(model, options, &CostModel::stated(1e11, 2e10, 1e10))? {
            search.try_cut(&cut);
        }
        let smallest =
            search.smallest.expect("every model has the cut into its layers, and each cut a smallest choice");
        match search.best {
            Some(mut plan) => {
                plan.smallest_device_bytes = smallest.arena.bytes;
                if let Some(budget) = options.host_budget
                    && plan.host.bytes > budget
                {
                    return Err(Error::OutOfBudget {
                        message: format!(
                            "the host's store needs {} ({} bytes), its budget is {} ({budget} bytes)",
                            format_bytes(plan.host.bytes),
                            plan.host.bytes,
                            format_bytes(budget)
                        ),
                        smallest_device_bytes: smallest.arena.bytes,
                    });
                }
                Ok(plan)
            }
            None => Err(refusal(&smallest, options)),
        }
    }

    /// The stretches in which a shard's own gradients leave, are applied, and its weights come back for the next step, in bytes of weights
    /// from the shard's first.
    ///
    /// In pieces these three overlap, which matters most at the turn of the step, where the first shard's gradient is the last to leave
    /// and its weights are the first to be needed; and no copy that can wait keeps a lane from a more urgent one for long. With one slot
    /// there is one piece: no double buffering means that nothing of a shard moves while another computes.
    pub fn pieces(&self, shard: usize) -> Vec<Range<u64>> {
        // Smaller pieces cost more to start than they hide: at 10 GB/s this is 26 microseconds.
        const LEAST_BYTES: u64 = 256 << 10;
        const MOST: u64 = 8;
        let own = &self.shards[shard].layout.own;
        let bytes = own.end - own.start;
        let whole = self.choice.resident || self.choice.updates_on_device || self.choice.slots == 1;
        let most = if whole { 1 } else { MOST };
        let count = most.min(bytes / LEAST_BYTES).max(1);
        let at = |i: u64| if i == count { bytes } else { align_up(bytes * i / count, ALIGNMENT) };
        (0..count).map(|i| at(i)..at(i + 1)).collect()
    }

    /// Names of a shard's layers.
    pub fn layer_names<'a>(&self, model: &'a Model, shard: usize) -> Vec<&'a str> {
        self.shards[shard].layout.layers.clone().map(|l| model.train.layers[l].name.as_str()).collect()
    }

    /// Stretches of the arena by purpose, for people: name and bytes.
    pub fn arena_table(&self) -> Vec<(&'static str, u64)> {
        let (a, n) = (&self.arena, self.shards.len());
        let until = |from: Option<&u64>, to: u64| from.map_or(0, |&f| to.saturating_sub(f));
        // Stretches lie in this order, so each ends where the next begins.
        let workspace = a.bytes - a.workspace;
        let saved_start = a.saved.iter().flatten().min().copied().unwrap_or(a.workspace);
        let gradients_start = a.gradients.first().copied().unwrap_or(saved_start);
        let activations_start = a.activations.first().copied().unwrap_or(gradients_start);
        let state_start = a.remainders.iter().chain(&a.moments[0]).min().copied().unwrap_or(activations_start);
        let slots_start = a.gradient_slots.first().copied().unwrap_or(state_start);
        let mut rows = vec![
            ("batch inputs and results", a.weight_slots.first().copied().unwrap_or(0)),
            ("weights", until(a.weight_slots.first(), slots_start)),
            ("gradients", state_start - slots_start),
            ("optimizer state", activations_start - state_start),
            ("boundary activations", gradients_start - activations_start),
            ("boundary gradients", saved_start - gradients_start),
            ("kept activations", a.workspace - saved_start),
            ("workspace", workspace),
        ];
        rows.retain(|&(_, bytes)| bytes > 0 || n == 0);
        rows
    }
}

/// The cuts to try, each once.
fn cuts(model: &Model, options: &PlanOptions, cost: &CostModel) -> Result<Vec<Vec<Range<usize>>>> {
    let layers = model.layers();
    if let Some(cut) = &options.cut {
        let whole = cut.first().is_some_and(|r| r.start == 0) && cut.last().is_some_and(|r| r.end == layers);
        if !whole || cut.iter().any(|r| r.is_empty()) || cut.windows(2).any(|w| w[0].end != w[1].start) {
            return Err(Error::bad(format!("the cut {cut:?} does not divide {layers} layers")));
        }
        return Ok(vec![cut.clone()]);
    }
    let single: Vec<ShardPrograms> = (0..layers).map(|l| ShardPrograms::new(model, l..l + 1, false, false)).collect();
    let secs: Vec<f64> = single.iter().map(|s| s.forward_secs(cost) + s.backward_secs(cost)).collect();
    let bytes: Vec<f64> = single.iter().map(|s| s.layout.weight_bytes as f64).collect();
    let mut seen = HashSet::new();
    let mut cuts = Vec::new();
    // Every count up to 16, then about ten in each doubling: more shards than that differ little.
    let counts = (1..=layers).filter(|&n| n <= 16 || n == layers || n % (n.ilog2() as usize * n / 64).max(1) == 0);
    for n in counts {
        let mut add = |cut: Vec<Range<usize>>| {
            if seen.insert(cut.clone()) {
                cuts.push(cut);
            }
        };
        match options.rule {
            Some(CutRule::BalancedSecs) => add(balanced(&secs, n)),
            Some(CutRule::BalancedBytes) => add(balanced(&bytes, n)),
            Some(CutRule::MaxFill) => {
                // The largest shard of n layers-worth: capacity is what a shard of the heaviest n-th holds.
                let capacity = (bytes.iter().sum::<f64>() / n as f64).max(bytes.iter().copied().fold(0.0, f64::max));
                let of = |r: Range<usize>| bytes[r].iter().sum::<f64>() as u64;
                max_fill(layers, capacity as u64, of).into_iter().for_each(&mut add);
            }
            None => {
                add(balanced(&secs, n));
                add(balanced(&bytes, n));
            }
        }
    }
    Ok(cuts)
}

struct Search<'a> {
    model: &'a Model,
    options: &'a PlanOptions,
    cost: &'a CostModel,
    best: Option<Plan>,
    smallest: Option<Plan>,
}

impl Search<'_> {
    fn try_cut(&mut self, cut: &[Range<usize>]) {
        let n = cut.len();
        let twice = self.options.recompute == Recompute::Always;
        let build = |keep: bool| -> Vec<ShardPrograms> {
            cut.iter().map(|r| ShardPrograms::new(self.model, r.clone(), keep, twice)).collect()
        };
        if let Some(keep) = &self.options.kept {
            let of = |s: usize| keep.get(s).copied().unwrap_or(false);
            let shards: Vec<ShardPrograms> =
                cut.iter().enumerate().map(|(s, r)| ShardPrograms::new(self.model, r.clone(), of(s), twice)).collect();
            for choice in self.choices(n) {
                self.offer(shards.clone(), &choice);
            }
            return;
        }
        if self.options.anywhere.is_some() {
            if self.options.recompute != Recompute::Never || n == 1 {
                let shards = build(false);
                self.choices_anywhere().iter().for_each(|choice| self.offer(shards.clone(), choice));
            }
            return;
        }
        let kept = (self.options.recompute != Recompute::Always).then(|| build(true));
        let again = (self.options.recompute != Recompute::Never || n == 1).then(|| build(false));
        for choice in self.choices(n) {
            match (&kept, &again) {
                (Some(kept), Some(again)) => {
                    self.offer(again.clone(), &choice);
                    self.offer(kept.clone(), &choice);
                    self.offer_mixed(kept, again, &choice);
                }
                (Some(only), None) | (None, Some(only)) => self.offer(only.clone(), &choice),
                (None, None) => unreachable!("each way to recompute builds one of the two"),
            }
        }
    }

    /// The ways to place state that are worth trying for a cut into `n`, smallest first.
    fn choices(&self, n: usize) -> Vec<Choice> {
        let (slots, microbatches) = (self.options.slots.min(n), self.model.microbatches);
        let deep = slots > 1;
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
                for &(gradient_slots, activations, gradients, input_entries) in depths {
                    choices.push(Choice {
                        resident,
                        slots,
                        gradient_slots: gradient_slots.min(n),
                        activations: tier(activations),
                        gradients: tier(gradients.min(microbatches + 1)),
                        input_entries,
                        updates_on_device: false,
                        crosses: self.options.crosses,
                        pipelined: self.options.pipelined,
                    });
                }
            }
        }
        choices
    }

    /// The ways for a model whose shards run anywhere, smallest first.
    fn choices_anywhere(&self) -> Vec<Choice> {
        let slots = self.options.slots;
        // With four entries of a ring what comes in need not wait for what goes out.
        const DEPTHS: [(usize, usize, usize, usize); 5] =
            [(1, 2, 2, 1), (2, 2, 2, 1), (1, 3, 3, 2), (2, 3, 3, 2), (2, 4, 4, 2)];
        let depths = if slots == 1 { &DEPTHS[..1] } else { &DEPTHS };
        let of = |updates_on_device: bool| {
            depths.iter().map(move |&(gradient_slots, activations, gradients, input_entries)| Choice {
                resident: false,
                slots,
                gradient_slots,
                activations: BoundaryTier::Host { entries: activations },
                gradients: BoundaryTier::Host { entries: gradients },
                input_entries,
                updates_on_device,
                crosses: false,
                pipelined: false,
            })
        };
        let on_device = if self.options.clips { None } else { Some(of(true)) };
        of(false).chain(on_device.into_iter().flatten()).collect()
    }

    fn plan(&self, shards: Vec<ShardPrograms>, choice: &Choice) -> Plan {
        let moments = self.options.moments;
        let host = host_map(self.model, &shards, choice, moments);
        let (arena, estimated_secs) = match self.options.anywhere {
            None => {
                (arena_map(self.model, &shards, choice, moments), estimate_secs(self.model, &shards, choice, self.cost))
            }
            Some(devices) => (
                anywhere_map(self.model, &shards, choice, moments),
                estimate_anywhere_secs(self.model, &shards, choice, moments, devices, self.cost),
            ),
        };
        Plan {
            arena,
            host,
            choice: choice.clone(),
            moments: self.options.moments,
            smallest_device_bytes: 0,
            estimated_secs,
            shards,
        }
    }

    fn fits(&self, plan: &Plan) -> bool {
        self.options.device_budget.is_none_or(|budget| plan.arena.bytes <= budget)
    }

    /// Keeps a plan if it is the best so far. What fits whole is left at rest, with the fewest shards; else the fastest wins, and among
    /// equals the one with fewer shards, then fewer bytes.
    fn offer(&mut self, shards: Vec<ShardPrograms>, choice: &Choice) {
        let plan = self.plan(shards, choice);
        if self.smallest.as_ref().is_none_or(|s| plan.arena.bytes < s.arena.bytes) {
            self.smallest = Some(plan.clone());
        }
        let rank = |p: &Plan| {
            let recomputes = p.shards[..p.shards.len() - 1].iter().any(|s| !s.kept);
            let at_rest = p.choice.resident && (!recomputes || self.options.recompute == Recompute::Always);
            (!at_rest, if at_rest { p.shards.len() } else { 0 })
        };
        let better = |best: &Plan| {
            // Estimates this close are the same.
            let apart = plan.estimated_secs / best.estimated_secs.max(1e-12) - 1.0;
            let by_secs = if apart.abs() < 1e-3 { std::cmp::Ordering::Equal } else { apart.total_cmp(&0.0) };
            let by_size = (plan.shards.len(), plan.arena.bytes).cmp(&(best.shards.len(), best.arena.bytes));
            rank(&plan).cmp(&rank(best)).then(by_secs).then(by_size).is_lt()
        };
        if self.fits(&plan) && self.best.as_ref().is_none_or(better) {
            self.best = Some(plan);
        }
    }

    /// Keeps the activations of as many shards as fit, those first that save most seconds a byte.
    fn offer_mixed(&mut self, kept: &[ShardPrograms], again: &[ShardPrograms], choice: &Choice) {
        let Some(budget) = self.options.device_budget else { return };
        let whole = arena_map(self.model, kept, choice, self.options.moments).bytes;
        if whole <= budget || arena_map(self.model, again, choice, self.options.moments).bytes > budget {
            return;
        }
        let worth = |s: usize| {
            let saved = kept[s].forward.as_ref().map_or(0, |p| p.bytes(crate::graph::Area::Saved)).max(1);
            (again[s].backward_secs(self.cost) - kept[s].backward_secs(self.cost)) / saved as f64
        };
        let mut order: Vec<usize> = (0..kept.len().saturating_sub(1)).collect();
        order.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(b.cmp(&a)));
        let mut mixed = again.to_vec();
        for s in order {
            mixed[s] = kept[s].clone();
            if arena_map(self.model, &mixed, choice, self.options.moments).bytes > budget {
                mixed[s] = again[s].clone();
            }
        }
        self.offer(mixed, choice);
    }
}

/// Says what does not fit, with a table of what the smallest plan needs.
fn refusal(smallest: &Plan, options: &PlanOptions) -> Error {
    let needs = smallest.arena.bytes;
    let budget = options.device_budget.unwrap_or(0);
    let mut message = format!(
        "device memory: the smallest plan needs {needs} bytes ({}), the budget is {budget} bytes ({})\n",
        format_bytes(needs),
        format_bytes(budget)
    );
    message += &format!(
        "  the smallest plan has {} shards and {} weight slots:\n",
        smallest.shards.len(),
        smallest.arena.weight_slots.len()
    );
    for (what, bytes) in smallest.arena_table() {
        message += &format!("  {what:<26} {bytes:>14} bytes  {:>12}\n", format_bytes(bytes));
    }
    message += &format!("  smallest budget that works {needs:>14} bytes: memory = {needs}");
    if options.slots > 1 {
        message += "; fewer slots, a smaller microbatch or recompute = \"auto\" may need less";
    }
    Error::OutOfBudget { message, smallest_device_bytes: needs }
}
