//! The job `extend`: a model's context grows, stage by stage, and the adapter that does it is written.
//!
//! Order: everything is read, checked and planned; then the run folder is made; the base model is measured as it came
//! and with its positions interpolated; the stages train; the adapted model is measured dense and sparse; adapter,
//! summary and report are written. A checkpoint holds what was measured so far, so that a resumed run repeats nothing.
//!
//! Units: tokens, seconds, bytes. Errors: before the run folder exists, anything about settings, model, data, memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use megacontext_base::decoder::Decoder;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeScaling;
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::corpus;
use crate::data::documents::{Document, load, tokenize};
use crate::data::packing::{TokenStream, split_holdout};
use crate::error::{PluginError, Result};
use crate::host::{Answer, HostApi};
use crate::jobs::begin::{Begun, Resumable, begin};
use crate::jobs::device::OnDevice;
use crate::jobs::evaluation::Inputs;
use crate::jobs::{ModelDir, model_error, parse, save_adapter, to_value, with_threads};
use crate::report::{self, RunReport};
use crate::run::Telemetry;
use crate::run::folder::{RunFolder, config_toml, expect_run};
use crate::run::metrics::{EvaluationRecord, Record, StageRecord, TrainRecord, wall_time};
use crate::run::summary::{
    BaseSummary, ByContext, DataSummary, DocumentLoss, GroupSummary, Perplexity, SUMMARY, StageSummary,
    Summary,
};
use crate::train::config::{ExtendConfig, StageConfig};
use crate::train::device_plan::DeviceMemory;
use crate::train::eval::{Protocol, perplexity_by_document, select};
use crate::train::plan::{self, Plan, peak_bytes, since};
use crate::train::trainer::Trainer;

/// Stands for text found on this machine that the embedded model never saw.
pub const HELD_OUT_CORPUS: &str = "corpus:held-out";
/// In front of the name of a split of the host's own documents.
pub const HOST_SPLIT: &str = "host:";
/// Documents asked of the host at a time.
const HOST_PAGE: u64 = 256;
/// Bytes of held-out text below which the project's own files are added.
const ENOUGH_TEXT: usize = 2_000_000;
/// Steps averaged for a stage's first and last loss.
const EDGE_STEPS: usize = 5;

/// The job's parameters: the settings, and whether to take an interrupted run up again.
#[derive(Clone, Debug, Deserialize)]
struct Params {
    #[serde(default)]
    resume: bool,
    #[serde(flatten)]
    config: serde_json::Map<String, Value>,
}

/// What a checkpoint knows besides tensors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    config_hash: String,
    seed: u64,
    stage: usize,
    metric_lines: u64,
    seconds: f64,
    tokens: u64,
    perplexity: Perplexity,
    evaluated: BTreeMap<usize, u64>,
    stage_seconds: Vec<f64>,
    seconds_by_part: BTreeMap<String, f64>,
    inputs: Inputs,
}

impl Resumable for State {
    fn config_hash(&self) -> &str {
        &self.config_hash
    }

    fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    fn metric_lines(&self) -> u64 {
        self.metric_lines
    }
}

/// Documents of `data`, the held-out corpus of this machine among them where it is asked for.
pub fn load_data(data: &[String], host: &dyn HostApi) -> Result<Vec<Document>> {
    if data.is_empty() {
        return Err(PluginError::usage("data: expected at least one file, folder or glob, got none"));
    }
    let (corpus, paths): (Vec<String>, Vec<String>) =
        data.iter().cloned().partition(|d| d == HELD_OUT_CORPUS);
    let (splits, paths): (Vec<String>, Vec<String>) =
        paths.into_iter().partition(|d| d.starts_with(HOST_SPLIT));
    let mut documents = if paths.is_empty() { Vec::new() } else { load(&paths)? };
    for split in &splits {
        documents.extend(host_documents(&split[HOST_SPLIT.len()..], host)?);
    }
    if !corpus.is_empty() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().filter(|p| p.is_dir());
        documents
            .extend(corpus::quickstart_documents(ENOUGH_TEXT, &corpus::Roots::find(), workspace).documents);
    }
    Ok(documents)
}

