//! A session: one base model, perhaps with an adapter, held for a host.
//!
//! Reading calls (embeddings, tables, logits, NLL, deltas) run side by side; calls that learn exclude everything else.
//! A phase names the groups that learn; the host brings the batches, the session does the steps. Optimiser state stays
//! with its parameters when a phase ends. A session opened without a base only runs jobs.
//!
//! Shapes: T entries, E model width, V vocabulary, D head width, N positions. Units: nats, tokens.
//! Errors: sizes that do not fit, with what was expected; a call that needs a base or a phase there is none of.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{Device, Tensor};
use megacontext_base::adapter::{AdapterConfig, MegacontextKey, write_adapter};
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeScaling, RopeTables, frequencies, tables};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{PluginError, Result};
use crate::host::{Answer, HostApi};
use crate::jobs::{self, ModelDir, model_error, parse, to_value};
use crate::run::checkpoint;
use crate::run::folder::config_hash;
use crate::train::config::{Attention, GroupSize, OptimizerConfig, StageConfig};

/// What a session is opened with.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// Model folder; none for a session that only runs jobs.
    pub base: Option<PathBuf>,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
}

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
}

struct Phase {
    groups: Vec<Group>,
    optimizer: OptimizerConfig,
    begun_at: u64,
    /// What learns and its moments as they were when the phase began, for a roll-back.
    parameters: Vec<(String, Tensor)>,
    moments: Vec<(String, Tensor)>,
}

