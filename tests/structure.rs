//! Reads the sources and holds them to the house rules: which module may use which, where `unsafe` may stand and that
//! it says why, what finished code does not hold, and that every file says what it is for.
//!
//! The rules work on tokens, with comments and literals taken apart, so that a word in a message is no violation.
//! Planted violations in the last tests show that each rule can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules from the ground up: each may use those before it.
const LAYERS: [&str; 10] = ["base", "trace", "graph", "device", "nn", "sched", "spill", "engine", "data", "train"];
/// Modules that use `base` alone, wherever they stand in the list.
const ON_BASE_ALONE: [&str; 3] = ["trace", "sched", "data"];
/// Under this module alone `unsafe` may stand.
const UNSAFE_MODULE: &str = "device";
/// And in the one bench that calls another library's functions: cuBLAS, beside our products.
const UNSAFE_BENCH: &str = "benches/kernels/peers.rs";
/// Where an unsafe function may be declared, and nothing unsafe be done: an embedder's kernels are what he says they
/// are.
const UNSAFE_DECLARED: &str = "src/graph/custom.rs";
/// What may be unsafe in a test, a bench or an example: a counting allocator, since the trait is unsafe, and a use of
/// what the library gives as unsafe: a device's functions, called or handed on, and an embedder's kernels.
const UNSAFE_TRAIT: &str = "GlobalAlloc";
const DEVICE_FUNCTIONS: [&str; 4] = ["submit", "write_host", "read_host", "unpoisoned_bytes"];
const UNSAFE_TYPE: &str = "Kernels";
/// How far above a comment that says `as above` the reason may be.
const REASON_LINES: usize = 40;

/// A piece of code: a word, or one character of punctuation. Literals are the word `"`.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// A source file taken apart.
struct Source {
    tokens: Vec<Token>,
    /// The comments of each line, without their slashes; empty where there is none.
    comments: Vec<String>,
    /// What is left of each line without comments, trimmed.
    code: Vec<String>,
}

/// Takes a file apart into code and comments.
fn read(text: &str) -> Source {
    let chars: Vec<char> = text.chars().collect();
    let lines = text.lines().count() + 1;
    let mut source =
        Source { tokens: Vec::new(), comments: vec![String::new(); lines], code: vec![String::new(); lines] };
    let (mut i, mut line) = (0, 0);
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    while i < chars.len() {
        let c = at(i);
        if c == '\n' {
            line += 1;
            i += 1;
        } else if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                source.comments[line].push(at(i));
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            loop {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    ('\n', _) => (line, i) = (line + 1, i + 1),
                    (other, _) => {
                        source.comments[line].push(other);
                        i += 1;
                    }
                }
                if depth == 0 || i >= chars.len() {
                    break;
                }
            }
        } else if let Some((end, breaks)) = literal(&chars, i) {
            source.tokens.push(Token { text: "\"".into(), line });
            source.code[line].push('"');
            line += breaks;
            i = end;
        } else if word(c) {
            let start = i;
            while word(at(i)) {
                i += 1;
            }
            let text: String = chars[start..i].iter().collect();
            source.code[line].push_str(&text);
            source.tokens.push(Token { text, line });
        } else {
            if !c.is_whitespace() {
                source.tokens.push(Token { text: c.into(), line });
            }
            source.code[line].push(c);
            i += 1;
        }
    }
    source.code.iter_mut().for_each(|line| *line = line.trim().to_string());
    source
}