/// All documents of a host's split.
fn host_documents(split: &str, host: &dyn HostApi) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    loop {
        if host.cancelled() {
            return Err(PluginError::cancelled("the host asked to stop while its documents were read"));
        }
        let start = documents.len() as u64;
        let page = host.documents(split, start, HOST_PAGE)?;
        let last = (page.len() as u64) < HOST_PAGE;
        let numbered = page.into_iter().zip(start..);
        documents.extend(numbered.map(|(text, n)| Document::new(format!("{HOST_SPLIT}{split}/{n}"), text)));
        if last {
            break;
        }
    }
    if documents.is_empty() {
        return Err(PluginError::data(format!("data: the host has no documents in its split \"{split}\"")));
    }
    Ok(documents)
}

/// The stage's attention and group size, as they stand in files.
fn attention_of(stage: &StageConfig) -> (String, Option<usize>) {
    match stage.pattern() {
        Pattern::ShiftedSparse { group } => ("s2".to_string(), Some(group)),
        _ => ("dense".to_string(), None),
    }
}

/// Text ready for a run.
struct Text {
    stream: Vec<u32>,
    held_out: Vec<Vec<u32>>,
    summary: DataSummary,
    warning: Option<String>,
}

fn read_text(config: &ExtendConfig, model: &ModelDir, host: &dyn HostApi) -> Result<Text> {
    let documents = load_data(&config.data, host)?;
    let (mut train, mut held_out) = split_holdout(documents, config.holdout, config.seed);
    if held_out.is_empty() || train.is_empty() {
        // A single source: its last part is held out instead of a document.
        train.append(&mut held_out);
        let Some(last) = train.last_mut() else {
            return Err(PluginError::data("data: there is no text in it"));
        };
        let cut = last.text.floor_char_boundary((last.text.len() as f64 * (1.0 - config.holdout)) as usize);
        let tail = last.text.split_off(cut);
        held_out.push(Document::new(format!("{} (its last part)", last.name), tail));
    }
    let encode = model.encoder();
    let stream = TokenStream::join(&tokenize(&train, &encode)?, model.eos()?);
    let longest = config.context.max(config.eval.contexts.iter().copied().max().unwrap_or(0));
    let all = tokenize(&held_out, &encode)?;
    let summary = DataSummary {
        sources: config.data.clone(),
        train_documents: train.len(),
        train_tokens: stream.len() as u64,
        held_out_documents: held_out.len(),
        held_out_tokens: all.iter().map(|d| d.len() as u64).sum(),
    };
    let held_out = select(&all, longest, config.eval.max_tokens, 0);
    if held_out.is_empty() {
        return Err(PluginError::data("data: the held-out documents have no text to evaluate on"));
    }
    let tokens = |d: &Vec<u32>| d.len() - 1;
    let scored: usize = held_out.iter().map(tokens).sum();
    let long: usize = held_out.iter().filter(|d| d.len() > longest).map(tokens).sum();
    let warning = (long * 2 < scored).then(|| {
        format!(
            "only {long} of the {scored} tokens to evaluate on are in documents longer than {longest} tokens: perplexity at \
             that length is then mostly perplexity of shorter texts"
        )
    });
    Ok(Text { stream: stream.tokens, held_out, summary, warning })
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let params: Params = parse(params)?;
    let config = ExtendConfig::from_json(Value::Object(params.config))?;
    if params.resume {
        expect_run(&config.out)?;
    }
    let threads = config.threads;
    with_threads(threads, || Run::prepare(config, params.resume, host)?.finish())?
}

fn plan_event(plan: &Plan, config: &ExtendConfig) -> Result<Value> {
    let note = whole_modules_note(config);
    let mut value = to_value(plan)?;
    value["text"] =
        json!([Some(plan.text()), note.clone()].into_iter().flatten().collect::<Vec<_>>().join("\n"));
    value["note"] = json!(note);
    Ok(value)
}

/// Said before training, because it decides what the adapter can be used with: some readers take LoRA factors alone.
fn whole_modules_note(config: &ExtendConfig) -> Option<String> {
    let whole: Vec<&str> =
        config.groups().into_iter().filter(|g| *g != Group::Lora).map(Group::name).collect();
    (!whole.is_empty()).then(|| {
        format!(
            "note: the adapter will carry {} trained in full (modules_to_save): PEFT reads that, vLLM and llama.cpp do not. \
             For them, afterwards: mclora export --format lora-only --base {} --adapter {} --out DIR, or mclora merge",
            whole.join(" and "),
            config.base.display(),
            config.out.join("adapter").display()
        )
    })
}

struct Run<'h> {
    host: &'h dyn HostApi,
    config: ExtendConfig,
    model: ModelDir,
    data: DataSummary,
    held_out: Vec<Vec<u32>>,
    /// Of the model measured last, at the context to reach, dense.
    losses: Vec<DocumentLoss>,
    plan: Plan,
    trainer: Trainer,
    folder: RunFolder,
    telemetry: Telemetry,
    state: State,
    started: Instant,
}

