//! A panic where a test wants one.
//!
//! `MEGACONTEXT_FAULT=PLACE` makes the first call that comes by PLACE panic, once in a process: an entry of a session by its
//! name (`step`, `run`, `logits`, …), or the kind of an event (`progress`, …), where a job tells its host of it, deep inside and
//! in a thread of its pool. It shows that a panic becomes an error and poisons its session alone; nothing else reads the variable.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static PLACE: OnceLock<Option<String>> = OnceLock::new();
static DONE: AtomicBool = AtomicBool::new(false);

/// Panics here if this is the place.
///
/// # Panics
/// As said.
pub(crate) fn at(place: &str) {
    let wanted = PLACE.get_or_init(|| std::env::var("MEGACONTEXT_FAULT").ok());
    if wanted.as_deref() == Some(place) && !DONE.swap(true, Ordering::AcqRel) {
        panic!("an injected fault at {place}");
    }
}
