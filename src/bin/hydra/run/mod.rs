//! A run in progress: what it resumes from, what watches its models, what it shows, and how it ends.

pub mod inbox;
pub mod judge;
pub mod live;
pub mod observer;
pub mod outcome;
pub mod progress;
pub mod signals;
pub mod standing;
pub mod training;
pub mod watch;
