//! Trains Transformers and CNNs that are larger than the memory they are given.
//!
//! A model is traced once into a graph ([`graph`]), differentiated, cut into shards under a memory budget ([`spill`])
//! and run on lanes, with copies overlapping compute ([`engine`]). The bits of the result do not depend on the budget,
//! the cut, the number of devices or the number of threads. A small GPT on a device with a quarter of the memory that
//! its state takes:
//!
//! ```
//! use hydra::data::{RandomSource, RandomOptions, names};
//! use hydra::base::{DType, Shape};
//! use hydra::nn::from_config;
//! use hydra::spill::PlanOptions;
//! use hydra::train::{Session, TrainOptions, Weights};
//!
//! # fn main() -> hydra::base::Result<()> {
//! let config = serde_json::json!({ "n_layer": 8, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64 });
//! let gpt = from_config("gpt2", &config)?;
//! let tensors = [names::INPUT_IDS, names::LABELS].map(|name| (name.to_string(), DType::I32, Shape::from([16])));
//! let data = RandomSource::new(&RandomOptions { tensors: tensors.to_vec(), vocab: 64, classes: 64, batch: 4, seed: 1 })?;
//! let plan = PlanOptions { device_budget: Some(400_000), ..PlanOptions::default() };
//! let options = TrainOptions { batch: 4, microbatch: 2, plan, ..TrainOptions::new(3) };
//! let mut session = Session::start(gpt.as_ref(), Weights::Random, Box::new(data), None, options)?;
//! while let Some(step) = session.wait_step()? {
//!     println!("loss {:.3}", step.result.loss);
//! }
//! assert!(session.engine().high_water_bytes(0) <= 400_000);
//! # Ok(())
//! # }
//! ```
//!
//! | to do this | see |
//! | --- | --- |
//! | train step by step, evaluate, save and resume | [`train::Session`]; examples/08_fine_tuning |
//! | train to the end, with an observer, validation and checkpoints on schedule | [`train::Session::run`]; for several models [`train::Fleet`] |
//! | run steps in a loop of your own, and read and write weights | [`engine::Engine`], which takes a [`spill::Plan`] and a [`device::Device`]; examples/07_own_loop |
//! | train part of a model and freeze the rest | [`train::TrainOptions::frozen`] |
//! | train low-rank adapters beside a model's weights | [`train::TrainOptions::low_rank`], [`train::save_adapters`] |
//! | start from weights of your own | [`train::Weights`] |
//! | describe a network or a layer | [`nn::Network`], [`nn::layers`], [`graph::Builder`] |
//! | add an op with a kernel and a gradient | [`graph::CustomOp`] |
//! | read and save Hugging Face directories | [`nn::open`], [`nn::save`], [`nn::from_config`] |
//! | read back a saved network of your own | [`nn::open_own`]; examples/02_own_model |
//! | compute a model's logits | [`train::Session::wait_forward`] during training, [`train::wait_forward`], [`engine::Engine::wait_logits`] |
//! | choose which model's unit a device takes next | [`sched::Policy`]; on a virtual clock [`engine::simulate`] |
//! | see where the time went | [`trace`] |
//!
//! README.md lists the examples; ARCHITECTURE.md has the map of the code.

pub mod base;
pub mod data;
pub mod device;
pub mod engine;
pub mod graph;
pub mod nn;
pub mod sched;
pub mod spill;
pub mod trace;
pub mod train;
