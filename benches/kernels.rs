//! The cuda device's kernels over a named table of real models' shapes, forward and gradient, in bf16 and f32: TFLOP/s or GB/s, the share of
//! the roofline that the same run measured, and cuBLAS beside products, in turn with ours (A B A B).
//!
//! Each op runs as in training: a graph, its program, a task on the device; time is read from the device's own marks. Inputs are normal
//! numbers and rotate over more than twice any L2 cache. Beside the ops: copies by pinned memory, the time from a task to the next, AdamW.
//!
//! Not through criterion: its clock is the host's, and it measures one body after another, where ours and the peer's must take turns.
//!
//! `cargo bench --features cuda --bench kernels -- [FILTER ..]`; with `--features peers` cuBLAS is asked too. `HYDRA_BENCH_QUICK=1` takes few
//! samples, `HYDRA_BENCH_JSON=PATH` writes everything as JSON. Without a GPU it says so and exits 0, with `HYDRA_REQUIRE_GPU=1` it exits 1.
//! `HYDRA_BENCH_DEVICE=emulated` walks through it all on the emulator, with shapes of a few elements; its seconds mean nothing.

#[path = "kernels/links.rs"]
mod links;
#[path = "kernels/machine.rs"]
mod machine;
#[path = "kernels/peers.rs"]
mod peers;
#[path = "kernels/report.rs"]
mod report;
#[path = "kernels/shapes.rs"]
mod shapes;

use hydra::base::{DType, Error, Result};
use hydra::device::{DeviceSpec, why_no_cuda, why_no_emulator};
use hydra::graph::Work;
use machine::{COMPUTE, Effort, Machine, Prepared};
use peers::{Cublas, Product};
use report::{Ceilings, Row, Spread, Unit};
use serde_json::json;
use shapes::Case;
use std::process::ExitCode;

/// Memory that is left for cuBLAS's operands and the context.
const LEFT_FREE: f64 = 0.45;

fn set(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|v| !v.is_empty() && v != "0")
}

