//! What the compilers said of the kernels: no register spills, no stack frames, no products in turn, and every kernel
//! that is launched by name is there.
//!
//! Reads the logs that `build.rs` keeps of ptxas, for every architecture that is built.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What may use local memory: kernel, architecture, most bytes of spills, of stack; and why.
const EXCEPTIONS: &[(&str, &str, u32, u32, &str)] = &[("add_position_grad_f32", "sm_120", 24, 24, BLACKWELL)];

const BLACKWELL: &str =
    "tiles and launch bounds are chosen for the registers of sm_80 and sm_90a; here a few words do not fit";

/// A source file whose snake-case literals are no kernels: the emulator's own entry points.
const OTHER_NAMES: &str = "library.rs";

/// What ptxas said of one kernel on one architecture.
#[derive(Debug, Default)]
struct Compiled {
    stack_bytes: u32,
    spill_store_bytes: u32,
    spill_load_bytes: u32,
    registers: u32,
}

/// The number before `what` in a line of ptxas.
fn number(line: &str, what: &str) -> Option<u32> {
    line[..line.find(what)?].split_whitespace().next_back()?.parse().ok()
}

/// By kernel and architecture, of the sources whose stem is `wanted`.
fn compiled_of(wanted: impl Fn(&str) -> bool) -> BTreeMap<(String, String), Compiled> {
    let mut all = BTreeMap::new();
    for path in files(Path::new(env!("HYDRA_FATBINS")), "log") {
        if !path.file_stem().and_then(|stem| stem.to_str()).is_some_and(&wanted) {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a log of ptxas");
        let mut current = None;
        for line in text.lines() {
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                let mut parts = rest.split('\'');
                let (kernel, arch) = (parts.next().expect("a name"), parts.nth(1).expect("an architecture"));
                current = Some((kernel.to_string(), arch.to_string()));
                continue;
            }
            let Some(key) = &current else { continue };
            let entry: &mut Compiled = all.entry(key.clone()).or_default();
            if let Some(bytes) = number(line, " bytes stack frame") {
                entry.stack_bytes = bytes;
                entry.spill_store_bytes = number(line, " bytes spill stores").expect("beside the stack frame");
                entry.spill_load_bytes = number(line, " bytes spill loads").expect("beside the stack frame");
            }
            if let Some(registers) = number(line, " registers") {
                entry.registers = registers;
                // What follows belongs to functions that are no kernels.
                current = None;
            }
        }
    }
    all
}

/// All of them.
fn compiled() -> BTreeMap<(String, String), Compiled> {
    compiled_of(|_| true)
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == extension));
    found.sort();
    found
}

fn source(dir: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)
}

/// The string literals of a Rust file that look like a kernel's name: lower-case words with underscores between.
fn names(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let word = |literal: &&str| {
        let lower = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        literal.starts_with(|c: char| c.is_ascii_lowercase()) && literal.contains('_') && literal.split('_').all(lower)
    };
    code.split('"').filter(word).map(str::to_string).collect()
}

#[test]
fn no_spills_and_no_stack_frames() {
    let all = compiled();
    assert!(!all.is_empty(), "no kernel in {}", env!("HYDRA_FATBINS"));
    let mut faults = Vec::new();
    let mut used = BTreeSet::new();
    for ((kernel, arch), said) in &all {
        assert!(said.registers > 0, "{kernel} for {arch}: the log has no register count");
        let spills = said.spill_store_bytes.max(said.spill_load_bytes);
        let exception = EXCEPTIONS.iter().position(|e| e.0 == kernel && e.1 == arch);
        let (most_spills, most_stack) = exception.map_or((0, 0), |e| (EXCEPTIONS[e].2, EXCEPTIONS[e].3));
        used.extend(exception.filter(|_| spills > 0 || said.stack_bytes > 0));
        if spills > most_spills || said.stack_bytes > most_stack {
            faults.push(format!("{kernel} for {arch}: {said:?}"));
        }
    }
    assert!(faults.is_empty(), "local memory is used by\n{}", faults.join("\n"));
    for (i, exception) in EXCEPTIONS.iter().enumerate() {
        // A build for fewer architectures needs fewer.
        let built = all.keys().any(|(_, arch)| arch == exception.1);
        assert!(used.contains(&i) || !built, "no kernel needs the exception {exception:?}");
        assert!(!exception.4.is_empty(), "an exception says why");
    }
}

