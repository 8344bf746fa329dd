//! The one place where the plugin meets the ABI: the exported module, and a session behind a guard.
//!
//! Every entry does the same four things: refuse if an earlier call panicked, check the views that came in, call the
//! plain-Rust [`Session`], turn its error into the ABI's. A panic inside is caught here. The call that panicked answers
//! `Internal` with the panic's message, every later one `Poisoned`: what the session holds may be half-changed, and
//! nobody should read it.
//!
//! Nothing else in the plugin knows the ABI's types, so another ABI would replace this file and its folder alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi_stable::export_root_module;
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{RResult, RStr, RString, RVec};
use megacontext_lora_abi::dlpack::READ_ONLY;
use megacontext_lora_abi::raw::{
    HostBox, PluginModule, PluginModuleRef, RawBuildInfo, RawSession, RawSession_TO, SessionBox,
};
use megacontext_lora_abi::tensor::{DType, check_disjoint};
use megacontext_lora_abi::{
    ABI_REVISION, AbiError, ContextView, ErrorKind, OwnedTensor, TensorError, TensorView, TensorViewMut,
    VERSION_BYTES,
};
use serde_json::Value;

use crate::error::{Kind, PluginError};
use crate::fault;
use crate::host::{self, HostApi};
use crate::jobs;
use crate::learned::Learned;
use crate::session::Session;

mod context;
mod lending;
mod tensors;

use context::OwnedContext;
use lending::Lending;

/// The version line, read by a host before anything that depends on a layout.
#[unsafe(export_name = "megacontext_lora_abi_line")]
pub static ABI_LINE: [u8; VERSION_BYTES.len()] = VERSION_BYTES;

/// What the plugin can do besides its jobs, the devices that it has apart.
const CAPABILITIES: &[&str] = &[
    "session:embed",
    "session:rope_tables",
    "session:context_tables",
    "session:logits",
    "session:nll",
    "session:lora_delta",
    "session:parameter",
    "session:shared_parameter",
    "session:phases",
    "session:adapters",
    "session:tree",
    "session:focus",
    "host:parameters",
    "model:llama",
    "model:mistral",
    "model:qwen2",
    "model:qwen3",
    "model:smollm3",
    "model:gpt_neox",
    "model:gemma3_text",
    "model:nanochat",
    "rope:linear",
    "rope:ntk",
    "rope:dynamic",
    "rope:yarn",
    "rope:longrope",
    "rope:llama3",
    "rope:gaussian",
    "rope:sigma",
    "attention:dense",
    "attention:s2",
    "adapter:peft",
];

#[export_root_module]
fn root_module() -> PluginModuleRef {
    PluginModule { abi_revision: ABI_REVISION, build_info, capabilities, open_session }.leak_into_prefix()
}

extern "C" fn build_info() -> RawBuildInfo {
    let mut cpu_features: RVec<RString> =
        env!("MEGACONTEXT_TARGET_FEATURES").split(',').filter(|f| !f.is_empty()).map(RString::from).collect();
    cpu_features
        .extend(detected_features().into_iter().map(|f| RString::from(format!("{f} (found at run time)"))));
    RawBuildInfo {
        crate_version: env!("CARGO_PKG_VERSION").into(),
        rustc: env!("MEGACONTEXT_RUSTC").into(),
        target: env!("MEGACONTEXT_TARGET").into(),
        profile: env!("MEGACONTEXT_PROFILE").into(),
        cpu_features,
    }
}

/// CPU features that kernels choose by when they run.
fn detected_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut found = Vec::new();
        for (name, there) in [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ] {
            if there {
                found.push(name);
            }
        }
        found
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

extern "C" fn capabilities() -> RVec<RString> {
    let jobs = jobs::KINDS.iter().map(|kind| RString::from(format!("job:{kind}")));
    let devices = || jobs::device::capabilities().into_iter().map(RString::from).collect::<Vec<_>>();
    // No panic crosses, whatever a driver does.
    let devices = catch_unwind(devices).unwrap_or_else(|_| vec!["device:cpu".into()]);
    jobs.chain(CAPABILITIES.iter().map(|name| RString::from(*name))).chain(devices).collect()
}

