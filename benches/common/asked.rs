//! What the environment asks of a bench, read alike by all of them.

/// Whether a variable is set: to anything but nothing and 0.
pub fn set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|v| !v.is_empty() && v != "0")
}

/// Whether few samples of small shapes will do: `HYDRA_BENCH_QUICK`.
pub fn quick() -> bool {
    set("HYDRA_BENCH_QUICK")
}
