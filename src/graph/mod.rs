//! The traced computation: ops, their shape and gradient rules.

pub mod kinds;