fn main() -> ExitCode {
    let emulated = std::env::var("HYDRA_BENCH_DEVICE").is_ok_and(|v| v == "emulated");
    if let Some(why) = if emulated { why_no_emulator() } else { why_no_cuda() } {
        println!("kernels: nothing is measured: {why}");
        return if set("HYDRA_REQUIRE_GPU") { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let effort = match (emulated, set("HYDRA_BENCH_QUICK")) {
        (true, _) => Effort::TINY,
        (false, true) => Effort::QUICK,
        (false, false) => Effort::FULL,
    };
    match measure(emulated, effort, &filters) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is known of the device before it starts.
struct Facts {
    /// For the JSON.
    device: serde_json::Value,
    /// Bytes of its memory that are free.
    free_bytes: u64,
    /// Keeps the GPU's context alive while devices come and go: cuBLAS lives in it.
    _context: Option<Box<dyn std::any::Any>>,
}

fn facts(emulated: bool) -> Result<Facts> {
    #[cfg(feature = "cuda")]
    if !emulated {
        let gpu = hydra::device::cuda::Gpu::open(0)?;
        let facts = gpu.facts();
        let device = json!({
            "name": facts.name, "arch": facts.arch, "multiprocessors": facts.multiprocessors, "memory_bytes": facts.memory_bytes,
        });
        let free_bytes = gpu.free_bytes()?;
        return Ok(Facts { device, free_bytes, _context: Some(Box::new(gpu)) });
    }
    match emulated {
        true => Ok(Facts { device: json!({ "name": "emulated" }), free_bytes: 64 << 20, _context: None }),
        false => Err(Error::bad("built without the feature \"cuda\"")),
    }
}

fn measure(emulated: bool, effort: Effort, filters: &[String]) -> Result<()> {
    let facts = facts(emulated)?;
    println!("device: {}", facts.device);
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));
    let mut cases = shapes::all(emulated)?;
    cases.retain(|case| wanted(&case.name));
    let room = (facts.free_bytes as f64 * (1.0 - LEFT_FREE)) as u64;
    cases.retain(|case| {
        let bytes = Prepared::new(case, &effort).bytes();
        if bytes > room {
            println!("left out: {} in {}, which takes {bytes} bytes of the {room} there are", case.name, case.dtype);
        }
        bytes <= room
    });
    let products = [shapes::ceiling_product(DType::Bf16, emulated)?, shapes::ceiling_product(DType::F32, emulated)?];
    let copy = shapes::ceiling_copy(emulated)?;
    let ceilings = products.iter().chain([&copy]);
    let needed = cases.iter().chain(ceilings).map(|case| Prepared::new(case, &effort).bytes()).filter(|&b| b <= room);
    let arena_bytes = needed.max().unwrap_or(0).max(2 * effort.copy_bytes).max(links::adamw_bytes(emulated)).min(room);
    let spec = match emulated {
        true => DeviceSpec::Emulated { arch: 90, seed: 0, threads: Some(1) },
        false => DeviceSpec::Cuda { ordinal: 0, threads: None },
    };
    let mut bench = Bench {
        machine: Machine::start(spec, arena_bytes, effort)?,
        // After the device, whose context it shares.
        cublas: if emulated { Err(Error::bad("there is none for the emulator")) } else { Cublas::open() },
        effort,
        arena_bytes,
        ceilings: Ceilings::default(),
    };
    if let Err(why) = &bench.cublas {
        println!("cuBLAS is not beside: {why}");
    }
    let mut rows = bench.find_ceilings(&products, &copy);
    report::print_head();
    rows.iter().for_each(report::print_row);
    // After each row: a run that is stopped keeps what it had.
    let save = |bench: &Bench, rows: &[Row]| {
        let Some(path) = std::env::var_os("HYDRA_BENCH_JSON") else { return Ok(()) };
        let text = format!("{:#}\n", report::json(&facts.device, &bench.ceilings, rows));
        std::fs::write(&path, text).map_err(|e| Error::io("write", path.as_ref(), e))
    };
    for case in &cases {
        rows.push(bench.row(case));
        report::print_row(&rows[rows.len() - 1]);
        save(&bench, &rows)?;
        bench.recover(&rows)?;
    }
    rows.extend(bench.others(emulated, &wanted)?);
    save(&bench, &rows)?;
    let failed = rows.iter().filter(|row| row.ours.is_err()).count();
    match failed {
        0 => Ok(()),
        _ => Err(Error::Device(format!("{failed} of {} rows could not be measured, as the table says", rows.len()))),
    }
}

struct Bench {
    /// Dropped before the machine, whose context it lives in.
    cublas: Result<Cublas>,
    machine: Machine,
    effort: Effort,
    arena_bytes: u64,
    ceilings: Ceilings,
}

impl Bench {
    /// Measures the ceilings; their rows come first in the table.
    fn find_ceilings(&mut self, products: &[Case; 2], copy: &Case) -> Vec<Row> {
        let mut rows = vec![self.row(copy)];
        if let (Ok(ours), Unit::Bytes(bytes)) = (&rows[0].ours, rows[0].unit) {
            self.ceilings.copy_bytes_per_sec = Some(bytes / ours.median);
        }
        for (i, case) in products.iter().enumerate() {
            let row = self.row(case);
            let by = match (&row.peer, &row.ours) {
                (Some(peer), _) => Some((peer.median, "cuBLAS")),
                (None, Ok(ours)) => Some((ours.median, "our own product")),
                (None, Err(_)) => None,
            };
            if let (Some((secs, by)), Unit::Flops(flops)) = (by, row.unit) {
                self.ceilings.flops_per_sec[i] = Some(flops / secs);
                self.ceilings.by[i] = by;
            }
            rows.push(row);
            if rows.iter().any(|row| row.ours.is_err()) && self.machine.restart().is_err() {
                break;
            }
        }
        rows
    }

    /// Starts the device anew where the last row failed on it.
    fn recover(&mut self, rows: &[Row]) -> Result<()> {
        match rows.last() {
            Some(Row { ours: Err(_), .. }) => self.machine.restart(),
            _ => Ok(()),
        }
    }

    /// One op, and cuBLAS in turn with it where it is a product.
    fn row(&mut self, case: &Case) -> Row {
        let prepared = Prepared::new(case, &self.effort);
        let cost = prepared.cost;
        let (unit, flops) = match cost.family.work() {
            Work::Flops => (Unit::Flops(cost.flops), cost.flops),
            Work::Bytes => (Unit::Bytes(cost.bytes as f64), 0.0),
        };
        let arithmetic = self.ceilings.flops_per_sec[usize::from(case.dtype == DType::F32)];
        let bound_secs = self.ceilings.copy_bytes_per_sec.and_then(|copy| {
            let memory = cost.bytes as f64 / copy;
            if flops == 0.0 { Some(memory) } else { arithmetic.map(|rate| memory.max(flops / rate)) }
        });
        let (ours, peer) = match self.samples(case, &prepared) {
            Ok((ours, peer)) => (Ok(ours), peer),
            Err(error) => (Err(error.to_string()), None),
        };
        Row {
            name: case.name.clone(),
            dtype: case.dtype.to_string(),
            shapes: case.shapes(),
            unit,
            bound_secs,
            ours,
            peer,
        }
    }

    fn samples(&mut self, case: &Case, prepared: &Prepared) -> Result<(Spread, Option<Spread>)> {
        if prepared.bytes() > self.arena_bytes {
            return Err(Error::Device(format!(
                "needs {} bytes, of which there are {}",
                prepared.bytes(),
                self.arena_bytes
            )));
        }
        self.machine.fill(prepared)?;
        let (task, repeats) = self.machine.sized(prepared)?;
        let product = Product::of(case);
        let mut cublas = match (&mut self.cublas, &product) {
            (Ok(cublas), Some(product)) => match cublas.prepare(product, prepared.sets as usize) {
                Ok(()) => Some(cublas),
                Err(why) => {
                    println!("cuBLAS is not beside {}: {why}", case.name);
                    None
                }
            },
            _ => None,
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for sample in 0..self.effort.warm_up + self.effort.samples {
            let a = self.machine.time(COMPUTE, task.clone())? / repeats as f64;
            let b = cublas.as_mut().map(|cublas| cublas.sample(repeats)).transpose()?;
            if sample >= self.effort.warm_up {
                ours.push(a);
                theirs.extend(b);
            }
        }
        Ok((Spread::of(ours), (!theirs.is_empty()).then(|| Spread::of(theirs))))
    }

    /// Updates, copies and what lies between tasks.
    fn others(&mut self, emulated: bool, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let samples = self.effort.samples;
        for bf16 in [false, true] {
            if wanted("adamw") {
                let row = links::adamw(&mut self.machine, emulated, bf16, samples);
                rows.push(row.unwrap_or_else(|error| failed("adamw/gpt2_124m", &error)));
                self.recover(&rows)?;
            }
        }
        for row in &mut rows {
            if let (Unit::Bytes(bytes), Some(copy)) = (row.unit, self.ceilings.copy_bytes_per_sec) {
                row.bound_secs = Some(bytes / copy);
            }
        }
        if wanted("copy") {
            rows.extend(links::copies(&mut self.machine, self.effort.copy_bytes, samples)?);
        }
        if wanted("hand-over") {
            match links::hand_overs(&mut self.machine, samples) {
                Ok(gaps) => rows.extend(gaps),
                Err(error) => rows.push(failed("hand-over", &error)),
            }
        }
        rows.iter().for_each(report::print_row);
        Ok(rows)
    }
}

/// A row of what could not be measured.
fn failed(name: &str, error: &Error) -> Row {
    Row {
        name: name.into(),
        dtype: String::new(),
        shapes: String::new(),
        unit: Unit::Nothing,
        bound_secs: None,
        ours: Err(error.to_string()),
        peer: None,
    }
}
