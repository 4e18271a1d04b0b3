//! `search` of a `[[model]]`: one model per combination of values, and what ends models early.
//!
//! A combination is put into the model's TOML and read as if written by hand, so it passes the same checks. Names come
//! from the values and not from their spelling in the file, so that the rewritten record of a job names the same
//! models.

use super::model::{LONGEST_NAME, Length, MODEL_KEYS, Model, read_model, read_name};
use super::optimizer::SHORT_KEYS;
use super::section::{MOST, Origin, Section, show};
use hydra::base::Result;
use hydra::base::philox::Sequence;
use hydra::train::{Asha, Patience, Rungs, Selection, Survivors};
use std::collections::BTreeSet;
use std::ops::Range;
use toml::{Table, Value};

/// What a search made from one `[[model]]`, without the models themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// Its dotted path, such as `model.0.search`.
    pub at: String,
    /// The numbers of its models in the job.
    pub models: Range<usize>,
    /// What ends its models early, if anything. The metric is the loss on held-out data where the model has any, else
    /// the training loss; models have their numbers in the job.
    pub stop: Option<Selection>,
    /// The replacement for `stop` where there are no losses, a table of survivors; `None` if the job has no such table.
    pub simulated: Option<Selection>,
}

impl Search {
    /// Whether its models are compared with each other.
    pub fn compares(&self) -> bool {
        matches!(self.stop, Some(Selection::Asha(_)))
    }
}

/// The keys of a search. Names and the grid use the order of the varied ones here, not the file's.
pub const KEYS: &[&str] = &[
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "clip",
    "decay",
    "momentum",
    "nesterov",
    "batch",
    "microbatch",
    "steps",
    "epochs",
    "dtype",
    "draw",
    "stop",
];
/// Those of them that contain values to try.
const VARIED: &[&str] = KEYS.split_at(13).0;
/// More models than this from one search are a mistake, and there might not be enough memory for them.
const MOST_COMBINATIONS: u64 = 1000;
/// This plus the model's place in the file is the number of the random sequence that draws its combinations ("Se").
const DRAW_STREAM: u64 = 0x5365_0000_0000;

/// A varied key, with its values and the words for them in names.
struct Axis<'a> {
    key: &'static str,
    values: &'a [Value],
    words: Vec<String>,
}

/// Reads the `[[model]]` at index `place` in the file: one model or, with a search, one per combination. The first is
/// number `first` of the job.
pub fn read_models(s: &Section, place: usize, first: usize, seed: u64) -> Result<(Vec<Model>, Option<Search>)> {
    let Some(d) = s.section("search", KEYS)? else { return Ok((vec![read_model(s)?], None)) };
    if !KEYS.iter().any(|key| d.has(key)) {
        return Err(d.fault_here("is empty; write what to try, such as { lr = [1e-3, 3e-4] }, or leave it out"));
    }
    let axes = read_axes(&d)?;
    let name = read_name(s)?;
    let chosen = choose(&d, &axes, seed, place as u64)?;
    let models = chosen.into_iter().map(|n| combination(s, name, &axes, n)).collect::<Result<Vec<_>>>()?;
    let range = first..first + models.len();
    let (stop, simulated) = match read_stop(&d, &range, &models)? {
        Some((stop, simulated)) => (Some(stop), simulated),
        None => (None, None),
    };
    Ok((models, Some(Search { at: s.path_of("search"), models: range, stop, simulated })))
}

fn read_axes<'a>(d: &Section<'a>) -> Result<Vec<Axis<'a>>> {
    let mut axes = Vec::new();
    for &key in VARIED {
        let Some(value) = d.value(key) else { continue };
        let values = value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| {
            d.fault(key, format!("want a list of values to try, such as [1e-3, 3e-4], got {}", show(value)))
        })?;
        let words: Vec<String> = values.iter().map(word).collect();
        if let Some(i) = (1..words.len()).find(|&i| words[..i].contains(&words[i])) {
            return Err(d.fault(key, format!("{} is there twice; leave one out", words[i])));
        }
        axes.push(Axis { key, values, words });
    }
    Ok(axes)
}

