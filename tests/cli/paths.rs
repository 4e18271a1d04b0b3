//! Where the program writes: names that are no UTF-8, places that are no files, and what it must not write over.

use super::{GPT, Job, Ran, copy_folder, i64s, tensor_file, with_rates};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program with `args`, some of which may be paths that are no UTF-8.
fn hydra(args: &[&Path]) -> Ran {
    Command::new(env!("CARGO_BIN_EXE_hydra")).args(args).output().expect("the program runs").into()
}

/// A GPT-2 in `folder`, and inputs for it.
fn model_and_inputs(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, input) = (folder.join("model"), folder.join("x.safetensors"));
    copy_folder(&super::fixture("gpt2").join("model"), &model);
    fs::write(&input, tensor_file(&[("input_ids", "I64", &[1, 4], i64s(&[1, 2, 3, 4]))])).expect("inputs");
    (model, input)
}

#[test]
#[cfg(target_os = "linux")]
fn names_that_are_no_utf8_are_names_of_files() {
    use std::os::unix::ffi::OsStrExt;
    let job = Job::measured("");
    let folder = job.folder.path().join(std::ffi::OsStr::from_bytes(b"na\xefve"));
    fs::create_dir(&folder).expect("a folder");
    let (file, run) = (folder.join("job.toml"), folder.join("runs/job"));
    fs::write(&file, with_rates(GPT)).expect("job.toml");
    let said = hydra(&["train".as_ref(), &file, "--json".as_ref()]).fine().json();
    assert!(said["run"].as_str().is_some_and(|run| run.ends_with("ve/runs/job")), "{said}");
    assert!(said["models"][0]["model"].as_str().is_some_and(|model| model.ends_with("runs/job/m/model")), "{said}");
    let again = hydra(&["train".as_ref(), &file, "--json".as_ref(), "--resume".as_ref(), "auto".as_ref()]);
    assert_eq!(again.fine().json(), said, "nothing to do");
    let report = hydra(&["report".as_ref(), &run, "--json".as_ref()]).fine().json();
    assert!(report["report"].as_str().is_some_and(|page| page.ends_with("report.html")), "{report}");
    let (model, input) = model_and_inputs(&folder);
    let (output, json) = (folder.join("y.safetensors"), Path::new("--json"));
    let said = hydra(&["forward".as_ref(), &model, "--input".as_ref(), &input, "--output".as_ref(), &output, json]);
    assert!(said.fine().json()["output"].as_str().is_some_and(|file| file.ends_with("y.safetensors")));
}

#[test]
#[cfg(unix)]
fn forward_writes_into_devices_and_through_links_and_over_nothing_that_it_reads() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let job = Job::measured("");
    let (model, input) = model_and_inputs(job.folder.path());
    let forward =
        |output: &Path| hydra(&["forward".as_ref(), &model, "--input".as_ref(), &input, "--output".as_ref(), output]);
    forward(&job.at("y.safetensors")).fine();
    let logits = fs::read(job.at("y.safetensors")).expect("logits");
    forward(Path::new("/dev/null")).fine();
    assert!(fs::metadata("/dev/null").expect("it is there").file_type().is_char_device());
    fs::create_dir(job.at("far")).expect("a folder");
    symlink("far/z.safetensors", job.at("z.safetensors")).expect("a link");
    forward(&job.at("z.safetensors")).fine();
    assert!(job.at("z.safetensors").symlink_metadata().expect("a link").is_symlink());
    assert!(fs::read(job.at("far/z.safetensors")).expect("logits") == logits);
    // By other names too.
    symlink("x.safetensors", job.at("same.safetensors")).expect("a link");
    symlink("model", job.at("twin")).expect("a link");
    let before = fs::read(&input).expect("inputs");
    for (output, says) in [
        ("x.safetensors", "is the input"),
        ("far/../x.safetensors", "is the input"),
        ("same.safetensors", "is the input"),
        ("model/model.safetensors", "lies in the model's folder"),
        ("model/y.safetensors", "lies in the model's folder"),
        ("twin/config.json", "lies in the model's folder"),
    ] {
        forward(&job.at(output)).bad(&[output, says]);
    }
    assert!(fs::read(&input).expect("inputs") == before && !job.at("model/y.safetensors").exists());
    // Rates of a device go the same way.
    symlink("far/rates.json", job.at("rates.json")).expect("a link");
    hydra(&["devices".as_ref(), "--profile".as_ref(), &job.at("rates.json")]).fine();
    assert!(job.at("rates.json").symlink_metadata().expect("a link").is_symlink());
    assert!(job.json("far/rates.json")["rates"].is_array());
}

