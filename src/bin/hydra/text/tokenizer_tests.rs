//! A byte-level BPE of three merges in both forms: its tokens, and what is said of files at fault.

use super::*;
use serde_json::json;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bpe")
}

/// A folder with copies of these of the fixture's files.
fn folder(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    names.iter().for_each(|name| fs::write(folder.path().join(name), read(&fixture().join(name)).unwrap()).unwrap());
    folder
}

fn open(path: &Path) -> Result<Arc<FileTokenizer>> {
    Tokenizers::default().open(path).map(|found| found.expect("a tokenizer"))
}

fn ids(tokenizer: &FileTokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text.as_bytes()).unwrap()
}

/// The fixture's tokenizer.json with `change` made.
fn changed(change: impl Fn(&mut Value)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("any-name");
    let mut json = serde_json::from_slice(&read(&fixture().join(TOKENIZER)).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    (folder, path)
}

/// Checks that what is at `path` is refused as the input's fault in one line that has all of `says`.
#[track_caller]
fn refused(path: &Path, says: &[&str]) {
    let error = open(path).expect_err("refused");
    assert!(matches!(error, Error::BadInput(_)), "{error}");
    let error = error.to_string();
    assert!(error.contains(path.to_str().unwrap()) && !error.contains('\n'), "{error}");
    says.iter().for_each(|says| assert!(error.contains(says), "{says:?} is not in {error}"));
}

#[test]
fn both_forms_cut_alike() {
    let two = open(folder(&[VOCAB, MERGES]).path()).unwrap();
    let one = open(&fixture()).unwrap();
    // As GPT-2 has it, letters are numbered from `!`, and what is not printable comes after the printable ones.
    for (text, want) in [
        ("", vec![]),
        ("the", vec![83, 257]),
        (" the", vec![258]),
        (" the\n the", vec![258, 198, 258]),
        ("  the", vec![220, 258]),
        ("é\0", vec![127, 102, 188]),
        ("'t the't", vec![6, 83, 258, 6, 83]),
    ] {
        assert_eq!(ids(&one, text), want, "{text:?}");
        assert_eq!(ids(&two, text), want, "{text:?}");
    }
    assert_eq!((one.vocab(), two.vocab()), (260, 260));
    // A tokenizer.json says that this is one token; vocab.json does not.
    assert_eq!(ids(&one, "he<|end|>he"), [257, 259, 257]);
    assert_eq!(ids(&two, "he<|end|>"), [257, 27, 91, 68, 77, 67, 91, 29]);
    assert_ne!(one.identity, two.identity);
    let other = open(&changed(|json| json["model"]["merges"] = json!(["h e"])).1);
    assert!(other.is_ok(), "merges as strings: {other:?}");
    assert_ne!(one.identity, other.unwrap().identity);
}

/// As in a tokenizer.json, and in transformers: where the vocabulary has it.
#[test]
fn the_end_of_a_text_is_one_token() {
    let (without, with) = (folder(&[VOCAB, MERGES]), folder(&[VOCAB, MERGES]));
    let path = with.path().join(VOCAB);
    let mut vocab: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let id = vocab.as_object().unwrap().len();
    vocab[END] = json!(id);
    fs::write(&path, vocab.to_string()).unwrap();
    let (without, with) = (open(without.path()).unwrap(), open(with.path()).unwrap());
    let text = format!("the{END}\nthe");
    assert_eq!(ids(&with, &text), [83, 257, id as u32, 198, 83, 257]);
    assert!(ids(&without, &text).len() > 6 && with.vocab() > id);
}

#[test]
fn a_text_is_cut_whole_and_nothing_is_added() {
    let (_folder, path) = changed(|json| {
        json["truncation"] = json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
        json["padding"] = json!({ "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!" });
        let end = json!({ "SpecialToken": { "id": "<|end|>", "type_id": 0 } });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [end, text], "pair": [end, text],
            "special_tokens": { "<|end|>": { "id": "<|end|>", "ids": [259], "tokens": ["<|end|>"] } },
        });
    });
    let tokenizer = open(&path).unwrap();
    let marked = tokenizer.inner.encode_fast(" the", true).unwrap().get_ids().to_vec();
    assert_eq!(marked, [259, 258], "the file would add a token");
    assert_eq!(ids(&tokenizer, " the the the"), [258, 258, 258]);
}

