//! The job `sweep`: a short run of `extend` for each of several LoRA ranks, and which one to take.
//!
//! All runs share text, seed, steps and everything else; alpha goes with the rank, so that the strength alpha / rank is
//! the same (a fixed alpha would compare strengths, not ranks). Which rank to take is decided by [`crate::train::rank`].
//!
//! A budget is for all ranks together: steps, shared equally, or seconds, from which the plan's estimate makes a number of
//! steps before the first one. Seconds are a wish, not a limit.
//!
//! Folder: `config.toml` (settings as resolved), `rank-N/` (a run folder of `extend` each), `summary.json`
//! ([`SweepSummary`]), `report.html`, `extend.toml` (settings of a whole run at the chosen rank). A sweep goes on where it was interrupted: finished ranks are kept, the one that was
//! running resumes as `extend` does, so it ends with the same numbers.
//!
//! Memory: the peak of each rank is measured from its own beginning where the system allows to reset it
//! (`/proc/self/clear_refs`), else it is the program's.
//!
//! Units: nats per token, seconds, bytes, tokens. Errors: anything about settings before the first rank runs.

use std::path::{Path, PathBuf};

use megacontext_base::device::Device;
use megacontext_base::lora::LoraConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{IoResultExt, PluginError, Result};
use crate::host::{Answer, HostApi};
use crate::jobs::device::OnDevice;
use crate::jobs::{ModelDir, extend, parse, to_value, with_threads};
use crate::report::sweep::render;
use crate::run::folder::{CONFIG, RunFolder, config_hash_without, config_toml, expect_run};
use crate::run::summary::{SUMMARY, Summary};
use crate::train::config::ExtendConfig;
use crate::train::eval::batch_rows;
use crate::train::plan::{self, bytes, duration};
use crate::train::rank::{Choice, RULE, choose, mean_loss};

/// Optimiser steps for each rank where nothing says otherwise.
const STEPS_EACH: usize = 60;
/// Ranks tried where none are named.
const RANKS: [usize; 4] = [4, 8, 16, 32];
/// Settings of a whole run at the chosen rank.
const NEXT: &str = "extend.toml";
/// A rank's folder: this and the rank.
const RANK_DIR: &str = "rank-";

/// What a sweep is told besides the settings of its runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Settings {
    /// Ranks to try.
    #[serde(default)]
    ranks: Vec<usize>,
    /// Alpha over rank; none means that of the settings.
    #[serde(default)]
    scale: Option<f64>,
    /// Optimiser steps of all ranks together.
    #[serde(default)]
    budget_steps: Option<usize>,
    /// Seconds of all ranks together, about.
    #[serde(default)]
    budget_seconds: Option<f64>,
}

#[derive(Deserialize)]
struct Params {
    #[serde(default)]
    resume: bool,
    #[serde(flatten)]
    settings: Settings,
    #[serde(flatten)]
    config: Map<String, Value>,
}

/// A finished sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepSummary {
    /// One for each rank, ascending.
    pub ranks: Vec<RankSummary>,
    /// Which to take, and why.
    pub choice: Choice,
    /// The rule, in a sentence.
    pub rule: String,
    /// Perplexity of the base model, and of interpolation alone, on the same tokens at the context to reach.
    pub base_perplexity: Option<f64>,
    /// See there.
    pub interpolated_perplexity: Option<f64>,
    /// Context to reach, tokens.
    pub context: usize,
    /// Optimiser steps of each rank.
    pub steps: u64,
    /// Documents evaluated, and their tokens.
    pub documents: usize,
    /// See there.
    pub tokens: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// Worker threads.
    pub threads: usize,
    /// What passes of the first rank's run ran on.
    #[serde(default)]
    pub device: String,
    /// Seconds of all ranks, evaluation included.
    pub seconds: f64,
    /// The base model's folder.
    pub base: String,
    /// Where the text came from.
    pub data: Vec<String>,
    /// What extends the model with the chosen rank.
    pub next_command: String,
}

