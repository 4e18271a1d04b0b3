//! SIGINT, SIGTERM and SIGHUP: signals that end a run early.
//!
//! They are blocked, and one thread waits for them, so that they are handled in ordinary code. A signal that was
//! ignored when the program started, such as SIGHUP under `nohup`, stays ignored.

use crate::print::complain;
use hydra::base::{Error, Result};
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The signals that ask a run to stop.
const ASKING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// A signal so soon after the first is the same request: `timeout` sends one to its child and one to the child's group,
/// and a user may press the keys twice.
const REPEATS: Duration = Duration::from_secs(2);

/// How signals that ask a run to stop are handled. While a job is prepared, which may take minutes for tokenizing a
/// text or searching for a plan, there is nothing to save, and they end the program. Later the first sets a flag, which
/// is checked between steps, and a further one that does not repeat the first ends the program.
pub struct Signals {
    /// Set by the first signal once training may have begun.
    pub stop: Arc<AtomicBool>,
    preparing: Arc<Mutex<bool>>,
}

impl Signals {
    /// Listens from now on. Threads that are started later also block the signals, so this must be called before any is
    /// started.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn install() -> Result<Signals> {
        let signals = Signals { stop: Arc::default(), preparing: Arc::new(Mutex::new(true)) };
        let (flag, preparing) = (Arc::clone(&signals.stop), Arc::clone(&signals.preparing));
        let mut asked_at: Option<Instant> = None;
        let handler = move || {
            // Held until the program exits, so that no run begins meanwhile.
            if *preparing.lock().unwrap_or_else(PoisonError::into_inner) {
                let error = Error::Interrupted { at: "the job's preparation".into(), checkpoint: Some(false) };
                complain(&error);
                std::process::exit(error.exit_code().into());
            }
            flag.store(true, Ordering::Relaxed);
            if asked_at.get_or_insert_with(Instant::now).elapsed() > REPEATS {
                complain("a second signal: the run ends at once; of each model its last checkpoint is kept");
                std::process::exit(1);
            }
        };
        listen(handler)?;
        Ok(signals)
    }

    /// From now on the first signal lets the step end before the run stops.
    pub fn wait_for_the_step(&self) {
        *self.preparing.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// Calls `heed` for each of the signals that are not ignored, on a thread of its own.
fn listen(mut heed: impl FnMut() + Send + 'static) -> Result<()> {
    let refused = |why: String| Error::Device(format!("cannot listen for signals: {why}"));
    let ignored = ignored();
    let heeded: SigSet = ASKING.into_iter().filter(|&signal| ignored >> (signal as u32 - 1) & 1 == 0).collect();
    heeded.thread_block().map_err(|e| refused(e.to_string()))?;
    let body = move || {
        while heeded.wait().is_ok() {
            heed();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(body).map(drop).map_err(|e| refused(e.to_string()))
}

/// A bit mask of the signals that this process ignores, from the lowest bit on, if the system reports it.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
