//! `--set path=value`: changes one value of a job before it is read.
//!
//! A path is keys and list indices with dots between them. `model.N.KEY` stands for `model.N.optimizer.KEY` where KEY
//! is one of the optimizer's own, such as `lr`.

use super::optimizer::SHORT_KEYS;
use super::section::{Origin, show};
use hydra::base::Result;
use toml::{Table, Value};

/// Deepest path that is followed; a job file has no value deeper than five, and a parser's own limit is 80.
const DEEPEST: usize = 16;

/// Applies `setting`, of the form `path=value`, to `job`.
///
/// # Errors
/// When the setting has no `=`, its path leads through a value that is not a table or list, an index is out of range,
/// or its value is not TOML.
pub fn apply(origin: Origin, job: &mut Table, setting: &str) -> Result<()> {
    let fault = |message: String| origin.fault("", format!("--set {setting}: {message}"));
    let (path, text) =
        setting.split_once('=').ok_or_else(|| fault("want PATH=VALUE, such as model.0.lr=1e-3".into()))?;
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|key| key.is_empty()) || keys.len() > DEEPEST {
        return Err(fault("want a path such as model.0.lr before the =".into()));
    }
    if let ["model", _, key] = keys[..]
        && SHORT_KEYS.contains(&key)
    {
        keys.insert(2, "optimizer");
    }
    let value = read_value(text.trim()).map_err(fault)?;
    // A job without [[device]] implicitly has one, the host.
    if keys.starts_with(&["device", "0"]) && keys.len() > 2 && !job.contains_key("device") {
        let host = Table::from_iter([("kind".to_string(), Value::from("host"))]);
        job.insert("device".into(), Value::Array(vec![Value::Table(host)]));
    }
    // Otherwise a missing list is not created: no index is in its range.
    if ["model", "device"].contains(&keys[0]) && keys.len() > 1 && !job.contains_key(keys[0]) {
        return Err(fault(format!("{}: the job file has no [[{}]]", keys[0], keys[0])));
    }
    let (last, way) = keys.split_last().expect("splitting gives at least one key");
    let mut container = Container::Table(job);
    for (i, key) in way.iter().enumerate() {
        container = container.step(key).map_err(|message| fault(format!("{}: {message}", keys[..=i].join("."))))?;
    }
    container.put(last, value).map_err(|message| fault(format!("{}: {message}", keys.join("."))))
}

/// The value that `text` stands for; a bare word, or words, such as `fifo` or `64 MiB`, is a string.
fn read_value(text: &str) -> std::result::Result<Value, String> {
    match text.parse::<Value>() {
        Ok(value) => Ok(value),
        // Text that opens a list, a table or a quote was meant as TOML; treating it as a string would hide the mistake.
        Err(error) if text.starts_with(['[', '{', '"', '\'']) => {
            Err(format!("the value is no TOML: {}", error.message()))
        }
        Err(_) => Ok(Value::String(text.to_string())),
    }
}

/// Where a path has led: a value with parts.
enum Container<'a> {
    Table(&'a mut Table),
    List(&'a mut Vec<Value>),
}

impl<'a> Container<'a> {
    /// The table or list under `key`; if a table lacks the key, a table is created there.
    fn step(self, key: &str) -> std::result::Result<Container<'a>, String> {
        let value = match self {
            Container::Table(table) => table.entry(key).or_insert_with(|| Value::Table(Table::new())),
            Container::List(list) => {
                let at = index(list, key)?;
                &mut list[at]
            }
        };
        match value {
            Value::Table(table) => Ok(Container::Table(table)),
            Value::Array(list) => Ok(Container::List(list)),
            other => Err(format!("leads through {}, which has no parts", show(other))),
        }
    }

    fn put(self, key: &str, value: Value) -> std::result::Result<(), String> {
        match self {
            Container::Table(table) => {
                table.insert(key.to_string(), value);
            }
            Container::List(list) => {
                let at = index(list, key)?;
                list[at] = value;
            }
        }
        Ok(())
    }
}

fn index(list: &[Value], key: &str) -> std::result::Result<usize, String> {
    key.parse().ok().filter(|&at: &usize| at < list.len()).ok_or_else(|| match list.len() {
        0 => "the list is empty".to_string(),
        n => format!("want an index from 0 to {}", n - 1),
    })
}
