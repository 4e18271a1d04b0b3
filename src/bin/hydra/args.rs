//! The command line. Usage errors are clap's own: `error: ...` on standard error, exit code 2.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Trains neural networks larger than the memory they are given.
#[derive(Clone, Debug, Parser)]
#[command(name = "hydra", version, disable_help_subcommand = true, arg_required_else_help = false)]
pub struct CommandLine {
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Train the models of a job
    Train {
        /// What to do when the run's directory holds a run already
        #[arg(long, value_enum, default_value_t = Resume::Never)]
        resume: Resume,
        #[command(flatten)]
        file: JobFile,
    },
    /// Show how a job would run: the cut, the tiers, predicted bytes and seconds, the bound, what would help
    Plan {
        #[command(flatten)]
        file: JobFile,
        /// Write plan.json into this folder
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Run a job's schedule on simulated devices: the same executor on a virtual clock
    Simulate(Wishes),
    /// Run a model forward, in evaluation mode, and write its logits
    Forward {
        /// A Hugging Face directory: config.json and model.safetensors, or its parts
        #[arg(value_name = "MODEL_DIR")]
        model: PathBuf,
        /// input_ids (or pixel_values), and optionally attention_mask
        #[arg(long, value_name = "X.safetensors")]
        input: PathBuf,
        /// Where the logits go
        #[arg(long, value_name = "Y.safetensors")]
        output: PathBuf,
    },
    /// Show what is here: devices, their memory, measured rates, and why a kind is missing
    Devices {
        /// Write devices.json into this folder
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Write the first device's measured rates into this file, for profile = "FILE.json" of a [[device]], which is
        /// then not measured
        #[arg(long, value_name = "FILE.json")]
        profile: Option<PathBuf>,
    },
    /// Write a run's report: schedule, losses, where the time went
    Report {
        /// The run's directory
        #[arg(value_name = "RUN_DIR")]
        run: PathBuf,
    },
}

// Not a doc comment: clap would use it in place of the command's own.
#[derive(Args, Clone, Debug)]
pub struct JobFile {
    /// The job file
    #[arg(value_name = "JOB.toml")]
    pub job: PathBuf,
    /// Change one value of the job, such as model.0.lr=1e-3; may be repeated
    #[arg(long, value_name = "PATH=VALUE", allow_hyphen_values = true)]
    pub set: Vec<String>,
}

// What is simulated, and the settings that differ from the job's.
#[derive(Args, Clone, Debug)]
pub struct Wishes {
    #[command(flatten)]
    pub file: JobFile,
    /// The policy or baseline, instead of the job's
    #[arg(long, value_name = "P")]
    pub policy: Option<String>,
    /// The number of devices, instead of the job's; for jobs with one [[device]]
    #[arg(long, value_name = "N")]
    pub devices: Option<u64>,
    /// Weight slots of a device, instead of the job's; 1 is no double buffering
    #[arg(long, value_name = "N")]
    pub slots: Option<u64>,
    /// Run every combination of these values, such as policy=fifo,srtf or devices=1,2,4 (also slots, memory, link,
    /// recompute, pipeline, rehearse); may be repeated
    #[arg(long, value_name = "KEY=A,B,..")]
    pub sweep: Vec<String>,
    /// Write schedule.svg, trace.json and simulation.json into this folder; of a sweep sweep.csv and sweep.svg
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What to do when the run's directory holds a run already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// Refuse, and leave it untouched
    Never,
    /// Go on from its last checkpoint if it has one, else start
    Auto,
    /// Go on from its last checkpoint; refuse if there is none
    Require,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    #[test]
    fn the_definition_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn reads_each_command() {
        let read = |line: &str| CommandLine::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        let args = read("hydra train job.toml --resume auto --set model.0.lr=1e-3 --set run.seed=-1 --json");
        assert!(args.json);
        let Command::Train { file, resume } = args.command else { panic!("train") };
        assert_eq!((file.job, resume), (PathBuf::from("job.toml"), Resume::Auto));
        assert_eq!(file.set, ["model.0.lr=1e-3", "run.seed=-1"]);
        let Command::Train { resume, .. } = read("hydra train job.toml").command else { panic!("train") };
        assert_eq!(resume, Resume::Never);
        let args = read("hydra --json plan job.toml --out here");
        assert!(args.json);
        assert!(matches!(args.command, Command::Plan { out: Some(_), .. }));
        let forward = read("hydra forward m --input x.safetensors --output y.safetensors").command;
        assert!(matches!(forward, Command::Forward { .. }));
        assert!(matches!(read("hydra devices").command, Command::Devices { out: None, profile: None }));
        assert!(matches!(read("hydra report runs/demo").command, Command::Report { .. }));
    }

    #[test]
    fn usage_errors_exit_with_2_and_begin_with_error() {
        for line in [
            "hydra",
            "hydra trian job.toml",
            "hydra train",
            "hydra train job.toml --resume maybe",
            "hydra train job.toml --slots 2",
            "hydra forward m --input x",
            "hydra report",
        ] {
            let error = CommandLine::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.use_stderr(), "{line}");
            assert!(error.to_string().starts_with("error: "), "{line}: {error}");
        }
        let help = CommandLine::try_parse_from(["hydra", "--help"]).expect_err("help");
        assert_eq!((help.kind(), help.exit_code()), (ErrorKind::DisplayHelp, 0));
    }
}
