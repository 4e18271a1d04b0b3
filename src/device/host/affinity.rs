//! Which cores a thread may run on.

use std::ops::Range;

/// Confines the calling thread to `cores` of those that the process may use, counted in their order; does nothing where
/// the system refuses or there is no such call.
pub(super) fn pin(cores: Range<usize>) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a cpu_set_t is plain bits, for which all zeros is the empty set.
        let mut allowed = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
        // SAFETY: as above.
        let mut chosen = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
        let size = size_of::<libc::cpu_set_t>();
        // SAFETY: the kernel writes at most `size` bytes into the set.
        if unsafe { libc::sched_getaffinity(0, size, &mut allowed) } != 0 {
            return;
        }
        let mut nth = 0;
        for cpu in 0..libc::CPU_SETSIZE as usize {
            // SAFETY: below CPU_SETSIZE, as the macro asks.
            if !unsafe { libc::CPU_ISSET(cpu, &allowed) } {
                continue;
            }
            if cores.contains(&nth) {
                // SAFETY: below CPU_SETSIZE, as the macro asks.
                unsafe { libc::CPU_SET(cpu, &mut chosen) };
            }
            nth += 1;
        }
        // SAFETY: the kernel reads `size` bytes of the set; a refusal leaves the thread where it was, which is only
        // slower.
        let _ = unsafe { libc::sched_setaffinity(0, size, &chosen) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
}
