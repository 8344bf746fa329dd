//! The jobs a session runs as a whole, by name: JSON parameters in, JSON result out, events on the way.
//!
//! | kind | parameters | result |
//! |---|---|---|
//! | `extend` | [`crate::train::config::ExtendConfig`] | [`crate::run::summary::Summary`] |
//! | `train` | [`crate::train::cycle::CycleConfig`] | [`train::CycleSummary`] |
//! | `train_gistnet` | [`crate::train::gistnet::GistRunConfig`] | [`train_gistnet::GistSummary`] |
//! | `train_lensnet` | [`crate::train::lensnet::LensRunConfig`] | [`train_lensnet::LensSummary`] |
//! | `pretrain` | [`pretrain::PretrainConfig`] | losses of the model and of the n-gram baselines |
//! | `eval_ppl` | [`eval_ppl::EvalPpl`] | a list of perplexities |
//! | `eval_gap` | [`eval_gap::EvalGap`] | dense and sparse perplexity by length |
//! | `eval_gist` | [`eval_gist::EvalGist`] | what a GistNet costs, beside what else could stand for blocks |
//! | `eval_passkey` | [`eval_passkey::EvalPasskey`] | accuracy by length and depth |
//! | `generate` | [`generate::GenerateJob`] | continuations |
//! | `export` | [`export::Export`] | what was written for readers of LoRA alone |
//! | `merge` | [`merge::Merge`] | what was merged and where it is |
//! | `sweep` | [`sweep`] | [`sweep::SweepSummary`] |
//! | `logits` | [`logits::LogitsJob`] | where the logits are |
//! | `rope` | [`rope::RopeJob`] | the rotary bands of a model, before and after a scaling |
//! | `report` | folders of runs | [`report::Comparison`] |
//! | `bench` | [`mod@bench`] | one measurement |
//!
//! Errors: an unknown kind, naming the ones there are; a parameter that does not exist, by name.

use std::path::Path;

use megacontext_base::adapter::{Adapter, AdapterConfig, MegacontextKey, read_adapter, write_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, stored_narrow};
use megacontext_base::error::BaseError;
use megacontext_base::lora::LoraModules;
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeScaling, SIGMA};
use megacontext_base::tokenizer::Tokenizer;
use megacontext_base::weights::Weights;
use megacontext_kernels::precision::Precision;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Kind, PluginError, Result};
use crate::host::HostApi;

mod begin;
pub mod bench;
pub(crate) mod device;
pub mod eval_gap;
pub mod eval_gist;
pub mod eval_passkey;
pub mod eval_ppl;
mod evaluation;
pub mod export;
pub mod extend;
pub mod generate;
mod gist_text;
pub mod logits;
pub mod merge;
pub mod parameters;
pub mod pretrain;
pub mod report;
pub mod rope;
pub mod sweep;
pub mod train;
pub mod train_gistnet;
pub mod train_lensnet;

/// Names of all jobs.
pub const KINDS: [&str; 17] = [
    "extend",
    "train",
    "train_gistnet",
    "train_lensnet",
    "pretrain",
    "eval_ppl",
    "eval_gap",
    "eval_gist",
    "eval_passkey",
    "generate",
    "merge",
    "export",
    "sweep",
    "logits",
    "rope",
    "report",
    "bench",
];

/// Runs a job to its end.
///
/// # Errors
/// Those of the job; an unknown kind is [`Kind::Usage`].
pub fn run(kind: &str, params: Value, host: &dyn HostApi) -> Result<Value> {
    match kind {
        "extend" => extend::run(params, host),
        "train" => train::run(params, host),
        "train_gistnet" => train_gistnet::run(params, host),
        "train_lensnet" => train_lensnet::run(params, host),
        "pretrain" => pretrain::run(params, host),
        "eval_ppl" => eval_ppl::run(params, host),
        "eval_gap" => eval_gap::run(params, host),
        "eval_gist" => eval_gist::run(params, host),
        "eval_passkey" => eval_passkey::run(params, host),
        "generate" => generate::run(params, host),
        "merge" => merge::run(params, host),
        "export" => export::run(params, host),
        "sweep" => sweep::run(params, host),
        "logits" => logits::run(params, host),
        "rope" => rope::run(params, host),
        "report" => report::run(params, host),
        "bench" => bench::run(params, host),
        other => Err(PluginError::usage(format!("job: expected one of {KINDS:?}, got \"{other}\""))),
    }
}

/// Reads parameters; an error names the key.
pub(crate) fn parse<T: DeserializeOwned>(params: Value) -> Result<T> {
    serde_path_to_error::deserialize(params).map_err(|e| match e.path().to_string().as_str() {
        "." => PluginError::usage(format!("parameters: {}", e.inner())),
        key => {
            // An error that begins with the key's name says it once.
            let (inner, begin) = (e.inner().to_string(), format!("{key}: "));
            PluginError::usage(format!("{begin}{}", inner.strip_prefix(&begin).unwrap_or(&inner)))
        }
    })
}

