//! The ABI itself: trait objects and the root module, in abi_stable's types.
//!
//! A host needs none of this: it uses [`crate::Plugin`], [`crate::Session`] and [`crate::Host`]. A plugin implements
//! [`RawSession`] and exports [`PluginModule`].
//!
//! How it grows: a method or field is added at the end, behind `last_prefix_field`, with a default for partners that do
//! not have it, and leaves [`crate::ABI_REVISION`] as it is. Anything else raises the revision. JSON objects may gain keys
//! at any time; who reads one from the other side ignores keys that it does not know, except where it is a request
//! (config, params), whose unknown keys are errors.
//!
//! Panics: nothing unwinds through these calls. abi_stable aborts the process on one, so the plugin guards every method
//! (a panicked session answers `Poisoned`) and [`crate::Host`] implementations are guarded by the adaptor.

// `sabi_trait` makes items that cannot be documented from here (everything written here is), and impls inside a const.
#![allow(missing_docs, non_local_definitions)]

use crate::context::ContextView;
use crate::dlpack::OwnedTensor;
use crate::error::AbiError;
use crate::host::Answer;
use crate::parameters::ParametersRef;
use crate::tensor::{TensorView, TensorViewMut};
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, ROption, RResult, RStr, RString, RVec};
use abi_stable::{StableAbi, package_version_strings, sabi_trait};

/// What the plugin asks of its host and tells it. See [`crate::Host`] for what each means.
#[sabi_trait]
pub trait RawHost: Send + Sync + 'static {
    /// Something happened: a kind (`progress`, `log`, …) and a JSON object.
    fn event(&self, kind: RStr<'_>, json: RStr<'_>);
    /// Whether the running job should stop at the next step.
    #[sabi(last_prefix_field)]
    fn cancelled(&self) -> bool;
    /// Documents `start .. start + count` of a split, fewer at its end.
    fn documents(&self, _split: RStr<'_>, _start: u64, _count: u64) -> RResult<RVec<RString>, AbiError> {
        RResult::ROk(RVec::new())
    }
    /// A training phase began.
    fn phase_entered(&self, _json: RStr<'_>) -> Answer {
        Answer::Continue
    }
    /// A training phase ended; the answer decides what becomes of it.
    fn phase_left(&self, _json: RStr<'_>) -> Answer {
        Answer::Continue
    }
    /// Edits of a working context, JSON; none where the plugin's allocator is to choose.
    fn allocate(&self, _json: RStr<'_>) -> RResult<ROption<RString>, AbiError> {
        RResult::ROk(ROption::RNone)
    }
    /// A moment of a run of alternating optimisation, by its kind; the answer decides how it goes on.
    fn hook(&self, _kind: RStr<'_>, _json: RStr<'_>) -> Answer {
        Answer::Continue
    }
    /// The parameters of a job that stands between two phases, before `when` (`phase_entered`, `phase_left`) is asked.
    fn parameters(&self, _when: RStr<'_>, _json: RStr<'_>, _parameters: ParametersRef<'_>) {}
}

/// A host, owned by the session that it was given to.
pub type HostBox = RawHost_TO<RBox<()>>;

