//! The command-line program: reads a job file, runs it, prints what happens.

#[allow(dead_code, unused_imports)]
mod args;
#[allow(dead_code, unused_imports)]
mod job;

fn main() {}
