//! The time for which threads have computed: it tells a task that takes long from one that hangs.

#[cfg(target_os = "linux")]
use std::sync::Mutex;

/// The CPU clocks of a device's threads. Where the system has none, nobody seems to compute.
#[derive(Debug, Default)]
pub(super) struct CpuClocks {
    #[cfg(target_os = "linux")]
    clocks: Mutex<Vec<libc::clockid_t>>,
}

impl CpuClocks {
    /// Counts the calling thread in.
    pub fn add_this_thread(&self) {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the call takes nothing.
            let thread = unsafe { libc::pthread_self() };
            let mut clock = 0;
            // SAFETY: writes the clock's number to where we have one; the thread is the calling one, so it is there.
            if unsafe { libc::pthread_getcpuclockid(thread, &mut clock) } == 0 {
                self.clocks.lock().expect("no thread panics while it holds the clocks").push(clock);
            }
        }
    }

    /// Seconds for which the threads that are there have computed in all.
    pub fn secs(&self) -> f64 {
        #[cfg(target_os = "linux")]
        {
            let secs = |&clock: &libc::clockid_t| {
                let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                // SAFETY: writes to the one timespec. Of a thread that has ended the system refuses the clock and leaves
                // the zeros.
                unsafe { libc::clock_gettime(clock, &mut time) };
                time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
            };
            self.clocks.lock().expect("no thread panics while it holds the clocks").iter().map(secs).sum()
        }
        #[cfg(not(target_os = "linux"))]
        0.0
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_computes_is_told_from_one_that_sleeps() {
        use std::time::{Duration, Instant};
        let clocks = super::CpuClocks::default();
        let in_thread = |body: fn()| {
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    clocks.add_this_thread();
                    let before = clocks.secs();
                    body();
                    clocks.secs() - before
                });
                thread.join().unwrap()
            })
        };
        let began = Instant::now();
        let computed = in_thread(|| {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(300) {
                std::hint::black_box(0);
            }
        });
        assert!(computed > 0.0 && computed <= began.elapsed().as_secs_f64(), "{computed} s");
        let slept = in_thread(|| std::thread::sleep(Duration::from_millis(300)));
        assert!((0.0..0.1).contains(&slept), "{slept} s");
    }
}
