//! A session: one base model, perhaps with an adapter, held for a host.
//!
//! Reading calls (embeddings, tables, logits, NLL, deltas) run side by side; calls that learn exclude everything else.
//! A phase names the groups that learn; the host brings the batches, the session does the steps (module `phases`).
//! Optimiser state stays with its parameters when a phase ends. Checkpoints and the adapter are in the module `files`,
//! switching between adapters in `adapters`, a gist tree in `history`, LensNet over it in `lens`. A session opened without a base only runs jobs.
//!
//! In class `bf16` the base's matrices are stored in bf16; a group that a phase lets learn becomes f32 then, losing nothing,
//! and stays f32. A roll-back brings the bf16 values back.
//!
//! While the host is asked about a phase (`phase_entered`, `phase_left`) no lock is held: the callback may read. What
//! would change the session, or write it down half-changed, is refused until the callback has returned.
//!
//! Shapes: T entries, E model width, V vocabulary, D head width, N positions. Units: nats, tokens.
//! Errors: sizes that do not fit, with what was expected; a call that needs a base or a phase there is none of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{Device, Tensor};
use megacontext_base::decoder::{Decoder, Forward, stored_narrow};
use megacontext_base::device::{self, DeviceChoice};
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::params::{Group, Shared};
use megacontext_base::rope::{
    Entries as Placed, MOST_LEVELS, PositionOptions, RopeScaling, RopeTables, SIGMA,
};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
use crate::jobs::{self, ModelDir, model_error, parse};
use crate::learned;
use crate::run::folder::config_hash;
use crate::train::config::OptimizerConfig;

mod adapters;
mod files;
mod history;
mod lens;
mod phases;

/// What a session is opened with.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// Model folder; none for a session that only runs jobs.
    pub base: Option<PathBuf>,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
    /// Precision class.
    pub dtype: Precision,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
    /// What is not as in a plain model's positions, instead of what the base's `config.json` says.
    pub positions: Option<PositionOptions>,
}

/// Levels of sigma's scales in a session where nothing else says: tokens, gists, gists of gists, and one more.
const SIGMA_LEVELS: usize = 4;

/// The entries of a working context.
#[derive(Clone, Copy, Debug)]
pub enum Entries<'a> {
    /// Token ids, T of them.
    Tokens(&'a [u32]),
    /// Embeddings, row-major [T, E].
    Embeddings(&'a [f32]),
}

/// A working context.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// What the entries are.
    pub entries: Entries<'a>,
    /// Centre of each entry in tokens; none means 0, 1, 2, …
    pub mu: Option<&'a [f64]>,
    /// Spread of each entry in tokens; none means 0.
    pub sigma: Option<&'a [f64]>,
    /// Level of each entry; none means tokens. Given, it stands in for what else is not: entries follow one another without
    /// `mu`, and spreads are those of their spans without `sigma`, by the rule of the session's positions; spreads are
    /// multiplied by the learned scales of their levels.
    pub lod: Option<&'a [u32]>,
    /// The token after each entry, `u32::MAX` where none is scored.
    pub targets: Option<&'a [u32]>,
}

struct Loaded {
    dir: PathBuf,
    model: ModelDir,
    decoder: Decoder,
    scaling: RopeScaling,
    context_length: usize,
    phase: Option<Phase>,
    optimizer: Option<Optimizer>,
    gradients: Gradients,
    steps: u64,
    /// Parameters that may differ from the base folder: an adapter brought them, they learned or were resumed.
    changed: BTreeSet<String>,
    /// The adapter on the model, by name.
    active: Option<String>,
    /// It was trained, and not exported since.
    unsaved: AtomicBool,
    /// Adapters beside the model.
    adapters: BTreeMap<String, adapters::Resident>,
    /// Parameters in the host's hands.
    lent: Arc<AtomicUsize>,
}

/// A parameter in the host's hands; nobody writes parameters while one lives.
pub struct Lent {
    shared: Shared,
    count: Arc<AtomicUsize>,
}

