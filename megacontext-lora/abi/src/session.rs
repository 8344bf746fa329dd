//! A session as a host uses it: plain Rust over the trait object.
//!
//! A session is one base model, perhaps with an adapter, and the jobs that need none opened. It may be shared between
//! threads; calls that learn exclude each other and calls that read. The JSON that goes in is validated by the plugin, so
//! the messages are its own. After a panic inside the plugin every call answers [`crate::ErrorKind::Poisoned`].
//!
//! Shapes: T entries, E model width, V vocabulary, D head width, N positions. Sizes are in [`Session::describe`].
//! Outputs go into buffers of the caller; views carry their shapes.

use crate::context::ContextView;
use crate::dlpack::OwnedTensor;
use crate::error::{AbiError, ErrorKind};
use crate::raw::SessionBox;
use crate::tensor::{TensorView, TensorViewMut};
use abi_stable::std_types::{RResult, RString};
use serde_json::Value;
use std::path::Path;

/// Result of a session's calls.
pub type Result<T> = std::result::Result<T, AbiError>;

/// An open session.
pub struct Session {
    raw: SessionBox,
}

pub(crate) fn json(answer: RResult<RString, AbiError>) -> Result<Value> {
    let text = answer.into_result()?;
    serde_json::from_str(&text)
        .map_err(|e| AbiError::new(ErrorKind::Internal, format!("the plugin answered with broken JSON: {e}")))
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        AbiError::new(ErrorKind::Usage, format!("{}: expected a path in UTF-8", path.display()))
    })
}

impl Session {
    pub(crate) fn new(raw: SessionBox) -> Self {
        Self { raw }
    }

    /// Runs a whole job (`extend`, `train_gistnet`, `eval_gist`, …: [`Session::describe`] lists them under `jobs`) and returns
    /// its result. Events go to the session's host meanwhile, and the job stops with [`ErrorKind::Cancelled`] when the host says so.
    pub fn run(&self, kind: &str, params: &Value) -> Result<Value> {
        json(self.raw.run(kind.into(), params.to_string().as_str().into()))
    }

    /// Whether the session still answers: [`ErrorKind::Poisoned`] after a panic, at the price of a call that does nothing. A
    /// plugin of an earlier build answers that all is well; its next other call tells.
    pub fn check(&self) -> Result<()> {
        self.raw.check().into_result()
    }

    /// Sizes and state: `vocab_size`, `hidden_size`, `head_dim`, `rotary_width`, `layers`, `heads`, `kv_heads`,
    /// `original_context`, `context`, `rope`, `positions`, `sigma_scales`, `lora`, `fingerprint`, `phase`, `steps`, `base`,
    /// `device`, `jobs`. Opened without a base, a session has `base` null and no sizes, but `devices`: the processor and every GPU
    /// {device, name, compute_capability, memory_bytes, unusable}, with the reason in `no_gpu` where there is none.
    pub fn describe(&self) -> Result<Value> {
        json(self.raw.describe())
    }

    /// Embeddings of tokens: U32 `[T]` to F32 `[T, E]`.
    pub fn embed(&self, tokens: TensorView<'_>, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.embed(tokens, out).into_result()
    }

    /// RoPE tables of the positions mu, F64 `[N]`, blurred by sigma, F64 `[N]` or `[0]` for none: F32 `[N, W/2]` each, W the
    /// `rotary_width`.
    pub fn rope_tables(
        &self,
        mu: TensorView<'_>,
        sigma: TensorView<'_>,
        out_cos: TensorViewMut<'_>,
        out_sin: TensorViewMut<'_>,
    ) -> Result<()> {
        self.raw.rope_tables(mu, sigma, out_cos, out_sin).into_result()
    }

    /// RoPE tables of a context's entries as `logits` and `nll` use them, its levels and their learned scales included:
    /// F32 `[T, W/2]` each, W the rotated width of a head.
    pub fn context_tables(
        &self,
        context: ContextView<'_>,
        out_cos: TensorViewMut<'_>,
        out_sin: TensorViewMut<'_>,
    ) -> Result<()> {
        self.raw.context_tables(context, out_cos, out_sin).into_result()
    }

    /// Logits of every entry, F32 `[T, V]`.
    pub fn logits(&self, context: ContextView<'_>, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.logits(context, out).into_result()
    }

    /// Negative log-likelihood of every entry's target, in nats, F32 `[T]`; NaN where nothing is scored.
    pub fn nll(&self, context: ContextView<'_>, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.nll(context, out).into_result()
    }