/// What one rank cost and reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankSummary {
    /// The rank.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Held-out loss at the context to reach, nats per token.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Parameters of LoRA.
    pub lora_parameters: u64,
    /// Parameters that learn, LoRA's among them.
    pub parameters: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Bytes as planned.
    pub planned_bytes: u64,
    /// Bytes at the peak.
    pub peak_bytes: u64,
    /// Its run folder.
    pub folder: PathBuf,
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let Params { resume, settings, config } = parse(params)?;
    let config = ExtendConfig::from_json(Value::Object(config))?;
    if resume {
        expect_run(&config.out)?;
    }
    let threads = config.threads;
    with_threads(threads, || Sweep::prepare(settings, config, resume, host)?.run())?
}

struct Sweep<'h> {
    host: &'h dyn HostApi,
    settings: Settings,
    /// Settings of the runs, but for the rank.
    config: ExtendConfig,
    folder: RunFolder,
}

impl<'h> Sweep<'h> {
    fn prepare(
        mut settings: Settings,
        mut config: ExtendConfig,
        resume: bool,
        host: &'h dyn HostApi,
    ) -> Result<Self> {
        settings.check(&config.lora)?;
        let scale = settings.scale.unwrap_or(config.lora.alpha / config.lora.r.max(1) as f64);
        settings.scale = Some(scale);
        // The text is the same for all ranks, and so is what an evaluation at the context to reach scores.
        config.eval.contexts = vec![config.context];
        let model = ModelDir::open(&config.base)?;
        // Before there is a folder; each run opens it for itself.
        let on = OnDevice::open(config.device, host)?.running(&model.config, host)?;
        let taken_up = resume && config.out.join(CONFIG).is_file();
        if !taken_up {
            config.steps = settings.steps(&config, &model, on.device())?;
        } else if config.steps.is_none() && config.stages.is_empty() {
            config.steps = began_with_steps(&config.out)?;
        }
        let mut sum = (0.0, 0);
        for &rank in &settings.ranks {
            let at = |e: PluginError| e.context(format!("rank {rank}"));
            let resolved = of_rank(&config, scale, rank, true).resolve(&model.config).map_err(at)?;
            let plan = plan::plan(&model.config, &resolved, 0, on.device()).map_err(at)?;
            sum = (sum.0 + plan.seconds, sum.1.max(plan.memory.total));
        }
        let text = format!(
            "sweep: ranks {}, {} steps each: about {} of training in all, at most about {} of memory beside the text",
            names(&settings.ranks),
            config.steps.unwrap_or_else(|| config.stages.iter().map(|s| s.steps).sum()),
            duration(sum.0),
            bytes(sum.1)
        );
        host.event("plan", &json!({ "seconds": sum.0, "bytes": sum.1, "steps": config.steps, "text": text }));
        let folder = RunFolder::open(&config.out, resume)?;
        let sweep = Self { host, settings, config, folder };
        let toml = sweep.toml()?;
        if taken_up {
            sweep.check_same(&toml)?;
        } else {
            sweep.folder.write(CONFIG, toml.as_bytes())?;
        }
        Ok(sweep)
    }

    /// The settings as resolved.
    fn toml(&self) -> Result<String> {
        let (mut all, own) = (to_value(&self.config)?, to_value(&self.settings)?);
        if let (Value::Object(all), Value::Object(own)) = (&mut all, own) {
            all.extend(own);
        }
        config_toml(&all)
    }

    /// Refuses to go on with other settings than the sweep began with.
    fn check_same(&self, toml: &str) -> Result<()> {
        let path = self.folder.path().join(CONFIG);
        let began = std::fs::read_to_string(&path).at(&path)?;
        let hash = |text: &str| -> Result<String> {
            let value: Value = toml::from_str(text)
                .map_err(|e| PluginError::data(format!("{}: {}", path.display(), e.message())))?;
            // What may differ from one machine to the next; each run checks what these name.
            let beside = ["base", "data", "out", "threads", "device", "memory_budget_bytes"];
            config_hash_without(&value, &beside)
        };
        if hash(&began)? != hash(toml)? {
            return Err(PluginError::usage(format!(
                "resume: expected the settings that the sweep began with ({}), got others; leave the flags out, or begin a \
                 new sweep in another folder",
                path.display()
            )));
        }
        Ok(())
    }

