//! The job `eval_gist`: what a stored GistNet costs a base model on given text, beside everything else that could stand for a
//! block.
//!
//! Measured like the validations of a run that trains one ([`gistnet_adapter::validate`]), on passages drawn from all of the text
//! by the seed; or, with `run`, on the test text of a finished run, with the run's settings: then the figures are those that it
//! ended with. Nothing is written.
//!
//! Units: nats, tokens. Errors: a run that is not finished, or whose text is no longer what it was; a network of another base
//! model, adapter or width, or for other blocks or places than asked for; text too short; a group too small for the horizon. An
//! evaluation that the host stops leaves nothing to go on with.

use std::path::{Path, PathBuf};

use gistnet_adapter::trainer::Setting;
use gistnet_adapter::validate::Validator;
use gistnet_adapter::{Expected, GistNet};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::DocumentShape;
use megacontext_base::device::DeviceChoice;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::data::documents::tokenize;
use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::{OnDevice, network_beside};
use crate::jobs::evaluation::hash_of;
use crate::jobs::extend::load_data;
use crate::jobs::gist_text::read_text;
use crate::jobs::train_gistnet::{NETWORK, measure_once};
use crate::jobs::{ModelDir, model_error, parse, to_value, with_threads};
use crate::run::folder::CONFIG;
use crate::run::summary::SUMMARY;
use crate::train::config::{Attention, GroupSize, pattern};
use crate::train::gistnet::{GistRunConfig, Passages, PlaceSettings};
use crate::train::plan::{Beside, check_forward};

