//! Good files read as they are, hostile ones are errors that name what is wrong.

use super::*;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView as Given, serialize};

/// A file of this header and so many zero bytes of data.
fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

/// Checks that a file is refused as bad input, in one line that names the file and holds every one of `parts`.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    match TensorFile::parse(bytes, "x.safetensors") {
        Err(Error::BadInput(message)) => {
            assert!(message.starts_with("x.safetensors: ") && !message.contains('\n'), "{message}");
            for part in parts {
                assert!(message.contains(part), "'{part}' is not in: {message}");
            }
        }
        other => panic!("{other:?}"),
    }
}

/// As [`refused`], for a header of these entries.
#[track_caller]
fn refused_entries(entries: &[String], data_bytes: usize, parts: &[&str]) {
    refused(&file(&format!("{{{}}}", entries.join(",")), data_bytes), parts);
}

/// A file as the safetensors crate writes it, with every element type, a scalar and an empty tensor.
fn good() -> Vec<u8> {
    let numbers: Vec<u8> = (0..96).collect();
    let view = |dtype, shape: &[usize], len: usize| Given::new(dtype, shape.to_vec(), &numbers[..len]).unwrap();
    let tensors = vec![
        ("f64", view(Dtype::F64, &[3], 24)),
        ("f32", view(Dtype::F32, &[2, 3], 24)),
        ("f16", view(Dtype::F16, &[31], 62)),
        ("bf16", view(Dtype::BF16, &[1, 1, 1], 2)),
        ("i64", view(Dtype::I64, &[], 8)),
        ("i32", view(Dtype::I32, &[5, 0, 7], 0)),
        ("i16", view(Dtype::I16, &[33], 66)),
        ("i8", view(Dtype::I8, &[7], 7)),
        ("u8", view(Dtype::U8, &[1], 1)),
        ("bool", view(Dtype::BOOL, &[3], 3)),
    ];
    let text = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize(tensors, Some(text)).unwrap()
}

#[test]
fn what_the_crate_writes_reads_the_same() {
    let bytes = good();
    let ours = TensorFile::parse(&bytes, "good").unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(ours.tensors().count(), theirs.len());
    for tensor in ours.tensors() {
        let their = theirs.tensor(&tensor.entry.name).unwrap();
        assert_eq!((tensor.bytes, tensor.entry.shape.axes()), (their.data(), their.shape()));
        assert_eq!(tensor.entry.element.to_string(), format!("{:?}", their.dtype()));
        let start = tensor.entry.start_bytes as usize;
        assert_eq!(&bytes[start..start + tensor.entry.len_bytes as usize], tensor.bytes);
    }
    let names: Vec<_> = ours.index().entries().iter().map(|entry| entry.name.as_str()).collect();
    assert!(names.is_sorted(), "{names:?}");
    assert_eq!(ours.get("i64").unwrap().entry.shape, Shape::default());
    assert!(ours.get("i6").is_none());
    assert_eq!(ours.index().metadata()["format"], "pt");
}

/// With tensors in the crate's order our header has the crate's bytes.
#[test]
fn what_we_write_is_what_the_crate_writes() {
    let bytes = good();
    let good = TensorFile::parse(&bytes, "good").unwrap();
    let mut tensors: Vec<_> = good.tensors().map(|tensor| tensor.entry).collect();
    tensors.sort_by_key(|entry| (std::cmp::Reverse(entry.element), &entry.name));
    let metadata = BTreeMap::from([("format", "pt".to_string())]);
    let header = header(&metadata, tensors.iter().map(|t| (t.name.as_str(), t.element, t.shape.axes())));
    assert_eq!(header, bytes[..header.len()]);
    assert_eq!(header.len() as u64, tensors[0].start_bytes);
    assert_eq!(super::header(&BTreeMap::new(), []), file("{}      ", 0));
}

/// Old files have headers of any length, so that no tensor is aligned; they are read byte by byte.
#[test]
fn alignment_is_no_condition() {
    for pad in 0..9 {
        let header = format!("{{{}}}{}", entry("a", "F32", "[2]", 0, 8), " ".repeat(pad));
        let bytes = file(&header, 8);
        let read = TensorFile::parse(&bytes, "x").unwrap();
        assert_eq!(read.get("a").unwrap().bytes.len(), 8);
    }
    // An element type may also follow an odd number of bytes.
    let bytes = file(&format!("{{{},{}}}", entry("a", "U8", "[1]", 0, 1), entry("b", "F32", "[1]", 1, 5)), 5);
    assert_eq!(TensorFile::parse(&bytes, "x").unwrap().get("b").unwrap().bytes.len(), 4);
    assert_eq!(TensorFile::parse(&file("{}", 0), "x").unwrap().tensors().count(), 0);
}

