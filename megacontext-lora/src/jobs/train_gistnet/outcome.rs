//! What a run that trained GistNet leaves: its best network on the test text, the report, the summary.

use gistnet_adapter::validate::Baselines;
use serde_json::{Value, json};

use super::{GistSummary, NETWORK, Run};
use crate::error::{PluginError, Result};
use crate::host::Answer;
use crate::jobs::evaluation::hash_of;
use crate::jobs::to_value;
use crate::report::gistnet::{GistReport, render};
use crate::run::folder::config_toml;
use crate::run::summary::SUMMARY;
use crate::train::device_plan::DeviceMemory;
use crate::train::gistnet::GistPlan;
use crate::train::plan::{peak_bytes, since};

impl Run<'_> {
    pub(super) fn finish(mut self, plan: &GistPlan, parameters: usize) -> Result<Value> {
        let phase = json!({ "job": "train_gistnet", "groups": ["gistnet"], "steps": self.config.steps() });
        if self.host.phase_entered(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host did not want the training to begin; go on with --resume",
            ));
        }
        self.stages()?;
        let Some(validation) = self.state.best.clone() else {
            return Err(PluginError::internal("a run ended without a validation"));
        };
        let Some(test) = self.test(validation.horizon)? else {
            return Err(PluginError::cancelled(
                "stopped while measuring on the test text; go on with --resume and the same settings",
            ));
        };
        let phase =
            json!({ "job": "train_gistnet", "groups": ["gistnet"], "delta_nll": test.validation.delta_nll });
        if self.host.phase_left(&phase) != Answer::Continue {
            return Err(PluginError::cancelled(
                "the host turned the result down; the network and the checkpoints are kept",
            ));
        }
        let baselines = self.state.baselines.get(&validation.horizon).map(Baselines::means);
        let path = self.folder.path().join(NETWORK);
        let summary = GistSummary {
            recovered: test.validation.recovered,
            test,
            baselines: baselines.unwrap_or_default(),
            validation,
            most_gap: self.config.validation.most_gap,
            steps: self.step as u64,
            best_step: self.state.best_step,
            ended: self.state.ended.clone().unwrap_or_default(),
            parameters,
            gist_version: self.trainer.network.gist_version(),
            seed: self.config.seed,
            threads: rayon::current_num_threads(),
            device: self.decoder.device().describe(),
            seconds: self.before + since(self.started),
            planned_bytes: plan.total,
            peak_bytes: peak_bytes().unwrap_or(0),
            device_memory: DeviceMemory::of(plan.device.as_ref(), self.decoder.device()),
            base: self.config.base.display().to_string(),
            base_fingerprint: self.state.inputs.base.clone(),
            data: self.config.data.clone(),
            passages: self.text.tokens.len(),
            held_out_passages: self.held_out.len(),
            test_passages: self.test.len(),
            test_text: hash_of(self.test),
            network: path.display().to_string(),
        };
        self.telemetry.sync()?;
        let page = GistReport {
            summary: &summary,
            records: self.telemetry.records(),
            config: &config_toml(self.config)?,
        };
        self.folder.write(crate::report::REPORT, render(&page).as_bytes())?;
        self.folder.write_json(SUMMARY, &summary)?;
        to_value(&summary)
    }
}
