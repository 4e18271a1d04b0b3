//! The traced model: ops with their rules, reverse mode, memory placement, programs.
//!
//! Nothing here launches anything: a graph is data, and a program is data that a device runs.

mod alike;
mod builder;
mod cost;
mod custom;
mod differentiate;
mod fuse;
mod gradient;
#[expect(clippy::module_inception, reason = "the graph itself is this module's first noun")]
mod graph;
mod ids;
pub mod kinds;
mod layout;
mod loss_parts;
mod loss_step;
mod low_rank;
mod op;
mod padding;
mod place;
mod program;
mod scratch;
mod slice;

pub(crate) use alike::alike;
pub use builder::{AttentionOptions, Builder};
pub use cost::{Cost, Family, Work, cost};
pub use custom::{CUSTOM_OPERANDS, Custom, CustomOp, KernelCall, Kernels, Number};
pub use differentiate::differentiate;
pub use graph::{Graph, Input, Layer, LossPart, Node, Parameter, ParameterGradient, Source, State, Value, ValueInfo};
pub use ids::IdRange;
pub use kinds::{Activation, Init, Mode, WeightLayout};
pub use layout::{ModelLayout, ShardLayout, SharedUse};
pub use loss_parts::split_loss;
pub use low_rank::{LowRank, MOST_RANK, adapted_layer, adapter_names};
pub use op::{AttentionKind, Op, RotaryScaling, Rotation, Slowing, Window};
pub use place::{ALIGNMENT, Lifetime, place};
pub use program::{AREAS, Area, Buffer, Kind, Program, Step, UsedInput};
pub use scratch::*;