impl Lent {
    /// Where it is, how it is stored, and its shape.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // What was read was read before whoever sees the count fall writes.
        self.count.fetch_sub(1, Ordering::Release);
    }
}

/// An open phase, and the session as it was before, for a roll-back.
struct Phase {
    groups: Vec<Group>,
    optimizer: OptimizerConfig,
    /// How long the phase is to be, for a schedule that has an end.
    steps: Option<usize>,
    seed: u64,
    /// The session's count of steps when the phase began; a resumed phase began where the saved one did.
    begun_at: u64,
    before: Before,
}

/// What a roll-back restores.
struct Before {
    steps: u64,
    scaling: RopeScaling,
    context_length: usize,
    /// The phase brought the LoRA factors with it.
    lora_attached: bool,
    /// The adapter in use, and whether it had been trained and not exported.
    active: Option<String>,
    unsaved: bool,
    /// Copies of what the phase changes, fresh LoRA factors apart.
    parameters: Vec<(String, Tensor)>,
    optimizer: Option<Optimizer>,
}

/// An open session.
pub struct Session {
    host: Arc<dyn HostApi>,
    /// What passes run on; the processor without a base.
    device: device::Device,
    loaded: Option<RwLock<Loaded>>,
    /// A phase is being entered or left.
    changing: AtomicBool,
    /// The gist tree, if there is one. Locked after `loaded` where both are.
    history: RwLock<Option<history::History>>,
}

/// While this lives, a phase is being entered or left.
struct Transition<'a>(&'a AtomicBool);

impl Drop for Transition<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn in_transition(call: &str) -> PluginError {
    PluginError::usage(format!(
        "{call}: a phase is being entered or left; expected no such call before the host has answered"
    ))
}

fn size(what: &str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(PluginError::usage(format!("{what}: expected {expected} values, got {got}")))
}

impl Session {
    /// Opens a session; a base named in `config` is read now.
    pub fn open(config: Value, host: Arc<dyn HostApi>) -> Result<Self> {
        let config: SessionConfig = parse(config)?;
        let Some(dir) = config.base else {
            if config.adapter.is_some() {
                return Err(PluginError::usage("session: an adapter needs a base, got none"));
            }
            if config.device != DeviceChoice::Auto {
                return Err(PluginError::usage(format!(
                    "session: a device needs a base, got {} without one; jobs name their own",
                    config.device
                )));
            }
            return Ok(Self::over(host, device::Device::Cpu, None));
        };
        let mut model = ModelDir::open(&dir)?;
        if let Some(positions) = config.positions {
            positions.check(model.config.architecture.rotary_width / 2).map_err(PluginError::usage)?;
            model.config.positions = positions;
        }
        let on = OnDevice::open(config.device, &*host)?.running(&model.config, &*host)?;
        let (mut decoder, scaling, adapter) = model.decoder_with(config.adapter.as_deref(), config.dtype)?;
        on.take(&mut decoder)?;
        let own = adapter.as_ref().and_then(|a| a.config.megacontext.as_ref());
        let context_length = own.map_or(model.config.context(), |own| own.context_length);
        let changed = adapter
            .iter()
            .flat_map(|a| a.parameters(decoder.config()))
            .map(|(name, _)| name.to_string())
            .collect();
        let loaded = Loaded {
            dir,
            model,
            decoder,
            scaling,
            context_length,
            phase: None,
            optimizer: None,
            gradients: Gradients::staying(),
            steps: 0,
            changed,
            active: adapter.is_some().then(|| adapters::DEFAULT.to_string()),
            unsaved: AtomicBool::new(false),
            adapters: BTreeMap::new(),
            lent: Arc::default(),
        };
        Ok(Self::over(host, on.device().clone(), Some(RwLock::new(loaded))))
    }

    fn over(host: Arc<dyn HostApi>, device: device::Device, loaded: Option<RwLock<Loaded>>) -> Self {
        Self { host, device, loaded, changing: AtomicBool::new(false), history: RwLock::new(None) }
    }

