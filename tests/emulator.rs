//! The emulator that stands for a GPU finds what it must: `tests/emulator/run.sh` compiles small kernels for it, right
//! ones and ones with a mistake each, and runs them under eight orders of execution.

use std::process::Command;

#[test]
fn the_emulator_runs_what_is_right_and_finds_what_is_wrong() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let run = Command::new("sh").arg("tests/emulator/run.sh").arg(out.path()).output().expect("a shell");
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}\n{}", String::from_utf8_lossy(&run.stderr));
    // Three builds of the kernels, each with its cases.
    assert_eq!(text.matches(": 0 of ").count(), 3, "{text}");
}
