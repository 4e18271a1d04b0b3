//! SIGINT, SIGTERM and SIGHUP: what ends a run before its time.
//!
//! They are blocked, and one thread waits for them, so that what they do is plain code. One that the program was
//! started to ignore, as `nohup` does with SIGHUP, stays ignored.

use crate::print::complain;
use hydra::base::{Error, Result};
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What asks a run to stop.
const ASKING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// A signal so soon after the first is the same wish: `timeout` sends one to its child and one to the child's group,
/// and who types may type twice.
const REPEATS: Duration = Duration::from_secs(2);

/// What signals that ask a run to stop do. While a job is prepared, which may take minutes where a text is cut or a plan
/// is searched, there is nothing to keep: they end the program. Later the first sets a flag, which is heeded between
/// steps, and another that is no repeat of it ends the program.
pub struct Signals {
    /// Set by the first signal once training may have begun.
    pub stop: Arc<AtomicBool>,
    preparing: Arc<Mutex<bool>>,
}

impl Signals {
    /// Listens from now on. Threads that are started later block the signals as well, so this comes before any is.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn install() -> Result<Signals> {
        let signals = Signals { stop: Arc::default(), preparing: Arc::new(Mutex::new(true)) };
        let (flag, preparing) = (Arc::clone(&signals.stop), Arc::clone(&signals.preparing));
        let mut asked_at: Option<Instant> = None;
        let handler = move || {
            // Held until the end, so that no run begins meanwhile.
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

    /// From now on there is something to put in order first.
    pub fn wait_for_the_step(&self) {
        *self.preparing.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// Calls `heed` at each of the signals that are not ignored, on a thread of its own.
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

/// The signals that this process ignores, from the lowest bit on, where the system says so.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