#[test]
fn warpgroups_share_what_a_block_is_launched_with() {
    // `RegisterShares` in kernels/gpu.cuh counts on as many registers a thread as a multiprocessor has for a block:
    // with fewer, a warpgroup that asks for more waits forever.
    let sources = ["conv_hopper", "conv_hopper_pointwise", "conv_hopper_weight", "gemm_hopper"];
    let attention = ["attention_hopper", "attention_hopper_grad_q", "attention_hopper_grad_kv"];
    for stem in sources.into_iter().chain(attention) {
        let all = compiled_of(|other| other == stem);
        assert!(!all.is_empty(), "no log of {stem}");
        for ((kernel, arch), said) in all.iter().filter(|((_, arch), _)| arch == "sm_90a") {
            let warpgroups = if kernel == "attention_forward_hopper64_bf16" { 4 } else { 3 };
            let at_launch = 65536 / (128 * warpgroups) / 8 * 8;
            assert_eq!(said.registers, at_launch, "{kernel} for {arch}");
        }
    }
    // No other kernel shares.
    for path in files(&source("kernels"), "cu") {
        let text = std::fs::read_to_string(&path).expect("a kernel");
        let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        let known = sources.contains(&stem) || attention.contains(&stem);
        assert_eq!(text.contains("::others()"), known, "{stem}");
        assert!(!text.contains("setmaxnreg"), "{stem}: through RegisterShares alone");
    }
}

#[test]
fn no_product_is_made_to_wait_for_another() {
    // ptxas does so where registers that a wgmma on its way uses are touched, and says it (tests/emulator/planted).
    for path in files(Path::new(env!("HYDRA_FATBINS")), "log") {
        let text = std::fs::read_to_string(&path).expect("a log of ptxas");
        let said: Vec<_> = text.lines().filter(|line| line.contains("Performance Loss")).collect();
        assert!(said.is_empty(), "{}: {said:?}", path.display());
    }
}

#[test]
fn every_launched_kernel_is_built_for_every_architecture() {
    let all = compiled();
    let mut archs: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (kernel, arch) in all.keys() {
        archs.entry(kernel).or_default().insert(arch);
    }
    let every: BTreeSet<&str> = archs.values().flatten().copied().collect();
    let mut launched = BTreeSet::new();
    for path in rust_files(&source("src/device/cuda")) {
        if path.file_name().is_some_and(|name| name != OTHER_NAMES) {
            let text = std::fs::read_to_string(&path).expect("a source file");
            // Names in tests may be made up.
            launched.extend(names(text.split("#[cfg(test)]").next().expect("a split has a first part")));
        }
    }
    assert!(launched.len() > 20, "kernels' names were not found: {launched:?}");
    let missing: Vec<_> = launched.iter().filter(|name| !archs.contains_key(name.as_str())).collect();
    assert!(missing.is_empty(), "launched, and in no file of kernels/: {missing:?}");
    for (kernel, has) in &archs {
        // The empty body of a kernel that only newer chips run counts as built.
        assert_eq!(has, &every, "{kernel} is not built for every architecture");
    }
    let idle: Vec<_> = archs.keys().filter(|name| !launched.contains(**name)).collect();
    assert!(idle.is_empty(), "built, and launched by nobody: {idle:?}");
}

/// All Rust files below `dir`.
fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found = files(dir, "rs");
    for path in entries.map(|e| e.expect("an entry").path()) {
        if path.is_dir() {
            found.extend(rust_files(&path));
        }
    }
    found
}

#[test]
fn names_are_told_from_other_literals() {
    let text = "// \"not_this\"\nlet a = pick(d, \"add_f32\", \"add_bf16\"); \"two words\"; \"one\"; \"x_\"; \"Upper_case\"; \"conv2d_grad_weight_sum\"";
    let want = ["add_bf16", "add_f32", "conv2d_grad_weight_sum"].map(str::to_string);
    assert_eq!(names(text), want.into());
}
