//! The command-line program: reads a job file, runs it, prints what happens.

#[allow(dead_code)]
mod args;
#[allow(dead_code)]
mod job;

fn main() {}