/// What the job is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalGist {
    /// The folder of a finished run: its network on its test text, with its settings; only `threads` and `device` may stand beside it.
    pub run: Option<PathBuf>,
    /// The base model's folder.
    pub base: PathBuf,
    /// An adapter on it.
    pub adapter: Option<PathBuf>,
    /// The network's file, `gistnet.safetensors` of a run.
    pub network: PathBuf,
    /// Files, folders, globs, or `corpus:held-out`.
    pub data: Vec<String>,
    /// Tokens of a passage; none means the context that model and adapter were trained for.
    pub context: Option<usize>,
    /// H.
    pub horizon: usize,
    /// K, to be refused if the network has another.
    pub block: Option<usize>,
    /// Passages.
    pub passages: usize,
    /// Most blocks of a passage.
    pub blocks: usize,
    /// Measure shifted sparse attention of this group as well.
    pub sparse_group: Option<GroupSize>,
    /// Where entries stand, to be refused if the network was trained with others; none means what it was trained with.
    pub places: Option<PlaceSettings>,
    /// Measure a network that was trained beside another adapter.
    pub other_adapter: bool,
    /// Seed of which passages are measured.
    pub seed: u64,
    /// Precision class.
    pub dtype: Precision,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for EvalGist {
    fn default() -> Self {
        Self {
            run: None,
            base: PathBuf::new(),
            adapter: None,
            network: PathBuf::new(),
            data: Vec::new(),
            context: None,
            horizon: 32,
            block: None,
            passages: 32,
            blocks: 16,
            sparse_group: None,
            places: None,
            other_adapter: false,
            seed: 0,
            dtype: Precision::F32,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let job: EvalGist = parse(params)?;
    with_threads(job.threads, || match &job.run {
        None => evaluate(&job, &mut |model, context, least| drawn(&job, model, context, least, host), host),
        Some(run) => {
            let alone = EvalGist {
                run: job.run.clone(),
                threads: job.threads,
                device: job.device,
                ..EvalGist::default()
            };
            if job != alone {
                return Err(PluginError::usage(
                    "run: expected nothing but threads and device beside it, since a run has its own settings, got others",
                ));
            }
            of_run(run, job.threads, job.device, host)
        }
    })?
}

/// The network of a run on its test text.
fn of_run(run: &Path, threads: Option<usize>, device: DeviceChoice, host: &dyn HostApi) -> Result<Value> {
    let (config, summary) = (run.join(CONFIG), run.join(SUMMARY));
    let text = std::fs::read_to_string(&config).at(&config)?;
    let config: GistRunConfig =
        toml::from_str(&text).map_err(|e| PluginError::data(format!("{}: {e}", config.display())))?;
    let text = std::fs::read_to_string(&summary).at(&summary)?;
    let ended: Value =
        serde_json::from_str(&text).map_err(|e| PluginError::data(format!("{}: {e}", summary.display())))?;
    let (Some(horizon), Some(expected)) =
        (ended["test"]["validation"]["horizon"].as_u64(), ended["test_text"].as_str())
    else {
        return Err(PluginError::data(format!(
            "{}: expected the summary of a run of `mclora train gistnet` with a test text, got another",
            summary.display()
        )));
    };
    let sparse_group = match config.sparse()? {
        Some(Pattern::ShiftedSparse { group }) => Some(GroupSize::Tokens(group as u64)),
        _ => None,
    };
    let job = EvalGist {
        run: Some(run.to_path_buf()),
        base: config.base.clone(),
        adapter: config.adapter.clone(),
        network: run.join(NETWORK),
        data: config.data.clone(),
        context: config.context,
        horizon: horizon as usize,
        block: Some(config.network.block),
        passages: config.validation.test_passages,
        blocks: config.validation.blocks,
        sparse_group,
        places: Some(config.places),
        other_adapter: false,
        seed: config.seed,
        dtype: config.dtype,
        threads,
        device,
    };
    let test = |model: &ModelDir| {
        let test = read_text(&config, model, host)?.test;
        let got = hash_of(&test);
        if got != expected {
            return Err(PluginError::data(format!(
                "the test text of {} is not what it was: expected sha256 {expected:.12}…, got {got:.12}…; bring the text of \
                 --data back, or name text to measure on",
                run.display()
            )));
        }
        Ok(test)
    };
    evaluate(&job, &mut |model, _, _| test(model), host)
}

/// Passages of the job's text, of `context` tokens, or fewer but at least `least`.
fn drawn(
    job: &EvalGist,
    model: &ModelDir,
    context: usize,
    least: usize,
    host: &dyn HostApi,
) -> Result<Vec<Vec<u32>>> {
    let mut passages = Passages::default();
    passages.add(&tokenize(&load_data(&job.data, host)?, &model.encoder())?, 0, context, least);
    if passages.tokens.is_empty() {
        return Err(PluginError::data(format!(
            "data: expected a document of at least {least} tokens, for an entry, a block and a horizon, got none"
        )));
    }
    Ok(passages.drawn(job.passages, job.seed))
}

/// Text to measure on, given the model, and the tokens of a passage and the least of one.
type Text<'a> = &'a mut dyn FnMut(&ModelDir, usize, usize) -> Result<Vec<Vec<u32>>>;

fn evaluate(job: &EvalGist, text: Text, host: &dyn HostApi) -> Result<Value> {
    let usage = |message: String| Err(PluginError::usage(message));
    for (key, value) in [("horizon", job.horizon), ("passages", job.passages), ("blocks", job.blocks)] {
        if value == 0 {
            return usage(format!("{key}: expected at least 1, got 0"));
        }
    }
    let model = ModelDir::open(&job.base)?;
    let fingerprint = model.weights.fingerprint();
    let expected = Expected {
        block: job.block,
        width: Some(model.config.hidden_size),
        base_fingerprint: Some(&fingerprint),
        ..Expected::default()
    };
    let mut loaded = GistNet::load(&job.network, expected).map_err(model_error)?;
    let trained_with = loaded.identity.place_rule.map(PlaceSettings::from);
    if let Some((asked, trained)) = job.places.zip(trained_with).filter(|(a, b)| !a.same_as(*b)) {
        return usage(format!(
            "places: expected those that the network was trained with, {trained}, got {asked}; left out, they are"
        ));
    }
    let places = job.places.or(trained_with).unwrap_or_default();
    let on = OnDevice::open(job.device, host)?.running(&model.config, host)?;
    let (mut decoder, scaling, adapter) = model.decoder_with(job.adapter.as_deref(), job.dtype)?;
    on.take(&mut decoder)?;
    network_beside("GistNet", loaded.network.set_device(on.device()), host);
    let on_base = model.adapter_fingerprint(&decoder, &scaling, adapter.as_ref())?;
    if !job.other_adapter {
        loaded.identity.check_adapter(&on_base, "GistNet", &job.network).map_err(|error| {
            let error = model_error(error);
            let message =
                format!("{}; other_adapter (--other-adapter) measures it all the same", error.message);
            PluginError { message, ..error }
        })?;
    }
    let trained = adapter.as_ref().and_then(|adapter| adapter.config.megacontext.as_ref());
    let context = job.context.unwrap_or(trained.map_or(model.config.context(), |own| own.context_length));
    let block = loaded.network.config().block;
    let least = 2 * block + job.horizon;
    if context < least {
        return usage(format!(
            "context: expected at least {least} tokens, for an entry, a block of {block} and a horizon of {}, got {context}",
            job.horizon
        ));
    }
    let sparse = job.sparse_group.map(|group| pattern(Attention::S2, group, context)).transpose()?;
    if let Some(pattern) = sparse {
        gistnet_adapter::delta_nll::check_group(pattern, job.horizon)
            .map_err(|e| PluginError::usage(format!("sparse_group: {e}")))?;
    }
    let documents = text(&model, context, least)?;
    let network = loaded.network.config();
    let passage = DocumentShape { entries: context, precision: job.dtype, hidden: false };
    let beside = Beside {
        documents: (1 + u64::from(sparse.is_some())) * passage.bytes(decoder.config()),
        network: network.gpu_bytes(decoder.device(), network.entries_at_once(), false),
        ..Beside::default()
    };
    check_forward("the evaluation", decoder.config(), job.dtype, context, beside, decoder.device())?;

    let rule = places.rule(block);
    let setting = |pattern: Pattern| Setting { scaling: scaling.clone(), rule, pattern };
    let dense = setting(Pattern::Dense);
    let validator = Validator {
        decoder: &decoder,
        setting: &dense,
        sparse: sparse.map(setting),
        documents: &documents,
        horizon: job.horizon,
        most_blocks: job.blocks,
    };
    let found = measure_once(&validator, &loaded.network, &mut Buffers::default(), host)?;
    let found = found.ok_or_else(|| PluginError::cancelled("the host asked to stop; nothing was written"))?;
    to_value(json!({
        "validation": to_value(&found.validation)?,
        "baselines": to_value(&found.baselines)?,
        "recovered": found.validation.recovered,
        "table": to_value(&found.table)?,
        "blocks": to_value(&found.blocks)?,
        "run": job.run,
        "network": job.network,
        "gist_version": loaded.identity.gist_version,
        "base": job.base,
        "adapter": job.adapter,
        "base_fingerprint": fingerprint,
        "adapter_fingerprint": on_base,
        "places": places,
        "context": context,
        "block": block,
        "passages": documents.len(),
        "attention": "dense",
        "rope": scaling.to_string(),
        "dtype": job.dtype,
        "device": decoder.device().describe(),
        "seed": job.seed,
    }))
}
