//! The library's one error type: what went wrong, and whose fault it is.

use std::path::Path;

/// Why a call failed. The variants are the answers to "who has to act".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is at fault: a file, a config, a key, a shape, a value. The message says what and where.
    #[error("{0}")]
    BadInput(String),
    /// A budget is too small; the message holds the table of what is needed. The program prints it and exits with 2.
    #[error("{message}")]
    OutOfBudget {
        /// One line that says what does not fit, then the table.
        message: String,
        /// The smallest device budget, in bytes, that works.
        smallest_device_bytes: u64,
    },
    /// A device failed, stalled, or is not available.
    #[error("{0}")]
    Device(String),
    /// The operating system refused: a full disk, a directory that cannot be written.
    #[error("{what}: {source}")]
    Io {
        /// The operation that was tried and its path.
        what: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The loss of a step is infinite or NaN: the learning rate is too large, or the data is faulty.
    #[error("the loss is {loss} at step {step}{}", match layer {
        Some(layer) => format!("; the first layer whose output is not finite is {layer}"),
        None => ", though every layer's output is finite".into(),
    })]
    NotFinite {
        /// The step, from 0.
        step: u64,
        /// The loss.
        loss: f32,
        /// The first layer whose output is not finite; `None` when the logits are finite and only the loss is not.
        layer: Option<String>,
    },
    /// A model was taken out of the run.
    #[error("cancelled")]
    Cancelled,
    /// The run was asked to stop (SIGINT, SIGTERM, SIGHUP).
    #[error("interrupted at {at}{}", match checkpoint { Some(true) => ", after a checkpoint", Some(false) => ", with nothing new to keep", None => "" })]
    Interrupted {
        /// Steps done: `step 12` or, of several models, `step 12 of gpt, step 7 of bert`.
        at: String,
        /// Whether a checkpoint was saved, where that is known: the run's observer saves it, not the run itself.
        checkpoint: Option<bool>,
    },
}

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an [`Error::BadInput`] from anything that prints.
    pub fn bad(message: impl std::fmt::Display) -> Self {
        Error::BadInput(message.to_string())
    }

    /// Makes an [`Error::Io`] for `verb` (such as "read", "create") on `path`.
    pub fn io(verb: &str, path: &Path, source: std::io::Error) -> Self {
        Error::Io { what: format!("cannot {verb} {}", path.display()), source }
    }

    /// Wraps a system's error on a path that the user named: [`Error::BadInput`] where the path itself is at fault,
    /// else [`Error::Io`].
    pub fn refused(verb: &str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{AlreadyExists, InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound};
        let cannot_be_meant = matches!(
            source.kind(),
            NotFound | NotADirectory | IsADirectory | AlreadyExists | InvalidFilename | InvalidInput
        );
        let error = Error::io(verb, path, source);
        if cannot_be_meant { Error::bad(error) } else { error }
    }

    /// The program's exit code for this error: 2 where the input is at fault, 75 when interrupted, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::BadInput(_) | Error::OutOfBudget { .. } | Error::NotFinite { .. } | Error::Cancelled => 2,
            Error::Device(_) | Error::Io { .. } => 1,
            Error::Interrupted { .. } => 75,
        }
    }
}
