//! Which cores a thread may run on.

/// Cores of those that the process may use, counted in their order and round again after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cores {
    /// The first.
    pub first: usize,
    /// How many; no more than there are.
    pub count: usize,
}

impl Cores {
    /// Whether the `nth` of `all` is one.
    fn contains(self, nth: usize, all: usize) -> bool {
        (nth + all - self.first % all) % all < self.count
    }
}

/// Which of the cores that the process may use this thread runs on: one that was free when it was last woken, so that
/// two processes which count from theirs seldom meet. 0 where there is no such call.
pub(super) fn current() -> usize {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call takes nothing and touches no memory of ours.
        let cpu = unsafe { libc::sched_getcpu() };
        allowed().iter().position(|&c| c as i32 == cpu).unwrap_or(0)
    }
    #[cfg(not(target_os = "linux"))]
    0
}

/// Confines the calling thread to `cores`; does nothing where the system refuses or there is no such call.
pub(super) fn pin(cores: Cores) {
    #[cfg(target_os = "linux")]
    {
        let allowed = allowed();
        // SAFETY: a cpu_set_t is plain bits, for which all zeros is the empty set.
        let mut chosen = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
        for (nth, &cpu) in allowed.iter().enumerate() {
            if cores.contains(nth, allowed.len()) {
                // SAFETY: below CPU_SETSIZE, as the macro asks.
                unsafe { libc::CPU_SET(cpu, &mut chosen) };
            }
        }
        // SAFETY: the kernel reads the set's size of it; a refusal leaves the thread where it was, which is only
        // slower.
        let _ = unsafe { libc::sched_setaffinity(0, size_of_val(&chosen), &chosen) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
}

/// The CPUs that this thread may use; empty where the system does not say.
#[cfg(target_os = "linux")]
fn allowed() -> Vec<usize> {
    // SAFETY: a cpu_set_t is plain bits, for which all zeros is the empty set.
    let mut set = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    // SAFETY: the kernel writes at most the set's size into it.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Vec::new();
    }
    // SAFETY: below CPU_SETSIZE, as the macro asks.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_go_round() {
        let of = |first, count, all| (0..all).filter(|&n| Cores { first, count }.contains(n, all)).collect::<Vec<_>>();
        assert_eq!(of(0, 2, 4), [0, 1]);
        assert_eq!(of(3, 2, 4), [0, 3]);
        assert_eq!(of(6, 1, 4), [2], "further than once round");
        assert_eq!(of(1, 4, 4), [0, 1, 2, 3]);
        assert_eq!(of(0, 1, 1), [0]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pinned_thread_runs_on_its_core() {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        for first in 0..all {
            let pinned = std::thread::spawn(move || {
                pin(Cores { first, count: 1 });
                // All cores but one are no longer counted, so which it is shows in what is allowed.
                (current(), allowed())
            });
            let (current, after) = pinned.join().expect("it pins and returns");
            assert_eq!((current, after), (0, vec![allowed()[first]]));
        }
    }
}
