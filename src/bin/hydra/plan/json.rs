//! The content of plan.json.

use crate::job::RECOMPUTE;
use crate::machine::MachineDevice;
use crate::plan::placing::Sharing;
use crate::plan::planned::{Planned, PlannedJob};
use hydra::spill::{BoundaryTier, Home, OnDisk};
use serde_json::{Value, json};
use std::rc::Rc;

impl Planned {
    fn json(&self, on: &MachineDevice) -> Value {
        let (cost, host_tier) = (&on.cost, on.kind.host_tier());
        let (plan, microbatches) = (self.plan(), self.model().microbatches as f64);
        let on_disk = plan.choice.on_disk;
        let tier = |rests: bool, least: OnDisk| match rests {
            true => "device",
            false if on_disk >= least => "disk",
            false => host_tier,
        };
        let boundary = |tier: &BoundaryTier| match tier {
            BoundaryTier::Device => "device",
            BoundaryTier::Host { .. } => host_tier,
        };
        let shards: Vec<Value> = plan
            .shards
            .iter()
            .enumerate()
            .map(|(s, shard)| {
                json!({
                    "layers": plan.layer_names(self.model(), s),
                    "bytes": shard.fetch_bytes(),
                    "tiers": {
                        "weights": tier(plan.choice.rests(s), OnDisk::Weights),
                        "gradients": tier(plan.choice.rests(s), OnDisk::Gradients),
                        "moments": tier(plan.choice.rests(s), OnDisk::UpdateState),
                        "boundary_activations": boundary(&plan.choice.activations),
                        "boundary_gradients": boundary(&plan.choice.gradients),
                    },
                    "recompute": shard.recomputes(),
                    "device": match &self.placed.home {
                        Home::Anywhere => Value::Null,
                        Home::On(homes) => homes[s].into(),
                    },
                    "forward_secs": microbatches * shard.forward_secs(cost),
                    "backward_secs": microbatches * shard.backward_secs(cost),
                })
            })
            .collect();
        let arena: serde_json::Map<String, Value> =
            plan.arena_table().into_iter().map(|(what, bytes)| (what.to_string(), bytes.into())).collect();
        json!({
            "name": self.prepared.name,
            "steps": self.prepared.options.steps,
            "batch": self.prepared.options.batch,
            "microbatch": self.prepared.options.microbatch,
            "device_peak_bytes": plan.arena.bytes,
            "smallest_device_bytes": plan.smallest_device_bytes,
            "host_bytes": plan.host.bytes,
            "disk_bytes": plan.host.disk_bytes,
            "resident": plan.choice.resident,
            "resting_shards": plan.resting_shards(),
            "slots": plan.choice.slots,
            "device_updates": plan.device_updates(),
            "step_secs": self.prediction.step_secs,
            "bound_secs": self.prediction.bound_secs,
            "bound": self.prediction.bound,
            "arena": arena,
            "shards": shards,
        })
    }
}

impl PlannedJob {
    /// The text of plan.json.
    pub fn text(&self) -> String {
        format!("{:#}\n", self.json())
    }

    /// The content of plan.json. A shard's seconds are those of a step, all microbatches, on the first device; the last
    /// shard's forward, loss and backward are one unit, whose seconds are `backward_secs`. A model's seconds are those
    /// it takes when it has the devices to itself.
    pub fn json(&self) -> Value {
        let cost = &self.machine.first().cost;
        let ceiling = |model: &Rc<Planned>| {
            let options = &model.prepared.options;
            cost.ceiling_flops_per_sec(options.dtype, options.tf32)
        };
        let budgets: Vec<Option<u64>> = self.machine.devices.iter().map(|d| d.budget).collect();
        json!({
            "device_peak_bytes": self.map.arena_bytes.iter().max(),
            "smallest_device_bytes": self.smallest_device_bytes,
            "shards": self.models.iter().map(|m| m.plan().shards.len()).sum::<usize>(),
            "step_secs": self.step_secs,
            "bound_secs": self.bound_secs,
            "device": self.machine.first().kind.word(),
            "devices": budgets.len(),
            "policy": if self.sharing == Sharing::Alone { Value::Null } else { self.job.run.policy.word().into() },
            "budget": if budgets.iter().all(|b| *b == budgets[0]) { json!(budgets[0]) } else { json!(budgets) },
            "recompute": RECOMPUTE.iter().find(|(_, way)| *way == self.job.run.recompute).map(|(word, _)| *word),
            "resident": self.models.iter().all(|m| m.plan().choice.resident),
            "resting_shards": self.models.iter().map(|m| m.plan().resting_shards()).sum::<usize>(),
            "slots": self.models.iter().map(|m| m.plan().choice.slots).max(),
            "host_bytes": self.map.host_bytes,
            "host_budget": self.machine.homes.host,
            "disk_bytes": self.map.disk_bytes,
            "disk_budget": self.machine.homes.disk,
            "idle": self.idle_devices(),
            "ceilings": {
                "flops_per_sec": self.models.iter().map(ceiling).fold(0.0, f64::max),
                "h2d_bytes_per_sec": cost.h2d_bytes_per_sec,
                "d2h_bytes_per_sec": cost.d2h_bytes_per_sec,
                "host_update_bytes_per_sec": cost.host_update_bytes_per_sec,
                "disk_bytes_per_sec": cost.disk_bytes_per_sec,
            },
            "models": self.models.iter().map(|m| m.json(self.machine.first())).collect::<Vec<_>>(),
        })
    }
}
