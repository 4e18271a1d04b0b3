//! A GPU's marks as times on the host's clock.
//!
//! A GPU tells only how far two of its own marks lie apart, so each has a zero: a mark whose time on the host's clock
//! is known. The zero moves along, since a difference loses digits when it is large, and each new one is held between
//! the moments at which the host sent it and saw it passed: however long a run is, the clocks of several GPUs do not
//! drift apart.

use super::driver::{Driver, Mark, Stream};
use crate::base::Result;
use std::time::Instant;

/// Marks this far apart are still told apart to a microsecond.
const ZERO_SECS: f64 = 5.0;
/// Times that the first zero is tried; the one that took the shortest is known best.
const TRIES: usize = 8;

/// The clock of one GPU.
pub(super) struct GpuClock {
    /// Of its own, so that a zero is passed as soon as it is sent.
    stream: Stream,
    /// Passed when the host's clock stood at `zero_secs`.
    zero: Mark,
    zero_secs: f64,
    /// When `spare` was sent to become the next zero, if it was.
    sent_secs: Option<f64>,
    /// The zero before, to be recorded again.
    spare: Mark,
}

impl GpuClock {
    /// Waits for what is on `stream`, of which no other use is made from now on, and finds the time of a first zero on
    /// the host's `clock`.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn new(driver: &mut dyn Driver, stream: Stream, clock: Instant) -> Result<GpuClock> {
        let (mut zero, mut spare) = (driver.mark(stream.gpu)?, driver.mark(stream.gpu)?);
        let (mut zero_secs, mut least_secs) = (0.0, f64::INFINITY);
        for _ in 0..TRIES {
            let sent_secs = clock.elapsed().as_secs_f64();
            driver.record(spare, stream)?;
            while !driver.passed(spare)? {
                driver.wait_a_moment(0.0)?;
            }
            let seen_secs = clock.elapsed().as_secs_f64();
            if seen_secs - sent_secs < least_secs {
                (zero_secs, least_secs) = ((sent_secs + seen_secs) / 2.0, seen_secs - sent_secs);
                std::mem::swap(&mut zero, &mut spare);
            }
        }
        Ok(GpuClock { stream, zero, zero_secs, sent_secs: None, spare })
    }

    /// The time of a mark of this GPU that was passed.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn secs(&self, driver: &mut dyn Driver, mark: Mark) -> Result<f64> {
        Ok(self.zero_secs + driver.secs_between(self.zero, mark)?)
    }

    /// Moves the zero along, in two calls or more; the host's clock stands at `now_secs`.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn move_zero(&mut self, driver: &mut dyn Driver, now_secs: f64) -> Result<()> {
        match self.sent_secs {
            Some(sent_secs) if driver.passed(self.spare)? => {
                self.zero_secs = self.secs(driver, self.spare)?.clamp(sent_secs, now_secs);
                std::mem::swap(&mut self.zero, &mut self.spare);
                self.sent_secs = None;
            }
            None if now_secs - self.zero_secs > ZERO_SECS => {
                driver.record(self.spare, self.stream)?;
                self.sent_secs = Some(now_secs);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::cuda::Emulated;

    fn wait(driver: &mut Emulated, mark: Mark) {
        while !driver.passed(mark).expect("a mark") {
            driver.wait_a_moment(0.0).expect("what is queued runs");
        }
    }

    #[test]
    fn a_zero_is_set_right_and_marks_are_told_by_it() {
        let mut driver =
            Emulated::of(vec![Emulated::facts_of(0, 80), Emulated::facts_of(1, 80)], 3).expect("an emulator");
        let clock = Instant::now();
        let stream = driver.stream(1).expect("a stream");
        let mut gpu = GpuClock::new(&mut driver, stream, clock).expect("a clock");
        let now_secs = |driver: &mut Emulated, gpu: &GpuClock| {
            let mark = driver.mark(1).expect("a mark");
            driver.record(mark, stream).expect("a stream");
            wait(driver, mark);
            gpu.secs(driver, mark).expect("a time")
        };
        let before = clock.elapsed().as_secs_f64();
        let told = now_secs(&mut driver, &gpu);
        // Half of what the shortest of eight tries took is all that a zero is off by; a second is what no interruption
        // takes.
        assert!(before - 1.0 < told && told < clock.elapsed().as_secs_f64() + 1.0, "{told}, after {before}");
        // Nothing is sent within five seconds of a zero.
        gpu.move_zero(&mut driver, before).expect("no failure");
        assert!(gpu.sent_secs.is_none());
        // The host's clock has gone on a hundred seconds of which the GPU's knows nothing: it is set to the moment at
        // which the zero was sent.
        gpu.move_zero(&mut driver, 100.0).expect("no failure");
        assert_eq!(gpu.sent_secs, Some(100.0));
        gpu.move_zero(&mut driver, 100.5).expect("no failure");
        assert_eq!(gpu.sent_secs, Some(100.0), "not passed yet");
        wait(&mut driver, gpu.spare);
        gpu.move_zero(&mut driver, 101.0).expect("no failure");
        assert_eq!((gpu.sent_secs, gpu.zero_secs), (None, 100.0));
        let told = now_secs(&mut driver, &gpu);
        assert!((100.0..101.0).contains(&told), "{told}");
        assert!(driver.mark(0).is_ok_and(|other| gpu.secs(&mut driver, other).is_err()), "another GPU's mark");
    }
}
