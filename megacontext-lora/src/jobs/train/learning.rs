//! What a phase learns with: the module's trainer and optimiser over everything that is frozen, driven by the loop of [`Run::drive`].

use gistnet_adapter::GistNet;
use gistnet_adapter::curriculum::Stage;
use gistnet_adapter::trainer::{GistTrainer, Setting};
use lensnet_adapter::LensNet;
use lensnet_adapter::focus::Focus;
use lensnet_adapter::trainer::{LensTrainer, Objective};
use megacontext_base::buffers::Buffers;
use megacontext_base::context::HorizonLoss;
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::params::{Group, ParamStore};
use megacontext_kernels::attention::Pattern;
use serde_json::{Value, json};

use super::judge::Verdict;
use super::learners::{GistLearner, LensLearner, LoraLearner, Scene, by_history};
use super::modules::{Modules, Stored};
use super::text::{Data, Maker, Order};
use super::{Run, Scope};
use crate::error::{PluginError, Result};
use crate::host_allocator::HostAllocator;
use crate::jobs::model_error;
use crate::run::labels::LabelStamp;
use crate::run::tensor_file::Named;
use crate::train::cycle::{CycleConfig, PhasePlace};
use crate::train::labelling::{LOOKED_AT, begun_utilities, unit_of};

/// Bytes of passages that a phase of GistNet keeps instead of running them again.
const PASSAGE_BYTES: u64 = 128 << 20;

/// The modules after the steps of a phase, its optimiser, and why it ended before them, to be undone.
type Learned = (Modules, Optimizer, Option<Verdict>);

/// How contexts are chosen in a cycle.
pub(super) fn focus<'f>(
    config: &'f CycleConfig,
    loss: &'f HorizonLoss<'f>,
    other: &'f HostAllocator<'f>,
    scope: &Scope,
) -> Focus<'f> {
    let (allocator, limits) = (&config.allocator, scope.limits);
    Focus { loss, allocator, other: Some(other), limits, refocuses: config.refocuses }
}

