//! The host's side of the conversation, as a plain Rust trait.
//!
//! Implement [`Host`] for a struct of yours and give it to [`crate::Plugin::open_session`]. Every method has a default;
//! `()` is a host that hears nothing and never interrupts. Methods are called from the thread that runs the job and from
//! the plugin's own, so keep them short.
//!
//! A panic in a callback does not cross the ABI: it is caught, and from then on [`Host::cancelled`] answers true and the
//! questions about phases [`Answer::Stop`], so that the job ends in good order with `Cancelled`.
//!
//! Phases: a session asks [`Host::phase_entered`] and [`Host::phase_left`] whenever the host enters and leaves a phase; the
//! job `extend` asks once before it trains and once when the result has been measured. What an answer does is at
//! [`Answer`]. `cancelled` is for stopping anywhere else.
//!
//! Focus: whoever has a focus allocator of its own implements [`Host::allocate`].

use crate::error::{AbiError, ErrorKind};
use crate::parameters::{JobParameters, ParametersRef};
use crate::raw::{HostBox, RawHost, RawHost_TO};
use abi_stable::StableAbi;
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{ROption, RResult, RStr, RString, RVec};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// What becomes of a phase. What an answer does depends on where it is given.
///
/// In [`Host::phase_entered`]:
///
/// | | a session's phase | the job `extend` | a phase of the job `train` |
/// |---|---|---|---|
/// | `Continue` | the phase is open | training begins | the phase begins |
/// | `RollBack` | the call ends with `Cancelled`; the session is as it was before | the job ends with `Cancelled` before training | the phase is left out |
/// | `Stop` | as `RollBack` | as `RollBack` | the job ends with `Cancelled`, to be resumed |
///
/// In [`Host::phase_left`]:
///
/// | | a session's phase | the job `extend` | a phase of the job `train` |
/// |---|---|---|---|
/// | `Continue` | the phase ends, what was learned stays | the adapter and the report are written | it is kept, or undone by the run's own bounds |
/// | `RollBack` | the phase ends; parameters, LoRA, positions, optimiser state and count of steps are as before it | the job ends with `Cancelled`, no adapter is written | it is undone |
/// | `Stop` | as `Continue`: the phase ends, what was learned stays; the session stays open | as `RollBack` | as `Continue`, then the job ends with `Cancelled`, to be resumed |
///
/// `extend` keeps its checkpoints whatever the answer: a run resumed in the same folder goes on from there and asks again.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Go on; keep what was learned.
    Continue,
    /// Undo the phase.
    RollBack,
    /// Go no further.
    Stop,
}