/// Turns a result into JSON.
pub(crate) fn to_value(value: impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| PluginError::internal(format!("result: {e}")))
}

/// An error of the base crate, with the kind a host can act on.
pub fn model_error(error: BaseError) -> PluginError {
    let kind = match &error {
        BaseError::Config { .. } | BaseError::Weights { .. } | BaseError::Tokenizer { .. } => Kind::Model,
        BaseError::Adapter { .. } => Kind::Adapter,
        BaseError::Io { .. } => Kind::Io,
        BaseError::OutOfMemory { .. } => Kind::Memory,
        BaseError::Lora { .. }
        | BaseError::Tree { .. }
        | BaseError::WorkingContext { .. }
        | BaseError::Network { .. }
        | BaseError::Device { .. } => Kind::Usage,
        BaseError::TreeFile { .. } => Kind::Model,
        // A loss that is not a number comes from the model and its settings, not from a defect here.
        BaseError::NonFinite { .. } => Kind::Model,
        _ => Kind::Internal,
    };
    PluginError::new(kind, error.to_string())
}

/// A model folder, opened and checked but not yet in memory.
pub struct ModelDir {
    /// Sizes and settings.
    pub config: DecoderConfig,
    /// Memory-mapped weights.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl ModelDir {
    /// Opens a Hugging Face folder.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.as_os_str().is_empty() {
            return Err(PluginError::usage("base: expected a model folder, got none"));
        }
        let config = DecoderConfig::from_dir(dir).map_err(model_error)?;
        let weights = Weights::open(dir).map_err(model_error)?;
        weights.check(&config.tensors()).map_err(model_error)?;
        let tokenizer = Tokenizer::from_dir(dir).map_err(model_error)?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(PluginError::model(format!(
                "{}: expected a tokenizer of at most {} entries, the model's vocab_size, got {}",
                dir.display(),
                config.vocab_size,
                tokenizer.vocab_size()
            )));
        }
        Ok(Self { config, weights, tokenizer })
    }

    /// The decoder, in memory; `learning` are the groups that are going to learn.
    pub fn decoder(&self, precision: Precision, learning: &[Group]) -> Result<Decoder> {
        Decoder::from_weights(self.config.clone(), &self.weights, precision, learning).map_err(model_error)
    }

    /// The decoder with an adapter on it, and the scaling the adapter was trained with. It has a head of its own where the
    /// adapter unties it.
    pub fn decoder_with(
        &self,
        adapter: Option<&Path>,
        precision: Precision,
    ) -> Result<(Decoder, RopeScaling, Option<Adapter>)> {
        let mut decoder = self.decoder(precision, &[])?;
        let Some(dir) = adapter else { return Ok((decoder, self.config.rope_scaling.clone(), None)) };
        let adapter = read_adapter(dir).map_err(model_error)?;
        if adapter.unties(&self.config).map_err(model_error)? {
            decoder.untie().map_err(model_error)?;
        }
        let config = decoder.config().clone();
        adapter.check_against(&config, &self.weights.fingerprint()).map_err(model_error)?;
        adapter.load_into(&config, decoder.params_mut()).map_err(model_error)?;
        decoder.set_lora(Some(adapter.lora())).map_err(model_error)?;
        let scaling = adapter.rope_scaling().unwrap_or(&self.config.rope_scaling).clone();
        Ok((decoder, scaling, Some(adapter)))
    }

    /// The fingerprint of what [`ModelDir::decoder_with`] put on the model, for files of networks that learn beside it.
    pub(crate) fn adapter_fingerprint(
        &self,
        decoder: &Decoder,
        scaling: &RopeScaling,
        adapter: Option<&Adapter>,
    ) -> Result<String> {
        let replaced = adapter.iter().flat_map(|adapter| adapter.parameters(decoder.config()));
        let replaced = replaced.map(|(name, _)| name);
        decoder.adapter_fingerprint(&self.config, &self.weights, scaling, replaced).map_err(model_error)
    }

    /// What a model with an adapter on it will hold, for planning before anything of it is in memory.
    pub(crate) fn adapted(&self, adapter: Option<&Path>, precision: Precision) -> Result<Adapted> {
        let mut adapted = Adapted {
            config: self.config.clone(),
            lora: None,
            context: self.config.context(),
            beyond: 0,
            read: 0,
        };
        let Some(dir) = adapter else { return Ok(adapted) };
        let adapter = read_adapter(dir).map_err(model_error)?;
        if adapter.unties(&self.config).map_err(model_error)? {
            adapted.config = self.config.untied();
        }
        adapted.lora = Some(adapter.lora().resolve(&adapted.config).map_err(model_error)?);
        if let Some(own) = &adapter.config.megacontext {
            adapted.context = own.context_length;
        }
        let bytes = |tensor: &candle_core::Tensor| 4 * tensor.elem_count() as u64;
        adapted.read = adapter.tensors.values().map(bytes).sum();
        let widened = adapter.parameters(&adapted.config);
        let widened = widened.filter(|(name, _)| stored_narrow(adapted.config.group_of(name), precision));
        adapted.beyond = widened.map(|(_, tensor)| bytes(tensor) / 2).sum();
        Ok(adapted)
    }

    /// What the LoRA of an adapter comes to on this model, for planning before anything of it is in memory.
    pub(crate) fn lora_of(&self, adapter: Option<&Path>) -> Result<Option<LoraModules>> {
        let Some(dir) = adapter else { return Ok(None) };
        let adapter = read_adapter(dir).map_err(model_error)?;
        let mut config = self.config.clone();
        config.tie_word_embeddings &= !adapter.unties(&config).map_err(model_error)?;
        adapter.lora().resolve(&config).map(Some).map_err(model_error)
    }

    /// The context that the model was trained for, or the adapter on it.
    pub(crate) fn trained_context(&self, adapter: Option<&Path>) -> Result<usize> {
        let Some(dir) = adapter else { return Ok(self.config.context()) };
        let own = read_adapter(dir).map_err(model_error)?.config.megacontext;
        Ok(own.map_or(self.config.context(), |own| own.context_length))
    }

    /// A function that tokenises text.
    pub fn encoder(&self) -> impl Fn(&str) -> Result<Vec<u32>> + Sync + '_ {
        |text| self.tokenizer.encode(text).map_err(model_error)
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Result<u32> {
        self.tokenizer.eos_id().or(self.config.eos_token_id).ok_or_else(|| {
            PluginError::model(
                "expected an end-of-sequence token in config.json or tokenizer_config.json, got none",
            )
        })
    }
}