#[test]
fn the_vocabulary_reaches_to_the_highest_id() {
    let more = json!({ "id": 260, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false });
    let (_folder, path) = changed(|json| json["added_tokens"].as_array_mut().unwrap().push(more.clone()));
    let tokenizer = open(&path).unwrap();
    assert_eq!((tokenizer.vocab(), ids(&tokenizer, "<x>")), (261, vec![260]));
    // A hole below does not count against it.
    let (_folder, path) = changed(|json| json["model"]["vocab"]["far"] = json!(400));
    assert_eq!(open(&path).unwrap().vocab(), 401);
    let two = folder(&[VOCAB, MERGES]);
    fs::write(two.path().join(ADDED), r#"{"<x>": 260}"#).unwrap();
    assert_eq!(open(two.path()).unwrap().vocab(), 261);
}

/// A folder with one of the two forms, and `json` in the file `name` beside it.
fn beside(form: &[&str], name: &str, json: Value) -> tempfile::TempDir {
    let folder = folder(form);
    fs::write(folder.path().join(name), json.to_string()).unwrap();
    folder
}

/// What each gives is what transformers 5 gives for the same folder.
#[test]
fn tokens_beside_the_main_file_are_one_token_each() {
    for form in [&[VOCAB, MERGES][..], &[TOKENIZER]] {
        let plain = open(folder(form).path()).unwrap();
        let check = |name: &str, json: Value, text: &str, want: &[u32], vocab: usize| {
            let tokenizer = open(beside(form, name, json).path()).unwrap();
            assert_eq!((&ids(&tokenizer, text)[..], tokenizer.vocab()), (want, vocab), "{form:?}, {name}: {text:?}");
            assert_ne!(ids(&plain, text), want, "{form:?}, {name}: {text:?}");
            assert_ne!(tokenizer.identity, plain.identity);
        };
        check(ADDED, json!({ "<y>": 261, "<x>": 260 }), "<x>the<y> <x", &[260, 83, 257, 261, 220, 27, 87], 262);
        let y = json!({ "content": "<y>", "lstrip": true, "special": true });
        let decoder = json!({ "added_tokens_decoder": { "261": y, "260": { "content": "<x>" } } });
        check(CONFIG, decoder, "<x>the  <y>", &[260, 83, 257, 261], 262);
        // Of the vocabulary, but no token by itself before.
        check(CONFIG, json!({ "pad_token": { "content": "he", "lstrip": true } }), "t he", &[83, 257], 260);
        check(SPECIAL, json!({ "additional_special_tokens": ["he"] }), " the", &[256, 257], 260);
    }
    // What changes nothing is no other tokenizer.
    let same =
        beside(&[TOKENIZER], CONFIG, json!({ "eos_token": "<|end|>", "model_max_length": 9, "pad_token": null }));
    assert_eq!(open(same.path()).unwrap().identity, open(&fixture()).unwrap().identity);
    // Where the settings hold the added tokens, the two other files are of no account.
    let older = beside(&[TOKENIZER], CONFIG, json!({ "added_tokens_decoder": {} }));
    fs::write(older.path().join(ADDED), r#"{"<x>": 260}"#).unwrap();
    fs::write(older.path().join(SPECIAL), r#"{"pad_token": "[PAD]"}"#).unwrap();
    assert_eq!(open(older.path()).unwrap().vocab(), 260);
    let space = beside(&[VOCAB, MERGES], CONFIG, json!({ "add_prefix_space": true }));
    let (space, plain) = (open(space.path()).unwrap(), open(folder(&[VOCAB, MERGES]).path()).unwrap());
    assert_eq!(ids(&space, "the\nthe"), [258, 198, 83, 257]);
    assert_ne!(space.identity, plain.identity);
}

#[test]
fn what_beside_the_main_file_cannot_be_followed_is_refused() {
    let (one, two) = (&[TOKENIZER][..], &[VOCAB, MERGES][..]);
    let check = |form: &[&str], name: &str, json: Value, says: &[&str]| {
        refused(beside(form, name, json).path(), &[&[name], says].concat());
    };
    for form in [one, two] {
        check(form, ADDED, json!({ "<x>": 300 }), &["\"<x>\" has the id 300; by its place it is 260"]);
        check(form, ADDED, json!({ "<x>": 260, "<y>": 260 }), &["two tokens have the same id"]);
        let decoder = json!({ "added_tokens_decoder": { "7": { "content": "<x>" } } });
        check(form, CONFIG, decoder, &["\"<x>\" has the id 7; by its place it is 260"]);
        check(form, CONFIG, json!({ "added_tokens_decoder": { "x": {} } }), &["added_tokens_decoder: want an object"]);
        check(form, CONFIG, json!({ "pad_token": "[PAD]" }), &["pad_token \"[PAD]\" is neither in the vocabulary"]);
        check(form, SPECIAL, json!({ "extra_special_tokens": ["[A]"] }), &["extra_special_tokens \"[A]\" is neither"]);
        check(form, CONFIG, json!({ "split_special_tokens": true }), &["split_special_tokens"]);
        check(form, CONFIG, json!([1]), &["damaged, want an object"]);
    }
    check(two, CONFIG, json!({ "tokenizer_class": "CLIPTokenizer" }), &["CLIPTokenizer", "write a tokenizer.json"]);
    let space = |class: &str| json!({ "tokenizer_class": class, "add_prefix_space": true });
    check(one, CONFIG, space("GPT2Tokenizer"), &["add_prefix_space is true, and the tokenizer.json has false"]);
    assert!(open(beside(one, CONFIG, space("PreTrainedTokenizerFast")).path()).is_ok(), "it does not look at it");
    let capitals = changed(|json| {
        json["normalizer"] = json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true });
    });
    fs::write(capitals.0.path().join(CONFIG), r#"{"do_lower_case": false}"#).unwrap();
    let error = open(&capitals.1).unwrap_err().to_string();
    assert!(error.contains("do_lower_case is false, and the tokenizer.json has true"), "{error}");
}

#[test]
fn files_are_kept_as_they_were_read() {
    let names = |tokenizer: &FileTokenizer| tokenizer.files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let own = folder(&[VOCAB, MERGES, "tokenizer_config.json"]);
    let tokenizers = Tokenizers::default();
    let first = tokenizers.open(own.path()).unwrap().unwrap();
    assert_eq!(names(&first), [VOCAB, MERGES, "tokenizer_config.json"]);
    for (name, bytes) in &first.files {
        assert_eq!(*bytes, fs::read(own.path().join(name)).unwrap());
    }
    fs::remove_file(own.path().join(VOCAB)).unwrap();
    assert!(Arc::ptr_eq(&first, &tokenizers.open(own.path()).unwrap().unwrap()), "loaded once");
    // Where both forms are there, the one file says more. Whatever it is called, it is saved as transformers wants it.
    assert_eq!(names(&open(&fixture()).unwrap()), [TOKENIZER, "tokenizer_config.json"]);
    assert_eq!(names(&open(&changed(|_| {}).1).unwrap()), [TOKENIZER]);
}

#[test]
fn one_file_at_fault() {
    let check = |change: &dyn Fn(&mut Value), says: &[&str]| refused(&changed(change).1, says);
    check(&|json| json["version"] = json!("9.9"), &["is no tokenizer that can be loaded", "9.9"]);
    check(&|json| json["model"]["type"] = json!("Runes"), &["is no tokenizer that can be loaded"]);
    check(&|json| json["model"] = json!({ "type": "BPE", "vocab": {}, "merges": [] }), &["\"<|end|>\" has the id 259"]);
    let bare = json!({ "version": "1.0", "model": { "type": "BPE", "vocab": {}, "merges": [] } });
    check(&|json| *json = bare.clone(), &["the vocabulary is empty"]);
    check(&|json| json["model"]["dropout"] = json!(0.5), &["model.dropout is 0.5"]);
    check(
        &|json| json["added_tokens"][0]["content"] = json!("<y>"),
        &["\"<y>\" has the id 259; by its place it is 260"],
    );
    // The crate writes `ab` into a buffer for its longest token: a panic.
    let short =
        json!({ "version": "1.0", "model": { "type": "BPE", "vocab": { "a": 0, "b": 1 }, "merges": [["a", "b"]] } });
    check(&|json| *json = short.clone(), &["contradicts itself"]);
    assert!(!panics_are_contained());
    let folder = tempfile::tempdir().unwrap();
    refused(&folder.path().join("none"), &["no such file or folder"]);
    let path = folder.path().join(TOKENIZER);
    for damaged in ["", "{", "[1]", "{\"version\": \"1.0\"}"] {
        fs::write(&path, damaged).unwrap();
        refused(
            &path,
            &[if serde_json::from_str::<Value>(damaged).is_ok() { "holds no model" } else { "damaged JSON" }],
        );
    }
}

#[test]
fn two_files_at_fault() {
    let check = |name: &str, text: &[u8], says: &[&str]| {
        let folder = folder(&[VOCAB, MERGES]);
        fs::write(folder.path().join(name), text).unwrap();
        refused(folder.path(), &[&[name], says].concat());
    };
    check(VOCAB, b"{}", &["the vocabulary is empty"]);
    check(VOCAB, b"{\"a\": 0", &["damaged"]);
    check(VOCAB, b"[\"a\"]", &["want an object"]);
    check(VOCAB, b"{\"a\": -1}", &["-1"]);
    check(VOCAB, b"{\"a\": 0}", &["no token for '!'", "256 bytes"]);
    check(ADDED, b"{\"a\": \"0\"}", &["want an object"]);
    check(MERGES, b"#version: 0.2\nh e\nh", &["line 3", "two tokens", "\"h\""]);
    check(MERGES, b"h e x", &["line 1", "two tokens"]);
    check(MERGES, b"h e\n\nh x", &["line 3", "\"hx\" is not in vocab.json"]);
    check(MERGES, b"h \xff", &["byte 2 is not UTF-8"]);
    let half = folder(&[VOCAB]);
    assert!(Tokenizers::default().open(half.path()).unwrap().is_none());
}

#[test]
fn text_must_be_utf8() {
    let error = open(&fixture()).unwrap().encode(b"ab\xc3\xa9 \xff").unwrap_err().to_string();
    assert!(error.starts_with("byte 5 is not UTF-8"), "{error}");
}

/// Texts of awkward characters: the n-th is drawn from n alone.
fn awkward(n: u64) -> String {
    const PARTS: [&str; 22] = [
        "a", "the", " the", "The", "1", "12", ".", "/", "'s", "'", "\n", "\n", "\n", "\r", "\t", " ", "\u{a0}",
        "\u{2028}", "\u{e9}", "e\u{301}", "\0", "<|end|>",
    ];
    let mut random = hydra::base::philox::Sequence::new(n, 1);
    (0..300).map(|_| PARTS[random.below(PARTS.len() as u64) as usize]).collect()
}

/// How Llama 3, Qwen2 and 3, Mistral's Nemo, OLMo 2 and gpt-oss find words.
const SPLITS: [&str; 5] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// A tokenizer.json whose words are found by `regex`, as those of these models, behind Qwen's normalizer.
fn split_by(json: &mut Value, regex: &str) {
    json["normalizer"] = json!({ "type": "NFC" });
    json["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
        { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false },
    ] });
}

