//! Compiles kernels/: with the feature `cuda` by nvcc, one fatbin a source file; with `emulator` as C++, one shared
//! object.
//!
//! Only what changed is compiled again, and only what no other build in the target folder has compiled. Warnings are
//! errors; what ptxas says of registers and spills is kept for a test.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The kernels of the example with an op of its own.
const EXAMPLE: &str = "examples/04_custom_op";

/// What each fatbin holds: machine code, and for the first PTX as well, which newer chips compile for themselves.
const TARGETS: [&str; 7] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_80,code=compute_80",
    "arch=compute_86,code=sm_86",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
];

/// How all are compiled. Compressed for size, since every program and test carries them: a quarter of the bytes.
const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-fatbin",
    "--compress-mode=size",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v",
    "-I",
    "kernels",
];

const HOW_TO_GET_NVCC: &str = "the feature \"cuda\" needs nvcc of CUDA 13.0 or later, and none was found.
Looked at the variables NVCC and CUDA_HOME, then at PATH. Without a CUDA installation five wheels will do:
    python3 -m venv .nvcc && .nvcc/bin/pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \\
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    export NVCC=$(echo $PWD/.nvcc/lib/python3.*/site-packages/nvidia/cu13/bin/nvcc)";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed={EXAMPLE}/squared_relu.cu");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let feature = |name: &str| std::env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    let mut result = Ok(());
    if feature("CUDA") {
        result = result.and_then(|()| fatbins(&sources("kernels")?, &out.join("fatbins")));
        println!("cargo:rustc-env=HYDRA_FATBINS={}", out.join("fatbins").display());
        result = result.and_then(|()| fatbins(&sources(EXAMPLE)?, &out.join("example")));
        println!("cargo:rustc-env=HYDRA_EXAMPLE_FATBIN={}", out.join("example/squared_relu.fatbin").display());
    }
    if feature("EMULATOR") {
        result = result.and_then(|()| emulated("kernels", &out.join("emulated")));
        println!("cargo:rustc-env=HYDRA_EMULATED_KERNELS={}", out.join("emulated/kernels.so").display());
        result = result.and_then(|()| emulated(EXAMPLE, &out.join("emulated_example")));
        println!("cargo:rustc-env=HYDRA_EXAMPLE_EMULATED={}", out.join("emulated_example/kernels.so").display());
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// The kernels in a folder, by name.
fn sources(dir: &str) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{dir}: {e}"))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    found.sort();
    Ok(found)
}

/// Compiles for the CPU.
fn emulated(dir: &str, out: &Path) -> Result<(), String> {
    let sources: Vec<String> = sources(dir)?.iter().map(|path| path.display().to_string()).collect();
    println!("cargo:rerun-if-env-changed=CXX");
    take_objects(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let run = Command::new("sh")
        .arg("kernels/emulator/build.sh")
        .arg(out)
        .arg("plain")
        .env("SOURCES", sources.join(" "))
        .output();
    let output = run.map_err(|e| format!("the feature \"emulator\" needs a shell and a C++ compiler: {e}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "the feature \"emulator\" needs a C++20 compiler (CXX, or c++ on PATH), which said:\n{text}"
        ));
    }
    Ok(())
}

/// Where there are none yet, takes the objects of another build. They keep their times, by which build.sh tells what
/// has changed since, and it replaces files and never writes into one, so each build has its own.
fn take_objects(out: &Path) -> std::io::Result<()> {
    // It is made when all objects are there.
    let whole = |dir: &PathBuf| dir.join("kernels.so").is_file();
    let Some(found) = other_builds(out).into_iter().find(whole).filter(|_| !whole(&out.to_path_buf())) else {
        return Ok(());
    };
    std::fs::create_dir_all(out)?;
    for object in std::fs::read_dir(found)?.flatten().map(|entry| entry.path()) {
        let own = out.join(object.file_name().unwrap_or_default());
        if object.extension().is_some_and(|e| e == "o") && !own.exists() {
            std::fs::hard_link(object, own)?;
        }
    }
    Ok(())
}