/// A model with an adapter on it, before it is in memory.
pub(crate) struct Adapted {
    /// The model's, with a head of its own where the adapter gives it one.
    pub config: DecoderConfig,
    /// What LoRA comes to.
    pub lora: Option<LoraModules>,
    /// Tokens that it was trained for.
    pub context: usize,
    /// Bytes that trained tensors take more than the base's in their place: they are f32 in every class.
    pub beyond: u64,
    /// Bytes of the adapter's tensors, which are there twice while they are read.
    pub read: u64,
}

/// Writes an adapter in PEFT's format: these tensors of a model with LoRA on it, whose positions are stretched by `scaling` for
/// `context` tokens. Returns how many tensors it has.
pub(crate) fn save_adapter(
    dir: &Path,
    model: &ModelDir,
    base: &Path,
    decoder: &Decoder,
    mut tensors: Vec<(String, candle_core::Tensor)>,
    scaling: &RopeScaling,
    context: usize,
) -> Result<usize> {
    // The model's own configuration: an adapter may have given it a head of its own.
    let (config, params) = (decoder.config(), decoder.params());
    params.bring_home().map_err(model_error)?;
    // The scales of sigma are a line of adapter_config.json.
    tensors.retain(|(name, _)| name != SIGMA);
    // PEFT keeps all norms or none.
    if tensors.iter().any(|(name, _)| config.group_of(name) == Group::Norms) {
        for name in params.names().filter(|name| config.group_of(name) == Group::Norms) {
            if let Some(tensor) = params.get(name).filter(|_| !tensors.iter().any(|(n, _)| n == name)) {
                tensors.push((name.to_string(), tensor));
            }
        }
    }
    let (lora, tensors) = decoder.saved_lora(tensors).map_err(model_error)?;
    let whole = tensors.iter().map(|(name, _)| name.as_str()).filter(|n| config.group_of(n) != Group::Lora);
    let own = MegacontextKey {
        base_fingerprint: model.weights.fingerprint(),
        rope_scaling: scaling.clone(),
        base_rope_scaling: Some(config.rope_scaling.clone()),
        base_rope_theta: Some(config.rope_theta),
        original_max_position_embeddings: config.original_context(),
        context_length: context,
        positions: config.positions.clone(),
        sigma_scales: decoder.sigma_scales().filter(|scales| scales.iter().any(|scale| *scale != 1.0)),
    };
    let config = AdapterConfig::new(&lora, config, whole, base, own).map_err(model_error)?;
    write_adapter(dir, &config, &tensors).map_err(model_error)?;
    Ok(tensors.len())
}

/// More threads than any machine has cores; asking for more is a slip of the pen.
const MOST_THREADS: usize = 1024;

/// Uses so many threads for everything the job does; none keeps the default.
pub(crate) fn with_threads<R: Send>(threads: Option<usize>, f: impl FnOnce() -> R + Send) -> Result<R> {
    match threads {
        None => Ok(f()),
        Some(threads) if !(1..=MOST_THREADS).contains(&threads) => {
            Err(PluginError::usage(format!("threads: expected 1 to {MOST_THREADS}, got {threads}")))
        }
        Some(threads) => {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .map_err(|e| PluginError::usage(format!("threads: {threads}: {e}")))?;
            Ok(pool.install(f))
        }
    }
}