impl Run<'_> {
    /// The optimiser of the open phase: of the checkpoint that the run goes on from, or as the module was left.
    fn optimizer(&mut self, modules: &Modules, place: PhasePlace) -> Result<Optimizer> {
        let module = place.kind.module();
        let params = match module {
            Group::Gistnet => modules.gistnet.params(),
            Group::Lensnet => modules.lensnet.params(),
            _ => modules.decoder.params(),
        };
        let adamw = self.config.optimizer_of(place.kind).adamw();
        match self.taken_up.take().filter(|_| self.state.phase_step > 0) {
            Some(moments) => {
                let mut optimizer = Optimizer::new(adamw);
                let moments = moments.into_iter().map(|m: Named| (m.name, m.values.into_owned()));
                optimizer.import(params, moments).map_err(model_error)?;
                Ok(optimizer)
            }
            None => self.state.moments.take_up(self.folder.path(), module, params, adamw),
        }
    }

    pub(super) fn gistnet(&mut self, modules: Modules, place: PhasePlace, scope: &Scope) -> Result<Learned> {
        let optimizer = self.optimizer(&modules, place)?;
        let data = self.data(scope.context)?;
        let config = self.config;
        let Modules { decoder, gistnet, lensnet } = modules;
        let loss =
            HorizonLoss::new(&decoder, &scope.scaling, scope.rule, Pattern::Dense).map_err(model_error)?;
        let other = HostAllocator::new(self.host);
        let focus = focus(config, &loss, &other, scope);
        let base = self.base.clone();
        let maker = Maker { decoder: &decoder, levels: config.levels, base: &base };
        let setting = Setting { scaling: scope.scaling.clone(), rule: scope.rule, pattern: Pattern::Dense };
        let adamw = config.optimizer_of(place.kind).adamw();
        let mut trainer =
            GistTrainer::new(&decoder, setting, gistnet, adamw, PASSAGE_BYTES).map_err(model_error)?;
        trainer.optimizer = optimizer;
        let (phase, seed, lens_ready) = (place.number(), config.seed, self.state.lens_ready);
        let model_groups = &config.jt3.groups[..];
        let stage: Stage = config.stage_of(place.kind);
        let mut learner = GistLearner {
            scene: Scene { place, phase, seed, data: &data, maker, focus: &focus, lens_ready, model_groups },
            settings: config.gist_phase(place.kind),
            stage,
            trainer,
            lensnet: &lensnet,
            order: Order::new(data.train.len(), seed, phase),
            buffers: Buffers::default(),
        };
        let failed = self.drive(&mut learner, place)?;
        let GistTrainer { mut network, optimizer, .. } = learner.trainer;
        network.params_mut().freeze();
        Ok((Modules { decoder, gistnet: network, lensnet }, optimizer, failed))
    }

    /// What labels of a phase hold for.
    fn stated(&self, place: PhasePlace, scope: &Scope) -> Value {
        json!({
            "phase": self.state.phase,
            "kind": place.kind,
            "config_hash": self.state.config_hash,
            "base": self.state.inputs.base,
            "began_with": self.state.began_with,
            "step": self.state.step - self.state.phase_step as u64,
            "context": scope.context,
            "gist_version": self.state.gist_version,
        })
    }

    pub(super) fn lensnet(&mut self, modules: Modules, place: PhasePlace, scope: &Scope) -> Result<Learned> {
        let optimizer = self.optimizer(&modules, place)?;
        let data = self.data(scope.context)?;
        let config = self.config;
        let adapter = self.adapter_fingerprint(&modules.decoder, &scope.scaling)?;
        let Modules { decoder, gistnet, lensnet } = modules;
        let loss =
            HorizonLoss::new(&decoder, &scope.scaling, scope.rule, Pattern::Dense).map_err(model_error)?;
        let other = HostAllocator::new(self.host);
        let focus = focus(config, &loss, &other, scope);
        let base = self.base.clone();
        let maker = Maker { decoder: &decoder, levels: config.levels, base: &base };
        let (phase, seed, lens_ready) = (place.number(), config.seed, self.state.lens_ready);
        let model_groups = &config.jt3.groups[..];
        let scene = Scene { place, phase, seed, data: &data, maker, focus: &focus, lens_ready, model_groups };
        let mut order = Order::new(data.train.len(), seed, phase);
        if self.state.unit.is_none() {
            let mut found = Vec::new();
            for at in 0..LOOKED_AT.min(data.train.len()) {
                if self.host.cancelled() {
                    let modules = Modules { decoder, gistnet, lensnet };
                    self.checkpoint(&modules.parts(&config.jt3.groups), Some(&optimizer))?;
                    return self.stopped();
                }
                let history = data.history(order.at(at), maker, &gistnet)?;
                found.push(begun_utilities(&focus, &history, seed, &mut self.buffers)?);
            }
            self.state.unit = Some(unit_of(&found));
        }
        let objective = Objective {
            counterfactual: config.counterfactual.clone(),
            preference: config.preference.clone(),
        };
        let held =
            (config.preference.kl_weight != 0.0).then(|| self.start_of_lensnet(&lensnet)).transpose()?;
        let adamw = config.optimizer_of(place.kind).adamw();
        let mut trainer =
            LensTrainer::new(lensnet, scope.rule, config.levels, objective, adamw).map_err(model_error)?;
        trainer.optimizer = optimizer;
        if let Some(before) = held {
            trainer.hold_to(before).map_err(model_error)?;
        }
        let earlier =
            self.phases[..self.state.phase].iter().filter(|place| place.kind.module() == Group::Lensnet);
        let folder = self.folder.path().to_path_buf();
        let mut learner = LensLearner {
            scene,
            settings: config.lens_phase(place.kind),
            trainer,
            gistnet: &gistnet,
            scale: config.counterfactual.scale(self.state.unit.unwrap_or(1.0)),
            order,
            buffers: Buffers::default(),
            host: self.host,
            folder: &folder,
            stated: self.stated(place, scope),
            stamp: LabelStamp {
                base: self.state.inputs.base.clone(),
                adapter: Some(adapter),
                gist_version: self.state.gist_version,
                horizon: config.horizon,
                block: config.network.block,
            },
            first_round: 1 + earlier.map(|place| config.lens_phase(place.kind).labels.rounds).sum::<usize>(),
            labels: Vec::new(),
            rounds_made: 0,
        };
        let failed = self.drive(&mut learner, place)?;
        let LensTrainer { mut network, optimizer, .. } = learner.trainer;
        network.params_mut().freeze();
        Ok((Modules { decoder, gistnet, lensnet: network }, optimizer, failed))
    }

    /// LensNet as the open phase began.
    fn start_of_lensnet(&self, now: &LensNet) -> Result<LensNet> {
        let mut before = LensNet::new(now.config().clone(), self.config.seed).map_err(model_error)?;
        before.set_device(&now.device()).map_err(model_error)?;
        self.start_into(before.params_mut(), Group::Lensnet)?;
        Ok(before)
    }

    /// GistNet as the open phase began, whose gists were of this version.
    pub(super) fn start_of_gistnet(&self, now: &GistNet, version: u16) -> Result<GistNet> {
        let mut before = GistNet::new(now.config().clone(), self.config.seed).map_err(model_error)?;
        before.set_device(&now.device()).map_err(model_error)?;
        self.start_into(before.params_mut(), Group::Gistnet)?;
        before.set_gist_version(version);
        Ok(before)
    }

    /// Puts a module's parameters as the open phase began in the place of those of the same names.
    fn start_into(&self, params: &mut ParamStore, group: Group) -> Result<()> {
        let stored =
            self.state.start.as_ref().ok_or_else(|| PluginError::internal("a phase without a start"))?;
        for tensor in stored.read(self.folder.path())? {
            let (_, name) = tensor.name.split_once('/').unwrap_or(("", &tensor.name));
            let (name, values) = (name.to_string(), tensor.values.into_owned());
            params.insert_values(name, group, values, &tensor.shape).map_err(model_error)?;
        }
        Ok(())
    }

    pub(super) fn lora(&mut self, modules: Modules, place: PhasePlace, scope: &Scope) -> Result<Learned> {
        let optimizer = self.optimizer(&modules, place)?;
        let data = self.data(scope.context)?;
        let config = self.config;
        let (phase, seed, lens_ready) = (place.number(), config.seed, self.state.lens_ready);
        let mut order = Order::new(data.train.len(), seed, phase);
        let teacher = self.teacher(&modules, scope, &data, &mut order)?;
        let Modules { mut decoder, gistnet, lensnet } = modules;
        decoder.params_mut().set_learning(config.jt3.groups.iter().copied()).map_err(model_error)?;
        let horizon =
            |pattern| HorizonLoss::new(&decoder, &scope.scaling, scope.rule, pattern).map_err(model_error);
        let dense = horizon(Pattern::Dense)?;
        let entries = scope.limits.budget() + config.horizon;
        let loss = horizon(config.jt3_pattern(entries)?)?;
        let other = HostAllocator::new(self.host);
        let focus = focus(config, &dense, &other, scope);
        let base = self.base.clone();
        let maker = Maker { decoder: &decoder, levels: config.levels, base: &base };
        let model_groups = &config.jt3.groups[..];
        let mut learner = LoraLearner {
            scene: Scene { place, phase, seed, data: &data, maker, focus: &focus, lens_ready, model_groups },
            settings: &config.jt3,
            decoder: &decoder,
            gistnet: &gistnet,
            lensnet: &lensnet,
            optimizer,
            gradients: Gradients::staying(),
            order,
            buffers: Buffers::default(),
            loss,
            teacher,
        };
        let failed = self.drive(&mut learner, place)?;
        let optimizer = learner.optimizer;
        decoder.params_mut().freeze();
        Ok((Modules { decoder, gistnet, lensnet }, optimizer, failed))
    }

    /// What the model said of every history of the phase as the phase began, kept in a file, so that a phase that is taken up has
    /// the same teacher. Empty without one.
    fn teacher(
        &mut self,
        modules: &Modules,
        scope: &Scope,
        data: &Data,
        order: &mut Order,
    ) -> Result<Vec<(usize, Vec<f32>)>> {
        let jt3 = &self.config.jt3;
        if jt3.teacher == 0.0 {
            return Ok(Vec::new());
        }
        let mut numbers: Vec<usize> = (0..jt3.steps * jt3.batch).map(|at| order.at(at)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if let Some(stored) = &self.state.teacher {
            let tensors = stored.read(self.folder.path())?;
            let values = tensors.first().map(|tensor| &tensor.values[..]).unwrap_or_default();
            return Ok(by_history(&numbers, values));
        }
        self.say(&format!("asking the teacher about {} histories", numbers.len()));
        let decoder = &modules.decoder;
        let loss =
            HorizonLoss::new(decoder, &scope.scaling, scope.rule, Pattern::Dense).map_err(model_error)?;
        let maker = Maker { decoder, levels: self.config.levels, base: &self.base };
        let mut values = Vec::new();
        for number in &numbers {
            if self.host.cancelled() {
                self.checkpoint(&modules.parts(&jt3.groups), None)?;
                return self.stopped();
            }
            let history = maker.make(&data.train[*number], &modules.gistnet)?;
            values.extend(loss.teacher(&history.tree, &history.future).map_err(model_error)?);
        }
        let shape = vec![numbers.len(), self.config.horizon, decoder.config().hidden_size];
        let tensor = Named { name: "hidden".to_string(), shape, values: (&values[..]).into() };
        let file = format!("phase/{}-teacher.safetensors", self.state.phase);
        self.state.teacher = Some(Stored::write(self.folder.path(), file, &[tensor])?);
        Ok(by_history(&numbers, &values))
    }
}