/// An open session.
pub struct Session {
    host: Arc<dyn HostApi>,
    loaded: Option<RwLock<Loaded>>,
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
            return Ok(Self { host, loaded: None });
        };
        let model = ModelDir::open(&dir)?;
        let (decoder, scaling, adapter) = model.decoder_with(config.adapter.as_deref())?;
        let own = adapter.as_ref().and_then(|a| a.config.megacontext.as_ref());
        let context_length = own.map_or(model.config.max_position_embeddings, |own| own.context_length);
        let loaded = Loaded {
            dir,
            model,
            decoder,
            scaling,
            context_length,
            phase: None,
            optimizer: None,
            gradients: Gradients::new(),
            steps: 0,
        };
        Ok(Self { host, loaded: Some(RwLock::new(loaded)) })
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

    /// Runs a whole job; it brings its own model and does not touch the session's.
    pub fn run(&self, kind: &str, params: Value) -> Result<Value> {
        jobs::run(kind, params, &*self.host)
    }

    /// Sizes and state.
    pub fn describe(&self) -> Result<Value> {
        let jobs = jobs::KINDS;
        if self.loaded.is_none() {
            return Ok(json!({ "base": null, "jobs": jobs }));
        }
        let l = self.read()?;
        let c = l.decoder.config();
        Ok(json!({
            "base": l.dir,
            "jobs": jobs,
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "head_dim": c.head_dim,
            "layers": c.num_hidden_layers,
            "heads": c.num_attention_heads,
            "kv_heads": c.num_key_value_heads,
            "original_context": c.original_context(),
            "context": l.context_length,
            "rope": l.scaling.to_string(),
            "lora": l.decoder.lora(),
            "fingerprint": l.model.weights.fingerprint(),
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

    /// Rotation tables of positions, [N, D/2] each.
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
        size("rope tables: cos", mu.len() * c.head_dim / 2, out_cos.len())?;
        size("rope tables: sin", mu.len() * c.head_dim / 2, out_sin.len())?;
        let (cos, sin) = tables(&frequencies(c.head_dim, c.rope_theta, &l.scaling), mu, sigma);
        out_cos.copy_from_slice(&cos);
        out_sin.copy_from_slice(&sin);
        Ok(())
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
        l.check_tokens(&targets)?;
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let nll = l.decoder.nll(&x, &targets, &with).map_err(model_error)?;
        for ((out, nll), target) in out.iter_mut().zip(nll).zip(&targets) {
            *out = if *target == IGNORE { f32::NAN } else { nll };
        }
        Ok(())
    }

    /// What LoRA adds to a module's weight, alpha/r·B·A, [out, in].
    pub fn lora_delta(&self, module: &str, out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        let lora =
            l.decoder.lora().ok_or_else(|| PluginError::usage("lora delta: the model carries no LoRA"))?;
        let modules = lora.modules(l.decoder.config());
        let Some((_, rows, columns)) = modules.iter().find(|(name, _, _)| name == module) else {
            let known: Vec<&str> = modules.iter().map(|(name, _, _)| name.as_str()).collect();
            return Err(PluginError::usage(format!(
                "lora delta: expected one of {known:?}, got \"{module}\""
            )));
        };
        size("lora delta: out", rows * columns, out.len())?;
        let params = l.decoder.params();
        let factor = |suffix: &str| {
            params
                .get(&format!("{module}.{suffix}.weight"))
                .ok_or_else(|| PluginError::internal(format!("{module} has no {suffix}")))
        };
        let delta = (factor("lora_B")?.matmul(&factor("lora_A")?)? * lora.scale())?;
        copy_out(&delta, out)
    }

    /// A copy of a parameter: shape and values.
    pub fn parameter(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let l = self.read()?;
        let tensor = l
            .decoder
            .params()
            .get(name)
            .ok_or_else(|| PluginError::usage(format!("parameter: there is none named \"{name}\"")))?;
        Ok((tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1()?))
    }

    /// Groups with their parameters.
    pub fn parameter_groups(&self) -> Result<Value> {
        let l = self.read()?;
        let params = l.decoder.params();
        let mut groups = serde_json::Map::new();
        for name in params.names() {
            let group = Group::of_name(name);
            let entry = groups
                .entry(group.name())
                .or_insert_with(|| json!({ "learns": params.learns(group), "parameters": [] }));
            let shape = params.get(name).map(|t| t.dims().to_vec());
            if let Some(list) = entry["parameters"].as_array_mut() {
                list.push(json!({ "name": name, "shape": shape }));
            }
        }
        Ok(Value::Object(groups))
    }

    /// Begins a phase: `{groups: ["lora", …], lora: {…}, optimizer: {…}, context: N, seed: N}`. LoRA is attached fresh
    /// when it shall learn and the model carries none; `context` stretches the positions to that length.
    pub fn enter_phase(&self, params: Value) -> Result<Value> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Enter {
            groups: Vec<Group>,
            #[serde(default)]
            lora: Option<LoraConfig>,
            #[serde(default)]
            optimizer: OptimizerConfig,
            #[serde(default)]
            context: Option<usize>,
            #[serde(default)]
            seed: u64,
        }
        let enter: Enter = parse(params)?;
        let mut l = self.write()?;
        if let Some(phase) = &l.phase {
            return Err(PluginError::usage(format!(
                "a phase over {:?} is open; leave it first",
                phase.groups
            )));
        }
        if enter.groups.is_empty() {
            return Err(PluginError::usage("groups: expected at least one, got none"));
        }
        let known = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora];
        if let Some(bad) = enter.groups.iter().find(|g| !known.contains(g)) {
            return Err(PluginError::usage(format!("groups: the model has no parameters in \"{bad}\"")));
        }
        enter.optimizer.validate()?;
        let lora_learns = enter.groups.contains(&Group::Lora);
        if lora_learns && enter.groups.contains(&Group::Base) {
            return Err(PluginError::usage(
                "groups: a base that carries LoRA has to stay frozen; name lora or base",
            ));
        }
        let original = l.decoder.config().original_context();
        if let Some(context) = enter.context {
            let factor = (context as f64 / original as f64).max(1.0);
            l.scaling = RopeScaling::from_factor(factor).map_err(PluginError::usage)?;
            l.context_length = context;
        }
        if lora_learns && l.decoder.lora().is_none() {
            l.decoder.attach_lora(enter.lora.unwrap_or_default(), enter.seed).map_err(model_error)?;
        }
        l.decoder.params_mut().set_learning(enter.groups.iter().copied());
        if l.optimizer.is_none() {
            l.optimizer = Some(Optimizer::new(enter.optimizer.adamw()));
        }
        let parameters = l.copies()?;
        let learning = parameters.iter().map(|(_, t)| t.elem_count()).sum::<usize>();
        let moments = match &l.optimizer {
            Some(optimizer) => optimizer.export().map_err(model_error)?,
            None => Vec::new(),
        };
        let (groups, optimizer, begun_at) = (enter.groups.clone(), enter.optimizer, l.steps);
        l.phase = Some(Phase { groups, optimizer, begun_at, parameters, moments });
        drop(l);
        let event = json!({ "groups": enter.groups, "parameters": learning });
        if self.host.phase_entered(&event) != Answer::Continue {
            let mut l = self.write()?;
            l.phase = None;
            l.decoder.params_mut().set_learning([]);
            return Err(PluginError::cancelled("the host did not want this phase to begin"));
        }
        Ok(event)
    }

    /// Ends the phase: nothing learns any more. The host may answer that the phase be rolled back: then parameters,
    /// optimiser state and the count of steps are as they were when it began.
    pub fn leave_phase(&self) -> Result<Value> {
        let mut l = self.write()?;
        let phase = l.phase.take().ok_or_else(|| PluginError::usage("there is no phase to leave"))?;
        l.decoder.params_mut().set_learning([]);
        l.gradients = Gradients::new();
        let mut event = json!({ "groups": phase.groups, "steps": l.steps - phase.begun_at });
        drop(l);
        let answer = self.host.phase_left(&event);
        if answer == Answer::RollBack {
            let mut l = self.write()?;
            let l = &mut *l;
            for (name, value) in &phase.parameters {
                l.decoder.params().set(name, value).map_err(model_error)?;
            }
            if let Some(optimizer) = &mut l.optimizer {
                let moments = phase.moments.into_iter().collect();
                optimizer.import(l.decoder.params(), &moments).map_err(model_error)?;
            }
            l.steps = phase.begun_at;
        }
        event["rolled_back"] = json!(answer == Answer::RollBack);
        Ok(event)
    }

    /// One optimiser step: `{tokens: [[…], …], attention: "s2"|"dense", group: 0.25, lr: …}`; rows of one length, the
    /// last token of a row is a target only.
    pub fn step(&self, params: Value) -> Result<Value> {
        let batch: Batch = parse(params)?;
        let (tokens, targets, length) = batch.split()?;
        let mut l = self.write()?;
        let l = &mut *l;
        l.check_tokens(&tokens)?;
        l.check_tokens(&targets)?;
        let Some(phase) = &l.phase else {
            return Err(PluginError::usage("step: enter a phase first, so that something learns"));
        };
        let c = l.decoder.config();
        let rope = RopeTables::sequence(c.head_dim, c.rope_theta, &l.scaling, length)?;
        let rows = Rows::default();
        let with = Forward {
            pattern: batch.pattern(length)?,
            rope: &rope,
            rows: &rows,
            dropout_seed: Some(l.steps),
        };
        l.gradients.clear();
        let count = targets.len();
        let loss = l
            .decoder
            .accumulate_gradients(
                &tokens,
                batch.tokens.len(),
                &targets,
                &with,
                1.0 / count as f64,
                true,
                &mut l.gradients,
            )
            .map_err(model_error)?;
        let stage_step = (l.steps - phase.begun_at) as usize;
        let lr = batch.lr.unwrap_or_else(|| phase.optimizer.lr_at(stage_step, stage_step, usize::MAX));
        let optimizer =
            l.optimizer.as_mut().ok_or_else(|| PluginError::internal("a phase has no optimizer"))?;
        let grad_norm = optimizer.step(l.decoder.params(), &l.gradients, lr).map_err(model_error)?;
        l.steps += 1;
        Ok(
            json!({ "step": l.steps, "loss": loss.sum / count as f64, "lr": lr, "grad_norm": grad_norm, "tokens": count }),
        )
    }

    /// Mean NLL of a batch, given as for [`Session::step`]; nothing learns.
    pub fn evaluate(&self, params: Value) -> Result<Value> {
        let batch: Batch = parse(params)?;
        let (tokens, targets, length) = batch.split()?;
        let l = self.read()?;
        l.check_tokens(&tokens)?;
        l.check_tokens(&targets)?;
        let c = l.decoder.config();
        let rope = RopeTables::sequence(c.head_dim, c.rope_theta, &l.scaling, length)?;
        let rows = Rows::default();
        let with = Forward { pattern: batch.pattern(length)?, rope: &rope, rows: &rows, dropout_seed: None };
        let x = l.decoder.embed(&tokens, batch.tokens.len()).map_err(model_error)?;
        let nll = l.decoder.nll(&x, &targets, &with).map_err(model_error)?;
        let mean = nll.iter().map(|v| f64::from(*v)).sum::<f64>() / nll.len() as f64;
        Ok(json!({ "nll": mean, "perplexity": mean.exp(), "tokens": nll.len() }))
    }

    /// Writes a checkpoint of what learns into `dir`.
    pub fn save(&self, dir: &Path) -> Result<Value> {
        let l = self.read()?;
        if l.phase.is_none() {
            return Err(PluginError::usage("save: enter a phase first; outside one nothing learns"));
        }
        let trained: Vec<(String, Tensor)> =
            l.decoder.params().trainable().into_iter().map(|(name, t)| (name, t.detach())).collect();
        let optim = match &l.optimizer {
            Some(optimizer) => optimizer.export().map_err(model_error)?,
            None => Vec::new(),
        };
        let state = json!({ "config_hash": l.identity()?, "steps": l.steps });
        let path = checkpoint::save(dir, l.steps, &state, &trained, &optim, 1)?;
        Ok(json!({ "path": path, "step": l.steps }))
    }

    /// Takes up the newest checkpoint in `dir`, made in a phase over the same groups.
    pub fn resume(&self, dir: &Path) -> Result<Value> {
        let mut l = self.write()?;
        let l = &mut *l;
        if l.phase.is_none() {
            return Err(PluginError::usage("resume: enter the phase first, with the groups that were saved"));
        }
        let mut warnings = Vec::new();
        let loaded =
            checkpoint::load_latest(dir, &l.identity()?, &mut |w| warnings.push(w))?.ok_or_else(|| {
                PluginError::data(format!("{}: expected a checkpoint, found none", dir.display()))
            })?;
        for (name, _) in l.decoder.params().trainable() {
            if !loaded.tensors.iter().any(|(n, _)| *n == name) {
                return Err(PluginError::data(format!(
                    "{}: parameter {name} is not in it",
                    loaded.path.display()
                )));
            }
        }
        if let Some(optimizer) = &mut l.optimizer {
            optimizer.import(l.decoder.params(), &loaded.optim.into_iter().collect()).map_err(model_error)?;
        }
        for (name, tensor) in &loaded.tensors {
            l.decoder.params().set(name, tensor).map_err(model_error)?;
        }
        l.steps = loaded.step;
        Ok(json!({ "path": loaded.path, "step": loaded.step, "warnings": warnings }))
    }

    /// Writes the adapter as it stands, in PEFT's format.
    pub fn export(&self, dir: &Path) -> Result<Value> {
        let l = self.read()?;
        let lora = l
            .decoder
            .lora()
            .ok_or_else(|| PluginError::usage("export: the model carries no LoRA to write"))?;
        let params = l.decoder.params();
        let base = &l.model.config;
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for name in params.names() {
            let Some(tensor) = params.get(name) else { continue };
            let group = Group::of_name(name);
            let keep = group == Group::Lora || (group != Group::Base && l.differs(name, &tensor)?);
            if keep {
                tensors.push((name.to_string(), tensor));
            }
        }
        // PEFT keeps all norms or none.
        if tensors.iter().any(|(n, _)| Group::of_name(n) == Group::Norms) {
            for name in params.names().filter(|n| Group::of_name(n) == Group::Norms) {
                if let Some(tensor) = params.get(name).filter(|_| !tensors.iter().any(|(n, _)| n == name)) {
                    tensors.push((name.to_string(), tensor));
                }
            }
        }
        let whole = tensors.iter().map(|(n, _)| n.as_str()).filter(|n| Group::of_name(n) != Group::Lora);
        let own = MegacontextKey {
            base_fingerprint: l.model.weights.fingerprint(),
            rope_scaling: l.scaling.clone(),
            base_rope_scaling: Some(base.rope_scaling.clone()),
            original_max_position_embeddings: base.original_context(),
            context_length: l.context_length,
        };
        let config = AdapterConfig::new(lora, base, whole, &l.dir, own).map_err(model_error)?;
        write_adapter(dir, &config, &tensors).map_err(model_error)?;
        to_value(json!({ "path": dir, "tensors": tensors.len() }))
    }
}

