//! Phases of a session: entering, leaving, steps, and the mean NLL of a batch.
//!
//! Source: the alternating optimisation of MegaContext, where a phase swaps what is frozen. Everything about a phase is
//! checked before anything is changed; what was there before is kept until the phase ends, so that the host can have it
//! back (`Answer`).
//!
//! Units: nats, tokens, steps counted over the session's life. Errors: `Usage` for settings out of range and for calls at
//! the wrong time, `Cancelled` when the host does not want the phase.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Forward;
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::random::mix;
use megacontext_base::rope::{RopeTables, ScalingChoice};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Before, Loaded, Phase, SIGMA_LEVELS, Session};
use crate::error::{PluginError, Result};
use crate::host::Answer;
use crate::jobs::{model_error, parse};
use crate::train::config::{
    Attention, GroupSize, LONGEST_CONTEXT, OptimizerConfig, Schedule, pattern, stretched,
};

/// What a phase is entered with.
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
    scaling: Option<ScalingChoice>,
    #[serde(default)]
    factor: Option<f64>,
    #[serde(default)]
    steps: Option<usize>,
    #[serde(default)]
    seed: u64,
}

impl Enter {
    /// Refuses what does not depend on the model.
    fn validate(&self) -> Result<()> {
        let usage = |message: String| Err(PluginError::usage(message));
        if self.groups.is_empty() {
            return usage("groups: expected at least one, got none".into());
        }
        let known = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora, Group::Sigma];
        if let Some(bad) = self.groups.iter().find(|g| !known.contains(g)) {
            return usage(format!("groups: the model has no parameters in \"{bad}\""));
        }
        self.optimizer.validate()?;
        if self.steps == Some(0) {
            return usage("steps: expected at least 1, got 0".into());
        }
        if self.optimizer.schedule == Schedule::Cosine && self.steps.is_none() {
            return usage(
                "steps: a cosine schedule needs the length of the phase, expected a number of steps, got none"
                    .into(),
            );
        }
        if let Some(bad) = self.context.filter(|c| !(2..=LONGEST_CONTEXT).contains(c)) {
            return usage(format!("context: expected 2 to {LONGEST_CONTEXT} tokens, got {bad}"));
        }
        if self.context.is_none() && (self.scaling.is_some() || self.factor.is_some()) {
            return usage(
                "scaling and factor: expected a context to stretch to beside them, got none".into(),
            );
        }
        Ok(())
    }
}

impl Session {
    /// Begins a phase: `{groups: ["lora", …], lora: {…}, optimizer: {…}, context: N, steps: N, seed: N}`. LoRA is
    /// attached fresh when it shall learn and the model carries none; `context` stretches the positions to that length, by
    /// `scaling` (a name or a table) and `factor` where they are given;
    /// `steps` is the length that a cosine schedule needs. The optimiser's settings are this phase's, its moments those
    /// that the parameters already had.
    ///
    /// # Errors
    /// `Usage`; `Cancelled` when the host answers anything but [`Answer::Continue`]. Nothing has changed then.
    pub fn enter_phase(&self, params: Value) -> Result<Value> {
        let mut enter: Enter = parse(params)?;
        enter.groups.sort_unstable();
        enter.groups.dedup();
        enter.validate()?;
        let _transition = self.transition("enter_phase")?;
        let learning = self.write()?.enter(&enter)?;
        let event = json!({ "groups": enter.groups, "parameters": learning });
        if self.host.phase_entered(&event) != Answer::Continue {
            let mut l = self.write()?;
            if let Some(phase) = l.phase.take() {
                l.restore(phase.before)?;
            }
            return Err(PluginError::cancelled("the host did not want this phase to begin"));
        }
        Ok(event)
    }

