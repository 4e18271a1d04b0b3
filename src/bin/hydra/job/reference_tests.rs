//! docs/job.md has a table for each table of a job file, with a row for each key, in the order of the code.

use super::device::{DEVICE_KEYS, DISK_KEYS, HOST_KEYS};
use super::run::RUN_KEYS;
use super::{model, optimizer, search};

/// The document's tables: the name in each heading, and the keys of the rows below it.
fn tables(text: &str) -> Vec<(&str, Vec<&str>)> {
    let mut tables: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.trim_start_matches('#').strip_prefix(" `").filter(|_| line.starts_with("##")) {
            tables.push((name.trim_end_matches('`'), Vec::new()));
        } else if let (Some(row), Some((_, keys))) = (line.strip_prefix("| `"), tables.last_mut()) {
            keys.push(row.split('`').next().expect("split gives at least one part"));
        }
    }
    tables
}

#[test]
fn every_key_is_in_the_reference_and_no_other() {
    let text = include_str!("../../../../docs/job.md");
    let want: [(&str, &[&str]); 12] = [
        ("[run]", RUN_KEYS),
        ("[[device]]", DEVICE_KEYS),
        ("[host]", HOST_KEYS),
        ("disk", DISK_KEYS),
        ("[[model]]", model::MODEL_KEYS),
        ("data", model::DATA_KEYS),
        ("valid", model::VALID_KEYS),
        ("lora", model::LORA_KEYS),
        ("optimizer", optimizer::KEYS),
        ("schedule", optimizer::SCHEDULE_KEYS),
        ("search", search::KEYS),
        ("stop", search::STOP_KEYS),
    ];
    let found = tables(text);
    assert_eq!(found.len(), want.len(), "{found:?}");
    for ((name, keys), (want_name, want_keys)) in found.iter().zip(want) {
        assert_eq!((*name, &keys[..]), (want_name, want_keys));
    }
    for (word, _) in super::Policy::words() {
        assert!(text.contains(&format!("`{word}`")), "{word}");
    }
}
