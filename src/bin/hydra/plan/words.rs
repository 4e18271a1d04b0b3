//! A plan in words, for people to read.

use crate::job::Policy;
use crate::machine::MachineDevice;
use crate::plan::advice::what_would_help;
use crate::plan::placing::Sharing;
use crate::plan::planned::{Planned, PlannedJob};
use crate::print::{count, say, table};
use hydra::base::{format_bytes, format_secs};
use hydra::device::sim::DISK_BYTES_PER_SEC;
use hydra::spill::{Baseline, BoundaryTier, Home, OnDisk};
use hydra::trace::Bound;

impl PlannedJob {
    /// A sentence on the devices that will be idle for lack of models, and why; `None` where there are none.
    pub fn idle_devices(&self) -> Option<String> {
        let (models, devices) = (self.models.len(), self.machine.devices.len());
        let used = |d: u16| {
            self.models.iter().any(|m| match &m.placed.home {
                Home::Anywhere => true,
                Home::On(homes) => homes.contains(&d),
            })
        };
        let unused = (0..devices as u16).filter(|&d| !used(d)).count();
        let spare = match self.sharing {
            Sharing::Turns(_) if !self.sharing.pipelines() => devices.saturating_sub(models).max(unused),
            _ => unused,
        };
        if spare == 0 {
            return None;
        }
        let why = match self.sharing {
            Sharing::Alone | Sharing::Turns(_) if models < devices => "a model runs on one device at a time",
            Sharing::Lines(_) if self.job.run.policy == Policy::Lines(Baseline::OneAtATime) => {
                "one-at-a-time uses the first device alone"
            }
            _ => "every model is at home on another",
        };
        Some(format!("{} of {devices} idle at any time: {} and {why}", count(spare, "device"), count(models, "model")))
    }

    /// The bytes of the largest arena and of the store, for people to read.
    pub fn memory_text(&self) -> String {
        let most = self.map.arena_bytes.iter().copied().max().unwrap_or(0);
        let memory = format!("device memory {}, host memory {}", format_bytes(most), format_bytes(self.map.host_bytes));
        if self.map.disk_bytes == 0 {
            return memory;
        }
        let on_disk = self.models.iter().map(|m| m.plan().choice.on_disk).max().unwrap_or_default();
        format!("{memory}, disk {} ({})", format_bytes(self.map.disk_bytes), on_disk.words())
    }
}

/// Prints a few lines about each model's plan.
pub fn summary(planned: &PlannedJob) {
    for model in &planned.models {
        say(headline(model, planned));
    }
    together(planned);
}

/// Prints how several models or devices work together.
pub fn together(planned: &PlannedJob) {
    if planned.sharing == Sharing::Alone {
        planned.idle_devices().into_iter().for_each(say);
        return;
    }
    say(format!(
        "{} on {}, {}: {}; a step of every model is predicted to take {} (no less than {})",
        count(planned.models.len(), "model"),
        planned.machine.devices_text(),
        planned.job.run.policy.word(),
        planned.memory_text(),
        format_secs(planned.step_secs),
        format_secs(planned.bound_secs),
    ));
    let least = planned.smallest_device_bytes;
    say(format!("smallest budget of a device that works: {} ({least} bytes)", format_bytes(least)));
    if planned.sharing.pipelines() {
        say("microbatches of a model that would end last go on from device to device (run.pipeline)");
    }
    if let Some(held) = shards_held(planned) {
        say(held);
    }
    planned.idle_devices().into_iter().for_each(say);
}

/// How many shards each device's weight slots hold, if that is more than the plans ask for.
fn shards_held(planned: &PlannedJob) -> Option<String> {
    let anywhere = || (0..planned.models.len()).filter(|&m| planned.models[m].placed.home == Home::Anywhere);
    let slots: Vec<usize> = planned.map.maps[anywhere().next()?].iter().map(|map| map.weight_slots.at.len()).collect();
    let asked = anywhere().map(|m| planned.models[m].plan().choice.slots).max()?;
    if slots.iter().all(|&slots| slots == asked) {
        return None;
    }
    let shards: usize = anywhere().map(|m| planned.models[m].plan().shards.len()).sum();
    let each = |(device, slots): (usize, &usize)| format!("{slots} on device {device}");
    let each: Vec<String> = slots.iter().enumerate().map(each).collect();
    Some(format!("of {shards} shards that run anywhere, weight slots hold {}", each.join(", ")))
}

fn headline(model: &Planned, planned: &PlannedJob) -> String {
    let plan = model.plan();
    let place = match (plan.choice.resident, &model.placed.home) {
        (true, Home::On(homes)) if planned.machine.devices.len() > 1 => {
            let mut homes: Vec<u16> = homes.clone();
            homes.dedup();
            let homes: Vec<String> = homes.iter().map(u16::to_string).collect();
            format!("all state on device {}", homes.join(", "))
        }
        (true, _) => "all state on the device".to_string(),
        (false, _) => {
            let (resting, slots) = (plan.choice.resting, &plan.arena.weight_slots);
            let home = match plan.choice.on_disk {
                OnDisk::Nothing => "host memory",
                OnDisk::Weights => "the disk tier",
                _ => "host memory and on disk",
            };
            let state = match resting {
                0 => format!("state in {home}"),
                _ => format!("state of the first {} on the device, of others in {home}", count(resting, "shard")),
            };
            let updates = match (plan.choice.visiting_updates, plan.device_updates(), plan.shards.len()) {
                (0, ..) => String::new(),
                (_, updates, all) if updates == all => ", updates on the device".to_string(),
                (_, updates, _) => format!(", updates of the first {} on the device", count(updates, "shard")),
            };
            let large = if slots.has_large(resting) { " and a large one" } else { "" };
            format!("{state}{updates}, {}{large}", count(slots.count_from(resting), "weight slot"))
        }
    };
    let budget = planned.machine.first().budget.map_or(String::new(), |b| format!(" of {}", format_bytes(b)));
    let disk = match plan.choice.on_disk {
        OnDisk::Nothing => String::new(),
        on_disk => format!(", disk {} ({})", format_bytes(plan.host.disk_bytes), on_disk.words()),
    };
    format!(
        "{}: {}, {place}; device memory {}{budget}, host memory {}{disk}\n{}: a step is predicted to take {} (no less than {})",
        model.prepared.name,
        count(plan.shards.len(), "shard"),
        format_bytes(plan.arena.bytes),
        format_bytes(plan.host.bytes),
        model.prepared.name,
        format_secs(model.prediction.step_secs),
        format_secs(model.prediction.bound_secs),
    )
}