/// The words of some texts, one text behind the other: what no token reaches over.
fn words(tokenizer: &FileTokenizer, texts: &[&str]) -> Vec<String> {
    let of = |text: &&str| {
        let mut words = PreTokenizedString::from(*text);
        tokenizer.inner.get_pre_tokenizer().unwrap().pre_tokenize(&mut words).unwrap();
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(word, _, _)| word.to_string()).collect::<Vec<_>>()
    };
    texts.iter().flat_map(of).collect()
}

#[test]
fn pieces_have_the_tokens_of_the_whole() {
    let one = open(&fixture()).unwrap();
    let two = open(folder(&[VOCAB, MERGES]).path()).unwrap();
    let splits = SPLITS.map(|regex| open(&changed(|json| split_by(json, regex)).1).unwrap());
    let tokenizers: Vec<_> = [one, two].into_iter().chain(splits).collect();
    assert!(tokenizers.iter().all(|tokenizer| tokenizer.in_pieces));
    let mut cuts = 0;
    for n in 0..200 {
        let text = awkward(n);
        for tokenizer in &tokenizers {
            let whole = tokenizer.encode_in(&[&text]).unwrap();
            for least in [1, 7, 100] {
                let pieces = pieces(&text, least);
                assert_eq!(pieces.concat(), text);
                assert!(pieces.iter().rev().skip(1).all(|piece| piece.len() >= least), "{pieces:?}");
                assert_eq!(tokenizer.encode_in(&pieces).unwrap(), whole, "{n}, {least}: {text:?}");
                assert_eq!(words(tokenizer, &pieces), words(tokenizer, &[&text]), "{n}, {least}: {text:?}");
                cuts += pieces.len() - 1;
            }
        }
    }
    assert!(cuts > 1000, "{cuts}");
    for (text, want) in [
        ("a\nb", 2),
        ("a\n/", 1),
        ("a\n\nb", 1),
        ("a \nb", 1),
        ("a\n b", 1),
        ("a\n", 1),
        ("\nb", 1),
        ("", 1),
        ("a\n\u{a0}", 1),
    ] {
        assert_eq!(pieces(text, 1).len(), want, "{text:?}");
    }
}

