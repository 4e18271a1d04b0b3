//! Rows of the result: medians with their spread, rates, shares of the roofline; as a table and as JSON.

use hydra::base::format_secs;
use serde_json::{Value, json};

/// Seconds of many samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// A tenth is below.
    pub p10: f64,
    /// A tenth is above.
    pub p90: f64,
    /// How many there were.
    pub samples: usize,
}

impl Spread {
    /// Of at least one sample.
    pub fn of(mut secs: Vec<f64>) -> Spread {
        secs.sort_by(f64::total_cmp);
        let at = |share: f64| secs[((secs.len() - 1) as f64 * share).round() as usize];
        Spread { median: at(0.5), p10: at(0.1), p90: at(0.9), samples: secs.len() }
    }

    fn json(&self) -> Value {
        json!({ "median_secs": self.median, "p10_secs": self.p10, "p90_secs": self.p90, "samples": self.samples })
    }
}

/// What a row's seconds are divided into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// Floating-point operations.
    Flops(f64),
    /// Bytes.
    Bytes(f64),
    /// The seconds are the result.
    Nothing,
}

/// The two rates that the same run measured.
#[derive(Clone, Debug, Default)]
pub struct Ceilings {
    /// Bytes read and written a second by a large copy within the device.
    pub copy_bytes_per_sec: Option<f64>,
    /// Operations a second of a large product of bf16, then of f32.
    pub flops_per_sec: [Option<f64>; 2],
    /// Whose product that was.
    pub by: [&'static str; 2],
}

/// Who multiplied for a ceiling.
pub const CUBLAS: &str = "cuBLAS";
/// The same, where there is no cuBLAS.
pub const OURS: &str = "our own product";

impl Ceilings {
    /// For programs to read.
    pub fn json(&self) -> Value {
        json!({
            "copy_gbps": self.copy_bytes_per_sec.map(|rate| rate / 1e9),
            "bf16_tflops": self.flops_per_sec[0].map(|rate| rate / 1e12),
            "bf16_by": self.by[0],
            "f32_tflops": self.flops_per_sec[1].map(|rate| rate / 1e12),
            "f32_by": self.by[1],
        })
    }

    /// Those that [`Ceilings::json`] wrote.
    pub fn of(json: &Value) -> Ceilings {
        let rate = |name: &str, unit: f64| json[name].as_f64().map(|rate| rate * unit);
        let by = |name: &str| [CUBLAS, OURS].into_iter().find(|by| json[name] == **by).unwrap_or("");
        Ceilings {
            copy_bytes_per_sec: rate("copy_gbps", 1e9),
            flops_per_sec: [rate("bf16_tflops", 1e12), rate("f32_tflops", 1e12)],
            by: [by("bf16_by"), by("f32_by")],
        }
    }
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Row {
    /// Op, model, place.
    pub name: String,
    /// Element type; empty where there is none.
    pub dtype: String,
    /// Shapes of operands.
    pub shapes: String,
    /// What is counted.
    pub unit: Unit,
    /// Seconds by the roofline: neither operations nor bytes can be done sooner.
    pub bound_secs: Option<f64>,
    /// Ours, or why not.
    pub ours: Result<Spread, String>,
    /// cuBLAS on the same product, in turn with ours.
    pub peer: Option<Spread>,
}

impl Row {
    /// A row with a name and a time.
    pub fn of(name: String, unit: Unit, ours: Spread) -> Row {
        Row { name, dtype: String::new(), shapes: String::new(), unit, bound_secs: None, ours: Ok(ours), peer: None }
    }

    /// A row of what could not be measured.
    pub fn failed(name: &str, dtype: &str, why: String) -> Row {
        let (name, dtype) = (name.into(), dtype.into());
        Row { name, dtype, shapes: String::new(), unit: Unit::Nothing, bound_secs: None, ours: Err(why), peer: None }
    }

    /// Rate in the unit that people read: TFLOP/s or GB/s.
    fn rate(&self, secs: f64) -> Option<(f64, &'static str)> {
        match self.unit {
            Unit::Flops(flops) => Some((flops / secs / 1e12, "TFLOP/s")),
            Unit::Bytes(bytes) => Some((bytes / secs / 1e9, "GB/s")),
            Unit::Nothing => None,
        }
    }

    fn line(&self) -> String {
        let head = format!("| {} | {} |", self.name, self.dtype);
        let ours = match &self.ours {
            Ok(ours) => ours,
            Err(why) => return format!("{head} {why} | | | | | |"),
        };
        let rate = |secs| self.rate(secs).map_or(String::new(), |(rate, unit)| format!("{rate:.4} {unit}"));
        let spread = format!("{} .. {}", format_secs(ours.p10), format_secs(ours.p90));
        let share = self.bound_secs.map_or(String::new(), |bound| format!("{:.1} %", 100.0 * bound / ours.median));
        let (peer, ratio) = self.peer.map_or((String::new(), String::new()), |peer| {
            (rate(peer.median), format!("{:.3}", peer.median / ours.median))
        });
        format!("{head} {} | {spread} | {} | {share} | {peer} | {ratio} |", format_secs(ours.median), rate(ours.median))
    }

    /// For programs to read.
    pub fn json(&self) -> Value {
        let mut row =
            json!({ "name": self.name, "dtype": self.dtype, "shapes": self.shapes, "bound_secs": self.bound_secs });
        match self.unit {
            Unit::Flops(flops) => row["flops"] = json!(flops),
            Unit::Bytes(bytes) => row["bytes"] = json!(bytes),
            Unit::Nothing => {}
        }
        match &self.ours {
            Ok(ours) => {
                row["ours"] = ours.json();
                if let Some((rate, unit)) = self.rate(ours.median) {
                    row[if unit == "GB/s" { "gbps" } else { "tflops" }] = json!(rate);
                }
                row["share_of_roofline"] = json!(self.bound_secs.map(|bound| bound / ours.median));
            }
            Err(why) => row["error"] = json!(why),
        }
        if let Some(peer) = &self.peer {
            row["cublas"] = peer.json();
        }
        row
    }
}

/// The head of the table that [`print_row`] fills.
pub fn print_head() {
    println!(
        "| op / model / place | type | median | p10 .. p90 | rate | of the roofline | cuBLAS | cuBLAS time / ours |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
}

/// One line of the table, as soon as it is known.
pub fn print_row(row: &Row) {
    println!("{}", row.line());
}
