//! LensNet over a session's history: scores of working contexts, and one working context that the session edits by them.
//!
//! Source: MegaContext's loop of LensNet and focus allocator, and its telemetry's `focus_allocator` event (without `lod_hint`: no
//! level is hinted at here). [`Session::open_lens`] reads a network for the open history. [`Session::refocus`] goes on
//! with the context that the session holds: an iteration passes, new tokens come in, and where there is no room for them what
//! is worth least collapses; then the host's allocator chooses edits, or the plugin's.
//!
//! No lock is held while the host is asked: its allocator may read. Where the history, the network or the held context has
//! become another meanwhile, the refocus is refused.
//!
//! Shapes: W entries, each by the first token of its span and its level. Units: tokens, entries, iterations for ages.
//! Errors: `Usage` for entries that are no context of the history, limits or edits that cannot be kept, scores that are no
//! scores, and where no history or LensNet is open; `Model` for files, and for scores that are not finite. The held
//! context is then what it was.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use lensnet_adapter::allocator::{AllocatorConfig, Edit, Refocus, decide};
use lensnet_adapter::room::{make_room, widen};
use lensnet_adapter::trainer::{Seen, focus};
use lensnet_adapter::{Expected, LEVELS, LensNet};
use megacontext_base::context::{Entry, Limits, WorkingContext};
use megacontext_base::error::BaseError;
use megacontext_base::random::Random;
use megacontext_base::rope::SigmaRule;
use serde::Deserialize;
use serde_json::{Value, json};

use super::history::{History, check_adapter, check_places, none_open};
use super::{Loaded, Session, size};
use crate::error::{PluginError, Result};
use crate::host_allocator::HostAllocator;
use crate::jobs::device::network_beside;
use crate::jobs::{model_error, parse};
use crate::train::gistnet::PlaceSettings;

/// The LensNet of a history.
pub(super) struct Lens {
    network: LensNet,
    pub(super) path: PathBuf,
    rule: SigmaRule,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenLens {
    /// `lensnet.safetensors`.
    network: PathBuf,
    /// Take a network that was trained beside another adapter than what is on the base now.
    #[serde(default)]
    other_adapter: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefocusParams {
    /// W_max, entries.
    budget: usize,
    /// The newest tokens that stay tokens.
    #[serde(default)]
    protected: u64,
    /// The plugin's allocator.
    #[serde(default)]
    allocator: AllocatorConfig,
    /// Of what is drawn.
    #[serde(default)]
    seed: u64,
    /// Begins a context with these: first token and level of each.
    entries: Option<Vec<(i64, u32)>>,
    /// Begins a context of the whole history.
    #[serde(default)]
    anew: bool,
    /// What the event is called by.
    tag: Option<String>,
}

/// Entries by first token and level.
fn entries(call: &str, of: impl Iterator<Item = (i64, u32)>) -> Result<Vec<Entry>> {
    of.enumerate()
        .map(|(at, (start, lod))| {
            let refuse = |what: String| PluginError::usage(format!("{call}: entry {at}: expected {what}"));
            Ok(Entry {
                start: u64::try_from(start)
                    .map_err(|_| refuse(format!("a first token of at least 0, got {start}")))?,
                lod: u8::try_from(lod).map_err(|_| refuse(format!("a level below {LEVELS}, got {lod}")))?,
            })
        })
        .collect()
}

fn told(edit: &Edit) -> Value {
    json!({
        "action": edit.action, "start": edit.entry.start, "lod": edit.entry.lod, "score": edit.score, "age": edit.age,
        "cost_before": edit.cost_before, "cost_after": edit.cost_after,
    })
}

fn became_another() -> PluginError {
    PluginError::usage(
        "refocus: expected the history, LensNet and working context that it began with, but they became others meanwhile: \
         refocus again",
    )
}

/// Where the scores of a refocus come from.
enum Source {
    LensNet,
    /// By entry; others score 0.
    Given(HashMap<Entry, f32>),
}

impl Source {
    /// One score for each entry of `context`.
    fn given(scores: &[f32], context: &WorkingContext) -> Result<Self> {
        size("refocus: scores, one for each entry", context.cost(), scores.len())?;
        if let Some(at) = scores.iter().position(|score| !(-1.0..=1.0).contains(score)) {
            return Err(PluginError::usage(format!(
                "refocus: scores: expected numbers from -1 to 1, got {} for entry {at}",
                scores[at]
            )));
        }
        Ok(Self::Given(context.entries().iter().copied().zip(scores.iter().copied()).collect()))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::LensNet => "lensnet",
            Self::Given(_) => "host",
        }
    }
}

/// What a refocus begins with.
struct Begun {
    /// Of the history.
    id: Arc<()>,
    /// The context that the history holds.
    held: Option<WorkingContext>,
    /// The one to edit, perhaps beyond its budget.
    context: WorkingContext,
    source: Source,
}

impl History {
    fn lens(&self, call: &str) -> Result<&Lens> {
        self.lens.as_ref().ok_or_else(|| {
            PluginError::usage(format!(
                "{call}: expected an open LensNet, there is none; open_lens reads one"
            ))
        })
    }