/// Sequences of one step.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    tokens: Vec<Vec<u32>>,
    #[serde(default)]
    attention: Option<Attention>,
    #[serde(default)]
    group: Option<GroupSize>,
    #[serde(default)]
    lr: Option<f64>,
}

impl Batch {
    /// Inputs, targets and their length per row.
    fn split(&self) -> Result<(Vec<u32>, Vec<u32>, usize)> {
        let length = self.tokens.first().map_or(0, Vec::len);
        if length < 2 || self.tokens.iter().any(|row| row.len() != length) {
            return Err(PluginError::usage("tokens: expected rows of one length, at least 2 tokens each"));
        }
        let tokens = self.tokens.iter().flat_map(|row| &row[..length - 1]).copied().collect();
        let targets = self.tokens.iter().flat_map(|row| &row[1..]).copied().collect();
        Ok((tokens, targets, length - 1))
    }

    fn pattern(&self, context: usize) -> Result<Pattern> {
        let attention = self.attention.unwrap_or(Attention::Dense);
        let group = self.group.unwrap_or(GroupSize::Part(0.25));
        let pattern = StageConfig { context, attention, group, factor: None, steps: 1 }.pattern();
        match pattern {
            Pattern::ShiftedSparse { group } if group < 2 => {
                Err(PluginError::usage(format!("group: expected at least 2 tokens, got {group}")))
            }
            _ => Ok(pattern),
        }
    }
}

