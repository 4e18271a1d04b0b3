//! The plan: the cut, what stays on the device, what is recomputed. Of the plans that fit the budgets it is the fastest
//! by a cost model.
//!
//! A plan never changes a bit of the result, only time and bytes.

use super::found::Found;
use super::homes::{HomeBudgets, Homes, choose_homes, no_home};
use super::memory::{ArenaMap, Choice, Tenant};
use super::model::Model;
use super::search::Search;
use super::shard::ShardPrograms;
use super::store::{HostMap, OnDisk, home_bytes, host_map, pieces_of};
use crate::base::{Error, Result, format_bytes};
use crate::device::sim::CostModel;
use crate::graph::ShardLayout;
use std::ops::Range;

/// Whether a shard's forward is computed again in its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Recompute {
    /// Only where memory forces it.
    #[default]
    Auto,
    /// Everywhere, including the last shard, whatever the cut, so that compared schedules do equal work.
    Always,
    /// Nowhere; an error where that does not fit.
    Never,
}

/// What the updates of a step need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Updates {
    /// Moments that the optimizer keeps for each parameter: 2 for AdamW, 1 for SGD with momentum, else 0.
    pub moments: usize,
    /// Whether gradients are clipped by their global norm: then no update starts before the last gradient.
    pub clips: bool,
}

impl Updates {
    /// No moments and no clipping: SGD without momentum, or a model that is only evaluated.
    pub const PLAIN: Updates = Updates { moments: 0, clips: false };
}

impl Default for Updates {
    /// AdamW's, without clipping.
    fn default() -> Self {
        Updates { moments: 2, clips: false }
    }
}

/// How a model's shards spread over devices.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Spread {
    /// All run on one device.
    #[default]
    One,
    /// Each shard has one of several devices as its home.
    Stages {
        /// Microbatches flow through the shards as a pipeline, instead of all through one shard before the next.
        pipelined: bool,
    },
    /// Each shard may run on a different device every time, and nothing stays on a device after a visit.
    Anywhere(Anywhere),
}

/// Requirements on the units of a model whose shards run anywhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Anywhere {
    /// Number of devices.
    pub devices: usize,
    /// Where the model bounds the makespan: the seconds that a step should take if it never waits for a device, with
    /// its microbatches pipelined from unit to unit. The plan is then judged by this chain too, not only by device
    /// time.
    pub chain_secs: Option<f64>,
    /// The most seconds that a unit should take. The finer the units of all models, the sooner a device is free for the
    /// next one.
    pub unit_secs: Option<f64>,
}

impl Spread {
    /// Anywhere on this many devices, with no requirement on units.
    pub fn anywhere(devices: usize) -> Spread {
        Spread::Anywhere(Anywhere { devices, chain_secs: None, unit_secs: None })
    }

    /// Whether shards have homes on several devices.
    pub(super) fn is_stages(self) -> bool {
        matches!(self, Spread::Stages { .. })
    }

    /// Whether microbatches flow through such shards as a pipeline.
    pub(super) fn is_pipelined(self) -> bool {
        self == Spread::Stages { pipelined: true }
    }

    /// Whether shards run anywhere.
    pub(super) fn is_anywhere(self) -> bool {
        matches!(self, Spread::Anywhere(_))
    }
}

/// What a plan must keep to: first budgets and preferences, then choices that are forced instead of searched for, for
/// studies and tests.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    /// Bytes of the device's arena; `None`: as many as the fastest plan wants.
    pub device_budget: Option<u64>,
    /// Bytes of the host store and of the disk tier.
    pub homes: HomeBudgets,
    /// Weight slots; 1: no double buffering.
    pub slots: usize,
    /// Recomputation.
    pub recompute: Recompute,
    /// What the optimizer needs.
    pub updates: Updates,
    /// One device or several.
    pub spread: Spread,
    /// A cut to use instead of searching.
    pub cut: Option<Vec<Range<usize>>>,
    /// For each shard of `cut`, whether its forward's activations are kept instead of recomputed; a model that runs
    /// anywhere keeps none.
    pub kept: Option<Vec<bool>>,
    /// Force what has its home on disk, whatever the budgets; `None`: as little as possible.
    pub on_disk: Option<OnDisk>,
    /// Force state to stay on the device, or all of it to leave it.
    pub resident: Option<bool>,
    /// Force how many shards' state rests on the device where not all does, as far as there are as many; `None`: as
    /// many as fit.
    pub resting: Option<usize>,
    /// Force how many of the visiting shards are updated on the device, as far as there are as many; `None`: the number
    /// with the shortest step.
    pub visiting_updates: Option<usize>,
    /// Force boundary tensors to stay on the device, or to leave it.
    pub boundaries_stay: Option<bool>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions {
            device_budget: None,
            homes: HomeBudgets::default(),
            slots: 2,
            recompute: Recompute::Auto,
            updates: Updates::default(),
            spread: Spread::One,
            cut: None,
            kept: None,
            on_disk: None,
            resident: None,
            resting: None,
            visiting_updates: None,
            boundaries_stay: None,
        }
    }
}