impl<'h> Run<'h> {
    fn prepare(config: ExtendConfig, resume: bool, host: &'h dyn HostApi) -> Result<Self> {
        let started = Instant::now();
        let model = ModelDir::open(&config.base)?;
        let config = config.resolve(&model.config)?;
        let on = OnDevice::open(config.device, host)?.running(&model.config, host)?;
        let text = read_text(&config, &model, host)?;
        let tokens = text.stream.len() + text.held_out.iter().map(Vec::len).sum::<usize>();
        let program = plan::resident_bytes().unwrap_or(0).saturating_sub(4 * tokens as u64);
        let plan = plan::plan_beside(&model.config, &config, tokens, program, on.device())?;
        host.event("plan", &plan_event(&plan, &config)?);

        let groups = config.groups();
        let mut decoder = model.decoder(config.dtype, &groups)?;
        decoder.attach_lora(config.lora.clone(), config.seed).map_err(model_error)?;
        on.take(&mut decoder)?;
        let inputs =
            Inputs::of(&model, decoder.device(), std::iter::once(&text.stream).chain(&text.held_out));
        let mut trainer = Trainer::new(
            decoder,
            &groups,
            config.optimizer.clone(),
            config.batch.clone(),
            config.stages.clone(),
            text.stream,
            config.seed,
            plan.memory.recompute,
        )?;

        let folder = RunFolder::open(&config.out, resume)?;
        let state = State {
            config_hash: config.identity()?,
            seed: config.seed,
            stage_seconds: vec![0.0; config.stages.len()],
            inputs,
            ..State::default()
        };
        // Nothing else is given: it begins with a base model and text.
        let Begun { state, telemetry, loaded, warnings } = begin(&folder, &config, state, resume, "")?;
        if let Some(loaded) = loaded {
            trainer.restore(loaded)?;
        }
        let run = Run {
            host,
            config,
            model,
            data: text.summary,
            held_out: text.held_out,
            losses: Vec::new(),
            plan,
            trainer,
            folder,
            telemetry,
            state,
            started,
        };
        for warning in text.warning.into_iter().chain(warnings) {
            run.say(&warning);
        }
        if resume {
            let (step, steps) = (run.trainer.step_count(), run.trainer.steps());
            run.say(&format!("resuming after step {step} of {steps}"));
        }
        Ok(run)
    }

    fn say(&self, message: &str) {
        self.host.event("log", &json!({ "message": message }));
    }

    fn original(&self) -> usize {
        self.model.config.original_context()
    }

    /// Perplexity of one model at every context length; records each.
    fn evaluate(
        &mut self,
        name: &str,
        scaling: &RopeScaling,
        sparse: Option<&StageConfig>,
    ) -> Result<ByContext> {
        self.trainer.release_passes();
        let mut results = ByContext::new();
        for context in self.config.eval.contexts.clone() {
            let start = Instant::now();
            let pattern = match sparse {
                Some(stage) => StageConfig { context, ..stage.clone() }.pattern(),
                None => Pattern::Dense,
            };
            let protocol =
                Protocol { context, stride: self.config.eval.stride, pattern, scaling: scaling.clone() };
            let (result, losses) =
                perplexity_by_document(&self.trainer.decoder, &self.held_out, &protocol, self.host)?;
            if sparse.is_none() && context == self.config.context {
                // The last model measured is the adapted one.
                self.losses = losses;
            }
            let attention = if sparse.is_some() { "s2" } else { "dense" };
            let mut event = to_value(&result)?;
            event["model"] = json!(name);
            self.host.event("evaluation", &event);
            self.telemetry.record(Record::Evaluation(EvaluationRecord {
                step: self.trainer.step_count() as u64,
                model: name.to_string(),
                context,
                attention: attention.to_string(),
                perplexity: result.perplexity,
                tokens: result.tokens as u64,
                wall_time: wall_time(),
                wall_seconds: since(start),
            }))?;
            self.state.evaluated.insert(context, result.tokens as u64);
            *self.state.seconds_by_part.entry("evaluation".to_string()).or_insert(0.0) += since(start);
            results.insert(context, result.perplexity);
        }
        Ok(results)
    }

