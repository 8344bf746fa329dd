//! What a run of alternating optimisation leaves: the adapter, both networks, the report, the summary.

use std::collections::BTreeMap;

use gistnet_adapter::Identity as GistIdentity;
use lensnet_adapter::Identity as LensIdentity;
use lensnet_adapter::focus::History;
use lensnet_adapter::validate::{Validator, difference};
use megacontext_base::decoder::Decoder;
use megacontext_base::rope::{RopeScaling, SIGMA};
use serde_json::Value;

use super::judge::{Evaluation, change};
use super::modules::Modules;
use super::{CycleSummary, Run, Scope};
use crate::error::{PluginError, Result};
use crate::jobs::{model_error, save_adapter, to_value};
use crate::report::cycle::{CycleReport, render};
use crate::run::folder::config_toml;
use crate::run::summary::SUMMARY;
use crate::train::device_plan::DeviceMemory;
use crate::train::plan::{peak_bytes, since};

/// GistNet's file in a run folder.
pub const GISTNET: &str = "gistnet.safetensors";
/// LensNet's.
pub const LENSNET: &str = "lensnet.safetensors";
/// The adapter's folder.
pub const ADAPTER: &str = "adapter";

impl Run<'_> {
    /// The fingerprint of what stands on the base model.
    pub(super) fn adapter_fingerprint(&self, decoder: &Decoder, scaling: &RopeScaling) -> Result<String> {
        let replaced = self.own_tensors(decoder);
        let replaced = replaced.iter().map(String::as_str);
        decoder
            .adapter_fingerprint(&self.model.config, &self.model.weights, scaling, replaced)
            .map_err(model_error)
    }

    /// Loss@H on the test histories of contexts that others choose, beside those of the policy.
    pub(super) fn references(&mut self, modules: &Modules, scope: &Scope, test: &Evaluation) -> Result<()> {
        self.say("measuring recency, random focus and the oracle on test histories");
        let data = self.data(scope.context)?;
        let scale = self.config.counterfactual.scale(self.state.unit.unwrap_or(1.0));
        let mut buffers = std::mem::take(&mut self.buffers);
        let host = self.host;
        let found = self.judging(modules, scope, |judging| {
            let histories: Vec<History> = data
                .test
                .iter()
                .map(|passage| judging.maker.make(passage, &modules.gistnet))
                .collect::<Result<_>>()?;
            let validator =
                Validator { focus: judging.focus, histories: &histories, scale, seed: self.config.seed };
            validator.references(&mut buffers, &mut || !host.cancelled()).map_err(model_error)
        });
        self.buffers = buffers;
        let Some(found) = found? else {
            self.checkpoint(&modules.parts(&self.config.jt3.groups), None)?;
            return self.stopped();
        };
        let outcomes =
            found.outcomes.iter().map(|(reference, outcome)| (reference.name().to_string(), outcome));
        self.state.focus_loss = outcomes.clone().map(|(name, outcome)| (name, outcome.loss())).collect();
        self.state.focus_loss.insert("lensnet".to_string(), test.loss_at_h);
        self.state.focus_against =
            outcomes.map(|(name, outcome)| (name, difference(&test.losses, &outcome.losses))).collect();
        Ok(())
    }

    /// Writes the adapter and both networks as they stand.
    pub(super) fn write_modules(&self, modules: &Modules, scope: &Scope) -> Result<()> {
        let decoder = &modules.decoder;
        let path = self.folder.path();
        decoder.params().bring_home().map_err(model_error)?;
        let tensors = self.own_tensors(decoder);
        let tensors = tensors.iter().filter(|name| *name != SIGMA);
        let tensors = tensors.filter_map(|name| Some((name.clone(), decoder.params().get(name)?))).collect();
        let context = scope.context.max(self.trained);
        let base = &self.config.base;
        save_adapter(&path.join(ADAPTER), self.model, base, decoder, tensors, &scope.scaling, context)?;
        let adapter_fingerprint = Some(self.adapter_fingerprint(decoder, &scope.scaling)?);
        let fingerprint = self.model.weights.fingerprint();
        let place_rule = Some(scope.rule);
        let of_gists = GistIdentity {
            adapter_fingerprint: adapter_fingerprint.clone(),
            place_rule,
            ..GistIdentity::of_base(&fingerprint)
        };
        modules.gistnet.save(&path.join(GISTNET), &of_gists).map_err(model_error)?;
        let of_focus = LensIdentity {
            adapter_fingerprint,
            place_rule,
            gist_version: Some(modules.gistnet.gist_version()),
            ..LensIdentity::of_base(&fingerprint)
        };
        modules.lensnet.save(&path.join(LENSNET), &of_focus).map_err(model_error)
    }

    /// Runs what is left, and writes report and summary.
    pub(super) fn finish(mut self, modules: Modules) -> Result<Value> {
        let modules = self.cycles(modules)?;
        let c = self.config;
        let own = self.state.passes.iter().find(|pass| pass.without.is_none());
        let Some(test) = own.map(|pass| pass.test.clone()) else {
            return Err(PluginError::internal("a run ended without a measurement"));
        };
        let last = self.state.last_cycle.unwrap_or(c.cycles);
        let scope = self.scope(last.max(1))?;
        let data = self.data(scope.context)?;
        let test_before = self.state.test_before.clone().unwrap_or_else(|| test.clone());
        let same = c.context_of(1) == scope.context;
        let gist_version = self.state.passes.first().map_or(self.state.gist_version, |_| {
            let own = self.state.phases.iter().rfind(|phase| phase.place.without.is_none());
            own.map_or(self.state.gist_version, |phase| phase.gist_version)
        });
        let path = self.folder.path();
        let named = |file: &str| path.join(file).display().to_string();
        let summary = CycleSummary {
            test_change: same.then(|| change(&test_before, &test)),
            delta_nll: test.delta_nll.clone(),
            focus_loss: self.state.focus_loss.clone(),
            focus_against: self.state.focus_against.clone(),
            ablation: self.state.passes.iter().filter(|pass| pass.without.is_some()).cloned().collect(),
            ended: match self.state.last_cycle {
                None => "all cycles are done".to_string(),
                Some(cycle) => format!("cycle {cycle} lowered loss@H too little for another"),
            },
            cycles: last,
            steps: self.state.step,
            context: scope.context,
            budget: scope.limits.budget(),
            horizon: c.horizon,
            gist_version,
            seed: c.seed,
            threads: rayon::current_num_threads(),
            device: modules.decoder.device().describe(),
            seconds: self.before + since(self.started),
            planned_bytes: self.plan.total,
            peak_bytes: peak_bytes().unwrap_or(0),
            device_memory: DeviceMemory::of(self.plan.device.as_ref(), modules.decoder.device()),
            base: c.base.display().to_string(),
            base_fingerprint: self.model.weights.fingerprint(),
            data: c.data.clone(),
            histories: [data.train.len(), data.validation.len(), data.test.len()],
            adapter: named(ADAPTER),
            gistnet: named(GISTNET),
            lensnet: named(LENSNET),
            phases: std::mem::take(&mut self.state.phases),
            test_before,
            test,
        };
        drop(modules);
        self.telemetry.sync()?;
        let page =
            CycleReport { summary: &summary, records: self.telemetry.records(), config: &config_toml(c)? };
        self.folder.write(crate::report::REPORT, render(&page).as_bytes())?;
        self.folder.write_json(SUMMARY, &summary)?;
        to_value(&summary)
    }
}

/// Loss@H by policy, the dearest first, for tables.
pub(crate) fn by_loss(losses: &BTreeMap<String, f64>) -> Vec<(&str, f64)> {
    let mut all: Vec<(&str, f64)> = losses.iter().map(|(name, loss)| (name.as_str(), *loss)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}
