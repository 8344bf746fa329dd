//! Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Source: PEFT 0.21 (`LoraConfig`, `get_peft_model_state_dict`). A tensor's key in the file is `base_model.model.` and
//! our name of it. LoRA factors, trained embeddings and trained norms share the one file (`modules_to_save`).
//!
//! PEFT stores no RoPE scaling and does not know its base, so our own key `megacontext` adds both. Adapters without the
//! key are read too; then the base is taken on trust.
//!
//! Tied embeddings: PEFT wraps the embedding and the head separately, and a head that it is not told about stays at the
//! base's values. So when a tied model's embedding was trained, `lm_head` is listed, its tensor is written a second
//! time, and `ensure_weight_tying` is set: PEFT then gives our logits and keeps the tie on merging. LoRA on the embedding of a
//! tied model is written a second time as the head's (A' = Bᵀ, B' = Aᵀ). Reading, the second copy must equal the first to the
//! bit, or the adapter unties the model and is refused.
//!
//! `norm` in `modules_to_save` matches every module whose name ends so, layer norms included; norms are therefore
//! trained and saved all together or not at all.
//!
//! PEFT saves the base's own embedding beside LoRA on it, unless told not to; such a copy must be the base's
//! ([`Adapter::load_into`] compares) and is not taken over.
//!
//! Shapes: r rank, A [r, in], B [out, r]; values f32. Errors: `BaseError::Adapter` with the path.
//!
//! Left out, and refused: trained biases, fan-in-fan-out, variants that PEFT marks by keys of their own (QA-LoRA, arrow, KaSA,
//! ...), and initialisations that change the base (PiSSA, OLoRA, CorDA, LoftQ), unless PEFT has converted them to plain LoRA.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::{Store, bf16};
use serde_json::{Value, json};

pub use crate::adapter_config::{AdapterConfig, MegacontextKey};
use crate::atomic::{AtomicDir, is_vacant, previous};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::hf_export::{write_json, write_safetensors};
use crate::lora::{LoraConfig, LoraKind};
use crate::params::{Group, ParamStore};
use crate::rope::{RopeScaling, SIGMA};
use crate::weights::{Dtype, MappedFile};

/// Name of the description inside an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors inside an adapter folder.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";
/// The head of every family whose embeddings are ever tied.
const HEAD: &str = "lm_head";

/// An adapter as read from its folder.
pub struct Adapter {
    /// The folder.
    pub dir: PathBuf,
    /// Its description.
    pub config: AdapterConfig,
    /// Tensors in f32 by our names, as they are in the file. Use [`Adapter::parameters`] to take over what a model has.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Writes an adapter folder, whole or not at all. An older adapter at `dir` is replaced (other files in it are kept);
/// a folder that holds anything else is refused.
pub fn write_adapter(dir: &Path, config: &AdapterConfig, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut by_name: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, tensor) in tensors {
        if by_name.insert(name.clone(), tensor.clone()).is_some() {
            return Err(BaseError::adapter(dir, format!("expected tensor {name} once, it is given twice")));
        }
    }
    if config.lora.ensure_weight_tying {
        for (name, copy) in second_copies(config, &by_name)? {
            by_name.insert(name, copy);
        }
    }
    for name in by_name.keys() {
        let part = ["lora_", "token_adapter."].iter().any(|part| name.contains(&format!(".{part}")));
        let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
        let saved =
            module.is_some_and(|module| config.modules_to_save.iter().any(|s| module.ends_with(s.as_str())));
        if !saved && !part {
            let message = format!("expected LoRA factors and modules_to_save only, got tensor {name}");
            return Err(BaseError::adapter(dir, message));
        }
    }

    let building = AtomicDir::new(dir)?;
    keep_companions(dir, building.path())?;
    write_json(&building.path().join(CONFIG_FILE), &config.to_json())?;
    let header: Vec<(String, Vec<usize>)> =
        by_name.iter().map(|(name, t)| (format!("{PREFIX}{name}"), t.dims().to_vec())).collect();
    write_safetensors(&building.path().join(TENSOR_FILE), &header, Dtype::F32, |key, _| {
        by_name
            .get(key.strip_prefix(PREFIX).unwrap_or(key))
            .cloned()
            .ok_or_else(|| BaseError::adapter(dir, format!("tensor {key} is not given")))
    })?;
    building.commit()
}