    fn checkpoint(&mut self, before: f64) -> Result<()> {
        self.telemetry.sync()?;
        self.state.metric_lines = self.telemetry.lines();
        self.state.stage = self.trainer.position().map_or(self.config.stages.len(), |(stage, _)| stage);
        let mut state = self.state.clone();
        state.seconds = before + since(self.started);
        let step = self.trainer.step_count();
        let keep = self.config.checkpoint.keep;
        let path = self.trainer.save(self.folder.path(), &to_value(&state)?, keep)?;
        self.host.event("checkpoint", &json!({ "path": path, "step": step }));
        Ok(())
    }

    fn train(&mut self, before: f64) -> Result<()> {
        let steps = self.trainer.steps();
        let first = self.trainer.step_count();
        let begun = Instant::now();
        let mut seen = 0usize;
        while let Some((stage, stage_step)) = self.trainer.position() {
            if self.host.cancelled() {
                self.checkpoint(before)?;
                return Err(PluginError::cancelled(format!(
                    "stopped after step {} of {steps}; go on with --resume and the same settings",
                    self.trainer.step_count()
                )));
            }
            if stage_step == 0 {
                let settings = &self.config.stages[stage];
                let (attention, group) = attention_of(settings);
                self.telemetry.record(Record::Stage(StageRecord {
                    step: self.trainer.step_count() as u64,
                    stage,
                    context: settings.context,
                    attention,
                    group,
                    factor: settings.scaling(&self.model.config)?.factor(),
                    steps: settings.steps as u64,
                    wall_time: wall_time(),
                }))?;
            }
            let start = Instant::now();
            let report = self.trainer.step()?;
            let seconds = since(start);
            seen += report.tokens;
            self.state.tokens += report.tokens as u64;
            self.state.stage_seconds[stage] += seconds;
            self.telemetry.record(Record::Train(TrainRecord {
                step: report.step as u64,
                stage,
                context: report.context,
                loss: report.loss,
                lr: report.lr,
                grad_norm: report.grad_norm,
                tokens: self.state.tokens,
                wall_time: wall_time(),
                wall_seconds: seconds,
                wall_tokens_per_s: report.tokens as f64 / seconds,
            }))?;
            let elapsed = since(begun);
            self.host.event(
                "progress",
                &json!({
                    "job": "extend", "stage": stage + 1, "stages": self.config.stages.len(),
                    "step": report.step, "steps": steps, "loss": report.loss, "lr": report.lr,
                    "context": report.context, "tokens_per_s": seen as f64 / elapsed,
                    "eta_s": elapsed / (report.step - first) as f64 * (steps - report.step) as f64,
                }),
            );
            if report.step % self.config.checkpoint.every == 0 || report.step == steps {
                self.checkpoint(before)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Value> {
        let before = self.state.seconds;
        let last =
            self.config.stages.last().cloned().ok_or_else(|| PluginError::usage("stages: got none"))?;
        let scaling = last.scaling(&self.model.config)?;
        let baselines = self.config.eval.baselines;
        if baselines && self.trainer.step_count() == 0 && self.state.perplexity.base.is_empty() {
            self.say("measuring the base model as it came");
            let own = self.model.config.rope_scaling.clone();
            self.state.perplexity.base = self.evaluate("base", &own, None)?;
            self.say("measuring the base model with interpolated positions");
            self.state.perplexity.interpolated = self.evaluate("interpolated", &scaling, None)?;
            self.checkpoint(before)?;
        }
        let frozen = self.frozen_hashes()?;
        let learning: Vec<Group> = self.trainer.decoder.params().learning().collect();
        let phase = json!({ "job": "extend", "groups": learning, "steps": self.trainer.steps() });
        if self.host.phase_entered(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host did not want the training to begin; go on with --resume",
            ));
        }
        self.train(before)?;
        if self.frozen_hashes()? != frozen {
            return Err(PluginError::internal("a frozen parameter group changed while training"));
        }
        self.say("measuring the adapted model");
        let adapted = self.evaluate("adapted", &scaling, None)?;
        let phase = json!({ "job": "extend", "groups": learning, "perplexity": adapted });
        if self.host.phase_left(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host turned the result down: no adapter was written; the last checkpoint is kept",
            ));
        }
        self.write_adapter(&scaling)?;
        let sparse = match last.pattern() {
            Pattern::ShiftedSparse { .. } if baselines => self.evaluate("adapted", &scaling, Some(&last))?,
            _ => ByContext::new(),
        };
        self.telemetry.sync()?;
        let gap = sparse.get(&last.context).zip(adapted.get(&last.context)).map(|(s, d)| s / d - 1.0);
        self.state.perplexity.adapted = adapted;
        let summary = self.summary(before, sparse, gap)?;
        let page = RunReport {
            title: String::new(),
            summary: summary.clone(),
            records: self.telemetry.records().to_vec(),
            config: config_toml(&self.config)?,
        };
        self.folder.write("report.html", report::render(&page).as_bytes())?;
        self.folder.write_json(SUMMARY, &summary)?;
        to_value(&summary)
    }

    /// Hash of every group that must not change.
    fn frozen_hashes(&self) -> Result<Vec<String>> {
        let params = self.trainer.decoder.params();
        let groups = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora];
        let frozen = groups.into_iter().filter(|group| !params.learns(*group));
        frozen.map(|group| params.group_hash(group).map_err(model_error)).collect()
    }

    fn write_adapter(&self, scaling: &RopeScaling) -> Result<()> {
        let decoder: &Decoder = &self.trainer.decoder;
        let trained = decoder.params().trainable().map_err(model_error)?;
        let trained = trained.into_iter().map(|(name, t)| (name, t.detach())).collect();
        let dir = self.folder.path().join("adapter");
        save_adapter(&dir, &self.model, &self.config.base, decoder, trained, scaling, self.config.context)?;
        Ok(())
    }

    fn summary(&self, before: f64, sparse: ByContext, gap: Option<f64>) -> Result<Summary> {
        let params = self.trainer.decoder.params();
        let mut groups: BTreeMap<Group, GroupSummary> = BTreeMap::new();
        for name in params.names() {
            let group = self.model.config.group_of(name);
            let entry = groups.entry(group).or_insert_with(|| GroupSummary {
                name: group.to_string(),
                trained: params.learns(group),
                ..Default::default()
            });
            entry.tensors += 1;
            entry.parameters += params.shape(name).map_or(0, |shape| shape.iter().product::<usize>() as u64);
        }
        let losses = |stage: usize| -> Vec<f64> {
            let of_stage = |r: &Record| match r {
                Record::Train(t) if t.stage == stage => Some(t.loss),
                _ => None,
            };
            self.telemetry.records().iter().filter_map(of_stage).collect()
        };
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let mut stages = Vec::new();
        for (index, stage) in self.config.stages.iter().enumerate() {
            let losses = losses(index);
            let edge = EDGE_STEPS.min(losses.len());
            let (rows, micro) = self.config.batch.shape(stage.context);
            let (attention, group) = attention_of(stage);
            stages.push(StageSummary {
                context: stage.context,
                attention,
                group,
                factor: stage.scaling(&self.model.config)?.factor(),
                rope: stage.scaling(&self.model.config)?.to_string(),
                steps: stage.steps as u64,
                tokens: (rows * micro * stage.context * stage.steps) as u64,
                first_loss: mean(&losses[..edge]),
                last_loss: mean(&losses[losses.len() - edge..]),
                seconds: self.state.stage_seconds[index],
            });
        }
        let planned = self.plan.memory.kinds();
        let c = &self.model.config;
        let parameters: usize = c.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        Ok(Summary {
            perplexity: self.state.perplexity.clone(),
            perplexity_sparse: sparse,
            sparse_dense_gap: gap,
            held_out_losses: self.losses.clone(),
            evaluated_tokens: self.state.evaluated.clone(),
            seconds: before + since(self.started),
            seconds_by_part: self.state.seconds_by_part.clone(),
            peak_bytes: peak_bytes().unwrap_or(0),
            device_memory: DeviceMemory::of(self.plan.device.as_ref(), self.trainer.decoder.device()),
            planned_bytes: planned.map(|(k, v)| (k.to_string(), v)).into(),
            seed: self.config.seed,
            threads: rayon::current_num_threads(),
            device: self.trainer.decoder.device().describe(),
            steps: self.trainer.steps() as u64,
            context: self.config.context,
            command: format!(
                "mclora extend --config {} --out runs/again",
                self.folder.path().join("config.toml").display()
            ),
            stages,
            groups: groups.into_values().collect(),
            base: BaseSummary {
                path: self.config.base.display().to_string(),
                fingerprint: self.model.weights.fingerprint(),
                parameters: parameters as u64,
                context: self.original(),
                layers: c.num_hidden_layers,
                hidden_size: c.hidden_size,
                vocab_size: c.vocab_size,
            },
            data: self.data.clone(),
            versions: [("megacontext-lora".to_string(), env!("CARGO_PKG_VERSION").to_string())].into(),
        })
    }
}