    /// What the model's passes run on, as long as the session lives; the processor without a base.
    pub fn device(&self) -> &device::Device {
        &self.device
    }

    fn lock(&self) -> Result<&RwLock<Loaded>> {
        self.loaded.as_ref().ok_or_else(|| {
            PluginError::usage("this session was opened without a base; name one in its config")
        })
    }

    fn read(&self) -> Result<RwLockReadGuard<'_, Loaded>> {
        Ok(self.lock()?.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self) -> Result<RwLockWriteGuard<'_, Loaded>> {
        Ok(self.lock()?.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// [`Session::write`] for `call`, which has to wait until no phase is being entered or left.
    fn change(&self, call: &str) -> Result<RwLockWriteGuard<'_, Loaded>> {
        let guard = self.write()?;
        // Looked at under the lock: a transition that begins now waits for this call.
        if self.changing.load(Ordering::Acquire) { Err(in_transition(call)) } else { Ok(guard) }
    }

    /// [`Session::change`] for `call`, which may write parameters in place: not while the host reads one.
    fn overwrite(&self, call: &str) -> Result<RwLockWriteGuard<'_, Loaded>> {
        let guard = self.change(call)?;
        match guard.lent.load(Ordering::Acquire) {
            0 => Ok(guard),
            lent => Err(PluginError::usage(format!(
                "{call}: expected no shared parameter in the host's hands, got {lent} of shared_parameter that are still held; drop \
                 them first"
            ))),
        }
    }

    /// [`Session::read`] for `call`, which must not see a phase that is being entered or left.
    fn look(&self, call: &str) -> Result<RwLockReadGuard<'_, Loaded>> {
        let guard = self.read()?;
        if self.changing.load(Ordering::Acquire) { Err(in_transition(call)) } else { Ok(guard) }
    }

    /// Begins to enter or to leave a phase.
    fn transition(&self, call: &str) -> Result<Transition<'_>> {
        self.lock()?;
        if self.changing.swap(true, Ordering::AcqRel) {
            return Err(in_transition(call));
        }
        Ok(Transition(&self.changing))
    }

    /// Runs a whole job; it brings its own model and does not touch the session's.
    pub fn run(&self, kind: &str, params: Value) -> Result<Value> {
        jobs::run(kind, params, &*self.host)
    }

    /// Sizes and state; without a base the jobs and the devices that there are.
    pub fn describe(&self) -> Result<Value> {
        let jobs = jobs::KINDS;
        if self.loaded.is_none() {
            let mut answer = jobs::device::listed();
            answer["base"] = Value::Null;
            answer["jobs"] = json!(jobs);
            return Ok(answer);
        }
        let l = self.read()?;
        let c = l.decoder.config();
        Ok(json!({
            "base": l.dir,
            "jobs": jobs,
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "head_dim": c.head_dim,
            "rotary_width": c.architecture.rotary_width,
            "layers": c.num_hidden_layers,
            "heads": c.num_attention_heads,
            "kv_heads": c.num_key_value_heads,
            "original_context": c.original_context(),
            "context": l.context_length,
            "rope": l.scaling.to_string(),
            "positions": c.positions,
            "sigma_scales": l.decoder.sigma_scales(),
            "lora": l.decoder.lora(),
            "merged": l.decoder.is_merged(),
            "adapter": l.active,
            "adapters": l.adapters_json()["adapters"],
            "fingerprint": l.model.weights.fingerprint(),
            "dtype": l.decoder.precision(),
            "device": l.decoder.device().describe(),
            "phase": l.phase.as_ref().map(|p| p.groups.clone()),
            "steps": l.steps,
        }))
    }

    /// Embeddings of tokens into `out`, [T, E].
    pub fn embed(&self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        size("embed: out", tokens.len() * l.decoder.config().hidden_size, out.len())?;
        l.check_tokens(tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        copy_out(&l.decoder.embed(tokens, 1).map_err(model_error)?, out)
    }

    /// Rotation tables of positions, [N, W/2] each, W the rotated width of a head; as those of tokens (level 0).
    pub fn rope_tables(
        &self,
        mu: &[f64],
        sigma: Option<&[f64]>,
        out_cos: &mut [f32],
        out_sin: &mut [f32],
    ) -> Result<()> {
        let l = self.read()?;
        let c = l.decoder.config();
        check_positions(mu, sigma)?;
        let half = c.architecture.rotary_width / 2;
        size("rope tables: cos", mu.len() * half, out_cos.len())?;
        size("rope tables: sin", mu.len() * half, out_sin.len())?;
        let placed = Placed { mu, sigma, ..Placed::default() };
        let (cos, sin) = c.rope(&l.scaling).values(&placed).map_err(model_error)?;
        out_cos.copy_from_slice(&cos);
        out_sin.copy_from_slice(&sin);
        Ok(())
    }

    /// The rotation tables that a working context is computed with, [T, W/2] each: its places, its levels, the learned scales
    /// of their spreads. Blocks that turn by a base of their own (Gemma 3's) have others.
    pub fn context_tables(&self, context: Context, out_cos: &mut [f32], out_sin: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        let length = match context.entries {
            Entries::Tokens(tokens) => tokens.len(),
            Entries::Embeddings(values) => values.len() / l.decoder.config().hidden_size,
        };
        let tables = l.tables(length, context.mu, context.sigma, context.lod)?;
        let (_, half) = tables.cos_nd.dims2()?;
        size("context tables: cos", length * half, out_cos.len())?;
        size("context tables: sin", length * half, out_sin.len())?;
        copy_out(&tables.cos_nd, out_cos)?;
        copy_out(&tables.sin_nd, out_sin)
    }

    /// Logits of every entry, [T, V], dense attention.
    pub fn logits(&self, context: Context, out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        let (x, rope) = l.entries(&context)?;
        size("logits: out", x.dims()[1] * l.decoder.config().vocab_size, out.len())?;
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        copy_out(&l.decoder.logits(&x, &with).map_err(model_error)?, out)
    }

    /// NLL of every entry's target in nats, T values, NaN where nothing is scored.
    pub fn nll(&self, context: Context, out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        let (x, rope) = l.entries(&context)?;
        let length = x.dims()[1];
        size("nll: out", length, out.len())?;
        let targets: Vec<u32> = match (context.targets, context.entries) {
            (Some(targets), _) => {
                size("nll: targets", length, targets.len())?;
                targets.to_vec()
            }
            (None, Entries::Tokens(tokens)) => tokens[1..].iter().copied().chain([IGNORE]).collect(),
            (None, Entries::Embeddings(_)) => {
                return Err(PluginError::usage("nll: embeddings need targets, got none"));
            }
        };
        l.check_targets(&targets)?;
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let nll = l.decoder.nll(&x, &targets, &with).map_err(model_error)?;
        for ((out, nll), target) in out.iter_mut().zip(nll).zip(&targets) {
            *out = if *target == IGNORE { f32::NAN } else { nll };
        }
        Ok(())
    }

    /// What LoRA adds to a module's weight, [out, in], or [V, D] of an embedding: s·B·A, and all that DoRA or PiSSA change.
    pub fn lora_delta(&self, module: &str, out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        l.refuse_merged("lora delta")?;
        learned::lora_delta(&l.decoder, module, out)
    }

    /// A copy of a parameter: shape and values, in f32 however they are stored.
    pub fn parameter(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let l = self.read()?;
        let params = l.decoder.params();
        let shape = params
            .shape(name)
            .ok_or_else(|| PluginError::usage(format!("parameter: there is none named \"{name}\"")))?;
        Ok((shape.to_vec(), params.values(name).map_err(model_error)?.to_f32()))
    }

    /// A parameter where it lies, without a copy. Until it is dropped, calls that write parameters are refused.
    pub fn shared_parameter(&self, name: &str) -> Result<Lent> {
        let l = self.read()?;
        let params = l.decoder.params();
        if !params.contains(name) {
            return Err(PluginError::usage(format!("shared_parameter: there is none named \"{name}\"")));
        }
        // SAFETY: parameters are written under the write lock alone, by calls that look at the count first (`Session::overwrite`), which
        // rises here under the read lock; newer values of a GPU are brought by `share` itself, and there are none again before a
        // step. A phase that is undone puts other values in place and leaves these as they are.
        let shared = unsafe { params.share(name) }.map_err(model_error)?;
        l.lent.fetch_add(1, Ordering::Relaxed);
        Ok(Lent { shared, count: l.lent.clone() })
    }

    /// Groups with their parameters: name, shape, and how values are stored now.
    pub fn parameter_groups(&self) -> Result<Value> {
        let l = self.read()?;
        let params = l.decoder.params();
        learned::groups(params, |group| params.learns(group), str::to_string)
    }
}

