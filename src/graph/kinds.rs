//! The choices an op can be given: plain enums that the graph, the devices and the layers share.

/// The function applied to every element of a linear layer's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// The identity.
    None,
    /// max(x, 0).
    Relu,
    /// x Φ(x) with Φ by tanh, as GPT-2 has it (Hendrycks & Gimpel 2016, "Gaussian error linear units", arXiv:1606.08415, section 2).
    GeluTanh,
    /// x Φ(x) with Φ by the error function: exact.
    GeluErf,
}

/// How a linear layer's weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// (inputs, outputs): GPT-2's.
    InOut,
    /// (outputs, inputs): everybody else's.
    OutIn,
}