    /// Ends the phase: nothing learns any more. On [`Answer::RollBack`] parameters, LoRA, positions, optimiser state and
    /// the count of steps are as they were when it was entered; any other answer keeps what was learned.
    pub fn leave_phase(&self) -> Result<Value> {
        let _transition = self.transition("leave_phase")?;
        let mut l = self.write()?;
        l.bring_home()?;
        let phase = l.phase.take().ok_or_else(|| PluginError::usage("there is no phase to leave"))?;
        l.freeze();
        let mut event = json!({ "groups": phase.groups, "steps": l.steps.saturating_sub(phase.begun_at) });
        drop(l);
        let answer = self.host.phase_left(&event);
        if answer == Answer::RollBack {
            self.write()?.restore(phase.before)?;
        }
        event["rolled_back"] = json!(answer == Answer::RollBack);
        Ok(event)
    }

    /// One optimiser step: `{tokens: [[…], …], attention: "s2"|"dense", group: 0.25, lr: …}`; rows of one length. The last
    /// token of a row is a target only, and may be `u32::MAX`: then it is not scored. `mu`, `sigma` and `lod`, a value for
    /// every token of a row and the same for all rows, say where entries stand, as in a [`super::Context`]; where the group
    /// `sigma` learns, its scales get their gradient from entries with a `lod`.
    pub fn step(&self, params: Value) -> Result<Value> {
        let batch: Batch = parse(params)?;
        let sequences = batch.split()?;
        let mut l = self.overwrite("step")?;
        let l = &mut *l;
        let Some(phase) = &l.phase else {
            return Err(PluginError::usage("step: enter a phase first, so that something learns"));
        };
        sequences.check(l)?;
        let rope = batch.tables(l, sequences.length)?;
        let rows = Rows::default();
        let with = Forward {
            pattern: batch.pattern(sequences.length)?,
            rope: &rope,
            rows: &rows,
            dropout_seed: Some(mix(phase.seed ^ mix(l.steps))),
        };
        l.gradients.clear();
        let scale = 1.0 / sequences.scored as f64;
        let loss = l
            .decoder
            .accumulate_gradients(
                &sequences.tokens,
                batch.tokens.len(),
                &sequences.targets,
                &with,
                scale,
                true,
                &mut l.gradients,
            )
            .map_err(model_error)?;
        let at = l.steps.saturating_sub(phase.begun_at) as usize;
        // Only a cosine looks at the length, and it has one.
        let steps = phase.steps.unwrap_or(1);
        let lr = batch.lr.unwrap_or_else(|| phase.optimizer.lr_at(at, at.min(steps), steps));
        let optimizer =
            l.optimizer.as_mut().ok_or_else(|| PluginError::internal("a phase has no optimizer"))?;
        let grad_norm = optimizer.step(l.decoder.params(), &l.gradients, lr).map_err(model_error)?;
        l.steps += 1;
        *l.unsaved.get_mut() = true;
        Ok(json!({
            "step": l.steps,
            "loss": loss.sum * scale,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": sequences.scored,
        }))
    }

    /// Mean NLL of a batch, given as for [`Session::step`]; nothing learns.
    pub fn evaluate(&self, params: Value) -> Result<Value> {
        let batch: Batch = parse(params)?;
        let sequences = batch.split()?;
        let l = self.read()?;
        sequences.check(&l)?;
        let rope = batch.tables(&l, sequences.length)?;
        let rows = Rows::default();
        let pattern = batch.pattern(sequences.length)?;
        let with = Forward { pattern, rope: &rope, rows: &rows, dropout_seed: None };
        // What is not scored counts 0.
        let mut buffers = Buffers::default();
        let nll = l
            .decoder
            .score(&sequences.tokens, batch.tokens.len(), &sequences.targets, &with, &mut buffers)
            .map_err(model_error)?;
        let mean = nll.iter().map(|v| f64::from(*v)).sum::<f64>() / sequences.scored as f64;
        Ok(json!({ "nll": mean, "perplexity": mean.exp(), "tokens": sequences.scored }))
    }
}

