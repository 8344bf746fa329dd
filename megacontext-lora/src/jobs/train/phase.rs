//! One phase after another: entering, learning, judging, keeping or undoing.

use std::time::Instant;

use gistnet_adapter::GistNet;
use gistnet_adapter::trainer::Setting;
use megacontext_base::context::HorizonLoss;
use megacontext_base::gradients::Optimizer;
use megacontext_base::params::Group;
use megacontext_kernels::attention::Pattern;
use serde_json::{Value, json};

use super::judge::{Evaluation, Judging, Verdict, change};
use super::learners::{Failure, Learner};
use super::learning::focus;
use super::modules::{Modules, Stored, with_named, word};
use super::text::Maker;
use super::{Kept, PassSummary, PhaseSummary, Run, Scope, frozen_hashes};
use crate::error::{PluginError, Result};
use crate::host::Answer;
use crate::host_allocator::HostAllocator;
use crate::jobs::{model_error, to_value};
use crate::learned::Learned;
use crate::run::metrics::{CycleStepRecord, PhaseRecord, Record, wall_time};
use crate::train::config::pattern;
use crate::train::cycle::{PhaseKind, PhasePlace};
use crate::train::histories::Passage;
use crate::train::plan::since;

/// Which held-out histories are measured.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    Validation,
    Test,
}