    fn scores(
        &self,
        lens: &Lens,
        context: &WorkingContext,
        loaded: &Loaded,
    ) -> megacontext_base::error::Result<Vec<f32>> {
        let seen = Seen::of(context, &self.tree, &loaded.decoder, &lens.rule)?;
        focus(&lens.network, &seen, &lens.rule, self.tree.hierarchy().levels())
    }
}

impl Session {
    /// Reads a LensNet for the open history: `{network, other_adapter}`. It has to be of this base, of the history's block
    /// and version of gists, trained beside what is on the base now (unless `other_adapter` is true) and with the places of the
    /// session's positions. Returns its `network`, `config`, `parameters` and `gist_version`.
    pub fn open_lens(&self, params: Value) -> Result<Value> {
        let OpenLens { network: path, other_adapter } = parse(params)?;
        let l = self.read()?;
        let mut guard = self.history_mut();
        let history = guard.as_mut().ok_or_else(|| none_open("open_lens"))?;
        let (fingerprint, hierarchy) = (l.model.weights.fingerprint(), history.tree.hierarchy());
        let expected = Expected {
            block: Some(hierarchy.block()),
            width: Some(history.tree.width()),
            base_fingerprint: Some(&fingerprint),
            gist_version: Some(history.network.gist_version()),
            ..Expected::default()
        };
        let loaded = LensNet::load(&path, expected).map_err(model_error)?;
        if !other_adapter {
            check_adapter(&loaded.identity, &l, "LensNet", &path)?;
        }
        let places = PlaceSettings::from(l.model.config.positions.sigma);
        check_places("open_lens", loaded.identity.place_rule, l.model.config.positions.sigma)?;
        if usize::from(hierarchy.levels()) >= LEVELS {
            return Err(PluginError::usage(format!(
                "open_lens: expected a history of at most {} levels above the tokens, got {}",
                LEVELS - 1,
                hierarchy.levels()
            )));
        }
        let mut network = loaded.network;
        let placed = network.set_device(l.decoder.device());
        let told = json!({
            "network": path,
            "config": network.config(),
            "parameters": network.config().parameters(),
            "gist_version": loaded.identity.gist_version,
        });
        history.lens = Some(Lens { network, path, rule: places.rule(hierarchy.block()) });
        history.id = Arc::default();
        // The host may ask the session when it is told.
        drop(guard);
        drop(l);
        network_beside("LensNet", placed, &*self.host);
        Ok(told)
    }

    /// LensNet's scores of a working context over the history into `out`, \[W\]; its entries by first token and level. What
    /// cannot be done scores 0 at most (tokens) or at least (the topmost level).
    pub fn focus_scores(&self, start: &[i64], lod: &[u32], out: &mut [f32]) -> Result<()> {
        let l = self.read()?;
        let guard = self.history();
        let history = guard.as_ref().ok_or_else(|| none_open("focus_scores"))?;
        let lens = history.lens("focus_scores")?;
        size("focus_scores: lod", start.len(), lod.len())?;
        size("focus_scores: out", start.len(), out.len())?;
        let entries = entries("focus_scores", start.iter().copied().zip(lod.iter().copied()))?;
        let limits = Limits::new(entries.len().max(1), 0).map_err(model_error)?;
        let context = WorkingContext::new(entries, &history.tree, limits).map_err(model_error)?;
        history.check_embeddings("focus_scores", &l)?;
        out.copy_from_slice(&history.scores(lens, &context, &l).map_err(model_error)?);
        Ok(())
    }

