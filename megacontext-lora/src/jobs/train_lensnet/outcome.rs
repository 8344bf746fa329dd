//! What a run that trained LensNet leaves: pictures and traces of contexts as its best network chooses them, the report, the summary.

use lensnet_adapter::focus::Policy;
use megacontext_base::random::Random;
use serde_json::{Value, json};

use super::{Data, LensSummary, NETWORK, Run, TRACES};
use crate::error::{PluginError, Result};
use crate::host::Answer;
use crate::jobs::{model_error, to_value};
use crate::report::lensnet::{LensReport, Picture, render};
use crate::run::folder::config_toml;
use crate::run::summary::SUMMARY;
use crate::run::traces::{Trace, TraceLog};
use crate::train::device_plan::DeviceMemory;
use crate::train::lensnet::LensPlan;
use crate::train::plan::{peak_bytes, since};

impl Run<'_> {
    /// How the best network chooses contexts of the first test histories: pictures, and traces in `traces.jsonl`.
    fn pictures(&mut self, data: &Data) -> Result<Vec<Picture>> {
        const SHOWN: usize = 3;
        let best = self.best()?;
        let mut pictures = Vec::new();
        let mut traces = TraceLog::open(self.folder.path().join(TRACES), 0)?;
        let mut refocused = 0;
        for history in data.test.iter().take(SHOWN) {
            let mut random = Random::new(self.config.seed);
            let chosen = self
                .focus
                .choose(Policy::Lens(&best), history, &mut random, &mut self.buffers)
                .map_err(model_error)?;
            let after = chosen.steps.iter().skip(1).map(|step| &step.before).chain([&chosen.context]);
            for (step, after) in chosen.steps.iter().zip(after) {
                traces.append(&Trace::of(refocused, &step.refocus, after, 1e3 * step.seconds))?;
                refocused += 1;
            }
            pictures.push(Picture::of(&chosen, history.fact.clone()));
        }
        traces.sync()?;
        Ok(pictures)
    }

    pub(super) fn finish(mut self, data: &Data, plan: &LensPlan, parameters: usize) -> Result<Value> {
        let phase =
            json!({ "job": "train_lensnet", "groups": ["lensnet"], "steps": self.config.all_steps() });
        if self.host.phase_entered(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host did not want the training to begin; go on with --resume",
            ));
        }
        self.rounds(data)?;
        let (test, references) = self.test(data)?;
        let Some(validation) = self.state.best.clone() else {
            return Err(PluginError::internal("a run ended without a validation"));
        };
        let phase = json!({ "job": "train_lensnet", "groups": ["lensnet"], "loss_at_h": test.loss_at_h });
        if self.host.phase_left(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host turned the result down; the network and the checkpoints are kept",
            ));
        }
        let named = |of: &dyn Fn(&lensnet_adapter::validate::Outcome) -> Option<f64>| {
            let all = references.outcomes.iter().map(|(reference, outcome)| (reference.name(), outcome));
            let all = all.chain([("lensnet", &test.outcome)]);
            all.filter_map(|(name, outcome)| Some((name.to_string(), of(outcome)?))).collect()
        };
        let summary = LensSummary {
            focus_loss: named(&|outcome| Some(outcome.loss())),
            facts_shown: named(&|outcome| outcome.shows()),
            test,
            validation,
            budget: self.config.budget.unwrap_or(0),
            history: self.config.history.unwrap_or(0),
            horizon: self.config.horizon,
            unit: self.scale().unit,
            labels: self.labels.len(),
            steps: self.step as u64,
            best_step: self.state.best_step,
            parameters,
            gist_version: data.gist_version,
            seed: self.config.seed,
            threads: rayon::current_num_threads(),
            device: self.device.clone(),
            seconds: self.before + since(self.started),
            planned_bytes: plan.total,
            peak_bytes: peak_bytes().unwrap_or(0),
            device_memory: DeviceMemory::of(plan.device.as_ref(), self.focus.loss.decoder().device()),
            base: self.config.base.display().to_string(),
            base_fingerprint: self.state.inputs.base.clone(),
            gistnet: self.config.gistnet.display().to_string(),
            data: self.config.data.clone(),
            histories: data.text.len(),
            held_out_histories: data.held_out.len(),
            test_histories: data.test.len(),
            network: self.folder.path().join(NETWORK).display().to_string(),
        };
        let pictures = self.pictures(data)?;
        self.telemetry.sync()?;
        let page = LensReport {
            summary: &summary,
            records: self.telemetry.records(),
            pictures: &pictures,
            config: &config_toml(self.config)?,
        };
        self.folder.write(crate::report::REPORT, render(&page).as_bytes())?;
        self.folder.write_json(SUMMARY, &summary)?;
        to_value(&summary)
    }
}