    /// What LoRA adds to the weight of a module (`model.layers.0.self_attn.q_proj`), scale included: F32 `[out, in]`.
    pub fn lora_delta(&self, module: &str, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.lora_delta(module.into(), out).into_result()
    }

    /// A copy of one parameter, by its name in [`Session::parameter_groups`].
    pub fn parameter(&self, name: &str) -> Result<OwnedTensor> {
        self.raw.parameter(name.into()).into_result()
    }

    /// One parameter, by its name in [`Session::parameter_groups`], where the session keeps it and as it is stored (F32, or
    /// BF16 for a frozen weight): nothing is copied, and the tensor is read-only. It stays valid after the session is dropped. While
    /// the host holds one, calls that would write parameters (`step`, `resume`, adapters) answer [`ErrorKind::Usage`]; entering and
    /// leaving a phase do not. So it is for looking between phases: LoRA's factors, what `merge_adapter` made of a weight.
    pub fn shared_parameter(&self, name: &str) -> Result<OwnedTensor> {
        self.raw.shared_parameter(name.into()).into_result()
    }

    /// The parameter groups with their tensors: `{group: {learns, parameters: [{name, shape}]}}`.
    pub fn parameter_groups(&self) -> Result<Value> {
        json(self.raw.parameter_groups())
    }

    /// Begins a phase in which `params.groups` learn: `{groups, lora, optimizer, context, seed, steps}`, all but `groups`
    /// optional; a cosine schedule needs `steps`. Settings are checked before anything changes.
    pub fn enter_phase(&self, params: &Value) -> Result<Value> {
        json(self.raw.enter_phase(params.to_string().as_str().into()))
    }

    /// Ends the phase. Optimiser state stays with its groups.
    pub fn leave_phase(&self) -> Result<Value> {
        json(self.raw.leave_phase())
    }

    /// One optimiser step on the batch that `params` gives: `{tokens: [[…], …], attention, group, lr}`, rows of one length;
    /// the last token of a row is a target only, and not scored where it is [`crate::NO_TARGET`].
    pub fn step(&self, params: &Value) -> Result<Value> {
        json(self.raw.step(params.to_string().as_str().into()))
    }

    /// Mean NLL of a batch given as for [`Session::step`], without learning: `{nll, perplexity, tokens}`.
    pub fn evaluate(&self, params: &Value) -> Result<Value> {
        json(self.raw.evaluate(params.to_string().as_str().into()))
    }

    /// Writes a checkpoint into a folder of its own: what learns, whatever else differs from the base, and the optimiser's
    /// state; beside its place first, then renamed. A folder with another run's or a later checkpoint is refused.
    pub fn save(&self, path: &Path) -> Result<Value> {
        json(self.raw.save(utf8(path)?.into()))
    }

    /// Takes up the newest whole checkpoint of a folder, inside a phase over the groups it was saved in.
    pub fn resume(&self, path: &Path) -> Result<Value> {
        json(self.raw.resume(utf8(path)?.into()))
    }

    /// Writes the adapter folder (PEFT format).
    pub fn export(&self, path: &Path) -> Result<Value> {
        json(self.raw.export(utf8(path)?.into()))
    }

    /// Reads an adapter folder and keeps it beside the model under a name; it is not in use yet. The answer of this and the
    /// next two calls: `{active, adapters}`.
    pub fn load_adapter(&self, name: &str, path: &Path) -> Result<Value> {
        let params = serde_json::json!({ "name": name, "path": utf8(path)? });
        json(self.raw.load_adapter(params.to_string().as_str().into()))
    }

    /// Puts an adapter in use, or none: then the model is the base alone. The base is not read again. The adapter that the
    /// session was opened with, or that its first phase began, is called `default`; what a phase trained stays with its
    /// adapter. Not while a phase is open.
    pub fn set_adapter(&self, name: Option<&str>) -> Result<Value> {
        let params = serde_json::json!({ "name": name });
        json(self.raw.set_adapter(params.to_string().as_str().into()))
    }

    /// Forgets an adapter. One that was trained and not exported since is only forgotten by `force`.
    pub fn unload_adapter(&self, name: &str, force: bool) -> Result<Value> {
        let params = serde_json::json!({ "name": name, "force": force });
        json(self.raw.unload_adapter(params.to_string().as_str().into()))
    }

    /// Merges the LoRA in use into the weights, in memory: `{adapter, merged}`. Reading calls are cheaper then; training,
    /// exporting and switching wait for [`Session::unmerge_adapter`].
    pub fn merge_adapter(&self) -> Result<Value> {
        json(self.raw.merge_adapter())
    }

    /// Takes it out again, every weight to the bit what it was: `{adapter, unmerged}`.
    pub fn unmerge_adapter(&self) -> Result<Value> {
        json(self.raw.unmerge_adapter())
    }