/// One opened model with its jobs. See [`crate::Session`] for what each means.
#[sabi_trait]
pub trait RawSession: Send + Sync + 'static {
    /// Runs a whole job, one of those that `describe` lists.
    fn run(&self, kind: RStr<'_>, params_json: RStr<'_>) -> RResult<RString, AbiError>;
    /// Sizes and state, JSON.
    fn describe(&self) -> RResult<RString, AbiError>;
    /// Embeddings of tokens: U32 `[T]` to F32 `[T, E]`.
    fn embed(&self, tokens: TensorView<'_>, out: TensorViewMut<'_>) -> RResult<(), AbiError>;
    /// RoPE tables of positions: F64 `[N]` (sigma may be empty for all 0) to F32 `[N, D/2]` each.
    fn rope_tables(
        &self,
        mu: TensorView<'_>,
        sigma: TensorView<'_>,
        out_cos: TensorViewMut<'_>,
        out_sin: TensorViewMut<'_>,
    ) -> RResult<(), AbiError>;
    /// Logits of every entry, F32 `[T, V]`.
    fn logits(&self, context: ContextView<'_>, out: TensorViewMut<'_>) -> RResult<(), AbiError>;
    /// Negative log-likelihood of every entry's target in nats, F32 `[T]`, NaN where none is scored.
    fn nll(&self, context: ContextView<'_>, out: TensorViewMut<'_>) -> RResult<(), AbiError>;
    /// What LoRA adds to one module's weight, scale included, F32 `[out, in]`.
    fn lora_delta(&self, module: RStr<'_>, out: TensorViewMut<'_>) -> RResult<(), AbiError>;
    /// A copy of one parameter by its name, F32.
    fn parameter(&self, name: RStr<'_>) -> RResult<OwnedTensor, AbiError>;
    /// The parameter groups, JSON.
    fn parameter_groups(&self) -> RResult<RString, AbiError>;
    /// Begins a phase: which groups learn, and how.
    fn enter_phase(&self, params_json: RStr<'_>) -> RResult<RString, AbiError>;
    /// Ends the phase.
    fn leave_phase(&self) -> RResult<RString, AbiError>;
    /// One optimiser step on the batch given.
    fn step(&self, params_json: RStr<'_>) -> RResult<RString, AbiError>;
    /// Evaluates without learning.
    fn evaluate(&self, params_json: RStr<'_>) -> RResult<RString, AbiError>;
    /// Writes a checkpoint folder.
    fn save(&self, path: RStr<'_>) -> RResult<RString, AbiError>;
    /// Takes up a checkpoint folder.
    fn resume(&self, path: RStr<'_>) -> RResult<RString, AbiError>;
    /// Writes the adapter folder.
    #[sabi(last_prefix_field)]
    fn export(&self, path: RStr<'_>) -> RResult<RString, AbiError>;
    /// Does nothing but what every call does: answers `Poisoned` after a panic. A plugin without it says nothing.
    fn check(&self) -> RResult<(), AbiError> {
        RResult::ROk(())
    }
    /// Reads an adapter and keeps it beside the model.
    fn load_adapter(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("load_adapter"))
    }
    /// Puts another adapter in use, or none.
    fn set_adapter(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("set_adapter"))
    }
    /// Forgets an adapter.
    fn unload_adapter(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("unload_adapter"))
    }
    /// Merges the LoRA in use into the weights.
    fn merge_adapter(&self) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("merge_adapter"))
    }
    /// Takes it out again.
    fn unmerge_adapter(&self) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("unmerge_adapter"))
    }
    /// RoPE tables of a context's entries, F32 `[T, W/2]` each.
    fn context_tables(
        &self,
        _context: ContextView<'_>,
        _out_cos: TensorViewMut<'_>,
        _out_sin: TensorViewMut<'_>,
    ) -> RResult<(), AbiError> {
        RResult::RErr(AbiError::not_there("context_tables"))
    }
    /// Begins a history: a gist tree and the network that makes its gists.
    fn open_tree(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("open_tree"))
    }
    /// Adds tokens, U32 `[T]`, to it.
    fn tree_append(&self, _tokens: TensorView<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("tree_append"))
    }
    /// Gists of nodes of a level, F32 `[N, E]`.
    fn tree_gists(&self, _lod: u32, _first: u64, _out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        RResult::RErr(AbiError::not_there("tree_gists"))
    }
    /// Gists of blocks: F32 `[N, K, E]` to F32 `[N, E]`.
    fn gists(&self, _entries: TensorView<'_>, _lod: u32, _out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        RResult::RErr(AbiError::not_there("gists"))
    }
    /// Stores the history in a folder.
    fn save_tree(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("save_tree"))
    }
    /// Reads a LensNet for the open history.
    fn open_lens(&self, _params_json: RStr<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("open_lens"))
    }
    /// Scores of entries over the history: their first tokens, I64 `[W]`, and levels, U32 `[W]`, to F32 `[W]`.
    fn focus_scores(
        &self,
        _start: TensorView<'_>,
        _lod: TensorView<'_>,
        _out: TensorViewMut<'_>,
    ) -> RResult<(), AbiError> {
        RResult::RErr(AbiError::not_there("focus_scores"))
    }
    /// Edits a working context by scores: F32 `[W]`, or `[0]` for LensNet's.
    fn refocus(&self, _params_json: RStr<'_>, _scores: TensorView<'_>) -> RResult<RString, AbiError> {
        RResult::RErr(AbiError::not_there("refocus"))
    }
    /// One parameter by its name, as it is stored, without a copy.
    fn shared_parameter(&self, _name: RStr<'_>) -> RResult<OwnedTensor, AbiError> {
        RResult::RErr(AbiError::not_there("shared_parameter"))
    }
}

/// A session, owned by the host.
pub type SessionBox = RawSession_TO<RBox<()>>;

/// How a plugin was built.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct RawBuildInfo {
    /// Version of the plugin's crate.
    pub crate_version: RString,
    /// `rustc --version` of the compiler.
    pub rustc: RString,
    /// Target triple.
    pub target: RString,
    /// Cargo profile.
    pub profile: RString,
    /// CPU features: compiled in, and found at run time.
    pub cpu_features: RVec<RString>,
}

/// What the library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef, prefix_fields = PluginModulePrefix)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// [`crate::ABI_REVISION`] at the time of building.
    pub abi_revision: u32,
    /// How it was built.
    pub build_info: extern "C" fn() -> RawBuildInfo,
    /// What it can do, by name.
    pub capabilities: extern "C" fn() -> RVec<RString>,
    /// Opens a session.
    #[sabi(last_prefix_field)]
    pub open_session: extern "C" fn(config_json: RStr<'_>, host: HostBox) -> RResult<SessionBox, AbiError>,
}

impl RootModule for PluginModuleRef {
    abi_stable::declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "megacontext_lora";
    const NAME: &'static str = "megacontext-lora";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