/// A full description of a model's plan.
pub fn describe(model: &Planned, planned: &PlannedJob) -> String {
    let (plan, cost) = (model.plan(), &planned.machine.first().cost);
    let mut text = format!("{}\n\n{}", headline(model, planned), shard_table(model, planned.machine.first()));
    let tier = |tier: &BoundaryTier| match tier {
        BoundaryTier::Device => "the device",
        BoundaryTier::Host { .. } => "host memory",
    };
    if plan.shards.len() > 1 {
        let (activations, gradients) = (tier(&plan.choice.activations), tier(&plan.choice.gradients));
        text += &format!("  boundary activations in {activations}, boundary gradients in {gradients}\n");
    }
    if plan.choice.on_disk > OnDisk::Nothing && cost.disk_bytes_per_sec.is_none() {
        text += &format!(
            "  the disk is taken to read and write {}/s; [host] disk = {{ link = ... }} says better\n",
            format_bytes(DISK_BYTES_PER_SEC as u64)
        );
    }
    text += "\ndevice memory\n";
    let mut rows: Vec<Vec<String>> =
        plan.arena_table().into_iter().map(|(what, bytes)| vec![what.to_string(), format_bytes(bytes)]).collect();
    rows.push(vec!["in all".into(), format_bytes(plan.arena.bytes)]);
    if planned.sharing == Sharing::Alone {
        let bytes = plan.smallest_device_bytes;
        rows.push(vec!["smallest budget that works".into(), format!("{} ({bytes} bytes)", format_bytes(bytes))]);
    }
    text += &table(&rows);
    text += &format!("\na step: {}, of which\n", format_secs(model.prediction.step_secs));
    text += &bound_table(&model.prediction.bound);
    if planned.sharing == Sharing::Alone {
        text += &format!("\n{}; what would help:\n{}", the_bound(model), what_would_help(planned));
    }
    text.trim_end().to_string()
}

/// A row for each shard: its layers, its bytes, its tier, its seconds, and what it recomputes.
fn shard_table(model: &Planned, on: &MachineDevice) -> String {
    let (plan, host_tier, microbatches) = (model.plan(), on.kind.host_tier(), model.model().microbatches as f64);
    let mut rows = vec![["shard", "bytes", "tier", "forward", "backward", "recomputes"].map(String::from).to_vec()];
    for (s, shard) in plan.shards.iter().enumerate() {
        let names = plan.layer_names(model.model(), s);
        let layers = match names[..] {
            [one] => one.to_string(),
            [first, .., last] => format!("{first} to {last} ({})", names.len()),
            [] => String::new(),
        };
        rows.push(vec![
            format!("{s}  {layers}"),
            format_bytes(shard.fetch_bytes()),
            match (plan.choice.rests(s), plan.choice.on_disk) {
                (true, _) => "device".to_string(),
                (false, OnDisk::Nothing) => host_tier.to_string(),
                (false, OnDisk::Weights) => "disk".to_string(),
                (false, _) => format!("{host_tier}, disk"),
            },
            match shard.forward {
                Some(_) => format_secs(microbatches * shard.forward_secs(&on.cost)),
                None => "with backward".to_string(),
            },
            match shard.idles_back() {
                true => "nothing to do".to_string(),
                false => format_secs(microbatches * shard.backward_secs(&on.cost)),
            },
            if shard.recomputes() { "yes".to_string() } else { String::new() },
        ]);
    }
    table(&rows)
}

/// A step's seconds by what bound them.
fn bound_table(bound: &Bound) -> String {
    let total = bound.total().max(f64::MIN_POSITIVE);
    let rows: Vec<Vec<String>> = Bound::NAMES
        .iter()
        .zip(bound.parts())
        .filter(|(_, secs)| *secs > 0.0)
        .map(|(name, secs)| vec![name.to_string(), format_secs(secs), format!("{:.1} %", 100.0 * secs / total)])
        .collect();
    table(&rows)
}

/// What a step waits for most, and how close it comes to the limit of its busiest lane.
fn the_bound(model: &Planned) -> String {
    let parts = model.prediction.bound.parts();
    let most = (0..parts.len()).max_by(|&a, &b| parts[a].total_cmp(&parts[b])).unwrap_or(0);
    let share = 100.0 * model.prediction.bound_secs / model.prediction.step_secs.max(f64::MIN_POSITIVE);
    let secs = format_secs(model.prediction.bound_secs);
    let lane = model.prediction.busiest;
    format!("bound by {}; the busiest lane, {lane}, works {secs} a step, {share:.0} % of it", Bound::NAMES[most])
}