/// The numbers of the combinations to train: all of them, or a draw. They are counted with the last key fastest.
fn choose(d: &Section, axes: &[Axis], seed: u64, place: u64) -> Result<Vec<u64>> {
    let all = axes.iter().try_fold(1u64, |n, axis| n.checked_mul(axis.values.len() as u64));
    let draw = d.integer("draw", 1..=MOST_COMBINATIONS)?;
    match (all, draw) {
        (None, _) => Err(d.fault_here("has more combinations than can be counted; leave some out")),
        (Some(all), None) if all <= MOST_COMBINATIONS => Ok((0..all).collect()),
        (Some(all), None) => Err(d.fault_here(format!(
            "has {all} combinations, more than {MOST_COMBINATIONS}; leave some out, or draw a few by draw = 100"
        ))),
        (Some(all), Some(draw)) if draw <= all => Ok(draw_distinct(all, draw, seed, place)),
        (Some(all), Some(_)) => Err(d.fault("draw", format!("there are {all} combinations; write at most {all}"))),
    }
}

/// `count` different numbers below `all`, in ascending order, every set of them equally likely (Floyd's sampling
/// algorithm; Bentley & Floyd 1987, "A sample of brilliance").
fn draw_distinct(all: u64, count: u64, seed: u64, place: u64) -> Vec<u64> {
    let mut random = Sequence::new(seed, DRAW_STREAM + place);
    let mut drawn = BTreeSet::new();
    for last in all - count..all {
        if !drawn.insert(random.below(last + 1)) {
            drawn.insert(last);
        }
    }
    drawn.into_iter().collect()
}

/// Reads combination number `n` of the model at `s`.
fn combination(s: &Section, name: &str, axes: &[Axis], n: u64) -> Result<Model> {
    if axes.is_empty() {
        return read_model(s);
    }
    let mut picks = vec![0; axes.len()];
    let mut rest = n;
    for (pick, axis) in picks.iter_mut().zip(axes).rev() {
        *pick = (rest % axis.values.len() as u64) as usize;
        rest /= axis.values.len() as u64;
    }
    let mut table = s.whole().clone();
    table.remove("search");
    let mut full_name = name.to_string();
    let mut searched = Vec::new();
    for (axis, pick) in axes.iter().zip(picks) {
        put(&mut table, axis.key, axis.values[pick].clone());
        full_name += &format!("-{}={}", axis.key, axis.words[pick]);
        searched.push((axis.key.to_string(), axis.words[pick].clone()));
    }
    if full_name.len() > LONGEST_NAME {
        let long = full_name.len();
        let message = format!("{full_name} would be {long} bytes long, more than {LONGEST_NAME}; write a shorter one");
        return Err(s.fault("name", message));
    }
    table.insert("name".into(), full_name.into());
    let label = searched.iter().map(|(key, word)| format!("{key} = {word}")).collect::<Vec<_>>().join(", ");
    let at = format!("{}: {label}", s.path_of("search"));
    let origin = s.origin();
    let file = format!("{}: {at}", origin.file);
    let origin = Origin { file: &file, folder: origin.folder };
    let model = read_model(&Section::open(origin, String::new(), &table, MODEL_KEYS)?)?;
    Ok(Model { file: s.origin().file.to_string(), at, searched, ..model })
}

/// Puts a value where a person would write it. If `optimizer` is not a table, reading it will report that.
fn put(model: &mut Table, key: &str, value: Value) {
    if !SHORT_KEYS.contains(&key) {
        model.insert(key.into(), value);
    } else if let Value::Table(optimizer) = model.entry("optimizer").or_insert_with(|| Table::new().into()) {
        optimizer.insert(key.into(), value);
    }
}