    fn run(self) -> Result<Value> {
        let scale = self.settings.scale.unwrap_or(1.0);
        let count = self.settings.ranks.len();
        let mut finished: Vec<(usize, Summary)> = Vec::new();
        for (at, &rank) in self.settings.ranks.iter().enumerate() {
            let config = of_rank(&self.config, scale, rank, at == 0);
            let done = config.out.join(SUMMARY);
            let summary = if done.is_file() {
                self.say(&format!("rank {rank}: finished before"));
                Summary::read(&done)?
            } else {
                self.say(&format!("rank {rank} ({} of {count})", at + 1));
                reset_peak();
                let mut params = to_value(&config)?;
                params["resume"] = json!(expect_run(&config.out).is_ok());
                let host = RankHost { host: self.host, rank };
                let told = extend::run(params, &host).map_err(|e| e.context(format!("rank {rank}")))?;
                serde_json::from_value(told)
                    .map_err(|e| PluginError::internal(format!("rank {rank}: {e}")))?
            };
            self.host.event(
                "rank",
                &json!({ "rank": rank, "loss": mean_loss(&summary.held_out_losses), "seconds": trained(&summary) }),
            );
            finished.push((rank, summary));
        }
        let summary = self.summary(&finished, scale)?;
        let next = self.next(scale, summary.choice.rank)?;
        self.folder.write(NEXT, next.as_bytes())?;
        self.folder.write("report.html", render(&summary, &self.toml()?).as_bytes())?;
        self.folder.write_json(SUMMARY, &summary)?;
        to_value(&summary)
    }

    fn summary(&self, finished: &[(usize, Summary)], scale: f64) -> Result<SweepSummary> {
        let losses: Vec<_> = finished.iter().map(|(rank, s)| (*rank, &s.held_out_losses[..])).collect();
        let tokens = |s: &Summary| s.held_out_losses.iter().map(|l| l.tokens).collect::<Vec<_>>();
        let [(_, first), others @ ..] = finished else {
            return Err(PluginError::internal("a sweep ended without a rank"));
        };
        if others.iter().any(|(_, s)| tokens(s) != tokens(first)) {
            return Err(PluginError::data(format!(
                "{}: expected the ranks' runs to have evaluated the same documents, they have not; begin a new sweep",
                self.folder.path().display()
            )));
        }
        let choice = choose(&losses).ok_or_else(|| PluginError::internal("a sweep ended without a rank"))?;
        let sum = |s: &Summary, all: bool| -> u64 {
            let counts = |name: &str, trained: bool| if all { trained } else { name == "lora" };
            s.groups.iter().filter(|g| counts(&g.name, g.trained)).map(|g| g.parameters).sum()
        };
        let context = self.config.context;
        let ranks = finished.iter().map(|(rank, s)| {
            let loss = mean_loss(&s.held_out_losses);
            RankSummary {
                rank: *rank,
                alpha: scale * *rank as f64,
                loss,
                perplexity: loss.exp(),
                lora_parameters: sum(s, false),
                parameters: sum(s, true),
                seconds: trained(s),
                planned_bytes: s.planned_bytes.values().sum(),
                peak_bytes: s.peak_bytes,
                folder: rank_dir(&self.config.out, *rank),
            }
        });
        Ok(SweepSummary {
            ranks: ranks.collect(),
            rule: RULE.to_string(),
            base_perplexity: first.perplexity.base.get(&context).copied(),
            interpolated_perplexity: first.perplexity.interpolated.get(&context).copied(),
            context,
            steps: first.steps,
            documents: first.held_out_losses.len(),
            tokens: tokens(first).iter().sum(),
            seed: self.config.seed,
            threads: first.threads,
            device: first.device.clone(),
            seconds: finished.iter().map(|(_, s)| s.seconds).sum(),
            base: self.config.base.display().to_string(),
            data: self.config.data.clone(),
            next_command: format!("mclora extend --config {}", self.folder.path().join(NEXT).display()),
            choice,
        })
    }