impl Run<'_> {
    /// All phases that are left.
    pub(super) fn cycles(&mut self, mut modules: Modules) -> Result<Modules> {
        if self.config.ablation && self.state.origin.is_none() {
            self.state.origin = Some(self.keep_for_ablations(&modules, "origin.safetensors")?);
        }
        while let Some(place) = self.phases.get(self.state.phase).copied() {
            if self.state.last_cycle.is_some_and(|last| place.cycle > last) {
                self.state.phase += 1;
                continue;
            }
            if place.cycle > 0 && self.state.warm.is_none() {
                self.after_warm_start(&modules)?;
            }
            if place.without != self.state.without {
                self.end_pass(&modules)?;
                self.begin_pass(&mut modules, place.without)?;
            }
            modules = self.phase(modules, place)?;
            self.plateau(place);
        }
        self.end_pass(&modules)?;
        Ok(modules)
    }

    /// Writes down the modules as they stand, for a pass of an ablation to go back to.
    fn keep_for_ablations(&self, modules: &Modules, file: &str) -> Result<Kept> {
        let tensors = with_named(&modules.parts(&self.config.jt3.groups), |tensors| {
            Stored::write(self.folder.path(), file.to_string(), tensors)
        })?;
        Ok(Kept {
            tensors,
            moments: self.state.moments.clone(),
            gist_version: modules.gistnet.gist_version(),
            lens_ready: self.state.lens_ready,
            unit: self.state.unit,
        })
    }

    /// Keeps the modules for ablations, and measures them on the test histories.
    fn after_warm_start(&mut self, modules: &Modules) -> Result<()> {
        if self.state.test_before.is_none() {
            self.say("measuring the modules after the warm start on test histories");
            self.state.test_before = Some(self.evaluate(modules, &self.scope(1)?, Side::Test)?);
        }
        self.state.warm = Some(self.keep_for_ablations(modules, "warm.safetensors")?);
        self.checkpoint(&modules.parts(&self.config.jt3.groups), None)
    }

    /// What a pass ended with; the run's own leaves its files before anything is frozen for an ablation.
    fn end_pass(&mut self, modules: &Modules) -> Result<()> {
        let without = self.state.without;
        if self.state.passes.iter().any(|pass| pass.without == without) {
            return Ok(());
        }
        let last = self.state.last_cycle.unwrap_or(self.config.cycles);
        let scope = self.scope(last.max(1))?;
        self.say("measuring what the modules came to on test histories");
        let test = self.evaluate(modules, &scope, Side::Test)?;
        if without.is_none() {
            self.references(modules, &scope, &test)?;
            self.write_modules(modules, &scope)?;
        }
        let own = self.state.passes.iter().find(|pass| pass.without.is_none());
        let change = own.map(|own| change(&own.test, &test));
        self.state.passes.push(PassSummary { without, test, change });
        self.checkpoint(&modules.parts(&self.config.jt3.groups), None)
    }

    /// Goes back to where the run began, for a pass in which one module stays frozen; to the end of the warm start for LoRA, which
    /// had no part in it.
    fn begin_pass(&mut self, modules: &mut Modules, without: Option<Group>) -> Result<()> {
        let kept = if without == Some(Group::Lora) { &self.state.warm } else { &self.state.origin };
        let Some(kept) = kept.clone() else {
            return Err(PluginError::internal("an ablation without a beginning to go back to"));
        };
        modules.put(kept.tensors.read(self.folder.path())?)?;
        modules.gistnet.set_gist_version(kept.gist_version);
        self.state.gist_version = kept.gist_version;
        self.state.lens_ready = kept.lens_ready;
        self.state.unit = kept.unit;
        self.state.moments.only(&kept.moments);
        self.state.without = without;
        self.state.before = None;
        if let Some(data) = &self.data {
            data.forget();
        }
        if let Some(group) = without {
            self.say(&format!("ablation: the run again, with {group} frozen"));
        }
        self.checkpoint(&modules.parts(&self.config.jt3.groups), None)
    }

    /// Ends the cycles where one of the run's own lowered loss@H by less than it has to.
    fn plateau(&mut self, place: PhasePlace) {
        let next = self.phases.get(self.state.phase);
        let over = next.is_none_or(|next| (next.cycle, next.without) != (place.cycle, place.without));
        let own = place.cycle > 0 && place.without.is_none() && place.cycle < self.config.cycles;
        if !over || !own || self.config.judge.plateau == 0.0 {
            return;
        }
        let of_cycle =
            |phase: &&PhaseSummary| phase.place.without.is_none() && phase.place.cycle == place.cycle;
        let Some(first) = self.state.phases.iter().find(of_cycle) else { return };
        // A cycle that ends with GistNet ends with what it was judged by.
        let last = self.state.phases.last().map(|phase| &phase.after);
        let Some(now) = self.state.before.as_ref().or(last) else { return };
        let gained = first.before.loss_at_h - now.loss_at_h;
        if first.context == self.state.context && gained < self.config.judge.plateau {
            self.say(&format!(
                "cycle {} lowered loss@H by {gained:.4} nats, less than {}: it is the last one",
                place.cycle, self.config.judge.plateau
            ));
            self.state.last_cycle = Some(place.cycle);
        }
    }

    /// Calls `f` with everything that measures the modules in a cycle.
    pub(super) fn judging<R>(
        &self,
        modules: &Modules,
        scope: &Scope,
        f: impl FnOnce(&Judging) -> Result<R>,
    ) -> Result<R> {
        let decoder = &modules.decoder;
        let horizon =
            |pattern| HorizonLoss::new(decoder, &scope.scaling, scope.rule, pattern).map_err(model_error);
        let loss = horizon(Pattern::Dense)?;
        let entries = scope.limits.budget() + self.config.horizon;
        let sparse = match self.config.validation.sparse_group {
            None => None,
            Some(group) => Some(horizon(pattern(crate::train::config::Attention::S2, group, entries)?)?),
        };
        let setting = Setting { scaling: scope.scaling.clone(), rule: scope.rule, pattern: Pattern::Dense };
        let delta = setting.delta_nll(decoder, self.config.horizon).map_err(model_error)?;
        let other = HostAllocator::new(self.host);
        let focus = focus(self.config, &loss, &other, scope);
        f(&Judging {
            focus: &focus,
            delta: &delta,
            sparse: sparse.as_ref(),
            maker: Maker { decoder, levels: self.config.levels, base: &self.base },
            lens_ready: self.state.lens_ready,
            spans: self.config.validation.spans,
            seed: self.config.seed,
            host: self.host,
        })
    }

    /// What the modules are worth.
    pub(super) fn evaluate(&mut self, modules: &Modules, scope: &Scope, side: Side) -> Result<Evaluation> {
        let data = self.data(scope.context)?;
        let passages: &[Passage] = if side == Side::Test { &data.test } else { &data.validation };
        let mut buffers = std::mem::take(&mut self.buffers);
        let found = self.judging(modules, scope, |judging| {
            judging.measure(passages, &modules.gistnet, &modules.lensnet, None, &mut buffers)
        });
        self.buffers = buffers;
        let Some(found) = found? else {
            self.checkpoint(&modules.parts(&self.config.jt3.groups), None)?;
            return self.stopped();
        };
        self.evaluated(&found)?;
        Ok(found)
    }

    /// Tells the host what was measured.
    fn evaluated(&self, found: &Evaluation) -> Result<()> {
        let mut event = to_value(found)?;
        if let Value::Object(map) = &mut event {
            map.remove("losses");
        }
        let h = self.config.horizon;
        let mut text =
            format!("  loss@{h} {:.4}, behind whole histories {:.4}", found.loss_at_h, found.full_loss);
        if let (Some(gist), Some(deleted)) = (found.delta_nll.get("gist"), found.delta_nll.get("deleted")) {
            text += &format!("; ΔNLL@{h} of gists {gist:.4}, of nothing {deleted:.4}");
        }
        event["job"] = json!("train");
        event["text"] = json!(text);
        self.host.event("evaluation", &event);
        Ok(())
    }

    fn groups(&self, kind: PhaseKind) -> Vec<Group> {
        match kind {
            PhaseKind::Jt3 => self.config.jt3.groups.clone(),
            other => vec![other.module()],
        }
    }

    /// What the host and the metrics are told of a phase.
    fn told(&self, place: PhasePlace) -> Value {
        json!({
            "job": "train", "phase": place.kind.name(), "cycle": place.cycle, "without": place.without,
            "index": self.state.phase, "phases": self.phases.len(), "groups": self.groups(place.kind),
            "steps": self.config.steps_of(place.kind), "gist_version": self.state.gist_version,
        })
    }

    /// Measures, asks the host, and keeps what the phase may go back to; false where the host left the phase out.
    fn enter(&mut self, modules: &Modules, place: PhasePlace, scope: &Scope) -> Result<bool> {
        if self.state.context != scope.context {
            self.state.context = scope.context;
            self.state.before = None;
        }
        let told = self.told(place);
        if !self.wanted(modules, place, self.host.hook("phase_entering", &told))? {
            return Ok(false);
        }
        if self.state.before.is_none() {
            self.state.before = Some(self.evaluate(modules, scope, Side::Validation)?);
        }
        self.lend("phase_entered", modules, place, &told)?;
        if !self.wanted(modules, place, self.host.phase_entered(&told))? {
            return Ok(false);
        }
        let part = modules.parts(&self.config.jt3.groups);
        let own = match place.kind.module() {
            Group::Gistnet => &part[..1],
            Group::Lensnet => &part[1..2],
            _ => &part[2..],
        };
        let file = format!("phase/{}-{}.safetensors", self.state.phase, word(place.kind.module()));
        let path = self.folder.path();
        self.state.start = Some(with_named(own, |tensors| Stored::write(path, file, tensors))?);
        self.state.teacher = None;
        self.state.entered = true;
        self.state.phase_step = 0;
        self.state.failed = None;
        self.say(&format!("{place}: {} steps", self.config.steps_of(place.kind)));
        Ok(true)
    }

    /// Lets the host read the modules before it is asked `when`.
    fn lend(&self, when: &str, modules: &Modules, place: PhasePlace, told: &Value) -> Result<()> {
        let learned = Learned::new(&modules.decoder, &modules.stores(), &self.groups(place.kind))?;
        self.host.parameters(when, told, &learned);
        Ok(())
    }

    /// Does the host, by its answer, want the phase to begin?
    fn wanted(&mut self, modules: &Modules, place: PhasePlace, answer: Answer) -> Result<bool> {
        if answer == Answer::Stop {
            self.checkpoint(&modules.parts(&self.config.jt3.groups), None)?;
            return Err(PluginError::cancelled(format!(
                "the host did not want to go on with {place}; go on with --resume"
            )));
        }
        Ok(answer == Answer::Continue)
    }

    /// One phase, or what is left of it.
    fn phase(&mut self, mut modules: Modules, place: PhasePlace) -> Result<Modules> {
        let scope = self.scope(place.cycle.max(1))?;
        if !self.state.entered && !self.enter(&modules, place, &scope)? {
            self.say(&format!("{place}: left out, as the host asked"));
            self.state.phase += 1;
            self.checkpoint(&modules.parts(&self.config.jt3.groups), None)?;
            return Ok(modules);
        }
        let learning = self.groups(place.kind);
        let frozen = frozen_hashes(&modules, &learning)?;
        let (learned, optimizer, failed) = match place.kind {
            PhaseKind::WarmGistnet | PhaseKind::Jt1 => self.gistnet(modules, place, &scope)?,
            PhaseKind::WarmLensnet | PhaseKind::Jt2 => self.lensnet(modules, place, &scope)?,
            PhaseKind::Jt3 => self.lora(modules, place, &scope)?,
        };
        modules = learned;
        if failed.is_some() {
            self.state.failed = failed;
        }
        for (before, after) in frozen.iter().zip(frozen_hashes(&modules, &learning)?) {
            if *before != after {
                return Err(PluginError::internal(format!("{place}: the frozen group {} changed", before.0)));
            }
        }
        self.leave(modules, place, &scope, &optimizer)
    }

    /// Judges the phase, asks the host, keeps or undoes.
    fn leave(
        &mut self,
        mut modules: Modules,
        place: PhasePlace,
        scope: &Scope,
        optimizer: &Optimizer,
    ) -> Result<Modules> {
        let before = self.state.before.clone().unwrap_or_default();
        let (version, was_ready) = (self.state.gist_version, self.state.lens_ready);
        let module = place.kind.module();
        // Gists are others when GistNet has learned, or the embeddings that they are made from.
        let gists_change = module == Group::Gistnet || self.groups(place.kind).contains(&Group::Embeddings);
        if gists_change {
            let next = version.checked_add(1).ok_or_else(|| {
                PluginError::usage("gist_version: expected at most 65535 versions of gists in a run")
            })?;
            modules.gistnet.set_gist_version(next);
            self.state.gist_version = next;
        }
        // Recency reads no gists: only LensNet chooses others by those that GistNet makes now.
        let others = module == Group::Gistnet && was_ready;
        self.state.lens_ready |= module == Group::Lensnet;
        let (after, mut verdict) = match self.state.failed.clone() {
            Some(verdict) => (before.clone(), verdict),
            None => {
                // A run that is stopped here measures again: the state has to be as it was.
                let chooser = others.then(|| self.start_of_gistnet(&modules.gistnet, version)).transpose()?;
                let was = [version, u16::from(was_ready)];
                let found = self.evaluate_ended(&modules, chooser.as_ref(), scope, optimizer, was)?;
                let verdict = Verdict::of(place.kind, &before, &found, &self.config.judge);
                (found, verdict)
            }
        };
        let stale = gists_change && verdict.kept();
        let asked = [
            (
                self.state.failed.is_none(),
                "evaluation",
                json!({ "loss_at_h": after.loss_at_h, "full_loss": after.full_loss }),
            ),
            (stale, "labels_stale", json!({ "gist_version": self.state.gist_version })),
        ];
        let mut stop = false;
        for (asks, kind, mut told) in asked {
            if !asks {
                continue;
            }
            if let (Value::Object(told), Value::Object(place)) = (&mut told, self.told(place)) {
                told.extend(place.into_iter().filter(|(key, _)| key != "gist_version"));
            }
            match self.host.hook(kind, &told) {
                Answer::Continue => {}
                Answer::RollBack if verdict.kept() => verdict = Verdict::Host,
                Answer::RollBack => {}
                Answer::Stop => stop = true,
            }
        }
        let mut told = self.told(place);
        told["before"] = json!({ "loss_at_h": before.loss_at_h, "full_loss": before.full_loss });
        told["after"] = json!({ "loss_at_h": after.loss_at_h, "full_loss": after.full_loss });
        told["kept"] = json!(verdict.kept());
        told["verdict"] = to_value(&verdict)?;
        self.lend("phase_left", &modules, place, &told)?;
        let answer = self.host.phase_left(&told);
        if answer == Answer::RollBack && verdict.kept() {
            verdict = Verdict::Host;
        }
        if verdict.kept() {
            self.state.moments.keep(self.folder.path(), module, self.state.phase, optimizer)?;
            // Where the policy has yet to choose by the gists as they are, the next phase measures what it does.
            self.state.before = (!others).then(|| after.clone());
            if gists_change {
                self.host.event(
                    "labels_stale",
                    &json!({ "job": "train", "gist_version": self.state.gist_version }),
                );
            }
        } else {
            if let Some(start) = &self.state.start {
                modules.put(start.read(self.folder.path())?)?;
            }
            modules.gistnet.set_gist_version(version);
            (self.state.gist_version, self.state.lens_ready) = (version, was_ready);
        }
        if let Some(data) = &self.data {
            data.forget();
        }
        let summary = PhaseSummary {
            place,
            change: change(&before, &after),
            context: scope.context,
            before,
            after,
            steps: self.state.phase_step as u64,
            gist_version: self.state.gist_version,
            verdict,
        };
        self.telemetry.record(Record::Phase(Box::new(PhaseRecord {
            step: self.state.step,
            summary: summary.clone(),
            wall_time: wall_time(),
        })))?;
        let text = format!(
            "{place}: loss@{} {:.4} -> {:.4} ({:+.4} ± {:.4}), {}",
            self.config.horizon,
            summary.before.loss_at_h,
            summary.after.loss_at_h,
            summary.change.mean,
            summary.change.error,
            summary.verdict.text()
        );
        let mut event = self.told(place);
        event["kept"] = json!(summary.verdict.kept());
        event["text"] = json!(text);
        self.host.event("phase", &event);
        self.state.phases.push(summary);
        self.state.phase += 1;
        self.state.entered = false;
        self.state.phase_step = 0;
        (self.state.start, self.state.teacher, self.state.failed) = (None, None, None);
        let parts = modules.parts(&self.config.jt3.groups);
        self.checkpoint(&parts, None)?;
        let warm = self.state.warm.as_ref().map(|warm| &warm.moments);
        self.state.moments.tidy(self.folder.path(), warm.as_slice())?;
        if stop || answer == Answer::Stop {
            return Err(PluginError::cancelled(format!(
                "the host stopped the run after {place}; go on with --resume"
            )));
        }
        Ok(modules)
    }

    /// [`Run::evaluate`] of a phase whose steps are done: stopped in the middle, the run stands where the steps ended.
    fn evaluate_ended(
        &mut self,
        modules: &Modules,
        chooser: Option<&GistNet>,
        scope: &Scope,
        optimizer: &Optimizer,
        [version, ready]: [u16; 2],
    ) -> Result<Evaluation> {
        let data = self.data(scope.context)?;
        let mut buffers = std::mem::take(&mut self.buffers);
        let found = self.judging(modules, scope, |judging| {
            judging.measure(&data.validation, &modules.gistnet, &modules.lensnet, chooser, &mut buffers)
        });
        self.buffers = buffers;
        match found? {
            Some(found) => {
                self.evaluated(&found)?;
                Ok(found)
            }
            None => {
                (self.state.gist_version, self.state.lens_ready) = (version, ready == 1);
                self.checkpoint(&modules.parts(&self.config.jt3.groups), Some(optimizer))?;
                self.stopped()
            }
        }
    }

    /// The steps of a phase that are left.
    pub(super) fn drive(&mut self, learner: &mut dyn Learner, place: PhasePlace) -> Result<Option<Verdict>> {
        let steps = if self.state.failed.is_some() { 0 } else { self.config.steps_of(place.kind) };
        let settings = self.config.optimizer_of(place.kind);
        let begun = (Instant::now(), self.state.phase_step);
        while self.state.phase_step < steps {
            let at = self.state.phase_step;
            if self.stops() || !learner.prepare(at)? {
                self.checkpoint(&learner.parts(), Some(learner.optimizer()))?;
                return self.stopped();
            }
            let start = Instant::now();
            let lr = settings.lr_at(at, at, steps);
            let found = match learner.step(at, lr) {
                Ok(found) => found,
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::NotFinite(message)) => {
                    let message = format!("step {} (lr {lr:.2e}): {message}", at + 1);
                    return Ok(Some(Verdict::NotFinite { message }));
                }
            };
            self.state.phase_step += 1;
            self.state.step += 1;
            self.telemetry.record(Record::CycleStep(CycleStepRecord {
                step: self.state.step,
                phase: place.kind.name().to_string(),
                cycle: place.cycle,
                phase_step: self.state.phase_step as u64,
                loss: found.loss,
                measured: found.measured,
                lr,
                grad_norm: found.grad_norm,
                items: found.items as u64,
                wall_time: wall_time(),
                wall_seconds: since(start),
            }))?;
            let done = (self.state.phase_step - begun.1) as f64;
            let left = (steps - self.state.phase_step) as f64;
            self.host.event(
                "progress",
                &json!({
                    "job": "train", "phase": place.kind.name(), "cycle": place.cycle,
                    "stage": self.state.phase + 1, "stages": self.phases.len(),
                    "step": self.state.phase_step, "steps": steps, "loss": found.loss, "lr": lr,
                    "eta_s": since(begun.0) / done * left,
                }),
            );
            let told = json!({
                "job": "train", "phase": place.kind.name(), "cycle": place.cycle, "step": self.state.phase_step, "steps": steps,
                "loss": found.loss, "measured": found.measured, "lr": lr, "grad_norm": found.grad_norm,
            });
            match self.host.hook("step", &told) {
                Answer::Continue => {}
                Answer::RollBack => return Ok(Some(Verdict::Host)),
                Answer::Stop => {
                    self.checkpoint(&learner.parts(), Some(learner.optimizer()))?;
                    return self.stopped();
                }
            }
            let every = self.config.checkpoint.every;
            if self.state.phase_step.is_multiple_of(every) || self.state.phase_step == steps {
                self.checkpoint(&learner.parts(), Some(learner.optimizer()))?;
            }
        }
        Ok(None)
    }
}
