//! The command-line program: reads a job file, runs it, prints what happens.
//!
//! Exit codes: 0 done; 1 failed because of the machine or a bug; 2 the input is at fault; 75 interrupted, after a
//! checkpoint if a step was done. An error is one line on standard error that begins with `error: `; only the refusal
//! of a budget is followed by a table.

mod args;
mod commands;
mod job;
mod machine;
mod plan;
mod print;
mod run;
mod rundir;
mod setup;
mod text;

use args::{Command, CommandLine};
use clap::Parser;
use commands::{devices, forward, report, simulate, sweep, train};
use hydra::base::Result;
use print::complain;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    // A panic in any thread is our own bug and is printed as one line, like every error. Excepted are panics that a
    // file provokes in another crate's code.
    std::panic::set_hook(Box::new(|panic| {
        if text::tokenizer::panics_are_contained() {
            return;
        }
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        let place = panic.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
        complain(format!("bug in hydra: {}{place}", text.replace('\n', " ")));
    }));
    let line = CommandLine::parse();
    match catch_unwind(AssertUnwindSafe(|| run(&line))) {
        Ok(Ok(())) => match print::refused() {
            None => ExitCode::SUCCESS,
            Some(error) => {
                complain(format!("cannot write to standard output: {error}"));
                ExitCode::FAILURE
            }
        },
        Ok(Err(error)) => {
            complain(&error);
            ExitCode::from(error.exit_code())
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(line: &CommandLine) -> Result<()> {
    match &line.command {
        Command::Train { file, resume } => train::run(file, *resume, line.json),
        Command::Plan { file, out } => commands::plan::run(file, out.as_deref(), line.json),
        Command::Forward { model, input, output } => forward::run(model, input, output, line.json),
        Command::Simulate(wishes) if wishes.sweep.is_empty() => simulate::run(wishes, line.json),
        Command::Simulate(wishes) => sweep::run(wishes, line.json),
        Command::Devices { out, profile } => devices::run(out.as_deref(), profile.as_deref(), line.json),
        Command::Report { run } => report::run(run, line.json),
    }
}