impl Loaded {
    /// Checks a phase against the model, then begins it; returns how many values learn.
    fn enter(&mut self, enter: &Enter) -> Result<usize> {
        if let Some(phase) = &self.phase {
            return Err(PluginError::usage(format!(
                "a phase over {:?} is open; leave it first",
                phase.groups
            )));
        }
        self.refuse_merged("enter_phase")?;
        let lora_learns = enter.groups.contains(&Group::Lora);
        if enter.groups.contains(&Group::Base) && (lora_learns || self.decoder.lora().is_some()) {
            return Err(PluginError::usage(
                "groups: a base that carries LoRA has to stay frozen; name base only where there is no LoRA",
            ));
        }
        let config = self.decoder.config();
        let (scaling, context_length) = match enter.context {
            None => (self.scaling.clone(), self.context_length),
            Some(context) => (stretched(config, enter.scaling.as_ref(), enter.factor, context)?, context),
        };
        let fresh =
            (lora_learns && self.decoder.lora().is_none()).then(|| enter.lora.clone().unwrap_or_default());
        if let Some(lora) = &fresh {
            lora.validate(config).map_err(model_error)?;
        }
        if enter.groups.contains(&Group::Sigma) {
            // Scales of 1 change nothing.
            self.decoder.attach_sigma(SIGMA_LEVELS).map_err(model_error)?;
        }
        let mut before = Before {
            steps: self.steps,
            scaling: self.scaling.clone(),
            context_length: self.context_length,
            lora_attached: false,
            active: self.active.clone(),
            unsaved: self.unsaved.load(Ordering::Acquire),
            parameters: self.copies(&enter.groups)?,
            optimizer: self.optimizer.as_ref().map(Optimizer::copy).transpose().map_err(model_error)?,
        };

        if let Some(lora) = fresh {
            if let Err(error) = self.decoder.attach_lora(lora, enter.seed) {
                self.detach_lora()?;
                return Err(model_error(error));
            }
            before.lora_attached = true;
        }
        if self.active.is_none() && !enter.groups.contains(&Group::Base) {
            self.active = Some(self.free_name());
        }
        self.scaling = scaling;
        self.context_length = context_length;
        self.optimizer
            .get_or_insert_with(|| Optimizer::new(AdamWConfig::default()))
            .set_config(enter.optimizer.adamw());
        self.decoder.params_mut().set_learning(enter.groups.iter().copied()).map_err(model_error)?;
        let learning = self.decoder.params().trainable().map_err(model_error)?;
        self.changed.extend(learning.iter().map(|(name, _)| name.clone()));
        self.phase = Some(Phase {
            groups: enter.groups.clone(),
            optimizer: enter.optimizer.clone(),
            steps: enter.steps,
            seed: enter.seed,
            begun_at: self.steps,
            before,
        });
        Ok(learning.iter().map(|(_, t)| t.elem_count()).sum())
    }

    /// Copies of the parameters in these groups.
    fn copies(&self, groups: &[Group]) -> Result<Vec<(String, Tensor)>> {
        let params = self.decoder.params();
        params.bring_home().map_err(model_error)?;
        let names = params.names().filter(|name| params.group(name).is_some_and(|g| groups.contains(&g)));
        names
            .filter_map(|name| Some((name, params.get(name)?)))
            .map(|(name, tensor)| Ok((name.to_string(), tensor.copy()?)))
            .collect()
    }

    /// What was learned on a GPU and the optimiser's moments come here, where they take nothing from what runs there next.
    pub(super) fn bring_home(&mut self) -> Result<()> {
        self.decoder.params().bring_home().map_err(model_error)?;
        self.optimizer.as_mut().map_or(Ok(()), Optimizer::bring_home).map_err(model_error)
    }

    /// Nothing learns any more.
    fn freeze(&mut self) {
        self.decoder.params_mut().freeze();
        self.gradients = Gradients::staying();
    }

