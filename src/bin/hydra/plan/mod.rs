//! From a job to plans: how each model is cut, where it runs, and how models share the devices.
//!
//! [`planned`] is the whole: it has models traced, [`placing`] plan and place them, and predicts a step. [`fitting`]
//! holds plans to the memory that is free, [`room`] plans models that come later, [`rehearsal`] tries ways to take
//! turns. What a plan says is in [`words`] and [`json`], and in [`advice`] what would help.

pub mod advice;
pub mod fitting;
mod json;
pub mod placing;
pub mod planned;
pub mod rehearsal;
pub mod room;
pub mod words;
