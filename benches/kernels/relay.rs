//! The measurements run in a process of their own, and in another one from the item after it where an item fails.
//!
//! A kernel's fault is its context's, and the context is its process's: nothing runs on that GPU again before the
//! process has ended. So one process, the relay, gathers rows and writes the JSON, and touches no GPU. It starts
//! another that measures, which tells it by lines of its output how far it is. Items are numbered alike in each: from
//! which one it goes on, and the ceilings that were found, stand in its environment.

use crate::report::{self, Ceilings, Row};
use hydra::base::{Error, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// The item that a process goes on from; where it is set, it measures.
const FROM: &str = "HYDRA_BENCH_FROM";
/// The ceilings found before, as in the JSON.
const CEILINGS: &str = "HYDRA_BENCH_CEILINGS";
/// What lines begin with that are for the relay.
const MARK: &str = "@relay ";

/// Where a measuring process goes on, and the ceilings it finds; `None` in the relay.
pub fn asked() -> Option<(usize, Ceilings)> {
    let from = std::env::var(FROM).ok()?.parse().expect("the relay writes numbers");
    let known = std::env::var(CEILINGS).expect("the relay sets both");
    Some((from, Ceilings::of(&serde_json::from_str(&known).expect("the relay writes JSON"))))
}

/// What a measuring process tells the relay.
pub enum Said<'a> {
    /// What the device is.
    Device(&'a Value),
    /// An item begins.
    Item(usize, &'a str, &'a str),
    /// A row of it.
    Row(&'a Row),
    /// The ceilings, which may be found one by one.
    Ceilings(&'a Ceilings),
}

/// Tells it.
pub fn say(said: Said) {
    let message = match said {
        Said::Device(device) => json!({ "device": device }),
        Said::Item(number, name, dtype) => json!({ "item": { "number": number, "name": name, "dtype": dtype } }),
        Said::Row(row) => json!({ "row": row.json() }),
        Said::Ceilings(ceilings) => json!({ "ceilings": ceilings.json() }),
    };
    println!("{MARK}{message}");
}

/// Ends a measuring process after an item that failed. At once: what the driver does at an ordinary end might wait for
/// a kernel that does not.
pub fn fail() -> ! {
    std::process::abort()
}

/// What was gathered.
struct Gathered {
    device: Value,
    ceilings: Value,
    rows: Vec<Value>,
}

impl Gathered {
    /// After each row: a run that is stopped keeps what it had.
    fn save(&self) -> Result<()> {
        let Some(path) = std::env::var_os("HYDRA_BENCH_JSON") else { return Ok(()) };
        let all = json!({ "device": self.device, "ceilings": self.ceilings, "rows": self.rows });
        std::fs::write(&path, format!("{all:#}\n")).map_err(|e| Error::io("write", path.as_ref(), e))
    }
}

/// Has all items measured.
///
/// # Errors
/// When a process cannot be started or begins no item, the JSON cannot be written, or an item failed.
pub fn run() -> Result<()> {
    let program = std::env::current_exe().map_err(|e| Error::Device(format!("where this program is: {e}")))?;
    let ceilings = Ceilings::default().json();
    let mut gathered = Gathered { device: Value::Null, ceilings, rows: Vec::new() };
    let mut from = 0;
    loop {
        let mut child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .env(FROM, from.to_string())
            .env(CEILINGS, gathered.ceilings.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::Device(format!("{} does not start: {e}", program.display())))?;
        let output = child.stdout.take().expect("it is piped");
        let (mut item, mut failed) = (None, false);
        for line in BufReader::new(output).lines() {
            let line = line.map_err(|e| Error::Device(format!("the measuring process: {e}")))?;
            let Some(message) = line.strip_prefix(MARK) else {
                println!("{line}");
                continue;
            };
            let mut message: Value = serde_json::from_str(message).expect("it says JSON");
            let mut part = |name: &str| message.get_mut(name).map(Value::take);
            if let Some(device) = part("device") {
                gathered.device = device;
            } else if let Some(ceilings) = part("ceilings") {
                gathered.ceilings = ceilings;
            } else if let Some(begun) = part("item") {
                item = Some(begun);
            } else if let Some(row) = part("row") {
                failed |= row.get("error").is_some();
                gathered.rows.push(row);
                gathered.save()?;
            }
        }
        let end = child.wait().map_err(|e| Error::Device(format!("the measuring process: {e}")))?;
        if end.success() {
            break;
        }
        let Some(item) = item else { return Err(Error::Device(format!("the measuring process ended: {end}"))) };
        if !failed {
            let (name, dtype) = (item["name"].as_str().unwrap_or(""), item["dtype"].as_str().unwrap_or(""));
            let row = Row::failed(name, dtype, format!("the measuring process ended: {end}"));
            report::print_row(&row);
            gathered.rows.push(row.json());
        }
        gathered.save()?;
        from = item["number"].as_u64().expect("items are numbered") as usize + 1;
    }
    gathered.save()?;
    match gathered.rows.iter().filter(|row| row.get("error").is_some()).count() {
        0 => Ok(()),
        failed => {
            let all = gathered.rows.len();
            Err(Error::Device(format!("{failed} of {all} rows could not be measured, as the table says")))
        }
    }
}
