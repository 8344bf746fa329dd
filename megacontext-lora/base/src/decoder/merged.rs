//! LoRA merged into a model's weights in memory, and taken out again to the bit.
//!
//! Source: PEFT's `merge_adapter` and `unmerge_adapter`. A merged model computes y = W'·x in one product where the adapter
//! takes three. PEFT unmerges by subtracting the update, which leaves rounding behind in every weight; here the weight
//! itself is set aside while its merged form is in use, so that unmerging puts back the same bytes. A weight that lies in
//! its file costs nothing that way: merging gives it memory of its own, unmerging drops that. One that was in memory is
//! there twice meanwhile.
//!
//! A merged weight is stored as the weight was: in class bf16 it is rounded to bf16.
//!
//! Shapes: W [out, in]. Errors: `BaseError::Lora` for a call at the wrong time; nothing has changed then.

use candle_core::{DType, Tensor};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::{Store, bf16};

use super::Decoder;
use super::adapted::Attached;
use crate::error::{BaseError, Result};
use crate::lora::{LoraModules, changed};
use crate::params::{Group, Parameter};

/// What is set aside while LoRA is merged.
pub(super) struct Merged {
    pub(super) lora: Attached,
    weights: Vec<(String, Parameter)>,
}

impl Decoder {
    /// Merges the attached LoRA into the weights it acts on; its factors stay parameters, but no pass reads them. Returns
    /// how many weights took it up.
    ///
    /// # Errors
    /// When no LoRA is attached, it is merged already, or the base or LoRA learns.
    pub fn merge_adapter(&mut self) -> Result<usize> {
        self.refuse_merged("merge_adapter")?;
        let Some(lora) = self.lora.clone() else {
            return refuse("merge_adapter: expected LoRA, none is attached");
        };
        // A weight that is set aside would never be looked at.
        self.params.check_mapped()?;
        for group in [Group::Base, Group::Lora] {
            if self.params.learns(group) {
                return refuse(&format!("merge_adapter: expected {group} to be frozen, it learns"));
            }
        }
        let mut aside: Vec<(String, Parameter)> = Vec::new();
        let merged = self.config.tensors().into_iter().try_for_each(|(name, shape)| {
            let Some(weight) = self.merged_form(&lora.modules, &name)? else { return Ok(()) };
            let group = self.config.group_of(&name);
            let narrow = matches!(self.params.values(&name)?.weight(), Weight::Bf16(_));
            aside.push((name.clone(), self.params.take(&name)?));
            let values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
            if narrow {
                let values: Vec<bf16> = values.into_iter().map(bf16::put).collect();
                self.params.insert_values(name, group, values, &shape)
            } else {
                self.params.insert_values(name, group, values, &shape)
            }
        });
        let count = aside.len();
        self.merged = Some(Merged { lora, weights: aside });
        self.lora = None;
        if let Err(error) = merged {
            self.unmerge_adapter()?;
            return Err(error);
        }
        Ok(count)
    }

    /// Puts back the weights that [`Decoder::merge_adapter`] set aside, to the bit, and attaches LoRA again. Returns how
    /// many there were.
    ///
    /// # Errors
    /// When nothing is merged.
    pub fn unmerge_adapter(&mut self) -> Result<usize> {
        let Some(Merged { lora, weights }) = self.merged.take() else {
            return refuse("unmerge_adapter: expected merged LoRA, there is none");
        };
        let count = weights.len();
        for (name, weight) in weights {
            self.params.put(name, weight)?;
        }
        self.lora = Some(lora);
        Ok(count)
    }

    /// Is LoRA merged into the weights?
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Refuses `call` while LoRA is merged.
    pub(super) fn refuse_merged(&self, call: &str) -> Result<()> {
        match self.merged {
            None => Ok(()),
            Some(_) => refuse(&format!("{call}: LoRA is merged into the weights; unmerge it first")),
        }
    }

    /// The weight `name` with LoRA in it, f32; none where LoRA does not act on it.
    fn merged_form(&self, lora: &LoraModules, name: &str) -> Result<Option<Tensor>> {
        self.params.bring_home()?;
        let base = || match self.params.get(name) {
            Some(weight) => Ok(weight.to_dtype(DType::F32)?),
            None => refuse(&format!("merge_adapter: the model has no {name}")),
        };
        changed(lora, name, base, |factor| self.params.get(factor))
    }
}

fn refuse<T>(message: &str) -> Result<T> {
    Err(BaseError::Lora { message: message.to_string() })
}
