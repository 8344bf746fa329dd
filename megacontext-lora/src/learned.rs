//! What a model has learned, to be read where it lies: parameters by group, and what LoRA adds to a weight.
//!
//! A session reads its own model so, and a job that pauses between two phases lends its modules to the host ([`Learned`]).
//!
//! Shapes: as in checkpoints, row-major; a delta is [out, in], of an embedding [V, D].
//! Errors: a name that is not there; an output of another size.

use std::collections::BTreeMap;

use candle_core::DType;
use megacontext_base::decoder::Decoder;
use megacontext_base::lora;
use megacontext_base::params::{Group, Held, ParamStore};
use megacontext_kernels::linear::Weight;
use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::jobs::model_error;

/// Parameters of one store by group: name, shape, and how values are stored now.
pub(crate) fn groups(
    params: &ParamStore,
    learns: impl Fn(Group) -> bool,
    called: impl Fn(&str) -> String,
) -> Result<Value> {
    let mut groups = Map::new();
    for name in params.names() {
        let Some(group) = params.group(name) else { continue };
        let entry = groups
            .entry(group.name())
            .or_insert_with(|| json!({ "learns": learns(group), "parameters": [] }));
        let stored = match params.values(name).map_err(model_error)?.weight() {
            Weight::F32(_) => "f32",
            Weight::Bf16(_) => "bf16",
        };
        if let Some(list) = entry["parameters"].as_array_mut() {
            list.push(json!({ "name": called(name), "shape": params.shape(name), "stored": stored }));
        }
    }
    Ok(Value::Object(groups))
}

/// What LoRA adds to a module's weight, into `out`: s·B·A, and all that DoRA or PiSSA change.
pub(crate) fn lora_delta(decoder: &Decoder, module: &str, out: &mut [f32]) -> Result<()> {
    let lora =
        decoder.lora_modules().ok_or_else(|| PluginError::usage("lora delta: the model carries no LoRA"))?;
    let Some(found) = lora.get(module) else {
        let known: Vec<&str> = lora.modules.iter().map(|module| module.name.as_str()).collect();
        return Err(PluginError::usage(format!("lora delta: expected one of {known:?}, got \"{module}\"")));
    };
    if found.out * found.inp != out.len() {
        return Err(PluginError::usage(format!(
            "lora delta: out: expected {} values, got {}",
            found.out * found.inp,
            out.len()
        )));
    }
    let params = decoder.params();
    params.bring_home().map_err(model_error)?;
    let weight = params
        .get(&found.weight_name())
        .ok_or_else(|| PluginError::internal(format!("{module} has no weight")))?
        .to_dtype(DType::F32)?;
    let delta = lora::delta(found, &weight, |name| params.get(name)).map_err(model_error)?;
    out.copy_from_slice(&delta.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

/// The modules of a job, borrowed while nothing learns.
pub struct Learned<'a> {
    decoder: &'a Decoder,
    modules: Vec<(&'static str, &'a ParamStore)>,
    learning: Vec<Group>,
    held: BTreeMap<String, (&'a [usize], Held<'a>)>,
}

impl<'a> Learned<'a> {
    /// Of modules by their words in checkpoints (`gistnet`, `lensnet`, `model`), with the groups that learn in the phase at hand.
    ///
    /// # Errors
    /// When a parameter cannot be read.
    pub fn new(
        decoder: &'a Decoder,
        modules: &[(&'static str, &'a ParamStore)],
        learning: &[Group],
    ) -> Result<Self> {
        let mut held = BTreeMap::new();
        for &(module, params) in modules {
            for name in params.names() {
                let values = params.values(name).map_err(model_error)?;
                held.insert(format!("{module}/{name}"), (params.shape(name).unwrap_or(&[]), values));
            }
        }
        Ok(Self { decoder, modules: modules.to_vec(), learning: learning.to_vec(), held })
    }

    /// `{module: {group: {learns, parameters: [{name, shape, stored}]}}}`.
    ///
    /// # Errors
    /// When a parameter cannot be read.
    pub fn groups(&self) -> Result<Value> {
        let learns = |group| self.learning.contains(&group);
        let of = |&(module, params): &(&'static str, &ParamStore)| {
            Ok((module.to_string(), groups(params, learns, |name| format!("{module}/{name}"))?))
        };
        Ok(Value::Object(self.modules.iter().map(of).collect::<Result<_>>()?))
    }

    /// A parameter's shape and values, as they are stored.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn get(&self, name: &str) -> Result<(&[usize], Weight<'_>)> {
        let (shape, held) = self.held.get(name).ok_or_else(|| {
            PluginError::usage(format!(
                "parameters: expected a name from groups (gistnet/…, lensnet/…, model/…), got \"{name}\""
            ))
        })?;
        Ok((shape, held.weight()))
    }

    /// Rows and columns of what LoRA adds to a module's weight; none where it carries no LoRA.
    pub fn delta_shape(&self, module: &str) -> Option<[usize; 2]> {
        self.decoder.lora_modules()?.get(module).map(|found| [found.out, found.inp])
    }

    /// What LoRA adds to a module's weight, into `out`.
    ///
    /// # Errors
    /// Without LoRA there; when `out` has another length.
    pub fn lora_delta(&self, module: &str, out: &mut [f32]) -> Result<()> {
        lora_delta(self.decoder, module, out)
    }
}