/// Compiles for GPUs, and lists the fatbins in a Rust file.
fn fatbins(sources: &[PathBuf], out: &Path) -> Result<(), String> {
    for variable in ["NVCC", "CUDA_HOME", "HYDRA_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let nvcc = find_nvcc().ok_or(HOW_TO_GET_NVCC)?;
    std::fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let (targets, others) = (targets()?, other_builds(out));
    let (next, faults) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(fault) = fatbin(&nvcc, source, out, &targets, &others) {
                        faults.lock().expect("no thread panics while it holds this").push(fault);
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().expect("no thread panicked");
    if !faults.is_empty() {
        return Err(faults.join("\n"));
    }
    let mut list = String::from("&[\n");
    for source in sources {
        let stem = stem(source);
        list += &format!("    ({stem:?}, include_bytes!({:?})),\n", out.join(format!("{stem}.fatbin")));
    }
    list += "]\n";
    std::fs::write(out.join("list.rs"), list).map_err(|e| format!("{}: {e}", out.display()))
}

/// Where the other builds of this package in the same target folder keep the same: each set of features has a folder of
/// its own, each profile, and lints beside tests.
fn other_builds(out: &Path) -> Vec<PathBuf> {
    // out is TARGET/PROFILE/build/PACKAGE-HASH/out/NAME.
    let folder = |above: usize| out.ancestors().nth(above).unwrap_or(out);
    let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let inside = out.strip_prefix(folder(2)).unwrap_or(out);
    let package = std::env::var("CARGO_PKG_NAME").expect("cargo sets CARGO_PKG_NAME");
    let ours = |dir: &PathBuf| dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&package));
    let packages = list(folder(5)).flat_map(|profile| list(&profile.join("build")));
    packages.filter(ours).map(|dir| dir.join(inside)).filter(|dir| dir != out && dir.is_dir()).collect()
}

/// Compiles one file, unless neither it nor what it includes has changed since, or another build has compiled just
/// this.
fn fatbin(nvcc: &Path, source: &Path, out: &Path, targets: &[&str], others: &[PathBuf]) -> Result<(), String> {
    let io = |e: std::io::Error| format!("{}: {e}", source.display());
    let stem = stem(source);
    let files = |dir: &Path| ["fatbin", "hash", "log"].map(|kind| dir.join(format!("{stem}.{kind}")));
    let [fatbin, mark, log] = files(out);
    let mut texts = Vec::new();
    gather(source, &mut texts)?;
    let now = format!("{:x}", hash(&(nvcc, texts, targets, FLAGS)));
    let has_it = |[fatbin, mark, _]: &[PathBuf; 3]| {
        fatbin.exists() && std::fs::read_to_string(mark).is_ok_and(|before| before == now)
    };
    if has_it(&files(out)) {
        return Ok(());
    }
    // Without a mark until it is whole, here as there.
    _ = std::fs::remove_file(&mark);
    if let Some([found, _, said]) = others.iter().map(|dir| files(dir)).find(has_it) {
        std::fs::copy(found, fatbin).map_err(io)?;
        std::fs::copy(said, log).map_err(io)?;
        return std::fs::write(mark, now).map_err(io);
    }
    let mut command = Command::new(nvcc);
    command.args(FLAGS);
    for target in targets {
        command.args(["-gencode", target]);
    }
    let output = command.arg("-o").arg(&fatbin).arg(source).output().map_err(io)?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("nvcc refused {}:\n{text}", source.display()));
    }
    std::fs::write(log, text.as_bytes()).map_err(io)?;
    std::fs::write(mark, now).map_err(io)
}

/// All of [`TARGETS`], or those that HYDRA_CUDA_ARCHS names, as "80 90a": a developer's builds are quicker with one.
fn targets() -> Result<Vec<&'static str>, String> {
    let Ok(wanted) = std::env::var("HYDRA_CUDA_ARCHS") else { return Ok(TARGETS.to_vec()) };
    let mut targets = Vec::new();
    for arch in wanted.split([' ', ',']).filter(|arch| !arch.is_empty()) {
        let code = format!("code=sm_{arch}");
        let target = TARGETS.iter().find(|target| target.ends_with(&code));
        targets.push(*target.ok_or_else(|| format!("HYDRA_CUDA_ARCHS: {arch} is none of 80, 86, 89, 90a, 100, 120"))?);
    }
    if targets.is_empty() { Err("HYDRA_CUDA_ARCHS names no architecture".into()) } else { Ok(targets) }
}

fn find_nvcc() -> Option<PathBuf> {
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("nvcc")).find(|file| file.is_file());
    named.or(home).or(on_path).filter(|file| file.is_file())
}

/// The text of a file, and of everything that it includes from kernels/.
fn gather(path: &Path, texts: &mut Vec<(PathBuf, String)>) -> Result<(), String> {
    if texts.iter().any(|(seen, _)| seen == path) {
        return Ok(());
    }
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let includes =
        text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"').map(str::to_string));
    // What the emulator includes is not there for a GPU; a change of it compiles a little more than it must.
    let files: Vec<PathBuf> =
        includes.map(|name| Path::new("kernels").join(name)).filter(|file| file.is_file()).collect();
    texts.push((path.to_path_buf(), text));
    files.iter().filter(|file| !file.starts_with("kernels/emulator")).try_for_each(|file| gather(file, texts))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