/// A model's plan for one device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The shards, in order.
    pub shards: Vec<ShardPrograms>,
    /// Which state stays on the device and which visits.
    pub choice: Choice,
    /// The device's arena.
    pub arena: ArenaMap,
    /// The host's store.
    pub host: HostMap,
    /// What the updates need.
    pub updates: Updates,
    /// The smallest device budget for which there is a plan under the same options.
    pub smallest_device_bytes: u64,
    /// Estimated seconds of a step, by which the plan was chosen.
    pub estimated_secs: f64,
}

impl Plan {
    /// The fastest plan that fits, by a quick estimate; [`plan_alone`](crate::engine::plan_alone) compares the best few
    /// by simulating the executor.
    ///
    /// # Errors
    /// [`Error::OutOfBudget`] when no plan fits, with a table of what the smallest needs.
    pub fn new(model: &Model, options: &PlanOptions, cost: &CostModel) -> Result<Plan> {
        Ok(Plan::sketch(model, options, cost)?.own(model, options.recompute))
    }

    /// The plan of [`Plan::new`], of stand-ins, to compare with others.
    pub(super) fn sketch(model: &Model, options: &PlanOptions, cost: &CostModel) -> Result<Plan> {
        Ok(Plan::sketches(model, options, cost)?.swap_remove(0))
    }