    fn detach_lora(&mut self) -> Result<()> {
        let fixed = |name: &str| name.ends_with(".pissa_A") || name.ends_with(".pissa_B");
        let params = self.decoder.params_mut();
        let of_lora = |name: &&str| params.group(name) == Some(Group::Lora) || fixed(name);
        let names: Vec<String> = params.names().filter(of_lora).map(str::to_string).collect();
        for name in &names {
            params.remove(name);
        }
        self.decoder.set_lora(None).map_err(model_error)
    }

    /// The session as it was before a phase.
    fn restore(&mut self, before: Before) -> Result<()> {
        self.freeze();
        if before.lora_attached {
            self.detach_lora()?;
        }
        for (name, value) in before.parameters {
            let group = self.model.config.group_of(&name);
            self.decoder.params_mut().insert(name, group, value).map_err(model_error)?;
        }
        self.active = before.active;
        self.unsaved = AtomicBool::new(before.unsaved);
        self.optimizer = before.optimizer;
        self.scaling = before.scaling;
        self.context_length = before.context_length;
        self.steps = before.steps;
        Ok(())
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
    /// Where the entries of every row stand, as in a working context; for tokens of which the last is a target only.
    #[serde(default)]
    mu: Option<Vec<f64>>,
    #[serde(default)]
    sigma: Option<Vec<f64>>,
    #[serde(default)]
    lod: Option<Vec<u32>>,
}

/// A batch as the decoder takes it.
struct Sequences {
    /// Inputs, row-major.
    tokens: Vec<u32>,
    /// The token after each, [`IGNORE`] where none is scored.
    targets: Vec<u32>,
    /// Inputs per row.
    length: usize,
    /// Targets that are scored, at least 1.
    scored: usize,
}

impl Sequences {
    fn check(&self, l: &Loaded) -> Result<()> {
        l.check_tokens(&self.tokens)?;
        l.check_targets(&self.targets)
    }
}

impl Batch {
    fn split(&self) -> Result<Sequences> {
        let length = self.tokens.first().map_or(0, Vec::len);
        if length < 2 || self.tokens.iter().any(|row| row.len() != length) {
            return Err(PluginError::usage("tokens: expected rows of one length, at least 2 tokens each"));
        }
        if let Some(bad) = self.lr.filter(|lr| !lr.is_finite() || *lr < 0.0) {
            return Err(PluginError::usage(format!("lr: expected 0 or more, got {bad}")));
        }
        let tokens = self.tokens.iter().flat_map(|row| &row[..length - 1]).copied().collect();
        let targets: Vec<u32> = self.tokens.iter().flat_map(|row| &row[1..]).copied().collect();
        let scored = targets.iter().filter(|t| **t != IGNORE).count();
        if scored == 0 {
            return Err(PluginError::usage("tokens: expected at least one target to score, got none"));
        }
        Ok(Sequences { tokens, targets, length: length - 1, scored })
    }

    /// Rotation tables of the inputs, `length` of each row.
    fn tables(&self, l: &Loaded, length: usize) -> Result<RopeTables> {
        fn inputs<'v, T>(what: &str, values: Option<&'v Vec<T>>, length: usize) -> Result<Option<&'v [T]>> {
            let Some(values) = values else { return Ok(None) };
            super::size(what, length + 1, values.len())?;
            Ok(Some(&values[..length]))
        }
        let (mu, sigma) =
            (inputs("mu", self.mu.as_ref(), length)?, inputs("sigma", self.sigma.as_ref(), length)?);
        l.tables(length, mu, sigma, inputs("lod", self.lod.as_ref(), length)?)
    }

    fn pattern(&self, context: usize) -> Result<Pattern> {
        let attention = self.attention.unwrap_or(Attention::Dense);
        let group = self.group.unwrap_or(GroupSize::Part(0.25));
        pattern(attention, group, context)
    }
}