/// Refuses to replace what is not an adapter, and copies what else lies in an older adapter's folder.
fn keep_companions(old: &Path, new: &Path) -> Result<()> {
    if is_vacant(old) {
        return Ok(());
    }
    if !old.join(CONFIG_FILE).is_file() {
        let message = "expected no folder, an empty one or an older adapter to replace, got a folder without \
                       adapter_config.json or a file; choose another name";
        return Err(BaseError::adapter(old, message));
    }
    for entry in fs::read_dir(old).map_err(BaseError::io(old))? {
        let path = entry.map_err(BaseError::io(old))?.path();
        let Some(name) = path.file_name() else { continue };
        if name == CONFIG_FILE || name == TENSOR_FILE {
            continue;
        }
        if !path.is_file() {
            let message =
                format!("expected only files in the adapter to replace, got the folder {}", path.display());
            return Err(BaseError::adapter(old, message));
        }
        fs::copy(&path, new.join(name)).map_err(BaseError::io(&path))?;
    }
    Ok(())
}

/// Reads an adapter folder and checks everything that can be checked without its base; see
/// [`Adapter::check_against`].
pub fn read_adapter(dir: &Path) -> Result<Adapter> {
    let path = dir.join(CONFIG_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let aside = previous(dir);
            let hint = if aside.is_dir() {
                format!("; an interrupted write left the older adapter in {}: rename it", aside.display())
            } else {
                String::new()
            };
            let message = format!("expected a folder with {CONFIG_FILE}, there is none{hint}");
            return Err(BaseError::adapter(dir, message));
        }
        Err(e) => return Err(BaseError::io(&path)(e)),
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| {
        BaseError::adapter(&path, format!("expected complete JSON: {e}; copy the file again"))
    })?;
    let config = AdapterConfig::from_json(&value, &path)?;

    let path = dir.join(TENSOR_FILE);
    if !path.is_file() {
        let hint = if dir.join("adapter_model.bin").exists() {
            "; adapter_model.bin is not read, because reading a pickle runs code: save it again with safetensors"
        } else {
            ""
        };
        return Err(BaseError::adapter(dir, format!("expected a file {TENSOR_FILE}, there is none{hint}")));
    }
    let file = MappedFile::open(&path).map_err(|e| as_adapter(&path, e))?;
    let mut tensors = BTreeMap::new();
    for key in file.names() {
        let Some(name) = key.strip_prefix(PREFIX) else {
            let message = format!("expected keys that begin with \"{PREFIX}\", got {key}");
            return Err(BaseError::adapter(&path, message));
        };
        tensors.insert(name.to_string(), file.read_f32(&key).map_err(|e| as_adapter(&path, e))?);
    }
    Ok(Adapter { dir: dir.to_path_buf(), config, tensors })
}