    /// Settings of a whole run at a rank: those of the sweep, with the default number of steps and of lengths to measure.
    fn next(&self, scale: f64, rank: usize) -> Result<String> {
        let mut config = of_rank(&self.config, scale, rank, true);
        let own = ExtendConfig::default();
        (config.out, config.eval.contexts) = (own.out, own.eval.contexts);
        if config.stages.is_empty() {
            config.steps = own.steps;
        }
        config_toml(&config)
    }

    fn say(&self, message: &str) {
        self.host.event("log", &json!({ "message": message }));
    }
}

impl Settings {
    /// Refuses what does not depend on the model; ranks ascending afterwards.
    fn check(&mut self, lora: &LoraConfig) -> Result<()> {
        let usage = |message: String| Err(PluginError::usage(message));
        if self.ranks.is_empty() {
            self.ranks = RANKS.to_vec();
        }
        self.ranks.sort_unstable();
        if self.ranks[0] == 0 {
            return usage("ranks: expected at least 1 each, got 0".into());
        }
        if let Some(pair) = self.ranks.windows(2).find(|pair| pair[0] == pair[1]) {
            return usage(format!("ranks: expected each once, got {} twice", pair[0]));
        }
        if let Some(bad) = self.scale.filter(|s| !s.is_finite() || *s <= 0.0) {
            return usage(format!("scale: expected a positive number, got {bad}"));
        }
        if !lora.rank_pattern.is_empty() && !lora.alpha_pattern.is_empty() {
            return usage(
                "lora.alpha_pattern: expected none beside lora.rank_pattern, since alpha goes with the rank and a layer may be \
                 meant by both; got both"
                    .into(),
            );
        }
        if self.budget_steps.is_some() && self.budget_seconds.is_some() {
            return usage("budget_steps, budget_seconds: expected one of them, got both".into());
        }
        if let Some(bad) = self.budget_steps.filter(|steps| *steps < self.ranks.len()) {
            return usage(format!(
                "budget_steps: expected at least {}, one step for each rank, got {bad}",
                self.ranks.len()
            ));
        }
        if let Some(bad) = self.budget_seconds.filter(|s| !s.is_finite() || *s <= 0.0) {
            return usage(format!("budget_seconds: expected a positive number, got {bad}"));
        }
        Ok(())
    }

    /// Optimiser steps of each rank; none where the stages say it.
    fn steps(&self, config: &ExtendConfig, model: &ModelDir, device: &Device) -> Result<Option<usize>> {
        let given = if config.stages.is_empty() { config.steps.map(|_| "steps") } else { Some("stages") };
        let budget =
            self.budget_steps.map(|_| "budget_steps").or(self.budget_seconds.map(|_| "budget_seconds"));
        if let (Some(given), Some(budget)) = (given, budget) {
            return Err(PluginError::usage(format!(
                "{given}, {budget}: expected one of them, since each decides how many steps a rank gets; got both"
            )));
        }
        if given.is_some() {
            return Ok(config.steps);
        }
        let count = self.ranks.len();
        match (self.budget_steps, self.budget_seconds) {
            (Some(steps), _) => Ok(Some(steps / count)),
            (None, Some(seconds)) => self.steps_in(seconds, config, model, device).map(Some),
            (None, None) => Ok(Some(STEPS_EACH)),
        }
    }