/// Where a string or character that begins at `start` ends, and how many line breaks are in it; `None` where none
/// begins.
fn literal(chars: &[char], start: usize) -> Option<(usize, usize)> {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let after_word = start > 0 && (at(start - 1).is_alphanumeric() || at(start - 1) == '_');
    let breaks = |end: usize| chars[start..end.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    let prefix = if after_word { 0 } else { (0..2).take_while(|&n| matches!(at(start + n), 'b' | 'r' | 'c')).count() };
    let hashes = (0..).take_while(|&n| at(start + prefix + n) == '#').count();
    let quote = start + prefix + hashes;
    let raw = (0..prefix).any(|n| at(start + n) == 'r');
    if at(quote) == '"' && (raw || hashes == 0) {
        let mut i = quote + 1;
        while i < chars.len() {
            let closed = at(i) == '"' && (1..=hashes).all(|n| at(i + n) == '#');
            if closed {
                return Some((i + 1 + hashes, breaks(i)));
            }
            i += if at(i) == '\\' && !raw { 2 } else { 1 };
        }
        return Some((chars.len(), breaks(chars.len())));
    }
    if at(start) != '\'' || after_word {
        return None;
    }
    // A quote that no second one follows within a character is a lifetime.
    if at(start + 1) == '\\' {
        let close = (start + 3..start + 16).find(|&i| at(i) == '\'')?;
        return Some((close + 1, 0));
    }
    (at(start + 2) == '\'').then_some((start + 3, breaks(start + 3)))
}

/// For each token, whether it stands in a `#[cfg(test)]` item, and in how many inline modules.
fn contexts(tokens: &[Token]) -> Vec<(bool, usize)> {
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|t: &Token| t.text == text);
    let run = |i: usize, texts: &[&str]| texts.iter().enumerate().all(|(n, text)| is(i + n, text));
    let mut contexts = Vec::with_capacity(tokens.len());
    // For each open brace: whether it opened test code, and whether it opened a module.
    let mut braces: Vec<(bool, bool)> = Vec::new();
    let mut test_item = false;
    for i in 0..tokens.len() {
        test_item |= run(i, &["#", "[", "cfg", "(", "test", ")", "]"]);
        let inside = test_item || braces.last().is_some_and(|b| b.0);
        contexts.push((inside, braces.iter().filter(|b| b.1).count()));
        match tokens[i].text.as_str() {
            "{" => {
                braces.push((inside, i >= 2 && is(i - 2, "mod")));
                test_item = false;
            }
            "}" => _ = braces.pop(),
            ";" => test_item = false,
            _ => {}
        }
    }
    contexts
}

/// A file's place in the crate: `graph::place` for src/graph/place.rs.
fn module_path(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    inner.split('/').filter(|part| !matches!(*part, "mod" | "lib")).map(str::to_string).collect()
}

/// Files that hold test code alone.
fn is_test_file(path: &str) -> bool {
    let stem = Path::new(path).file_stem().and_then(|s| s.to_str()).unwrap_or("");
    path.starts_with("tests/")
        || path.contains("/tests/")
        || stem == "tests"
        || stem == "testing"
        || stem.ends_with("_tests")
}

/// The crate's own modules that a file names, with their lines: after `crate::`, or after as many `super::` as lead to
/// the root.
fn used_modules(path: &str, source: &Source) -> Vec<(String, usize)> {
    let (tokens, contexts) = (&source.tokens, contexts(&source.tokens));
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|t| t.text == text);
    let own = module_path(path).len();
    let mut used = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let mut to_root = is(i, "crate");
        let mut next = i;
        if is(i, "super") {
            let mut supers = 1;
            while is(next + 1, ":") && is(next + 3, "super") {
                (supers, next) = (supers + 1, next + 3);
            }
            to_root = supers >= own + contexts[i].1;
        }
        if !to_root || !is(next + 1, ":") || !is(next + 2, ":") {
            i = next + 1;
            continue;
        }
        next += 3;
        if is(next, "{") {
            let mut depth = 0;
            let mut expects = true;
            while let Some(token) = tokens.get(next) {
                match token.text.as_str() {
                    "{" => depth += 1,
                    "}" => depth -= 1,
                    "," if depth == 1 => expects = true,
                    name if depth == 1 && expects => {
                        used.push((name.to_string(), token.line));
                        expects = false;
                    }
                    _ => {}
                }
                next += 1;
                if depth == 0 {
                    break;
                }
            }
        } else if let Some(token) = tokens.get(next) {
            used.push((token.text.clone(), token.line));
        }
        i = next;
    }
    used
}

/// The layer rule for one file of the library.
fn check_layers(path: &str, source: &Source) -> Vec<String> {
    let Some(module) = module_path(path).into_iter().next() else { return Vec::new() };
    if module == "bin" {
        return Vec::new();
    }
    let Some(own) = LAYERS.iter().position(|&l| l == module) else {
        return vec![format!("{path}:1: module {module} has no place among the layers")];
    };
    let allowed = |name: &str| {
        let Some(layer) = LAYERS.iter().position(|&l| l == name) else { return false };
        layer == own || (layer < own && (name == "base" || !ON_BASE_ALONE.contains(&module.as_str())))
    };
    let wrong = used_modules(path, source).into_iter().filter(|(name, _)| !allowed(name));
    wrong.map(|(name, line)| format!("{path}:{}: {module} may not use {name}", line + 1)).collect()
}