/// What PEFT keeps a second time for the head of a tied model: the trained embedding, or LoRA on it, turned round.
fn second_copies(
    config: &AdapterConfig,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Vec<(String, Tensor)>> {
    let mut copies = Vec::new();
    if let [embedding, head, ..] = &config.modules_to_save[..]
        && let Some((_, table)) =
            tensors.iter().find(|(name, _)| name.ends_with(&format!("{embedding}.weight")))
    {
        copies.push((format!("{head}.weight"), table.clone()));
    }
    for (name, factor) in tensors {
        let of_head = match name.rsplit_once(".lora_embedding_") {
            Some((_, "A")) => "B",
            Some((_, "B")) => "A",
            _ => continue,
        };
        copies.push((format!("{HEAD}.lora_{of_head}.weight"), factor.t()?.contiguous()?));
    }
    Ok(copies)
}

impl Adapter {
    /// Where LoRA sits and how strong it is.
    pub fn lora(&self) -> LoraConfig {
        self.config.lora()
    }

    /// The RoPE scaling the adapter was trained with, if the adapter says.
    pub fn rope_scaling(&self) -> Option<&RopeScaling> {
        self.config.megacontext.as_ref().map(|own| &own.rope_scaling)
    }

    /// Refuses a base that the adapter was not made for: other weights, another RoPE scaling, tensors missing, too
    /// many, or of another shape. `base_fingerprint` is `Weights::fingerprint` of the base.
    pub fn check_against(&self, base: &DecoderConfig, base_fingerprint: &str) -> Result<()> {
        if let Some(own) = &self.config.megacontext {
            if own.base_fingerprint != base_fingerprint {
                return Err(self.refuse(format!(
                    "made for the base with fingerprint {}, got a base with {}; use the base it was trained on{}",
                    short(&own.base_fingerprint),
                    short(base_fingerprint),
                    self.config
                        .base_model_name_or_path
                        .as_ref()
                        .map_or_else(String::new, |name| format!(" ({name})")),
                )));
            }
            if own.base_rope_scaling.as_ref().is_some_and(|scaling| *scaling != base.rope_scaling) {
                return Err(self.refuse(format!(
                    "made for a base with RoPE scaling {}, got one with {}",
                    own.base_rope_scaling.as_ref().unwrap_or(&RopeScaling::None),
                    base.rope_scaling
                )));
            }
        }
        if let Some(scaling) = self.rope_scaling() {
            scaling
                .check(base.rope_theta, base.architecture.rotary_width)
                .map_err(|e| self.refuse(format!("megacontext.rope_scaling: {e}")))?;
        }
        let theta = self.config.megacontext.as_ref().and_then(|own| own.base_rope_theta);
        if let Some(theta) = theta.filter(|theta| *theta != base.rope_theta) {
            return Err(self.refuse(format!(
                "made for a base with rope_theta {theta}, got one with {}",
                base.rope_theta
            )));
        }
        let positions = self.config.megacontext.as_ref().map(|own| &own.positions);
        if let Some(positions) = positions.filter(|positions| **positions != base.positions) {
            return Err(self.refuse(format!(
                "made for the positions {}, got a base with {}; they are the key megacontext.positions of its config.json, \
                 or a session's setting",
                json!(positions),
                json!(base.positions)
            )));
        }
        let expected = self.expected(base)?;
        for (name, shape) in &expected {
            let Some(tensor) = self.tensors.get(name) else {
                return Err(self.refuse_tensors(format!("expected tensor {PREFIX}{name}, there is none")));
            };
            if tensor.dims() != shape {
                return Err(self.refuse_tensors(format!(
                    "tensor {PREFIX}{name}: expected shape {shape:?} for this base, got {:?}",
                    tensor.dims()
                )));
            }
        }
        if let Some(name) = self.tensors.keys().find(|name| !expected.contains_key(*name)) {
            return Err(self.refuse_tensors(format!(
                "got tensor {PREFIX}{name}, which adapter_config.json and this base do not account for"
            )));
        }
        self.check_second_copies(base)
    }

    /// Would head and embedding of a tied base differ with this adapter on it? Then the model is no longer tied, and the
    /// adapter is one for [`DecoderConfig::untied`].
    pub fn unties(&self, base: &DecoderConfig) -> Result<bool> {
        if !base.tie_word_embeddings {
            return Ok(false);
        }
        let [embedding, head] = [base.embedding_name(), base.untied_head_name()];
        let has_lora = |weight: &str| {
            let prefix = weight.replace(".weight", ".lora_");
            self.tensors.keys().any(|name| name.starts_with(&prefix))
        };
        if (has_lora(embedding) || has_lora(head))
            && !(self.config.lora.ensure_weight_tying && has_lora(embedding))
        {
            return Ok(true);
        }
        match (self.tensors.get(head), self.tensors.get(embedding)) {
            (None, None) => Ok(false),
            (Some(head), Some(embedding)) => Ok(!same_bits(head, embedding)?),
            // PEFT leaves the end that is not in the file at the base's values.
            _ => Ok(true),
        }
    }

    /// What a model of this configuration takes over: our names and f32 values. The second copy of a tied embedding is
    /// left out, and so are copies of the base.
    pub fn parameters<'a>(
        &'a self,
        base: &DecoderConfig,
    ) -> impl Iterator<Item = (&'a str, &'a Tensor)> + use<'a> {
        let head = base.tie_word_embeddings.then(|| format!("{}.", module_of(base.untied_head_name())));
        self.tensors
            .iter()
            .filter(move |(name, _)| {
                let second = head.as_ref().is_some_and(|head| name.starts_with(head));
                !second && base_copy(name).is_none()
            })
            .map(|(name, t)| (name.as_str(), t))
    }

    /// Puts the adapter's tensors into a model's parameters: LoRA factors added, trained base tensors replaced. Call
    /// [`Adapter::check_against`] before.
    ///
    /// # Errors
    /// When a copy of the base's embedding beside LoRA is not the base's; then nothing has been changed.
    pub fn load_into(&self, base: &DecoderConfig, params: &mut ParamStore) -> Result<()> {
        self.check_copies(base, |name| {
            Ok(match params.values(name)?.weight() {
                Weight::F32(values) => values.to_vec(),
                Weight::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            })
        })?;
        self.put_into(base, params)
    }

    /// Refuses copies of the base's weights, which PEFT saves beside LoRA on embeddings, that are not what `weight` gives by
    /// name; rounded to bf16 they may be, as bf16 is how some hold the base.
    pub fn check_copies(
        &self,
        base: &DecoderConfig,
        weight: impl Fn(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        for (name, copy) in &self.tensors {
            let Some(module) = base_copy(name) else { continue };
            let of = format!("{module}.weight");
            let of = if of == base.untied_head_name() { base.head_name() } else { &of };
            let copy = copy.flatten_all()?.to_vec1::<f32>()?;
            let values = weight(of)?;
            let same = |(v, c): (&f32, &f32)| v == c || *v == bf16::put(*c).to_f32();
            if values.len() != copy.len() || !values.iter().zip(&copy).all(same) {
                return Err(self.refuse_tensors(format!(
                    "expected {PREFIX}{name} to be the base's {of}, it differs: the adapter was made for another base"
                )));
            }
        }
        Ok(())
    }

    /// As [`Adapter::load_into`], of an adapter whose copies have been checked.
    pub fn put_into(&self, base: &DecoderConfig, params: &mut ParamStore) -> Result<()> {
        for (name, tensor) in self.parameters(base) {
            params.insert(name, base.group_of(name), tensor.clone())?;
        }
        if let Some(scales) = self.config.megacontext.as_ref().and_then(|own| own.sigma_scales.as_ref()) {
            params.insert_values(SIGMA, Group::Sigma, scales.clone(), &[scales.len()])?;
        }
        Ok(())
    }

    /// Name and shape of every tensor that the description asks for on this base.
    fn expected(&self, base: &DecoderConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        let modules = self.lora().resolve(base).map_err(|e| match e {
            BaseError::Lora { message } => self.refuse(format!("not for this base: {message}")),
            other => other,
        })?;
        let mut expected: BTreeMap<String, Vec<usize>> = modules.parameters().into_iter().collect();
        let (embedding, head) = (base.embedding_name(), base.untied_head_name());
        for module in &modules.modules {
            if module.tied {
                expected.insert(format!("{}.lora_A.weight", module_of(head)), vec![module.rank, module.out]);
                expected.insert(format!("{}.lora_B.weight", module_of(head)), vec![module.inp, module.rank]);
            }
            if module.kind != LoraKind::Linear {
                let copies =
                    [module.name.as_str(), module_of(head)].map(|name| format!("{name}.base_layer.weight"));
                for copy in copies.into_iter().filter(|copy| self.tensors.contains_key(copy)) {
                    expected.insert(copy, vec![base.vocab_size, base.hidden_size]);
                }
            }
        }
        let mut tensors = base.tensors();
        if base.tie_word_embeddings {
            tensors.push((head.to_string(), vec![base.vocab_size, base.hidden_size]));
        }
        for entry in &self.config.modules_to_save {
            let mut matched = false;
            for (name, shape) in &tensors {
                let module = name.strip_suffix(".bias").unwrap_or(module_of(name));
                if module.ends_with(entry.as_str()) {
                    if AdapterConfig::saved_module(base, name).is_none() {
                        return Err(self.refuse(format!(
                            "modules_to_save: expected embeddings, norms or {}, got \"{entry}\", which is {module}",
                            module_of(head)
                        )));
                    }
                    matched = true;
                    expected.insert(name.clone(), shape.clone());
                }
            }
            if !matched {
                return Err(self.refuse(format!("modules_to_save: \"{entry}\" is no module of this base")));
            }
        }
        // PEFT with ensure_weight_tying saves the head without listing it.
        if self.config.lora.ensure_weight_tying
            && base.tie_word_embeddings
            && expected.contains_key(embedding)
        {
            expected.insert(head.to_string(), vec![base.vocab_size, base.hidden_size]);
        }
        Ok(expected)
    }

    /// Refuses what would untie a tied model.
    fn check_second_copies(&self, base: &DecoderConfig) -> Result<()> {
        if !base.tie_word_embeddings {
            return Ok(());
        }
        let [embedding, head] = [base.embedding_name(), base.untied_head_name()];
        match (self.tensors.get(head), self.tensors.get(embedding)) {
            (None, None) => {}
            (Some(copy), Some(trained)) if same_bits(copy, trained)? => {}
            (Some(_), Some(_)) => {
                return Err(self.refuse_tensors(format!(
                    "expected {PREFIX}{head} to equal the trained embedding of this tied model, it differs; \
                     untie the base first"
                )));
            }
            _ => {
                return Err(self.refuse_tensors(format!(
                    "expected the trained embedding of a tied model twice, as {PREFIX}{embedding} and as {PREFIX}{head} \
                     (PEFT leaves the one that is missing at the base's values), there is one"
                )));
            }
        }
        for (which, other) in [("A", "B"), ("B", "A")] {
            let name = format!("{}.lora_{which}.weight", module_of(head));
            let Some(copy) = self.tensors.get(&name) else { continue };
            let factor = format!("{}.lora_embedding_{other}", module_of(embedding));
            let same = match self.tensors.get(&factor) {
                Some(factor) => same_bits(copy, &factor.t()?.contiguous()?)?,
                None => false,
            };
            if !same {
                return Err(self.refuse_tensors(format!(
                    "expected {PREFIX}{name} to be {PREFIX}{factor} turned round, since this model's head is tied to its \
                     embedding; untie the base first"
                )));
            }
        }
        Ok(())
    }

    fn refuse(&self, message: String) -> BaseError {
        BaseError::adapter(&self.dir, message)
    }

    fn refuse_tensors(&self, message: String) -> BaseError {
        BaseError::adapter(&self.dir.join(TENSOR_FILE), message)
    }
}

fn same_bits(one: &Tensor, other: &Tensor) -> Result<bool> {
    let bits = |t: &Tensor| -> Result<Vec<u32>> {
        Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    Ok(one.dims() == other.dims() && bits(one)? == bits(other)?)
}

/// The module whose weight this is PEFT's copy of.
fn base_copy(name: &str) -> Option<&str> {
    name.strip_suffix(".base_layer.weight")
}

fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

fn short(fingerprint: &str) -> String {
    fingerprint.chars().take(12).chain("…".chars()).collect()
}

fn as_adapter(path: &Path, error: BaseError) -> BaseError {
    match error {
        BaseError::Weights { tensor: Some(tensor), message, .. } => {
            BaseError::adapter(path, format!("tensor {tensor}: {message}"))
        }
        BaseError::Weights { tensor: None, message, .. } => BaseError::adapter(path, message),
        other => other,
    }
}