/// What a plugin tells its host and asks of it.
pub trait Host: Send + Sync + 'static {
    /// Something happened. Kinds: `log` {message}, `device` {device, description, asked, note, text}, `plan`, `progress` {job, stage, stages, step, steps, loss, lr,
    /// tokens_per_s, eta_s, context}, `evaluation` {model, context, attention, perplexity}, `checkpoint` {path, step},
    /// `focus_allocator` (see [`crate::Session::refocus`]), `validation` and `cell` {text, …} of trainings and sweeps, `phase` {phase,
    /// cycle, kept, text, …} and `labels_stale` {gist_version} of the job `train`, `label` of the jobs `train` and `train_lensnet` {round, document, context, kind,
    /// entries, nll_now} with {expands, collapses}, how many were measured, for `counterfactual`, and {losses} for `preference`,
    /// where `entries` and `losses` have one number for each variant. A later plugin may send others: ignore what you do not know.
    fn event(&self, kind: &str, json: &str) {
        let _ = (kind, json);
    }

    /// Whether the running job should stop; asked at every step.
    fn cancelled(&self) -> bool {
        false
    }

    /// Documents `start .. start + count` of `split`, in an order that stays; fewer than `count` means that there are no
    /// more.
    ///
    /// A job asks for every entry `host:NAME` of its `data`, with NAME as the split, from the first document to the last,
    /// page by page, before anything else happens; what it holds out for evaluation it chooses itself. A resumed run asks
    /// again and refuses other text than it began with. An error ends the job with `Data`.
    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, AbiError> {
        let _ = (split, start, count);
        Ok(Vec::new())
    }

    /// Edits of a working context, where the host has a focus allocator of its own; none leaves them to the plugin's. Asked
    /// once in every refocus: by [`crate::Session::refocus`], and by the job `train_lensnet` wherever it chooses a context (a
    /// run that is to be taken up to the same end needs the same answers to the same questions).
    ///
    /// The question: {entries: [[start, lod], …], scores: […], residency: [[age, change], …], budget, protected, block,
    /// levels}: first token and level of every entry, its score in −1 to 1, how many refocuses ago it changed last and how
    /// (`placed`, `expanded`, `collapsed`), W_max, the newest tokens that stay tokens, K, levels above the tokens.
    ///
    /// The answer: {edits: [{action, start, lod}, …]}, made in their order, with `expand` of a gist or `collapse` of the
    /// siblings that begin with this entry; or {entries: [[start, lod], …]}, the context for the same tokens as it should be
    /// in the end. Each edit has to keep the budget, whole siblings and the protected tail; else the call or the job ends with
    /// `Usage`, and nothing has changed. A session may be read from in here.
    fn allocate(&self, json: &str) -> Result<Option<String>, AbiError> {
        let _ = json;
        Ok(None)
    }

    /// A training phase begins: {groups, parameters} from a session, {job, groups, steps} from `extend`, {job, phase, cycle, groups,
    /// steps, gist_version, …} from `train`.
    ///
    /// A session may be read from in here. What would change it (`step`, `enter_phase`, `leave_phase`, `resume`), `save`
    /// and `export` answer `Usage` until this returns, from whichever thread they come.
    fn phase_entered(&self, json: &str) -> Answer {
        let _ = json;
        Answer::Continue
    }

    /// A training phase ended: {groups, steps} from a session, {job, groups, perplexity} from `extend`, {job, phase, cycle, before,
    /// after, kept, verdict, …} from `train`. Nothing learns any
    /// more; the same calls are refused as in [`Host::phase_entered`].
    fn phase_left(&self, json: &str) -> Answer {
        let _ = json;
        Answer::Continue
    }

    /// A moment of the job `train`, beside those that [`Host::phase_entered`] and [`Host::phase_left`] are:
    ///
    /// | kind | when | `RollBack` | `Stop` |
    /// |---|---|---|---|
    /// | `phase_entering` | before the modules are measured for a phase | the phase is left out | the job ends with `Cancelled` |
    /// | `step` | after every optimiser step {step, loss, …} | the phase ends here and is undone | the same, after a checkpoint |
    /// | `evaluation` | a phase has been measured {loss_at_h, …} | the phase is undone | the same |
    /// | `labels_stale` | JT1 was kept: gists are of a new version, labels of the old one are void | the phase is undone | the same |
    /// | `checkpoint` | one was written {path, step} | as `Stop` | the same |
    ///
    /// A run that was stopped goes on from there when it is resumed.
    fn hook(&self, kind: &str, json: &str) -> Answer {
        let _ = (kind, json);
        Answer::Continue
    }

    /// What the job `train` has learned so far, for looking at without a copy. Called right before [`Host::phase_entered`] and
    /// [`Host::phase_left`], with the name of that method as `when` and the same JSON: at `phase_left` the phase has been
    /// measured, unless it failed, and the JSON says what the run's own bounds make of it; [`Host::phase_left`] may still undo it. The
    /// parameters are the job's own and go with the call.
    fn parameters(&self, when: &str, json: &str, parameters: &JobParameters<'_>) {
        let _ = (when, json, parameters);
    }
}

impl Host for () {}

impl<H: Host + ?Sized> Host for std::sync::Arc<H> {
    fn event(&self, kind: &str, json: &str) {
        (**self).event(kind, json);
    }
    fn cancelled(&self) -> bool {
        (**self).cancelled()
    }
    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, AbiError> {
        (**self).documents(split, start, count)
    }
    fn allocate(&self, json: &str) -> Result<Option<String>, AbiError> {
        (**self).allocate(json)
    }
    fn phase_entered(&self, json: &str) -> Answer {
        (**self).phase_entered(json)
    }
    fn phase_left(&self, json: &str) -> Answer {
        (**self).phase_left(json)
    }
    fn hook(&self, kind: &str, json: &str) -> Answer {
        (**self).hook(kind, json)
    }
    fn parameters(&self, when: &str, json: &str, parameters: &JobParameters<'_>) {
        (**self).parameters(when, json, parameters);
    }
}

/// A [`Host`] as the ABI carries it.
struct Adaptor<H> {
    host: H,
    panicked: AtomicBool,
}