impl Loaded {
    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.decoder.config().vocab_size;
        match tokens.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
            Some(bad) => Err(PluginError::usage(format!("token id: expected below {vocab}, got {bad}"))),
            None => Ok(()),
        }
    }

    /// Entries as a residual stream [1, T, E], and their rotation tables.
    fn entries(&self, context: &Context) -> Result<(Tensor, RopeTables)> {
        let c = self.decoder.config();
        let x = match context.entries {
            Entries::Tokens(tokens) => {
                if tokens.contains(&IGNORE) {
                    return Err(PluginError::usage(format!(
                        "token id: expected below {}, got {IGNORE}",
                        c.vocab_size
                    )));
                }
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
        let counted: Vec<f64>;
        let mu = match context.mu {
            Some(mu) => mu,
            None => {
                counted = (0..length).map(|p| p as f64).collect();
                &counted
            }
        };
        size("mu", length, mu.len())?;
        check_positions(mu, context.sigma)?;
        let rope = RopeTables::at(c.head_dim, c.rope_theta, &self.scaling, mu, context.sigma)?;
        Ok((x, rope))
    }

    /// Copies of what learns.
    fn copies(&self) -> Result<Vec<(String, Tensor)>> {
        let learning = self.decoder.params().trainable();
        Ok(learning
            .into_iter()
            .map(|(name, t)| Ok((name, t.copy()?.detach())))
            .collect::<candle_core::Result<_>>()?)
    }

    fn identity(&self) -> Result<String> {
        config_hash(&json!({
            "fingerprint": self.model.weights.fingerprint(),
            "lora": self.decoder.lora(),
            "groups": self.phase.as_ref().map(|p| &p.groups),
            "context": self.context_length,
        }))
    }

    /// Is a parameter no longer what the base folder holds?
    fn differs(&self, name: &str, now: &Tensor) -> Result<bool> {
        let base = self.model.weights.tensor_f32(name, now.dims()).map_err(model_error)?;
        Ok((now - base)?.abs()?.max_all()?.to_scalar::<f32>()? > 0.0)
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