/// Whether the comment lines that end above `line` give a reason after `marker`. Lines of the same statement are passed
/// over.
fn has_reason_above(source: &Source, line: usize, marker: &str) -> bool {
    let mut at = line;
    while at > 0 {
        at -= 1;
        let code = &source.code[at];
        if !code.is_empty() {
            let same_statement = code.starts_with("#[") || !code.ends_with([';', '{', '}']);
            if same_statement {
                continue;
            }
            return false;
        }
        if source.comments[at].is_empty() {
            return false;
        }
        let mut first = at;
        while first > 0 && source.code[first - 1].is_empty() && !source.comments[first - 1].is_empty() {
            first -= 1;
        }
        let text =
            source.comments[first..=at].iter().map(|c| c.trim_start_matches(['/', '!', ' '])).collect::<Vec<_>>();
        let text = text.join(" ");
        let Some((_, reason)) = text.split_once(marker) else { return false };
        let is_reason = |text: &str| text.split_whitespace().count() >= 3 && !text.trim().starts_with("as above");
        let above = || {
            let mut lines = source.comments[first.saturating_sub(REASON_LINES)..first].iter();
            lines.any(|c| c.split_once("SAFETY:").is_some_and(|(_, reason)| is_reason(reason)))
        };
        return is_reason(reason) || (reason.trim().starts_with("as above") && above());
    }
    false
}

/// The rules about `unsafe` for one file.
fn check_unsafe(path: &str, source: &Source) -> Vec<String> {
    let tokens = &source.tokens;
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|t| t.text == text);
    let may = path.starts_with(&format!("src/{UNSAFE_MODULE}/")) || path == UNSAFE_BENCH;
    let mut wrong = Vec::new();
    // Where the body of an `unsafe impl` ends: its functions are unsafe because the trait says so.
    let mut implementation_end = 0;
    let mut allocator_end = 0;
    for i in (0..tokens.len()).filter(|&i| is(i, "unsafe")) {
        let line = tokens[i].line;
        let allocator = !path.starts_with("src/") && is(i + 1, "impl") && is(i + 2, UNSAFE_TRAIT);
        // `unsafe extern "C" fn` as well as `unsafe fn`.
        let keyword = (i + 1..i + 4).find(|&k| !is(k, "extern") && !is(k, "\"")).unwrap_or(i + 1);
        let function = is(keyword, "fn");
        let of_device = function && DEVICE_FUNCTIONS.iter().any(|name| is(keyword + 1, name));
        let calls = |text: &str| DEVICE_FUNCTIONS.contains(&text) || text == UNSAFE_TYPE;
        let block = tokens[i..].iter().take_while(|t| t.text != "}");
        let uses = is(i + 1, "{") && block.clone().any(|t| calls(&t.text));
        let given = !path.starts_with("src/") && (of_device || uses) || path == UNSAFE_DECLARED && function;
        if !may && !allocator && !given && i >= allocator_end {
            wrong.push(format!("{path}:{}: unsafe outside src/{UNSAFE_MODULE}", line + 1));
        }
        let is_type = function && is(keyword + 1, "(");
        if is(keyword, "impl") {
            let (mut depth, mut k) = (0, i);
            while k < tokens.len() {
                match tokens[k].text.as_str() {
                    "{" => depth += 1,
                    "}" if depth == 1 => break,
                    "}" => depth -= 1,
                    _ => {}
                }
                k += 1;
            }
            implementation_end = k;
            allocator_end = if allocator { k } else { allocator_end };
        }
        let documented = has_reason_above(source, line, "SAFETY:")
            || (function && (i < implementation_end || of_device || has_reason_above(source, line, "# Safety")));
        if !is_type && !documented {
            wrong.push(format!("{path}:{}: unsafe without a SAFETY comment that gives a reason", line + 1));
        }
    }
    wrong
}

/// What finished code does not hold, for one file.
fn check_finished(path: &str, source: &Source) -> Vec<String> {
    let tokens = &source.tokens;
    let contexts = contexts(tokens);
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|t| t.text == text);
    let mut wrong = Vec::new();
    let mut report = |line: usize, what: &str| wrong.push(format!("{path}:{}: {what}", line + 1));
    for (i, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "todo" | "unimplemented" | "dbg" if is(i + 1, "!") => report(token.line, &format!("{}!", token.text)),
            "ignore" if i > 0 && is(i - 1, "[") => report(token.line, "a test that is ignored"),
            "unwrap" if is(i + 1, "(") && !contexts[i].0 && !is_test_file(path) => {
                report(token.line, "unwrap outside tests");
            }
            _ => {}
        }
    }
    for (line, comment) in source.comments.iter().enumerate() {
        for word in ["FIXME", "TODO", "XXX"].iter().filter(|word| comment.contains(**word)) {
            report(line, word);
        }
    }
    wrong
}

