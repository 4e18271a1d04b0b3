//! plan.json as the report reads it: every key may be missing, and unknown keys are ignored.
//!
//! A report must be possible for runs of older and newer versions, so this is no mirror of what writes the file: where
//! a number is missing, the report leaves out what depends on it. A key with a type that it never had means that the
//! file is damaged.

use crate::base::{Error, LaneKind, Result, format_bytes};
use crate::trace::Ceilings;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Component, Path};

/// The keys at the top.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PlanFile {
    pub device_peak_bytes: Option<u64>,
    pub smallest_device_bytes: Option<u64>,
    /// Count over models.
    pub shards: Option<u64>,
    /// Predicted seconds of one step of every model.
    pub step_secs: Option<f64>,
    /// Seconds that no schedule can beat.
    pub bound_secs: Option<f64>,
    pub slots: Option<u64>,
    /// State stays on the device.
    pub resident: Option<bool>,
    /// How many shards have their state there, count over models.
    pub resting_shards: Option<u64>,
    /// Bytes, or words; one value, or a list with one per device.
    pub budget: Value,
    pub recompute: Value,
    /// Rates of a cost model.
    pub ceilings: Option<Rates>,
    pub models: Vec<ModelPlan>,
}

/// One of `models`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ModelPlan {
    pub name: String,
    pub shards: Vec<ShardPlan>,
}

/// One of a model's `shards`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ShardPlan {
    /// Names, or their number.
    pub layers: Value,
    pub bytes: Option<u64>,
    /// A tier, a list of them, or one for each kind of state.
    pub tiers: Value,
    /// Its forward is recomputed in its backward.
    pub recompute: Option<bool>,
    pub forward_secs: Option<f64>,
    pub backward_secs: Option<f64>,
}

/// The rates that are the ceilings of lanes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Rates {
    flops_per_sec: Option<f64>,
    h2d_bytes_per_sec: Option<f64>,
    d2h_bytes_per_sec: Option<f64>,
    host_update_bytes_per_sec: Option<f64>,
    disk_bytes_per_sec: Option<f64>,
}

impl Rates {
    pub(super) fn ceilings(&self) -> Ceilings {
        Ceilings {
            flops_per_sec: self.flops_per_sec,
            h2d_bytes_per_sec: self.h2d_bytes_per_sec,
            d2h_bytes_per_sec: self.d2h_bytes_per_sec,
            host_bytes_per_sec: self.host_update_bytes_per_sec,
            disk_read_bytes_per_sec: self.disk_bytes_per_sec,
            disk_write_bytes_per_sec: self.disk_bytes_per_sec,
        }
    }
}

impl PlanFile {
    /// Reads `path`.
    ///
    /// # Errors
    /// When the file does not exist or is no JSON object, a key has a type that it never had, or a model's name cannot
    /// be a folder's.
    pub(super) fn read(path: &Path) -> Result<PlanFile> {
        let fault = |what: &dyn std::fmt::Display| Error::bad(format!("{}: {what}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => fault(&"is not there; a run directory holds one"),
            _ => Error::io("read", path, e),
        })?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| fault(&format!("damaged: {e}")))?;
        // serde would also accept a list of the values.
        if !value.is_object() {
            return Err(fault(&"damaged: is no JSON object"));
        }
        let plan: PlanFile = serde_json::from_value(value).map_err(|e| fault(&format!("damaged: {e}")))?;
        for model in &plan.models {
            let mut parts = Path::new(&model.name).components();
            // A file from elsewhere must not point the report outside the run directory.
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == model.name.as_str())
            {
                return Err(fault(&format!("a model's name is '{}', which is no folder's", model.name)));
            }
        }
        Ok(plan)
    }

    /// The peak of a lane of `kind`, where it is known.
    pub(super) fn peak(&self, kind: LaneKind) -> Option<f64> {
        self.ceilings.as_ref()?.ceilings().of(kind)
    }

    /// The device budget for people to read; `None` where the file does not state it.
    pub(super) fn budget_text(&self) -> Option<String> {
        match &self.budget {
            Value::Number(bytes) => bytes.as_u64().map(format_bytes),
            other => Some(text(other)).filter(|text| !text.is_empty()),
        }
    }

    /// The shards as a table: columns and rows.
    pub(super) fn shard_table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let many = self.models.len() > 1;
        let mut columns: Vec<&str> =
            vec!["shard", "layers", "bytes", "tiers", "recomputed", "forward, predicted", "backward, predicted"];
        if many {
            columns.insert(0, "model");
        }
        let mut rows = Vec::new();
        for model in &self.models {
            for (i, shard) in model.shards.iter().enumerate() {
                let secs = |secs: Option<f64>| secs.map_or("-".into(), crate::base::format_secs);
                let mut row = if many { vec![model.name.clone()] } else { Vec::new() };
                row.extend([
                    i.to_string(),
                    layers(&shard.layers),
                    shard.bytes.map_or("-".into(), format_bytes),
                    text(&shard.tiers),
                    shard.recompute.map_or("-", |again| if again { "yes" } else { "no" }).into(),
                    secs(shard.forward_secs),
                    secs(shard.backward_secs),
                ]);
                rows.push(row);
            }
        }
        (columns.into_iter().map(String::from).collect(), rows)
    }
}

/// The layers of a shard in few words: where there are many, the first and the last.
fn layers(value: &Value) -> String {
    match value.as_array().map(Vec::as_slice) {
        Some([first, .., last]) => {
            format!("{} to {} ({})", text(first), text(last), value.as_array().map_or(0, Vec::len))
        }
        _ => text(value),
    }
}

/// A value for people to read: `pageable`; `pageable: gradients, weights; disk: moments`; nothing for null.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text_of_item).collect::<Vec<_>>().join(", "),
        Value::Object(items) => {
            let mut groups: Vec<(String, Vec<String>)> = Vec::new();
            for (name, value) in items {
                let (name, value) = (name.replace('_', " "), text_of_item(value));
                match groups.iter_mut().find(|group| group.0 == value) {
                    Some(group) => group.1.push(name),
                    None => groups.push((value, vec![name])),
                }
            }
            match groups.as_slice() {
                [(value, _)] => value.clone(),
                _ => {
                    let words = groups.iter().map(|(value, names)| format!("{value}: {}", names.join(", ")));
                    words.collect::<Vec<_>>().join("; ")
                }
            }
        }
        other => other.to_string(),
    }
}

/// Deeper down, JSON itself is as good as any words.
fn text_of_item(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}