#[test]
fn what_may_reach_over_a_line_is_cut_whole() {
    let whole = |change: &dyn Fn(&mut Value)| !open(&changed(change).1).unwrap().in_pieces;
    assert!(!whole(&|json| json["pre_tokenizer"]["trim_offsets"] = json!(false)));
    assert!(whole(&|json| json["normalizer"] = json!({ "type": "Prepend", "prepend": "a" })));
    assert!(whole(&|json| json["pre_tokenizer"] = Value::Null));
    assert!(whole(&|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true)));
    assert!(whole(&|json| json["pre_tokenizer"]["use_regex"] = json!(false)));
    assert!(whole(&|json| split_by(json, r"\s+|\S+")));
    assert!(whole(&|json| split_by(json, &SPLITS[0].replace(r"\r\n\p", r"\p"))));
    let split = |json: &mut Value, key: &str, value: Value| {
        split_by(json, SPLITS[0]);
        json["pre_tokenizer"]["pretokenizers"][0][key] = value;
    };
    assert!(whole(&|json| split(json, "behavior", json!("MergedWithNext"))));
    assert!(whole(&|json| split(json, "invert", json!(true))));
    assert!(whole(&|json| {
        split_by(json, SPLITS[0]);
        json["normalizer"] = json!({ "type": "NFKC" });
    }));
    assert!(whole(&|json| json["added_tokens"][0]["lstrip"] = json!(true)));
    assert!(whole(&|json| {
        let mut token = json["added_tokens"][0].clone();
        (token["id"], token["content"]) = (json!(260), json!("a\nb"));
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }));
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    refused(Path::new("/dev/zero"), &["is no regular file"]);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(TOKENIZER)).unwrap();
    refused(folder.path(), &[TOKENIZER, "is a folder"]);
}

