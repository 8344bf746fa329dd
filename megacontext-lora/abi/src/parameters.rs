//! The parameters of a running job, lent to its host for the length of one callback.
//!
//! A job brings its own model, which the host's session does not know. Where the job pauses between two phases, nothing learns,
//! and [`crate::Host::parameters`] gets a [`JobParameters`]: every parameter where it lies, by its name in checkpoints
//! (`gistnet/…`, `lensnet/…`, `model/…`).
//!
//! Shapes: as in the model's checkpoint, row-major; a LoRA delta is `[out, in]`. Errors: [`ErrorKind::Usage`] for a name that is
//! not there and for an output of another shape.
//!
//! [`ErrorKind::Usage`]: crate::ErrorKind::Usage

// As in `raw`: what `sabi_trait` makes cannot be documented from here.
#![allow(missing_docs, non_local_definitions)]

use crate::error::AbiError;
use crate::session::json;
use crate::tensor::{TensorView, TensorViewMut};
use abi_stable::sabi_trait;
use abi_stable::sabi_types::RRef;
use abi_stable::std_types::{RResult, RStr, RString};
use serde_json::Value;

/// What a plugin implements. See [`JobParameters`] for what each means.
#[sabi_trait]
pub trait RawParameters {
    /// All of them by module and group, JSON.
    fn groups(&self) -> RResult<RString, AbiError>;
    /// One of them, without a copy.
    fn get(&self, name: RStr<'_>) -> RResult<TensorView<'_>, AbiError>;
    /// What LoRA adds to one module's weight.
    #[sabi(last_prefix_field)]
    fn lora_delta(&self, module: RStr<'_>, out: TensorViewMut<'_>) -> RResult<(), AbiError>;
}

/// As it crosses: borrowed for one call.
pub type ParametersRef<'a> = RawParameters_TO<'a, RRef<'a, ()>>;

/// Parameters of a job between two of its phases. Nothing writes them while this lives, and this lives as long as the callback.
pub struct JobParameters<'a> {
    raw: ParametersRef<'a>,
}

impl<'a> JobParameters<'a> {
    pub(crate) fn new(raw: ParametersRef<'a>) -> Self {
        Self { raw }
    }

    /// `{module: {group: {learns, parameters: [{name, shape, stored}]}}}`; `learns` is whether the phase that is entered, or was
    /// left, lets the group learn.
    pub fn groups(&self) -> Result<Value, AbiError> {
        json(self.raw.groups())
    }

    /// One of them by its name in [`JobParameters::groups`], where it lies and as it is stored: F32, or BF16 for a frozen weight.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>, AbiError> {
        self.raw.get(name.into()).into_result()
    }

    /// What LoRA adds to the weight of a module of the base model (`model.layers.0.self_attn.q_proj`), scale included: F32
    /// `[out, in]`.
    pub fn lora_delta(&self, module: &str, out: TensorViewMut<'_>) -> Result<(), AbiError> {
        self.raw.lora_delta(module.into(), out).into_result()
    }
}
