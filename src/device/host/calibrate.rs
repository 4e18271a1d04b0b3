//! Measures this machine: about a second of each op family, so that plans are predicted in its own seconds.