extern "C" fn open_session(config_json: RStr<'_>, host: HostBox) -> RResult<SessionBox, AbiError> {
    let open = || {
        let config = parse("config", config_json)?;
        Session::open(config, Arc::new(HostProxy(host)))
    };
    let opened = catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|panic| {
        Err(PluginError::internal(format!("opening the session panicked: {}", panic_text(&*panic))))
    });
    opened
        .map(|session| RawSession_TO::from_value(SessionImpl::new(session), TD_Opaque))
        .map_err(abi_error)
        .into()
}

/// The host's callbacks as the plugin sees them.
struct HostProxy(HostBox);

impl HostApi for HostProxy {
    fn event(&self, kind: &str, json: &Value) {
        fault::at(kind);
        self.0.event(kind.into(), json.to_string().as_str().into());
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }

    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, PluginError> {
        let documents = self.0.documents(split.into(), start, count).into_result();
        let documents = documents.map_err(|e| {
            // What the adaptor says for a host whose callback panicked.
            let kind = if e.kind() == ErrorKind::Cancelled { Kind::Cancelled } else { Kind::Data };
            PluginError::new(kind, format!("the host's documents: {e}"))
        })?;
        Ok(documents.into_iter().map(RString::into_string).collect())
    }

    fn allocate(&self, json: &Value) -> Result<Option<Value>, PluginError> {
        let answer = self.0.allocate(json.to_string().as_str().into()).into_result();
        let answer = answer.map_err(|e| PluginError::usage(e.to_string()))?.into_option();
        answer.map(|json| parse("answer", json.as_rstr())).transpose()
    }

    fn phase_entered(&self, json: &Value) -> host::Answer {
        answer(self.0.phase_entered(json.to_string().as_str().into()))
    }

    fn phase_left(&self, json: &Value) -> host::Answer {
        answer(self.0.phase_left(json.to_string().as_str().into()))
    }

    fn hook(&self, kind: &str, json: &Value) -> host::Answer {
        answer(self.0.hook(kind.into(), json.to_string().as_str().into()))
    }

    fn parameters(&self, when: &str, json: &Value, learned: &Learned) {
        let lending = Lending(learned);
        self.0.parameters(when.into(), json.to_string().as_str().into(), lending.lent());
    }
}

fn answer(answer: megacontext_lora_abi::Answer) -> host::Answer {
    use megacontext_lora_abi::Answer as Given;
    match answer {
        Given::Continue => host::Answer::Continue,
        Given::RollBack => host::Answer::RollBack,
        Given::Stop => host::Answer::Stop,
    }
}

fn abi_error(error: PluginError) -> AbiError {
    let kind = match error.kind {
        Kind::Usage => ErrorKind::Usage,
        Kind::Data => ErrorKind::Data,
        Kind::Model => ErrorKind::Model,
        Kind::Adapter => ErrorKind::Adapter,
        Kind::Io => ErrorKind::Io,
        Kind::Memory => ErrorKind::Memory,
        Kind::Cancelled => ErrorKind::Cancelled,
        Kind::Poisoned => ErrorKind::Poisoned,
        Kind::Internal => ErrorKind::Internal,
    };
    AbiError::new(kind, error.message).with_context(error.context)
}

/// A view that was refused is the caller's mistake.
impl From<TensorError> for PluginError {
    fn from(error: TensorError) -> Self {
        Self::usage(error.to_string())
    }
}