impl Loaded {
    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.decoder.config().vocab_size;
        match tokens.iter().find(|t| **t as usize >= vocab) {
            Some(bad) => Err(PluginError::usage(format!("token id: expected below {vocab}, got {bad}"))),
            None => Ok(()),
        }
    }

    fn check_targets(&self, targets: &[u32]) -> Result<()> {
        let vocab = self.decoder.config().vocab_size;
        match targets.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
            Some(bad) => Err(PluginError::usage(format!(
                "target: expected a token id below {vocab}, or {IGNORE} for none, got {bad}"
            ))),
            None => Ok(()),
        }
    }

    /// Entries as a residual stream [1, T, E], and their rotation tables.
    fn entries(&self, context: &Context) -> Result<(Tensor, RopeTables)> {
        let c = self.decoder.config();
        let x = match context.entries {
            Entries::Tokens(tokens) => {
                self.check_tokens(tokens)?;
                if tokens.is_empty() {
                    return Err(PluginError::usage("entries: expected at least 1, got 0"));
                }
                self.decoder.embed(tokens, 1).map_err(model_error)?
            }
            Entries::Embeddings(values) => {
                let length = values.len() / c.hidden_size;
                if length == 0 || length * c.hidden_size != values.len() {
                    return Err(PluginError::usage(format!(
                        "entries: expected rows of {} values, at least one, got {} values",
                        c.hidden_size,
                        values.len()
                    )));
                }
                Tensor::from_slice(values, (1, length, c.hidden_size), &Device::Cpu)?
            }
        };
        let length = x.dims()[1];
        let rope = self.tables(length, context.mu, context.sigma, context.lod)?;
        Ok((x, rope))
    }

    /// Rotation tables of `length` entries; what is not given follows from the levels, or is 0, 1, 2, … and certain.
    fn tables(
        &self,
        length: usize,
        mu: Option<&[f64]>,
        sigma: Option<&[f64]>,
        lod: Option<&[u32]>,
    ) -> Result<RopeTables> {
        let c = self.decoder.config();
        let rope = c.rope(&self.scaling);
        let rule = &c.positions.sigma;
        for (what, got) in
            [("mu", mu.map(<[f64]>::len)), ("sigma", sigma.map(<[f64]>::len)), ("lod", lod.map(<[u32]>::len))]
        {
            if let Some(got) = got {
                size(what, length, got)?;
            }
        }
        if mu.is_none() && sigma.is_none() && lod.is_none() {
            return Ok(rope.sequence(length)?);
        }
        let scales = self.decoder.sigma_scales().filter(|_| lod.is_some());
        if let Some(lod) = lod {
            let levels = scales.as_ref().map_or(MOST_LEVELS, Vec::len);
            if let Some(bad) = lod.iter().find(|l| **l as usize >= levels) {
                return Err(PluginError::usage(format!("lod: expected a level below {levels}, got {bad}")));
            }
        }
        let tiled = lod.map(|lod| rule.tile(lod).0);
        let counted = || (0..length).map(|p| p as f64).collect();
        let mu = mu.map_or_else(|| tiled.unwrap_or_else(counted), <[f64]>::to_vec);
        let of_spans = lod.map(|lod| lod.iter().map(|l| rule.sigma(*l)).collect::<Vec<f64>>());
        let sigma = sigma.or(of_spans.as_deref());
        check_positions(&mu, sigma)?;
        let placed = Placed { mu: &mu, sigma, lod, scales: scales.as_deref(), length: None };
        rope.place(&placed).map_err(model_error)
    }

    /// What two sessions must share so that one can take up the other's checkpoint.
    fn identity(&self) -> Result<String> {
        config_hash(&json!({
            "fingerprint": self.model.weights.fingerprint(),
            "lora": self.decoder.lora(),
            "dtype": self.decoder.precision(),
            "context": self.context_length,
            "rope": self.scaling.to_json(),
            "adapter": self.active.as_ref().filter(|name| *name != adapters::DEFAULT),
        }))
    }

    /// Is a parameter no longer what the base folder holds, to the bit? LoRA's factors always are something else.
    fn differs(&self, name: &str) -> Result<bool> {
        match self.model.config.group_of(name) {
            Group::Lora => return Ok(true),
            // No tensor of the folder.
            Group::Sigma => return Ok(self.decoder.sigma_scales() != Some(self.base_values(name)?)),
            _ => {}
        }
        if !self.changed.contains(name) {
            return Ok(false);
        }
        let now = self.decoder.params().values(name).map_err(model_error)?;
        let base = self.base_values(name)?;
        Ok(match now.weight() {
            Weight::F32(now) => now.iter().zip(&base).any(|(a, b)| a.to_bits() != b.to_bits()),
            Weight::Bf16(now) => now.iter().zip(&base).any(|(a, b)| a.get().to_bits() != b.to_bits()),
        })
    }

    /// The fingerprint of what is on the base now.
    fn adapter_fingerprint(&self) -> Result<String> {
        let model = &self.model;
        let replaced = self.changed.iter().map(String::as_str);
        self.decoder
            .adapter_fingerprint(&model.config, &model.weights, &self.scaling, replaced)
            .map_err(model_error)
    }

    /// A parameter as this session reads it from the base folder.
    fn base_values(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.decoder.params().shape(name).unwrap_or(&[]);
        if name == SIGMA {
            let neutral = vec![1.0; shape.iter().product()];
            return Ok(self.model.config.sigma_scales().unwrap_or(neutral));
        }
        let weights = &self.model.weights;
        // The head that an adapter gave to a tied model was the embedding.
        let tied = self.model.config.tie_word_embeddings && name == self.model.config.untied_head_name();
        let name = if tied { self.model.config.embedding_name() } else { name };
        if stored_narrow(self.model.config.group_of(name), self.decoder.precision()) {
            let values = weights.values::<bf16>(name, shape).map_err(model_error)?;
            return Ok(values.into_iter().map(Store::get).collect());
        }
        weights.values(name, shape).map_err(model_error)
    }
}

fn check_positions(mu: &[f64], sigma: Option<&[f64]>) -> Result<()> {
    if let Some(bad) = mu.iter().find(|p| !p.is_finite()) {
        return Err(PluginError::usage(format!("mu: expected finite positions, got {bad}")));
    }
    if let Some(sigma) = sigma {
        size("sigma", mu.len(), sigma.len())?;
        if let Some(bad) = sigma.iter().find(|s| !s.is_finite() || **s < 0.0) {
            return Err(PluginError::usage(format!(
                "sigma: expected finite spreads of at least 0, got {bad}"
            )));
        }
    }
    Ok(())
}

fn copy_out(tensor: &Tensor, out: &mut [f32]) -> Result<()> {
    let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    size("out", values.len(), out.len())?;
    out.copy_from_slice(&values);
    Ok(())
}
