//! The classes of an image classifier, as config.json counts and names them.

use crate::base::Result;
use crate::nn::fields::{Fields, shown};
use serde_json::{Map, Value};

const MOST_CLASSES: usize = 1 << 20;

/// The number of classes: the number of names, else `num_labels`, else 2.
///
/// # Errors
/// When the two differ, the names are malformed, or the problem is not single-label classification.
pub(super) fn classes(f: &Fields) -> Result<usize> {
    if let Some(kind) = f.get("problem_type").filter(|&kind| kind != "single_label_classification") {
        return Err(
            f.fault("problem_type", format!("{} is not supported, only single_label_classification", shown(kind)))
        );
    }
    let stated = f.optional_count("num_labels", 1..=MOST_CLASSES)?;
    let Some(names) = f.get("id2label") else { return Ok(stated.unwrap_or(2)) };
    let named = names.as_object().map(Map::len).filter(|n| (1..=MOST_CLASSES).contains(n)).ok_or_else(|| {
        f.fault("id2label", format!("want 1 to {MOST_CLASSES} names of classes, got {}", shown(names)))
    })?;
    match stated {
        Some(stated) if stated != named => {
            Err(f.fault("num_labels", format!("is {stated}, but id2label names {named} classes")))
        }
        _ => Ok(named),
    }
}

/// The config that a network was given, with a name for every class: transformers counts the names, and maps them both
/// ways.
pub(super) fn with_named_classes(given: &Map<String, Value>, classes: usize) -> Map<String, Value> {
    let mut given = given.clone();
    given.remove("num_labels");
    if given.get("id2label").is_none_or(Value::is_null) {
        let name = |class: usize| format!("LABEL_{class}");
        let id2label: Map<_, _> = (0..classes).map(|c| (c.to_string(), name(c).into())).collect();
        let label2id: Map<_, _> = (0..classes).map(|c| (name(c), c.into())).collect();
        given.insert("id2label".into(), id2label.into());
        given.insert("label2id".into(), label2id.into());
    }
    given
}