    /// Steps of each rank so that all take about so many seconds, by the plan's estimate.
    fn steps_in(
        &self,
        seconds: f64,
        config: &ExtendConfig,
        model: &ModelDir,
        device: &Device,
    ) -> Result<usize> {
        let mut of_a_step = 0.0;
        let mut of_evaluation = 0.0;
        for (at, &rank) in self.ranks.iter().enumerate() {
            let probe = ExtendConfig { steps: Some(STEPS_EACH), ..of_rank(config, 1.0, rank, at == 0) };
            let probe = probe.resolve(&model.config)?;
            let step = plan::plan(&model.config, &probe, 0, device)?.seconds / STEPS_EACH as f64;
            of_a_step += step;
            // A forward pass is a third of a step at most; every token passes context / stride times.
            let (rows, micro) = probe.batch.shape(probe.context);
            let stride = probe.eval.stride.unwrap_or(probe.context / 2).clamp(1, probe.context);
            let windows = (probe.eval.max_tokens / stride).max(batch_rows(probe.context));
            let passes = if at == 0 { 4.0 } else { 1.0 };
            of_evaluation += passes * step / 3.0 * windows as f64 / (rows * micro) as f64;
        }
        let steps = (seconds - of_evaluation) / of_a_step;
        if steps < 1.0 {
            return Err(PluginError::usage(format!(
                "budget_seconds: expected at least about {:.0}, for one step and an evaluation of each rank, got {seconds}; \
                 fewer ranks, fewer tokens_per_step or a smaller eval.max_tokens help",
                (of_evaluation + of_a_step).ceil()
            )));
        }
        Ok(steps as usize)
    }
}

/// The settings of one rank's run; `first` is measured with what all are compared with.
fn of_rank(config: &ExtendConfig, scale: f64, rank: usize, first: bool) -> ExtendConfig {
    let mut own = config.clone();
    let (r, alpha) = (config.lora.r.max(1) as f64, scale * rank as f64);
    // Strength stays the same for every layer: what a pattern says of alpha goes with the rank, and a layer whose rank a
    // pattern fixes keeps the strength of the others.
    own.lora.alpha_pattern = config.lora.alpha_pattern.map(|alpha| alpha * rank as f64 / r);
    let fixed = config.lora.rank_pattern.0.iter();
    own.lora.alpha_pattern.0.extend(fixed.map(|(pattern, rank)| (pattern.clone(), scale * *rank as f64)));
    (own.lora.r, own.lora.alpha) = (rank, alpha);
    own.eval.baselines = first;
    own.out = rank_dir(&config.out, rank);
    own
}

/// Steps of each rank in a sweep that began earlier.
fn began_with_steps(out: &Path) -> Result<Option<usize>> {
    let path = out.join(CONFIG);
    let text = std::fs::read_to_string(&path).at(&path)?;
    let began: Value = toml::from_str(&text)
        .map_err(|e| PluginError::data(format!("{}: {}", path.display(), e.message())))?;
    Ok(began["steps"].as_u64().and_then(|steps| usize::try_from(steps).ok()))
}

fn rank_dir(out: &Path, rank: usize) -> PathBuf {
    out.join(format!("{RANK_DIR}{rank}"))
}

fn names(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Seconds of training.
fn trained(summary: &Summary) -> f64 {
    summary.stages.iter().map(|s| s.seconds).sum()
}

/// Begins to measure the most memory held anew. A system that does not know this goes on measuring from the start.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The host of one rank's run: its events say which rank it is, and its plan is not told a second time.
struct RankHost<'h> {
    host: &'h dyn HostApi,
    rank: usize,
}

impl HostApi for RankHost<'_> {
    fn event(&self, kind: &str, json: &Value) {
        if kind == "plan" {
            return;
        }
        let mut json = json.clone();
        json["rank"] = json!(self.rank);
        self.host.event(kind, &json);
    }

    fn cancelled(&self) -> bool {
        self.host.cancelled()
    }

    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>> {
        self.host.documents(split, start, count)
    }

    fn phase_entered(&self, json: &Value) -> Answer {
        self.host.phase_entered(json)
    }

    fn phase_left(&self, json: &Value) -> Answer {
        self.host.phase_left(json)
    }
}