#[test]
#[cfg(target_os = "linux")]
fn logits_for_standard_output_are_all_that_goes_there() {
    let job = Job::measured("");
    let (model, input) = model_and_inputs(job.folder.path());
    let forward = |output: &Path, more: &[&str]| {
        let paths = ["forward".as_ref(), model.as_path(), "--input".as_ref(), &input, "--output".as_ref(), output];
        let mut command = Command::new(env!("CARGO_BIN_EXE_hydra"));
        let output = command.args(paths).args(more).output().expect("the program runs");
        assert!(output.status.success(), "{output:?}");
        (output.stdout, String::from_utf8(output.stderr).expect("UTF-8"))
    };
    let (said, err) = forward(&job.at("y.safetensors"), &[]);
    assert!(said.starts_with(b"logits ") && err.is_empty(), "{err}");
    let file = fs::read(job.at("y.safetensors")).expect("logits");
    for (more, says) in [(&[][..], "logits "), (&["--json"], "{\"output\":\"/dev/stdout\"")] {
        let (out, err) = forward(Path::new("/dev/stdout"), more);
        assert!(out == file && err.starts_with(says), "{more:?}: {err}");
    }
}

#[test]
#[cfg(unix)]
fn a_link_to_nothing_holds_no_run() {
    let job = Job::new(GPT);
    std::os::unix::fs::symlink("nowhere", job.at("out")).expect("a link");
    job.hydra(&["train", "--set", "run.out=out"]).bad(&["job.toml: run.out: ", "out is a link to nothing"]);
    fs::create_dir(job.at("nowhere")).expect("a folder");
    job.hydra(&["train", "--set", "run.out=out"]).fine();
}

#[test]
fn a_run_is_not_overwritten_by_a_plan_or_a_simulation_and_a_plan_is_no_run() {
    let job = Job::new(GPT);
    let out = job.at("runs/job").display().to_string();
    job.hydra(&["plan", "--out", &out]).fine();
    // It may be planned again, and is nothing to go on from.
    job.hydra(&["plan", "--out", &out]).fine();
    job.hydra(&["train", "--resume", "require"]).bad(&["runs/job", "holds no run to resume"]);
    job.hydra(&["train"]).fine();
    let read = |file: &str| fs::read(job.at("runs/job").join(file)).expect(file);
    let (plan, trace) = (read("plan.json"), read("trace.json"));
    for args in [&["plan"][..], &["simulate"], &["simulate", "--sweep", "slots=1,2"]] {
        job.hydra(&[args, &["--out", &out]].concat()).bad(&["runs/job", "holds a run"]);
    }
    assert!(read("plan.json") == plan && read("trace.json") == trace);
    // What a simulation has left is no run either, and is not overwritten.
    let other = job.at("other").display().to_string();
    job.hydra(&["plan", "--out", &other]).fine();
    job.hydra(&["simulate", "--out", &other]).fine();
    let to_other = ["train", "--set", "run.out=other", "--resume"];
    job.hydra(&[&to_other[..], &["auto"]].concat()).bad(&["holds no run, but trace.json is there already"]);
    job.hydra(&[&to_other[..], &["require"]].concat()).bad(&["other"]);
}
