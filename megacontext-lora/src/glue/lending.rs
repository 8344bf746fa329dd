//! A job's modules as the ABI lends them to its host, for the length of one callback.

use std::panic::{AssertUnwindSafe, catch_unwind};

use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::sabi_types::RRef;
use abi_stable::std_types::{RResult, RStr, RString};
use megacontext_kernels::linear::Weight;
use megacontext_lora_abi::parameters::{ParametersRef, RawParameters, RawParameters_TO};
use megacontext_lora_abi::{AbiError, TensorView, TensorViewMut};

use super::{abi_error, panic_text};
use crate::error::PluginError;
use crate::learned::Learned;

/// A job's modules as the ABI lends them.
pub(super) struct Lending<'a>(pub &'a Learned<'a>);

impl Lending<'_> {
    /// For one call of the host's.
    pub fn lent(&self) -> ParametersRef<'_> {
        RawParameters_TO::from_ptr(RRef::new(self), TD_Opaque)
    }

    /// No panic crosses to the host, which called from within a callback of the plugin's.
    fn guard<'a, T>(
        &'a self,
        call: impl FnOnce(&'a Learned<'a>) -> Result<T, PluginError>,
    ) -> RResult<T, AbiError> {
        let caught = catch_unwind(AssertUnwindSafe(|| call(self.0)));
        let result = caught.unwrap_or_else(|panic| {
            Err(PluginError::internal(format!("parameters: a call panicked: {}", panic_text(&*panic))))
        });
        result.map_err(abi_error).into()
    }
}

impl RawParameters for Lending<'_> {
    fn groups(&self) -> RResult<RString, AbiError> {
        self.guard(|learned| Ok(RString::from(learned.groups()?.to_string())))
    }

    fn get(&self, name: RStr<'_>) -> RResult<TensorView<'_>, AbiError> {
        self.guard(|learned| {
            let (shape, weight) = learned.get(name.as_str())?;
            Ok(match weight {
                Weight::F32(values) => TensorView::new(values, shape)?,
                Weight::Bf16(values) => TensorView::new(values, shape)?,
            })
        })
    }

    fn lora_delta(&self, module: RStr<'_>, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard(|learned| {
            // A matrix of the right size the wrong way round must not pass; no LoRA there is the job's error.
            let dims = learned.delta_shape(module.as_str()).map_or([None; 2], |dims| dims.map(Some));
            out.fill("out", &dims, |values| learned.lora_delta(module.as_str(), values))
        })
    }
}