    /// Edits a working context: `{budget, protected, allocator, seed, entries, anew, tag}`, all but `budget` optional, by
    /// `scores`, one for each entry of it with the tokens that are new, or LensNet's. Returns the context's `entries`, the collapses
    /// that made `room`, the `edits`, and `focus_allocator`, which is also an event.
    pub fn refocus(&self, params: Value, scores: Option<&[f32]>) -> Result<Value> {
        let params: RefocusParams = parse(params)?;
        params.allocator.check().map_err(model_error)?;
        if params.anew && params.entries.is_some() {
            return Err(PluginError::usage("refocus: expected either entries or anew, got both"));
        }
        let limits = Limits::new(params.budget, params.protected).map_err(model_error)?;
        let Begun { id, held, mut context, source } = self.begin(&params, limits, scores)?;
        let mut score = |context: &WorkingContext| self.scores_of(&source, &id, context);
        let room =
            make_room(&mut context, limits, params.allocator.cooldown, &mut score).map_err(model_error)?;
        let host = HostAllocator::new(&*self.host);
        let mut random = Random::new(params.seed);
        let done = decide(Some(&host), &params.allocator, &mut context, &mut score, &mut random)
            .map_err(model_error)?;
        let entries: Vec<(u64, u8)> =
            context.entries().iter().map(|entry| (entry.start, entry.lod)).collect();
        match self.history_mut().as_mut() {
            Some(history) if Arc::ptr_eq(&history.id, &id) && history.context == held => {
                history.context = Some(context);
            }
            _ => return Err(became_another()),
        }
        let mut event = event_of(&done);
        event["tag"] = json!(params.tag.as_deref().unwrap_or("refocus"));
        event["source"] = json!(source.name());
        event["allocator"] = json!(if host.answered() { "host" } else { "plugin" });
        event["num_room"] = json!(room.len());
        self.host.event("focus_allocator", &event);
        Ok(json!({
            "entries": entries,
            "room": room.iter().map(told).collect::<Vec<_>>(),
            "edits": done.edits().map(told).collect::<Vec<_>>(),
            "focus_allocator": event,
        }))
    }

    /// What a refocus begins with.
    fn begin(&self, params: &RefocusParams, limits: Limits, scores: Option<&[f32]>) -> Result<Begun> {
        let l = self.read()?;
        let guard = self.history();
        let history = guard.as_ref().ok_or_else(|| none_open("refocus"))?;
        if scores.is_none() {
            history.lens("refocus")?;
            history.check_embeddings("refocus", &l)?;
        }
        let (tree, held) = (&history.tree, &history.context);
        let mut context = match (&params.entries, held) {
            (Some(given), _) => WorkingContext::new(entries("refocus", given.iter().copied())?, tree, limits),
            (None, Some(held)) if !params.anew => widen(held, tree, limits),
            (None, _) => WorkingContext::rebuild(tree, limits, u64::MAX),
        }
        .map_err(model_error)?;
        context.advance_residency();
        let source = match scores {
            None => Source::LensNet,
            Some(scores) => Source::given(scores, &context)?,
        };
        Ok(Begun { id: history.id.clone(), held: held.clone(), context, source })
    }

    /// Scores of a context over the history that a refocus began with.
    fn scores_of(
        &self,
        source: &Source,
        id: &Arc<()>,
        context: &WorkingContext,
    ) -> megacontext_base::error::Result<Vec<f32>> {
        if let Source::Given(by_entry) = source {
            return Ok(context.entries().iter().map(|e| by_entry.get(e).copied().unwrap_or(0.0)).collect());
        }
        let another = || BaseError::network("lensnet", became_another().message);
        let l = self.read().map_err(|_| another())?;
        let guard = self.history();
        let history = guard.as_ref().filter(|history| Arc::ptr_eq(&history.id, id)).ok_or_else(another)?;
        let lens = history.lens.as_ref().ok_or_else(another)?;
        history.scores(lens, context, &l)
    }
}

/// MegaContext's fields, as far as the allocator knows them.
fn event_of(done: &Refocus) -> Value {
    json!({
        "edits": done.num_expand + done.num_collapse,
        "num_expand": done.num_expand,
        "num_collapse": done.num_collapse,
        "swap_rate": done.swap_rate,
        "wc_length_before": done.wc_length_before,
        "wc_length": done.wc_length,
        "utilization": done.utilization,
        "residency_mean": done.residency_mean,
        "residency_p95": done.residency_p95,
        "score_mean": done.score_mean,
        "score_std": done.score_std,
        "score_abs_mean": done.score_abs_mean,
        "score_min": done.score_min,
        "score_max": done.score_max,
    })
}
