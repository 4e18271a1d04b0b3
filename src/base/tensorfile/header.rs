//! Writes the part of a safetensors file before its tensors.

use super::{Element, METADATA};
use serde_json::json;
use std::collections::BTreeMap;

/// The header's length and the header, padded so that what follows is aligned to eight bytes.
///
/// `tensors` are names, element types and axes in the order in which their elements follow, without gap.
pub fn header<'a>(
    metadata: &BTreeMap<&str, String>,
    tensors: impl IntoIterator<Item = (&'a str, Element, &'a [usize])>,
) -> Vec<u8> {
    let mut keys = Vec::new();
    if !metadata.is_empty() {
        keys.push(format!("\"{METADATA}\":{}", json!(metadata)));
    }
    let mut end = 0;
    for (name, element, axes) in tensors {
        let start = end;
        end += element.bytes() * axes.iter().product::<usize>() as u64;
        let (name, axes) = (json!(name), json!(axes));
        keys.push(format!(r#"{name}:{{"dtype":"{element}","shape":{axes},"data_offsets":[{start},{end}]}}"#));
    }
    let mut header = format!("{{{}}}", keys.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header].concat()
}