    /// The plans that may be the fastest of all, that of [`Plan::new`] first; of stand-ins, for a simulated device alone
    /// until they are [`Plan::own`]. At least one.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub(crate) fn sketches(model: &Model, options: &PlanOptions, cost: &CostModel) -> Result<Vec<Plan>> {
        if options.slots == 0 {
            return Err(Error::bad("slots is 0; at least 1 is needed"));
        }
        let mut search = Search::new(model, options, cost);
        search.run()?;
        let Search { fastest, smallest, homeless, diskless, .. } = search;
        let candidates = fastest.into_candidates();
        let smallest = smallest.expect("every model has the cut into its layers, and each cut a smallest choice");
        let needs = smallest.arena.bytes;
        let budgets = options.homes;
        if candidates.is_empty() {
            let Some((_, homeless)) = homeless else {
                return Err(refusal(model, &smallest.plan(model, options, needs), options));
            };
            let homeless = homeless.plan(model, options, needs);
            if let Some(on_disk) = options.on_disk {
                return Ok(vec![homeless.at_home(model, on_disk)]);
            }
            let diskless = diskless.map(|(_, found)| found.plan(model, options, needs).homes(model));
            return Err(no_home(homeless.homes(model), diskless, budgets, needs));
        }
        let at_home = |found: Found| {
            let plan = found.plan(model, options, needs);
            let on_disk = match options.on_disk {
                Some(on_disk) => on_disk,
                None => choose_homes(&[plan.homes(model)], budgets, needs)?[0],
            };
            Ok(if on_disk == OnDisk::Nothing { plan } else { plan.at_home(model, on_disk) })
        };
        candidates.into_iter().map(at_home).collect()
    }

    /// A sketch with its shards' own programs.
    pub(crate) fn own(mut self, model: &Model, recompute: Recompute) -> Plan {
        let sizes = |s: &ShardPrograms| [s.boundary_bytes, s.workspace_bytes(), s.input_bytes(), s.slot_bytes()];
        for shard in &mut self.shards {
            let layers = shard.layout.layers.clone();
            let own = ShardPrograms::new(model, layers, shard.kept, recompute == Recompute::Always);
            debug_assert_eq!(sizes(&own), sizes(shard));
            *shard = own;
        }
        self
    }

    /// The pieces in which a shard's own gradients leave, are applied, and its weights come back for the next step, as
    /// ranges in bytes of weights from the shard's first.
    ///
    /// In pieces these three overlap, which matters most between two steps, where the first shard's gradient is the
    /// last to leave and its weights are the first to be needed. Pieces also keep a copy that can wait from blocking a
    /// lane for a more urgent one. With one slot there is one piece: without double buffering nothing of a shard moves
    /// while another computes.
    pub fn pieces(&self, shard: usize) -> Vec<Range<u64>> {
        pieces_of(&self.choice, shard, self.shards[shard].own_bytes(), self.host.copy_stage_bytes)
    }

    /// What of it decides where everything lies.
    pub(super) fn tenant<'a>(&'a self, model: &'a Model) -> Tenant<'a> {
        Tenant { model, shards: &self.shards, choice: &self.choice, moments: self.updates.moments }
    }

    /// What it takes of host memory and of the disk tier, by what is at home in that.
    pub(super) fn homes(&self, model: &Model) -> Homes {
        OnDisk::ALL.map(|on_disk| home_bytes(self.tenant(model), on_disk))
    }

    /// The same plan with more or less of its state at home in the disk tier.
    pub(super) fn at_home(&self, model: &Model, on_disk: OnDisk) -> Plan {
        let choice = Choice { on_disk, ..self.choice.clone() };
        let host = host_map(Tenant { choice: &choice, ..self.tenant(model) });
        Plan { host, choice, ..self.clone() }
    }

    /// How many shards are updated on the device that computed their gradients.
    pub fn device_updates(&self) -> usize {
        self.choice.updated_of(self.shards.len())
    }

    /// Whether it is of `model`: the same layers, with state and tensors of the same sizes.
    pub(crate) fn is_of(&self, model: &Model) -> bool {
        let mut next = 0;
        let is_next = |shard: &ShardPrograms| {
            let layers = shard.layout.layers.clone();
            let follows = std::mem::replace(&mut next, layers.end) == layers.start;
            follows
                && layers.end <= model.layers()
                && shard.layout == ShardLayout::new(&model.train, &model.layout, layers)
        };
        self.shards.iter().all(is_next) && next == model.layers() && self.host == host_map(self.tenant(model))
    }

    /// How many shards' state stays on the device.
    pub fn resting_shards(&self) -> usize {
        self.choice.resting_of(self.shards.len())
    }

    /// Names of a shard's layers.
    pub fn layer_names<'a>(&self, model: &'a Model, shard: usize) -> Vec<&'a str> {
        self.shards[shard].layout.layers.clone().map(|l| model.train.layers[l].name.as_str()).collect()
    }

    /// The arena's bytes by purpose, for display: name and bytes.
    pub fn arena_table(&self) -> Vec<(&'static str, u64)> {
        let (a, n) = (&self.arena, self.shards.len());
        let until = |from: Option<&u64>, to: u64| from.map_or(0, |&f| to.saturating_sub(f));
        // Stretches lie in this order, so each ends where the next begins.
        let workspace = a.bytes - a.workspace;
        let saved_start = a.saved.iter().flatten().min().copied().unwrap_or(a.workspace);
        let gradients_start = a.gradients.first().copied().unwrap_or(saved_start);
        let activations_start = a.activations.first().copied().unwrap_or(gradients_start);
        let state_start =
            a.remainders.iter().chain(&a.moments[0]).chain(&a.update_slots).min().copied().unwrap_or(activations_start);
        let slots_start = a.gradient_slots.at.first().copied().unwrap_or(state_start);
        let mut rows = vec![
            ("batch inputs and results", a.weight_slots.at.first().copied().unwrap_or(0)),
            ("weights", until(a.weight_slots.at.first(), slots_start)),
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

    /// The table as lines of a message.
    pub(super) fn arena_lines(&self) -> String {
        let line = |(what, bytes)| format!("  {what:<26} {bytes:>14} bytes  {:>12}\n", format_bytes(bytes));
        self.arena_table().into_iter().map(line).collect()
    }
}

/// Says what does not fit, with a table of what the smallest plan needs.
fn refusal(model: &Model, smallest: &Plan, options: &PlanOptions) -> Error {
    let needs = smallest.arena.bytes;
    let budget = options.device_budget.unwrap_or(0);
    let count = |n: usize, what: &str| if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") };
    let mut message = format!(
        "device memory: the smallest plan needs {needs} bytes ({}), the budget is {budget} bytes ({})\n",
        format_bytes(needs),
        format_bytes(budget)
    );
    message += &format!(
        "  the smallest plan has {} and {}:\n",
        count(smallest.shards.len(), "shard"),
        count(smallest.arena.weight_slots.at.len(), "weight slot")
    );
    message += &smallest.arena_lines();
    message += &format!("  smallest budget that works {needs:>14} bytes: memory = {needs}");
    let samples = model.train.inputs.iter().filter_map(|input| input.shape.axes().first()).copied().max();
    let advice = [
        ("fewer slots", options.slots > 1),
        ("a smaller microbatch", samples > Some(1)),
        ("a smaller loss_rows", !model.train.loss_parts.is_empty()),
        ("recompute = \"auto\"", options.recompute != Recompute::Auto),
    ];
    let advice: Vec<&str> = advice.into_iter().filter(|(_, is_other)| *is_other).map(|(what, _)| what).collect();
    if let [others @ .., last] = &advice[..] {
        let before = if others.is_empty() { String::new() } else { format!("{} or ", others.join(", ")) };
        message += &format!("; {before}{last} may need less");
    }
    Error::OutOfBudget { message, smallest_device_bytes: needs }
}
