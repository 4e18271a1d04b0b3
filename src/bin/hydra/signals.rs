//! SIGINT and SIGTERM: what ends a run before its time.

use hydra::base::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A signal so soon after the first is the same wish: `timeout` sends one to its child and one to the child's group,
/// and who types may type twice.
const REPEATS: Duration = Duration::from_secs(2);

/// What SIGINT and SIGTERM do. While a job is prepared, which may take minutes where a text is cut or a plan is
/// searched, there is nothing to keep: they end the program. Later the first sets a flag, which is heeded between
/// steps, and another that is no repeat of it ends the program.
pub struct Signals {
    /// Set by the first signal once training may have begun.
    pub stop: Arc<AtomicBool>,
    preparing: Arc<Mutex<bool>>,
}

impl Signals {
    /// Listens from now on.
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
                crate::complain(&error.to_string());
                std::process::exit(error.exit_code().into());
            }
            flag.store(true, Ordering::Relaxed);
            if asked_at.get_or_insert_with(Instant::now).elapsed() > REPEATS {
                crate::complain("a second signal: the run ends at once; of each model its last checkpoint is kept");
                std::process::exit(1);
            }
        };
        ctrlc::set_handler(handler).map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))?;
        Ok(signals)
    }

    /// From now on there is something to put in order first.
    pub fn wait_for_the_step(&self) {
        *self.preparing.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}