/// A value as a word for names and tables: the shortest form of a number, and no characters that are invalid in a file
/// name.
fn word(value: &Value) -> String {
    // Longer than any value that is valid: two numbers of 24 characters.
    const LONGEST: usize = 64;
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Float(n) => {
            let (plain, exponent) = (n.to_string(), format!("{n:e}"));
            if exponent.len() < plain.len() { exponent } else { plain }
        }
        Value::Array(list) => list.iter().map(word).collect::<Vec<_>>().join(","),
        Value::Table(_) => "table".into(),
        other => other.to_string(),
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "+-.,".contains(c) { c } else { '_' };
    text.chars().take(LONGEST).map(plain).collect()
}

/// The keys of `stop`.
pub const STOP_KEYS: &[&str] = &["kind", "first", "eta", "survivors", "evaluations"];

/// Reads `stop`: the rule, and the table that a simulation uses instead.
fn read_stop(d: &Section, range: &Range<usize>, models: &[Model]) -> Result<Option<(Selection, Option<Selection>)>> {
    #[derive(Clone, Copy)]
    enum Kind {
        Asha,
        Patience,
    }
    const KINDS: [(&str, Kind); 2] = [("asha", Kind::Asha), ("patience", Kind::Patience)];
    let Some(s) = d.section("stop", STOP_KEYS)? else { return Ok(None) };
    let missing = |key, example: &str| s.fault(key, format!("is missing; write {example}"));
    let kind = s.word("kind", &KINDS)?.ok_or_else(|| missing("kind", "kind = \"asha\" or \"patience\""))?;
    if let Kind::Patience = kind {
        s.refuse(&["first", "eta", "survivors"], "is for kind = \"asha\" only; patience has evaluations")?;
        let evaluations = s.integer("evaluations", 1..=MOST)?.ok_or_else(|| {
            missing("evaluations", "how many in a row may bring no improvement, such as evaluations = 3")
        })?;
        return Ok(Some((Selection::Patience(Patience::new(evaluations)), None)));
    }
    s.refuse(&["evaluations"], "is for kind = \"patience\" only; asha has first and eta")?;
    let first = s
        .integer("first", 1..=MOST)?
        .ok_or_else(|| missing("first", "the steps after which models are first compared, such as first = 20"))?;
    let too_late = |model: &Model| matches!(model.length, Length::Steps(steps) if steps <= first);
    if models.iter().all(too_late) {
        return Err(s.fault("first", format!("no model has more than {first} steps; write fewer")));
    }
    let eta = s.integer("eta", 2..=MOST)?.unwrap_or(3);
    let rungs = Rungs::new(first, eta).map_err(|error| s.fault_here(error))?;
    let simulated = read_survivors(&s, rungs, range)?.map(Selection::Survivors);
    Ok(Some((Selection::Asha(Asha::new(rungs)), simulated)))
}

/// Reads `survivors`: for each rung the models that go on, numbered within the search.
fn read_survivors(s: &Section, rungs: Rungs, range: &Range<usize>) -> Result<Option<Survivors>> {
    let Some(value) = s.value("survivors") else { return Ok(None) };
    let model = |v: &Value| v.as_integer().and_then(|n| usize::try_from(n).ok()).filter(|n| *n < range.len());
    let list = |v: &Value| v.as_array()?.iter().map(model).collect::<Option<Vec<usize>>>();
    let table: Option<Vec<Vec<usize>>> = value.as_array().and_then(|lists| lists.iter().map(list).collect());
    let table = table.filter(|lists| !lists.is_empty()).ok_or_else(|| {
        let want = "a list per rung with the models that go on, such as [[0, 2], [2]]";
        s.fault("survivors", format!("want {want}, numbers from 0 to {}, got {}", range.len() - 1, show(value)))
    })?;
    // Checked with the file's numbers, then shifted to the job's.
    let moved = table.iter().map(|list| list.iter().map(|n| n + range.start).collect()).collect();
    let survivors = Survivors::new(rungs, table).and_then(|_| Survivors::new(rungs, moved));
    survivors.map(Some).map_err(|error| s.fault("survivors", error))
}