/// A request is an object; serde alone would take a list for a struct with defaults.
fn parse(what: &str, json: RStr<'_>) -> Result<Value, PluginError> {
    match serde_json::from_str(json.as_str()) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(other) => Err(PluginError::usage(format!("{what}: expected a JSON object, got {other}"))),
        Err(error) => Err(PluginError::usage(format!("{what}: not JSON: {error}"))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// A session with its guard.
struct SessionImpl {
    session: Session,
    poisoned: AtomicBool,
}

impl SessionImpl {
    fn new(session: Session) -> Self {
        Self { session, poisoned: AtomicBool::new(false) }
    }

    /// The guard around every entry.
    fn guard<T>(
        &self,
        entry: &str,
        call: impl FnOnce(&Session) -> Result<T, PluginError>,
    ) -> RResult<T, AbiError> {
        let poisoned = || {
            PluginError::poisoned(format!(
                "{entry}: an earlier call panicked; this session is no longer usable"
            ))
        };
        if self.poisoned.load(Ordering::Acquire) {
            return RResult::RErr(abi_error(poisoned()));
        }
        let entered = || {
            fault::at(entry);
            call(&self.session)
        };
        let result = catch_unwind(AssertUnwindSafe(entered)).unwrap_or_else(|panic| {
            self.poisoned.store(true, Ordering::Release);
            Err(PluginError::internal(format!(
                "{entry} panicked: {}; this session is no longer usable",
                panic_text(&*panic)
            )))
        });
        // Another thread may have panicked meanwhile over the state that this call has read.
        if self.poisoned.load(Ordering::Acquire) && result.is_ok() {
            return RResult::RErr(abi_error(poisoned()));
        }
        result.map_err(abi_error).into()
    }

    fn guard_json(
        &self,
        entry: &str,
        call: impl FnOnce(&Session) -> Result<Value, PluginError>,
    ) -> RResult<RString, AbiError> {
        self.guard(entry, |s| Ok(RString::from(call(s)?.to_string())))
    }
}

impl RawSession for SessionImpl {
    fn run(&self, kind: RStr<'_>, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("run", |s| s.run(kind.as_str(), parse("parameters", params_json)?))
    }

    fn describe(&self) -> RResult<RString, AbiError> {
        self.guard_json("describe", Session::describe)
    }

    fn embed(&self, tokens: TensorView<'_>, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("embed", |s| {
            check_disjoint(&[("out", out.memory())], &[("tokens", tokens.memory())])?;
            let tokens = tensors::read::<u32>(s.device(), &tokens, "tokens", &[None])?;
            let dims = [Some(tokens.len()), None];
            tensors::fill(s.device(), &mut out, "out", &dims, |values| s.embed(&tokens, values))
        })
    }

    fn rope_tables(
        &self,
        mu: TensorView<'_>,
        sigma: TensorView<'_>,
        mut out_cos: TensorViewMut<'_>,
        mut out_sin: TensorViewMut<'_>,
    ) -> RResult<(), AbiError> {
        self.guard("rope_tables", |s| {
            check_disjoint(
                &[("out_cos", out_cos.memory()), ("out_sin", out_sin.memory())],
                &[("mu", mu.memory()), ("sigma", sigma.memory())],
            )?;
            let mu = tensors::read::<f64>(s.device(), &mu, "mu", &[None])?;
            let sigma = tensors::read::<f64>(s.device(), &sigma, "sigma", &[None])?;
            let sigma = (!sigma.is_empty()).then_some(&*sigma);
            let dims = [Some(mu.len()), None];
            tensors::fill(s.device(), &mut out_cos, "out_cos", &dims, |cos| {
                tensors::fill(s.device(), &mut out_sin, "out_sin", &dims, |sin| {
                    s.rope_tables(&mu, sigma, cos, sin)
                })
            })
        })
    }

    fn logits(&self, context: ContextView<'_>, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("logits", |s| {
            let context = OwnedContext::read(s.device(), &context, &[("out", out.memory())])?;
            let dims = [Some(context.length), None];
            tensors::fill(s.device(), &mut out, "out", &dims, |values| s.logits(context.context(), values))
        })
    }

    fn nll(&self, context: ContextView<'_>, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("nll", |s| {
            let context = OwnedContext::read(s.device(), &context, &[("out", out.memory())])?;
            let dims = [Some(context.length)];
            tensors::fill(s.device(), &mut out, "out", &dims, |values| s.nll(context.context(), values))
        })
    }

    fn lora_delta(&self, module: RStr<'_>, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("lora_delta", |s| {
            // A matrix of the right size the wrong way round must not pass; no such factor is the session's error.
            let rows = s.parameter(&format!("{module}.lora_B.weight")).ok().map(|(shape, _)| shape[0]);
            tensors::fill(s.device(), &mut out, "out", &[rows, None], |values| {
                s.lora_delta(module.as_str(), values)
            })
        })
    }

    fn parameter(&self, name: RStr<'_>) -> RResult<OwnedTensor, AbiError> {
        self.guard("parameter", |s| {
            let (shape, values) = s.parameter(name.as_str())?;
            Ok(OwnedTensor::new(values, &shape)?)
        })
    }

    fn shared_parameter(&self, name: RStr<'_>) -> RResult<OwnedTensor, AbiError> {
        self.guard("shared_parameter", |s| {
            let lent = s.shared_parameter(name.as_str())?;
            let shared = lent.shared();
            let dtype = match shared.dtype() {
                candle_core::DType::F32 => DType::F32,
                candle_core::DType::BF16 => DType::Bf16,
                other => return Err(PluginError::internal(format!("a parameter stored as {other:?}"))),
            };
            let (data, shape) = (shared.data().cast_mut(), shared.shape().to_vec());
            // SAFETY: `lent` keeps the values and holds off whoever would write them; the host is told not to.
            Ok(unsafe { OwnedTensor::of_owner(lent, dtype, data, &shape, READ_ONLY) })
        })
    }

    fn parameter_groups(&self) -> RResult<RString, AbiError> {
        self.guard_json("parameter_groups", Session::parameter_groups)
    }

    fn enter_phase(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("enter_phase", |s| s.enter_phase(parse("parameters", params_json)?))
    }

    fn leave_phase(&self) -> RResult<RString, AbiError> {
        self.guard_json("leave_phase", Session::leave_phase)
    }

    fn step(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("step", |s| s.step(parse("parameters", params_json)?))
    }

    fn evaluate(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("evaluate", |s| s.evaluate(parse("parameters", params_json)?))
    }

    fn save(&self, path: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("save", |s| s.save(Path::new(path.as_str())))
    }

    fn resume(&self, path: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("resume", |s| s.resume(Path::new(path.as_str())))
    }

    fn export(&self, path: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("export", |s| s.export(Path::new(path.as_str())))
    }

    fn check(&self) -> RResult<(), AbiError> {
        self.guard("check", |_| Ok(()))
    }

    fn context_tables(
        &self,
        context: ContextView<'_>,
        mut out_cos: TensorViewMut<'_>,
        mut out_sin: TensorViewMut<'_>,
    ) -> RResult<(), AbiError> {
        self.guard("context_tables", |s| {
            let outs = [("out_cos", out_cos.memory()), ("out_sin", out_sin.memory())];
            let context = OwnedContext::read(s.device(), &context, &outs)?;
            let dims = [Some(context.length), None];
            tensors::fill(s.device(), &mut out_cos, "out_cos", &dims, |cos| {
                tensors::fill(s.device(), &mut out_sin, "out_sin", &dims, |sin| {
                    s.context_tables(context.context(), cos, sin)
                })
            })
        })
    }

    fn load_adapter(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("load_adapter", |s| s.load_adapter(parse("parameters", params_json)?))
    }

    fn set_adapter(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("set_adapter", |s| s.set_adapter(parse("parameters", params_json)?))
    }

    fn unload_adapter(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("unload_adapter", |s| s.unload_adapter(parse("parameters", params_json)?))
    }

    fn merge_adapter(&self) -> RResult<RString, AbiError> {
        self.guard_json("merge_adapter", Session::merge_adapter)
    }

    fn unmerge_adapter(&self) -> RResult<RString, AbiError> {
        self.guard_json("unmerge_adapter", Session::unmerge_adapter)
    }

    fn open_tree(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("open_tree", |s| s.open_tree(parse("parameters", params_json)?))
    }

    fn tree_append(&self, tokens: TensorView<'_>) -> RResult<RString, AbiError> {
        self.guard_json("tree_append", |s| {
            s.tree_append(&tensors::read::<u32>(s.device(), &tokens, "tokens", &[None])?)
        })
    }

    fn tree_gists(&self, lod: u32, first: u64, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("tree_gists", |s| {
            let width = s.tree_sizes("tree_gists")?.1;
            let dims = [None, Some(width)];
            tensors::fill(s.device(), &mut out, "out", &dims, |values| s.tree_gists(lod, first, values))
        })
    }

    fn gists(&self, entries: TensorView<'_>, lod: u32, mut out: TensorViewMut<'_>) -> RResult<(), AbiError> {
        self.guard("gists", |s| {
            check_disjoint(&[("out", out.memory())], &[("entries", entries.memory())])?;
            let (block, width) = s.tree_sizes("gists")?;
            let dims = [None, Some(block), Some(width)];
            let values = tensors::read::<f32>(s.device(), &entries, "entries", &dims)?;
            let dims = [Some(entries.shape()[0]), Some(width)];
            tensors::fill(s.device(), &mut out, "out", &dims, |gists| s.gists(&values, lod, gists))
        })
    }

    fn save_tree(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("save_tree", |s| s.save_tree(parse("parameters", params_json)?))
    }

    fn open_lens(&self, params_json: RStr<'_>) -> RResult<RString, AbiError> {
        self.guard_json("open_lens", |s| s.open_lens(parse("parameters", params_json)?))
    }

    fn focus_scores(
        &self,
        start: TensorView<'_>,
        lod: TensorView<'_>,
        mut out: TensorViewMut<'_>,
    ) -> RResult<(), AbiError> {
        self.guard("focus_scores", |s| {
            let inputs = [("start", start.memory()), ("lod", lod.memory())];
            check_disjoint(&[("out", out.memory())], &inputs)?;
            let start = tensors::read::<i64>(s.device(), &start, "start", &[None])?;
            let dims = [Some(start.len())];
            let lod = tensors::read::<u32>(s.device(), &lod, "lod", &dims)?;
            tensors::fill(s.device(), &mut out, "out", &dims, |scores| s.focus_scores(&start, &lod, scores))
        })
    }

    fn refocus(&self, params_json: RStr<'_>, scores: TensorView<'_>) -> RResult<RString, AbiError> {
        self.guard_json("refocus", |s| {
            let scores = tensors::read::<f32>(s.device(), &scores, "scores", &[None])?;
            s.refocus(parse("parameters", params_json)?, (!scores.is_empty()).then_some(&*scores))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use megacontext_lora_abi::host::host_box;

    fn session() -> SessionImpl {
        struct Silent;
        impl HostApi for Silent {
            fn event(&self, _: &str, _: &Value) {}
            fn cancelled(&self) -> bool {
                false
            }
        }
        SessionImpl::new(Session::open(serde_json::json!({}), Arc::new(Silent)).unwrap())
    }

    fn kind<T>(answer: RResult<T, AbiError>) -> ErrorKind {
        match answer.into_result() {
            Ok(_) => panic!("expected an error"),
            Err(error) => error.kind(),
        }
    }

    #[test]
    fn a_panic_is_an_error_once_and_poisons_every_entry_after_that() {
        let session = session();
        session.describe().into_result().unwrap();
        session.check().into_result().unwrap();
        let panicked = session.guard::<()>("run", |_| panic!("injected {}", 1)).into_result().unwrap_err();
        assert_eq!(panicked.kind(), ErrorKind::Internal);
        assert!(panicked.message().contains("run panicked: injected 1"), "{panicked}");

        let boxed: SessionBox = RawSession_TO::from_value(session, TD_Opaque);
        let (tokens, mut out, mut other) = ([0u32; 2], [0f32; 2], [0f32; 2]);
        let none = [0f64; 0];
        let view = || TensorView::of(&tokens);
        let context = ContextView::tokens(&tokens);
        let answers = [
            kind(boxed.run("extend".into(), "{}".into())),
            kind(boxed.describe()),
            kind(boxed.embed(view(), TensorViewMut::of(&mut out))),
            kind(boxed.rope_tables(
                TensorView::of(&none),
                TensorView::of(&none),
                TensorViewMut::of(&mut out),
                TensorViewMut::of(&mut other),
            )),
            kind(boxed.logits(context, TensorViewMut::of(&mut out))),
            kind(boxed.nll(context, TensorViewMut::of(&mut out))),
            kind(boxed.lora_delta("x".into(), TensorViewMut::of(&mut out))),
            kind(boxed.parameter("x".into())),
            kind(boxed.parameter_groups()),
            kind(boxed.enter_phase("{}".into())),
            kind(boxed.leave_phase()),
            kind(boxed.step("{}".into())),
            kind(boxed.evaluate("{}".into())),
            kind(boxed.save("x".into())),
            kind(boxed.resume("x".into())),
            kind(boxed.export("x".into())),
            kind(boxed.check()),
            kind(boxed.load_adapter("{}".into())),
            kind(boxed.set_adapter("{}".into())),
            kind(boxed.unload_adapter("{}".into())),
            kind(boxed.merge_adapter()),
            kind(boxed.unmerge_adapter()),
            kind(boxed.open_tree("{}".into())),
            kind(boxed.tree_append(TensorView::of(&none))),
            kind(boxed.tree_gists(1, 0, TensorViewMut::of(&mut out))),
            kind(boxed.gists(TensorView::of(&none), 0, TensorViewMut::of(&mut out))),
            kind(boxed.save_tree("{}".into())),
            kind(boxed.open_lens("{}".into())),
            kind(boxed.focus_scores(TensorView::of(&none), view(), TensorViewMut::of(&mut out))),
            kind(boxed.refocus("{}".into(), TensorView::of(&none))),
        ];
        assert_eq!(answers, [ErrorKind::Poisoned; 30]);
    }

    #[test]
    fn a_panic_poisons_its_own_session_only() {
        let (one, two) = (session(), session());
        let _ = one.guard::<()>("run", |_| panic!("injected"));
        assert_eq!(kind(one.describe()), ErrorKind::Poisoned);
        two.describe().into_result().unwrap();
    }

    #[test]
    fn what_is_not_json_is_a_usage_error() {
        assert_eq!(kind(session().run("extend".into(), "{".into())), ErrorKind::Usage);
        assert_eq!(kind(session().run("extend".into(), "[]".into())), ErrorKind::Usage);
        assert_eq!(kind(open_session("[".into(), host_box(()))), ErrorKind::Usage);
        assert_eq!(kind(open_session(r#"{"bas":"x"}"#.into(), host_box(()))), ErrorKind::Usage);
    }

    #[test]
    fn arguments_that_share_memory_are_refused() {
        let mut data = [0u32; 4];
        let pointer = data.as_mut_ptr();
        let tokens = TensorView::of(&data);
        // SAFETY: the call refuses before it writes; this is what the test shows.
        let out = unsafe {
            TensorViewMut::from_raw_parts(
                pointer.cast(),
                megacontext_lora_abi::DType::F32,
                megacontext_lora_abi::Device::CPU,
                &[4, 1],
                &[1, 1],
            )
        };
        let error = session().embed(tokens, out).into_result().unwrap_err();
        assert_eq!(error.to_string(), "out and tokens share memory");
    }

    #[test]
    fn the_module_names_its_jobs() {
        let names: Vec<String> = capabilities().into_iter().map(String::from).collect();
        assert!(jobs::KINDS.iter().all(|kind| names.contains(&format!("job:{kind}"))));
        assert!(build_info().rustc.starts_with("rustc "));
    }
}
