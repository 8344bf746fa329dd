//! Passages that are kept instead of run again.
//!
//! A document's own pass is the same whenever it comes up, because the base model does not learn: passages are kept as far as
//! a number of bytes allows. The first ones stay; with documents taken in turn, throwing out the oldest would keep none of
//! them long enough.
//!
//! Those of one store are of one setting: attention, stretch of positions, rule of places. The horizon is not among it.
//!
//! Units: bytes. Errors: those of [`DeltaNll::run`].

use std::collections::HashMap;

use megacontext_base::buffers::Buffers;
use megacontext_base::error::Result;

use crate::delta_nll::{DeltaNll, Passage};

/// Passages by the number of their document.
pub struct Passages {
    kept: HashMap<usize, Passage>,
    bytes: u64,
    budget: u64,
}

impl Passages {
    /// None yet; at most so many bytes.
    pub fn new(budget: u64) -> Self {
        Self { kept: HashMap::new(), bytes: 0, budget }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of those that are held.
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Runs a document unless it is kept, and keeps it if there is room: then nothing is given back. `divergence` as in
    /// [`DeltaNll::run`]; one that was kept without is run again.
    pub fn run(
        &mut self,
        number: usize,
        tokens: &[u32],
        delta: &DeltaNll,
        divergence: bool,
        buffers: &mut Buffers,
    ) -> Result<Option<Passage>> {
        if self.kept.get(&number).is_some_and(|kept| kept.document.keeps_hidden() || !divergence) {
            return Ok(None);
        }
        let passage = delta.run(tokens, divergence, buffers)?;
        let old = self.kept.remove(&number).map_or(0, |old| old.bytes());
        self.bytes -= old;
        if self.bytes + passage.bytes() > self.budget {
            return Ok(Some(passage));
        }
        self.bytes += passage.bytes();
        self.kept.insert(number, passage);
        Ok(None)
    }

    /// What [`Passages::run`] gave back of a document, or the one that is kept.
    ///
    /// # Panics
    /// When it was not run.
    pub fn of<'a>(&'a self, number: usize, fresh: &'a Option<Passage>) -> &'a Passage {
        let found = fresh.as_ref().or_else(|| self.kept.get(&number));
        found.expect("a passage that was not given back is kept")
    }
}