#[test]
fn a_byte_without_a_token_is_refused_in_both_forms() {
    let (_folder, path) = changed(|json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove("z");
    });
    refused(&path, &["has no token for 'z'"]);
    // Where another token stands in, none vanishes.
    let (_folder, path) = changed(|json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove("z");
        json["model"]["unk_token"] = json!("!");
    });
    assert_eq!(ids(&open(&path).unwrap(), "z"), [0]);
}

#[test]
fn a_letter_without_a_token_is_told_where_nothing_stands_for_it() {
    let letters = |change: &dyn Fn(&mut Value)| {
        changed(|json| {
            *json = json!({
                "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": { "type": "Whitespace" },
                "post_processor": null, "decoder": null, "truncation": null, "padding": null,
                "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2, "é": 3 }, "merges": [["a", "b"]] },
            });
            change(json);
        })
    };
    let (_folder, path) = letters(&|_| ());
    let plain = open(&path).unwrap();
    assert_eq!(ids(&plain, "ab  aé\n\tba "), [2, 0, 3, 1, 0]);
    for (text, word) in
        [("ab xab ba", "xab"), ("ab abx", "abx"), ("☃", "☃"), ("aéxa", "aéxa"), ("a\u{2003}axa\n", "axa")]
    {
        let error = plain.encode(text.as_bytes()).expect_err(text).to_string();
        assert!(error.contains(&format!("a letter of {word:?}")), "{text:?}: {error}");
    }
    // Where something stands for what is unknown, it does.
    let (_folder, path) = letters(&|json| json["model"]["unk_token"] = json!("é"));
    assert_eq!(ids(&open(&path).unwrap(), "axa"), [0, 3, 0]);
    // An accent that the normalizer takes off is no loss, a letter is.
    let (_folder, path) = letters(&|json| {
        json["normalizer"] =
            json!({ "type": "Sequence", "normalizers": [{ "type": "NFD" }, { "type": "StripAccents" }] });
    });
    let stripped = open(&path).unwrap();
    assert_eq!(ids(&stripped, "àb a\u{300}b"), [2, 2]);
    assert!(stripped.encode("àx".as_bytes()).is_err());
}

#[test]
fn a_file_of_another_kind_is_told_so() {
    refused(&fixture().join(VOCAB), &["holds no model", "name the folder"]);
    refused(&fixture().join("tokenizer_config.json"), &["holds no model"]);
    let (_folder, path) = changed(|json| json["model"]["vocab"]["far"] = json!(u32::MAX));
    refused(&path, &["the highest id is 4294967295"]);
}