#[test]
fn every_truncation_and_any_garbage_is_refused() {
    let bytes = good();
    for len in 0..bytes.len() {
        refused(&bytes[..len], &[]);
    }
    let mut long = bytes.clone();
    long.push(0);
    refused(&long, &["1 bytes follow the last tensor"]);
    refused(b"", &["0 bytes are too few"]);
    refused(b"1234567", &["7 bytes are too few"]);
    refused(&file("{}", 1), &["1 bytes follow"]);
}

#[test]
fn header_lengths_are_not_believed() {
    let mut bytes = good();
    let true_length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    for length in [u64::MAX, u64::MAX - 7, i64::MAX as u64, 1 << 32, 100_000_001] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refused(&bytes, &[&length.to_string(), "more than 100000000"]);
    }
    bytes[..8].copy_from_slice(&100_000_000u64.to_le_bytes());
    refused(&bytes, &["only", "truncated"]);
    for length in [0, 1, true_length - 1, true_length - 8, true_length + 1] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        // One space less of padding is still a header, before a byte too many.
        refused(&bytes, &[]);
    }
}

#[test]
fn headers_that_are_no_json_are_refused() {
    refused(&file("", 0), &["does not begin with '{'"]);
    refused(&file("[]", 0), &["does not begin with '{'"]);
    refused(&file(" {}", 0), &["does not begin with '{'"]);
    refused(&file("{", 0), &["header: EOF"]);
    refused(&file("{}}", 0), &["header: trailing"]);
    refused(&file("{}\0", 0), &["header: trailing"]);
    refused(&file(&"{\"a\":".repeat(200), 0), &["tensor 'a'"]);
    let mut latin = file(r#"{"e":1}"#, 0);
    latin[10] = 0xe9;
    refused(&latin, &["not UTF-8 at byte 10"]);
}

#[test]
fn tensors_that_contradict_themselves_are_named() {
    let one = |dtype, shape, start, end, data, parts: &[&str]| {
        refused_entries(&[entry("w.1", dtype, shape, start, end)], data, &[&["tensor 'w.1'"], parts].concat());
    };
    one("F8_E5M2", "[4]", 0, 4, 4, &["F8_E5M2", "not supported"]);
    one("f32", "[1]", 0, 4, 4, &["'f32'"]);
    one("F32", "[1]", 0, 5, 5, &["takes 4 bytes", "span 5"]);
    one("F32", "[2]", 0, 4, 4, &["takes 8 bytes", "span 4"]);
    one("F32", "[1]", 4, 0, 4, &["before their start"]);
    one("F32", "[2]", 0, 8, 7, &["ends at byte 8", "has 7", "truncated"]);
    one("F32", "[1]", u64::MAX - 4, u64::MAX, 4, &["truncated"]);
    one("U8", "[4]", 4, 8, 8, &["4 bytes before it belong to no tensor"]);
    one("F32", "[18446744073709551615,0]", 0, 0, 0, &["more elements than fit"]);
    one("F32", "[0,18446744073709551615]", 0, 0, 0, &["more elements than fit"]);
    one("F32", "[4294967296,0,4294967296]", 0, 0, 0, &["more elements than fit"]);
    one("F32", "[4294967296,4294967296]", 0, 0, 0, &["more elements than fit"]);
    one("F64", "[2305843009213693952]", 0, 0, 0, &["more elements than fit"]);
    one("F32", "[18446744073709551616]", 0, 0, 0, &["invalid"]);
    one("F32", "[-1]", 0, 4, 4, &["invalid value"]);
    one("F32", "[1.0]", 0, 4, 4, &["invalid type"]);
    one("F32", "1", 0, 4, 4, &["invalid type"]);
    one("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", 0, 4, 4, &["more than 16 axes"]);
    let raw = |value: &str, part| refused(&file(&format!(r#"{{"w.1":{value}}}"#), 0), &["tensor 'w.1'", part]);
    raw("1", "invalid type");
    raw("null", "invalid type");
    raw(r#"{"dtype":"F32","shape":[]}"#, "missing field `data_offsets`");
    raw(r#"{"dtype":"F32","shape":[],"data_offsets":[0]}"#, "invalid length 1");
    raw(r#"{"dtype":"F32","shape":[],"data_offsets":[0,4,4]}"#, "");
    raw(r#"{"dtype":"F32","shape":[],"shape":[1],"data_offsets":[0,4]}"#, "duplicate field `shape`");
    raw(r#"{"dtype":"F32","shape":[],"data_offsets":[0,4],"more":[]}"#, "unknown field `more`");
}

#[test]
fn tensors_that_contradict_each_other_are_named() {
    let (a, b) = (entry("a", "U8", "[4]", 0, 4), entry("b", "U8", "[4]", 3, 7));
    refused_entries(&[a.clone(), b], 7, &["'b'", "overlaps tensor 'a' by 1 bytes"]);
    refused_entries(&[a.clone(), entry("b", "U8", "[4]", 0, 4)], 4, &["overlaps"]);
    refused_entries(&[a.clone(), entry("b", "U8", "[4]", 5, 9)], 9, &["'b'", "1 bytes before it"]);
    refused_entries(&[a.clone(), entry("a", "U8", "[4]", 4, 8)], 8, &["'a' occurs twice"]);
    // Equal keys that are written differently.
    refused_entries(&[a.clone(), entry("\\u0061", "U8", "[4]", 4, 8)], 8, &["'a' occurs twice"]);
    let text = r#""__metadata__":{"k":"v"}"#.to_string();
    refused_entries(&[text.clone(), text.clone()], 0, &["__metadata__", "occurs twice"]);
    refused_entries(&[r#""__metadata__":{"k":"v","k":"v"}"#.to_string()], 0, &["key 'k' occurs twice"]);
    refused_entries(&[r#""__metadata__":{"k":1}"#.to_string()], 0, &["invalid type"]);
    // Empty tensors share a place with their neighbours and overlap nothing.
    let empty = |name, at| entry(name, "I64", "[0]", at, at);
    let header = format!("{{{},{},{},{a}}}", empty("p", 0), empty("q", 4), empty("r", 4));
    TensorFile::parse(&file(&header, 4), "x").unwrap();
}

/// A name may hold anything; a message stays one short line.
#[test]
fn hostile_names_do_not_spoil_the_message() {
    let name = "\\n\\u001b[31m".repeat(1000);
    let bytes = file(&format!("{{{}}}", entry(&name, "F32", "[1]", 0, 5)), 5);
    refused(&bytes, &["takes 4 bytes"]);
    refused(&file(r#"{"a":{"line\nbreak":1}}"#, 0), &["tensor 'a'", "line\\nbreak"]);
    let Err(e) = TensorFile::parse(&bytes, "x") else { panic!("read") };
    assert!(e.to_string().len() < 1000 && !e.to_string().chars().any(char::is_control), "{e}");
}

/// What may stand where a number stood in the JSON.
fn hostile_number() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (0u64..300).prop_map(|n| n.to_string()),
        Just("18446744073709551615".into()),
        Just("9223372036854775807".into()),
        Just("4294967296".into()),
        Just("-1".into()),
        Just("1e300".into()),
        Just("[]".into()),
        Just("null".into()),
    ]
}

#[derive(Clone, Debug)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Remove(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
    Number(prop::sample::Index, String),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = || any::<prop::sample::Index>();
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (at(), 1usize..40).prop_map(|(at, n)| Mutation::Remove(at, n)),
        (at(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (at(), hostile_number()).prop_map(|(at, number)| Mutation::Number(at, number)),
    ]
}

/// Applies a mutation; `Number` replaces one number of the header and mends the header's length.
fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    match mutation {
        Mutation::Set(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Mutation::Remove(at, n) => {
            let at = at.index(bytes.len());
            bytes.drain(at..(at + n).min(bytes.len()));
        }
        Mutation::Insert(at, more) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, more.iter().copied());
        }
        Mutation::Number(at, number) => {
            let Some(length) = bytes.first_chunk().map(|length| u64::from_le_bytes(*length) as usize) else { return };
            let Some(header) = bytes.get(8..).and_then(|rest| rest.get(..length)) else { return };
            let digit = |at: usize| header.get(at).is_some_and(u8::is_ascii_digit);
            let starts: Vec<usize> = (0..length).filter(|&at| digit(at) && (at == 0 || !digit(at - 1))).collect();
            if starts.is_empty() {
                return;
            }
            let start = starts[at.index(starts.len())];
            let end = (start..=length).find(|&at| !digit(at)).unwrap_or(length);
            bytes.splice(8 + start..8 + end, number.bytes());
            let length = (length + number.len() - (end - start)) as u64;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is done to a file, it is read or refused as bad input, and what is read keeps the index's promises.
    #[test]
    fn mutated_files_do_no_harm(mutations in prop::collection::vec(mutation(), 1..5)) {
        let mut bytes = good();
        for mutation in &mutations {
            mutate(&mut bytes, mutation);
        }
        match TensorFile::parse(&bytes, "x") {
            Ok(file) => {
                let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
                let mut covered = header;
                for tensor in file.tensors() {
                    let entry = tensor.entry;
                    prop_assert_eq!(entry.len_bytes, entry.shape.elems() as u64 * entry.element.bytes());
                    prop_assert_eq!(tensor.bytes.len() as u64, entry.len_bytes);
                    prop_assert!(entry.start_bytes >= header);
                    covered += entry.len_bytes;
                }
                prop_assert_eq!(covered, bytes.len() as u64);
                prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
            }
            Err(Error::BadInput(message)) => prop_assert!(message.starts_with("x: ") && !message.contains('\n')),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// Bytes that were never a file.
    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(matches!(TensorFile::parse(&bytes, "x"), Err(Error::BadInput(_))));
    }
}