impl<H: Host> Adaptor<H> {
    fn guard<R>(&self, otherwise: R, call: impl FnOnce(&H) -> R) -> R {
        if self.panicked.load(Ordering::Relaxed) {
            return otherwise;
        }
        catch_unwind(AssertUnwindSafe(|| call(&self.host))).unwrap_or_else(|_| {
            self.panicked.store(true, Ordering::Relaxed);
            otherwise
        })
    }
}

impl<H: Host> RawHost for Adaptor<H> {
    fn event(&self, kind: RStr<'_>, json: RStr<'_>) {
        self.guard((), |h| h.event(kind.as_str(), json.as_str()));
    }

    fn cancelled(&self) -> bool {
        self.guard(true, Host::cancelled)
    }

    fn documents(&self, split: RStr<'_>, start: u64, count: u64) -> RResult<RVec<RString>, AbiError> {
        let panicked = Err(AbiError::new(ErrorKind::Cancelled, "a callback of the host panicked"));
        self.guard(panicked, |h| h.documents(split.as_str(), start, count))
            .map(|documents| documents.into_iter().map(RString::from).collect())
            .into()
    }

    fn allocate(&self, json: RStr<'_>) -> RResult<ROption<RString>, AbiError> {
        let panicked = Err(AbiError::new(ErrorKind::Cancelled, "a callback of the host panicked"));
        self.guard(panicked, |h| h.allocate(json.as_str()))
            .map(|answer| answer.map(RString::from).into())
            .into()
    }

    fn phase_entered(&self, json: RStr<'_>) -> Answer {
        self.guard(Answer::Stop, |h| h.phase_entered(json.as_str()))
    }

    fn phase_left(&self, json: RStr<'_>) -> Answer {
        self.guard(Answer::Stop, |h| h.phase_left(json.as_str()))
    }

    fn hook(&self, kind: RStr<'_>, json: RStr<'_>) -> Answer {
        self.guard(Answer::Stop, |h| h.hook(kind.as_str(), json.as_str()))
    }

    fn parameters(&self, when: RStr<'_>, json: RStr<'_>, parameters: ParametersRef<'_>) {
        let parameters = JobParameters::new(parameters);
        self.guard((), |h| h.parameters(when.as_str(), json.as_str(), &parameters));
    }
}

/// Puts a host into the box that the ABI takes.
pub fn host_box(host: impl Host) -> HostBox {
    RawHost_TO::from_value(Adaptor { host, panicked: AtomicBool::new(false) }, TD_Opaque)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl Host for Recorder {
        fn event(&self, kind: &str, json: &str) {
            assert_ne!(kind, "panic");
            self.0.lock().unwrap().push(format!("{kind} {json}"));
        }
        fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, AbiError> {
            Ok((start..start + count).map(|i| format!("{split}{i}")).collect())
        }
    }

    #[test]
    fn calls_reach_the_host() {
        let recorder = Arc::new(Recorder::default());
        let boxed = host_box(recorder.clone());
        boxed.event("log".into(), "{}".into());
        assert_eq!(*recorder.0.lock().unwrap(), ["log {}"]);
        let documents = boxed.documents("train".into(), 2, 2).into_result().unwrap();
        assert_eq!(documents.iter().map(RString::as_str).collect::<Vec<_>>(), ["train2", "train3"]);
        assert!(!boxed.cancelled());
        assert!(boxed.allocate("{}".into()).into_result().unwrap().is_none());
        assert_eq!(boxed.phase_left("{}".into()), Answer::Continue);
        assert_eq!(boxed.hook("step".into(), "{}".into()), Answer::Continue);
    }

    #[test]
    fn a_panicking_host_cancels_and_is_not_called_again() {
        let recorder = Arc::new(Recorder::default());
        let boxed = host_box(recorder.clone());
        boxed.event("panic".into(), "{}".into());
        assert!(boxed.cancelled());
        assert_eq!(boxed.phase_entered("{}".into()), Answer::Stop);
        assert_eq!(boxed.hook("step".into(), "{}".into()), Answer::Stop);
        assert_eq!(
            boxed.documents("train".into(), 0, 1).into_result().unwrap_err().kind(),
            ErrorKind::Cancelled
        );
        assert_eq!(boxed.allocate("{}".into()).into_result().unwrap_err().kind(), ErrorKind::Cancelled);
        boxed.event("log".into(), "{}".into());
        assert!(recorder.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_unit_host_is_silent() {
        let boxed = host_box(());
        boxed.event("log".into(), "{}".into());
        assert!(!boxed.cancelled());
        assert!(boxed.documents("train".into(), 0, 1).into_result().unwrap().is_empty());
    }
}