    /// Begins a history, a gist tree that tokens are appended to, and drops the one before: `{network, levels, name, stored,
    /// refresh}`. `network` is a `gistnet.safetensors` of this base; `levels` above the tokens, 2 unless said; `name` of the
    /// base in files, at most 32 bytes, its folder's unless said; `stored` the folder of a history to go on with, whose gists
    /// have to be of the network's version or are made anew by `refresh`. The answer describes it: `{tokens, block, width,
    /// levels, nodes: {LOD1, …}, gist_version, stale, base, network}`.
    pub fn open_tree(&self, params: &Value) -> Result<Value> {
        json(self.raw.open_tree(params.to_string().as_str().into()))
    }

    /// Adds tokens, U32 `[T]`, and makes every gist that they complete, once; what fills no block stays tokens. The answer
    /// is the history's description with `made`, the nodes that each level got.
    pub fn tree_append(&self, tokens: TensorView<'_>) -> Result<Value> {
        json(self.raw.tree_append(tokens))
    }

    /// The gists of the history's nodes `first` … of level `lod`, as many as `out` has rows: F32 `[N, E]`.
    pub fn tree_gists(&self, lod: u32, first: u64, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.tree_gists(lod, first, out).into_result()
    }

    /// The gists of blocks, each of K entries of level `lod` (0: embeddings of tokens, above: gists): F32 `[N, K, E]` to F32
    /// `[N, E]`, by the network of the open history.
    pub fn gists(&self, entries: TensorView<'_>, lod: u32, out: TensorViewMut<'_>) -> Result<()> {
        self.raw.gists(entries, lod, out).into_result()
    }

    /// Stores the history in a folder of its own, whole or not at all: `{path, dtype, complete}`, gists in `f16` unless said
    /// (`bf16`, `f32`). A stored history of the same folder is replaced, anything else refused.
    pub fn save_tree(&self, params: &Value) -> Result<Value> {
        json(self.raw.save_tree(params.to_string().as_str().into()))
    }

    /// Reads a LensNet for the open history: `{network, other_adapter}`. `network` is a `lensnet.safetensors` of this base,
    /// of the history's block and version of gists, trained beside what is on the base now (unless `other_adapter` is true) and
    /// with the places of the session's positions. It stays until another is opened or another history is. The answer: `{network,
    /// config, parameters, gist_version}`.
    pub fn open_lens(&self, params: &Value) -> Result<Value> {
        json(self.raw.open_lens(params.to_string().as_str().into()))
    }

    /// LensNet's scores of a working context over the history, its entries given by first token, I64 `[W]`, and level, U32
    /// `[W]`: F32 `[W]` in −1 to 1, above 0 for a closer look, below 0 for a coarser one; tokens score 0 at most, gists of the topmost
    /// level 0 at least.
    pub fn focus_scores(
        &self,
        start: TensorView<'_>,
        lod: TensorView<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.raw.focus_scores(start, lod, out).into_result()
    }

    /// Edits a working context over the history: `{budget, protected, allocator, seed, entries, anew, tag}`, all but `budget`
    /// optional. The session holds one context: begun as fine as the budget allows, with the newest `protected` tokens as tokens;
    /// gone on with in the next call, when tokens that were appended come in as tokens, and what scores lowest collapses where there
    /// is no room for them. `entries`, `[[start, lod], …]`, begins one with these instead, `anew` one of the whole history. `allocator`
    /// has the settings of the plugin's allocator, `{expand_threshold, collapse_threshold, max_edits, cooldown, rounds, kind}`, unless
    /// [`crate::Host::allocate`] chooses; `seed` is of what is drawn.
    ///
    /// Scores are LensNet's, or one for each entry, new tokens included, F32 `[W]`; entries that edits make score 0 then.
    ///
    /// The answer: `{entries, room, edits, focus_allocator}`: the context now, the collapses that made room, and the edits, `{action,
    /// start, lod, score, age, cost_before, cost_after}` each; what the event `focus_allocator` says: `{tag, source (lensnet or host),
    /// allocator (plugin or host), edits, num_expand, num_collapse, num_room, swap_rate, wc_length_before, wc_length, utilization,
    /// residency_mean, residency_p95, score_mean, score_std, score_abs_mean, score_min, score_max}`.
    pub fn refocus(&self, params: &Value, scores: Option<TensorView<'_>>) -> Result<Value> {
        let scores = scores.unwrap_or_else(|| TensorView::of::<f32>(&[]));
        json(self.raw.refocus(params.to_string().as_str().into(), scores))
    }
}
