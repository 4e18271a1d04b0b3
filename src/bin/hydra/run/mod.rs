//! A run while it goes on: what it goes on from, who looks after its models, what it shows, and how it ends.

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