/// Every file says what it is for.
fn check_opening(path: &str, text: &str) -> Vec<String> {
    let says = text.lines().next().is_some_and(|line| line.trim_start_matches("//!").trim().len() > 10);
    if says && text.starts_with("//!") { Vec::new() } else { vec![format!("{path}:1: does not open with //!")] }
}

/// All rules for one file.
fn check(path: &str, text: &str) -> Vec<String> {
    let source = read(text);
    let mut wrong = check_unsafe(path, &source);
    wrong.extend(check_opening(path, text));
    wrong.extend(check_finished(path, &source));
    if path.starts_with("src/") {
        wrong.extend(check_layers(path, &source));
    }
    wrong
}

/// The `.rs` files under a folder of the repository, by their paths from its root.
fn rust_files(folder: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a readable folder").path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let inner = path.strip_prefix(root).expect("under the root");
                found.push(inner.to_str().expect("plain names").replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn sources_keep_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files: Vec<String> = ["src", "tests", "benches", "examples"].into_iter().flat_map(rust_files).collect();
    let count = |folder: &str| files.iter().filter(|f| f.starts_with(folder)).count();
    assert!(count("src/") > 80 && count("examples/") >= 3, "only {} files were found", files.len());
    let wrong: Vec<String> = files
        .iter()
        // This file holds planted violations, in strings; its comments name the words that it looks for.
        .filter(|f| *f != "tests/structure.rs")
        .flat_map(|path| check(path, &std::fs::read_to_string(root.join(path)).expect("a readable file")))
        .collect();
    assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_layers_are_the_library() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("lib.rs");
    let source = read(&text);
    let modules = source.tokens.windows(2).filter(|w| w[0].text == "mod").map(|w| w[1].text.as_str());
    for module in modules {
        assert!(LAYERS.contains(&module), "module {module} has no place among the layers");
    }
}

/// A way from a module back to itself over those that it uses, by the names on it; none where uses go one way.
fn circle(uses: &BTreeMap<String, Vec<String>>) -> Option<Vec<String>> {
    let mut ways: Vec<Vec<String>> = uses.keys().map(|name| vec![name.clone()]).collect();
    while let Some(way) = ways.pop() {
        for next in uses.get(&way[way.len() - 1]).into_iter().flatten().filter(|next| uses.contains_key(*next)) {
            let longer = [&way[..], std::slice::from_ref(next)].concat();
            match way.iter().position(|name| name == next) {
                Some(0) => return Some(longer),
                Some(_) => {}
                None => ways.push(longer),
            }
        }
    }
    None
}

/// The program's own modules that a file names, `plan::placing` or `print`: after `crate::`, and those that it declares.
/// Of what comes after a module's name only other modules in `all` count.
fn used_by_program(path: &str, source: &Source, all: &BTreeSet<String>) -> Vec<String> {
    let own = module_path(path);
    let (tokens, contexts) = (&source.tokens, contexts(&source.tokens));
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    let mut used = Vec::new();
    for i in (0..tokens.len()).filter(|&i| !contexts[i].0) {
        if text(i) == "mod" && text(i + 2) == ";" {
            used.push([&own[..], &[text(i + 1).to_string()]].concat().join("::"));
        }
        if text(i) != "crate" || text(i + 1) != ":" {
            continue;
        }
        assert_ne!(text(i + 3), "{", "{path}: write a use for each module");
        let names: Vec<&str> = match text(i + 6) {
            "{" => tokens[i + 6..].iter().map(|t| t.text.as_str()).take_while(|text| *text != ";").collect(),
            name => vec![name],
        };
        let inner = names.iter().map(|name| format!("{}::{name}", text(i + 3))).filter(|name| all.contains(name));
        let inner: Vec<String> = inner.collect();
        used.extend(if inner.is_empty() { vec![text(i + 3).to_string()] } else { inner });
    }
    used
}

#[test]
fn modules_of_the_program_do_not_use_each_other_in_circles() {
    let folder = "src/bin/hydra/";
    let paths: Vec<String> = rust_files(folder).into_iter().filter(|path| !is_test_file(path)).collect();
    // As if they stood at the crate's root: the program is a crate of its own.
    let inner = |path: &String| format!("src/{}", &path[folder.len()..]);
    let all: BTreeSet<String> = paths.iter().map(|path| module_path(&inner(path)).join("::")).collect();
    let (mut files, mut folders) = (BTreeMap::new(), BTreeMap::<String, Vec<String>>::new());
    for path in &paths {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a readable file");
        let (module, used) = (module_path(&inner(path)), used_by_program(&inner(path), &read(&text), &all));
        let outer = |name: &String| name.split("::").next().map(String::from).filter(|outer| *outer != module[0]);
        folders.entry(module[0].clone()).or_default().extend(used.iter().filter_map(outer));
        files.insert(module.join("::"), used);
    }
    assert!(files.len() > 40 && files["plan::planned"].contains(&"plan::placing".to_string()), "{files:?}");
    assert!(folders["run"].iter().any(|name| name == "plan"), "{folders:?}");
    assert_eq!((circle(&files), circle(&folders)), (None, None));
}

#[test]
fn planted_circles_are_found() {
    let uses = |pairs: &[(&str, &str)]| {
        let mut uses: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (from, to) in pairs {
            uses.entry(from.to_string()).or_default().push(to.to_string());
        }
        uses
    };
    assert_eq!(circle(&uses(&[("a", "b"), ("a", "c"), ("b", "c"), ("c", "print")])), None);
    let way = circle(&uses(&[("a", "b"), ("b", "c"), ("c", "b")])).expect("a circle");
    assert!(way.len() == 3 && way[0] == way[2], "{way:?}");
    assert_eq!(circle(&uses(&[("a", "a")])), Some(vec!["a".into(), "a".into()]));
    let all = ["a", "b", "b::c", "b::d"].map(String::from).into_iter().collect();
    let text = "mod c;\nuse crate::b::{C, c, d::{D}};\nuse crate::a::X;\n#[cfg(test)]\nmod tests { use crate::e; }";
    assert_eq!(used_by_program("src/b/mod.rs", &read(text), &all), ["b::c", "b::c", "b::d", "a"]);
}

/// Asserts that `text` as the file `path` breaks exactly the rules whose messages hold `want`.
fn check_planted(path: &str, text: &str, want: &[&str]) {
    let text = format!("//! A file that has a purpose.\n{text}");
    let wrong = check(path, &text);
    assert_eq!(wrong.len(), want.len(), "{text}\n{wrong:?}");
    for want in want {
        assert!(wrong.iter().any(|w| w.contains(want)), "{text}\nwant {want}, got {wrong:?}");
    }
}

#[test]
fn planted_uses_of_higher_layers_are_found() {
    check_planted("src/graph/op.rs", "use crate::base::Shape;\nuse super::kinds::Init;", &[]);
    check_planted("src/graph/op.rs", "use crate::engine::Engine;", &["op.rs:2: graph may not use engine"]);
    check_planted("src/graph/op.rs", "use crate::{base::{Shape, nn}, nn::Network};", &["graph may not use nn"]);
    check_planted("src/graph/op.rs", "fn f() { super::super::train::go(); }", &["graph may not use train"]);
    check_planted("src/graph/mod.rs", "use super::device::Task;", &["graph may not use device"]);
    check_planted("src/device/host/ops.rs", "use super::super::super::nn;", &["device may not use nn"]);
    check_planted("src/device/host/ops.rs", "use super::super::nn;", &[]);
    check_planted("src/graph/op.rs", "mod tests { use super::super::x; use super::super::super::nn; }", &["nn"]);
    check_planted("src/trace/svg.rs", "use crate::graph::Op;", &["trace may not use graph"]);
    check_planted(
        "src/data/text.rs",
        "use crate::engine::Engine;\nuse crate::base::Error;",
        &["data may not use engine"],
    );
    check_planted("src/sched/fifo.rs", "use crate::device::Device;", &["sched may not use device"]);
    check_planted("src/spill/cut.rs", "use crate::nowhere::X;", &["spill may not use nowhere"]);
    check_planted("src/other/mod.rs", "", &["has no place"]);
    check_planted("src/base/mod.rs", "// crate::train is far above\nconst S: &str = \"crate::nn::x\";", &[]);
}

#[test]
fn planted_unsafe_is_found() {
    let stated = "fn f() {\n    // SAFETY: the caller holds the lock.\n    unsafe { g() };\n}";
    check_planted("src/device/host/a.rs", stated, &[]);
    check_planted("src/graph/a.rs", stated, &["outside src/device"]);
    check_planted("tests/other.rs", stated, &["outside src/device"]);
    let counting =
        "// SAFETY: all is handed on to the system.\nunsafe impl GlobalAlloc for B {\n    unsafe fn a() {}\n}";
    check_planted("tests/other.rs", counting, &[]);
    check_planted("src/nn/a.rs", counting, &["outside src/device", "outside src/device"]);
    let used = "// SAFETY: nothing is in flight.\nlet ticket = unsafe { device.submit(0, task, &[]) };";
    let handed_on = "impl Device for A {\n    unsafe fn read_host(&self) {}\n    unsafe fn other() {}\n}";
    check_planted("examples/a.rs", used, &[]);
    check_planted("src/engine/a.rs", used, &["outside src/device"]);
    check_planted("tests/a.rs", &used[used.find("let").expect("it has")..], &["without a SAFETY"]);
    check_planted("tests/a.rs", handed_on, &["a.rs:4: unsafe outside", "a.rs:4: unsafe without"]);
    let declared = "/// Makes it.\n///\n/// # Safety\n/// The bytes are code.\npub unsafe fn new() {}";
    check_planted("src/graph/custom.rs", declared, &[]);
    check_planted("src/graph/custom.rs", stated, &["outside src/device"]);
    let again = "// SAFETY: plain bytes, nobody else has them.\nunsafe impl Send for X {}\n// SAFETY: as above.\nunsafe impl Sync for X {}";
    check_planted("src/device/host/a.rs", again, &[]);
    check_planted("src/device/host/a.rs", "// SAFETY: as above.\nunsafe impl Sync for X {}", &["without a SAFETY"]);
    let without = ["fn f() {\n    unsafe { g() };\n}", "fn f() {\n    // SAFETY:\n    unsafe { g() };\n}"];
    let apart = "fn f() {\n    // SAFETY: the caller holds the lock.\n    h();\n    unsafe { g() };\n}";
    let bare = ["unsafe fn f() {}", "unsafe impl Send for X {}", apart];
    for text in without.into_iter().chain(bare) {
        check_planted("src/device/host/a.rs", text, &["without a SAFETY comment"]);
    }
    let over_lines = "fn f() {\n    // SAFETY: the two halves do\n    // not overlap.\n    let x: &mut [u8] =\n        unsafe { g() };\n}";
    check_planted("src/device/host/a.rs", over_lines, &[]);
    check_planted(
        "src/device/a.rs",
        "/// Reads.\n///\n/// # Safety\n/// No task runs meanwhile.\npub unsafe fn f() {}",
        &[],
    );
    check_planted("src/device/a.rs", "type F = unsafe extern \"C\" fn(i32);\nconst S: &str = \"unsafe\";", &[]);
    let allocator =
        "// SAFETY: all is handed on to the system.\nunsafe impl A for B {\n    unsafe fn a() {}\n}\nunsafe fn b() {}";
    check_planted("src/device/a.rs", allocator, &["a.rs:6"]);
}

#[test]
fn planted_unfinished_code_is_found() {
    check_planted("src/nn/a.rs", "fn f() { g().unwrap(); }", &["a.rs:2: unwrap outside tests"]);
    check_planted("src/nn/a.rs", "#[cfg(test)]\nmod tests {\n fn f() { g().unwrap(); }\n}", &[]);
    check_planted("src/nn/a.rs", "#[cfg(test)]\nmod tests;\nfn f() { g().unwrap(); }", &["a.rs:4"]);
    check_planted("src/nn/a.rs", "#[cfg(test)]\nmod t { fn f() {} }\nfn f() { g().unwrap(); }", &["a.rs:4"]);
    check_planted("src/nn/a_tests.rs", "fn f() { g().unwrap(); }", &[]);
    check_planted("src/nn/a.rs", "fn f() { g().unwrap_or(1); h(\".unwrap()\", '\"', 'x', r#\"todo!()\"#); }", &[]);
    check_planted("src/nn/a.rs", "fn f<'a>(x: &'a str) { todo!() }", &["todo!"]);
    check_planted("src/nn/a.rs", "fn f() { unimplemented!(\"later\") }", &["unimplemented!"]);
    check_planted("src/nn/tests.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}", &["ignored"]);
    check_planted("src/nn/a.rs", "/* so far /* nested */ FIXME */ fn f() {}", &["FIXME"]);
    check_planted("src/nn/a.rs", "fn f() { let s = \"two\nlines\"; g().unwrap(); }", &["a.rs:3"]);
    assert_eq!(check("src/nn/a.rs", "fn f() {}").len(), 1);
    assert_eq!(check("src/nn/a.rs", "//!\nfn f() {}").len(), 1);
}
