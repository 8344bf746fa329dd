//! Keys and values of rows that grow: what generation keeps instead of running the past again.
//!
//! A cache has a fixed number of rows, each with room for a stated number of entries of its own, so that short rows pay
//! nothing for long ones. Memory is taken when the cache is made: 2·layers·C·G·D values, C the room of all rows together, in
//! the storage of activations (f32, or bf16 in the class of that name). The system gives pages as entries are written.
//!
//! Positions: entry i of a row is rotated as position i. A scaling that depends on the length of the sequence (dynamic,
//! longrope) is taken for the longest that a row can become, its room: then one set of frequencies holds for all of a row's
//! keys, and a step gives what a forward pass over the whole row at that stated length gives. (transformers takes the
//! length so far, and keys that are cached already keep the frequencies they were made with.)
//!
//! Shapes: C entries of all rows, G kv heads, D head width. Units: entries, bytes. Errors: no rows, a row without room.
//! Left out: caches that wrap around at a sliding window's size; growth.

use megacontext_kernels::attention::decode::CachedRow;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::bf16;

use crate::buffers::{Activation, Buffer, KeysValues, Scratch, keys_values_bytes};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::machine::Host;
use crate::rope::Rope;

/// One row of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Where its entries begin.
    pub first: usize,
    /// Entries it has room for.
    pub room: usize,
    /// Entries it has.
    pub length: usize,
}

/// What lies in one storage: the caches of all blocks, and the buffers of a step.
pub(crate) struct Held<S: Activation> {
    pub layers: Vec<KeysValues<Host, S>>,
    pub scratch: Scratch<Host, S>,
    /// The stream at the entries whose logits are wanted.
    pub last: Buffer<S>,
}

impl<S: Activation> Default for Held<S> {
    fn default() -> Self {
        Self { layers: Vec::new(), scratch: Scratch::default(), last: Buffer::default() }
    }
}

impl<S: Activation> Held<S> {
    fn new(config: &DecoderConfig, entries: usize) -> Result<Self> {
        let layers = KeysValues::of_blocks(&Host, config, entries)?;
        Ok(Self { layers, scratch: Scratch::default(), last: Buffer::default() })
    }

    fn bytes(&self) -> u64 {
        self.layers.iter().map(KeysValues::bytes).sum()
    }
}

/// Rows of tokens that were run, ready to be continued.
pub struct KvCache {
    rows: Vec<Row>,
    rope: Rope,
    f32: Held<f32>,
    bf16: Held<bf16>,
}

impl KvCache {
    /// An empty cache for rows with room for `rooms` entries each; `rope` are the positions of all.
    ///
    /// # Errors
    /// No rows, a row without room, or no memory.
    pub fn new(config: &DecoderConfig, precision: Precision, rope: Rope, rooms: &[usize]) -> Result<Self> {
        if rooms.is_empty() {
            return Err(BaseError::Input {
                message: "cache: expected at least one row, got none".to_string(),
            });
        }
        if let Some(row) = rooms.iter().position(|room| *room == 0) {
            let message = format!("cache: row {row}: expected room for at least 1 entry, got 0");
            return Err(BaseError::Input { message });
        }
        let mut first = 0;
        let rows: Vec<Row> = rooms
            .iter()
            .map(|room| {
                let row = Row { first, room: *room, length: 0 };
                first += room;
                row
            })
            .collect();
        let (mut f32, mut bf16) = (Held::default(), Held::default());
        if precision.stores_bf16() {
            bf16 = Held::new(config, first)?;
        } else {
            f32 = Held::new(config, first)?;
        }
        Ok(Self { rows, rope, f32, bf16 })
    }

    /// Bytes of keys and values for `entries` entries of all rows together.
    pub fn planned_bytes(config: &DecoderConfig, precision: Precision, entries: usize) -> u64 {
        keys_values_bytes(config, precision, entries)
    }

    /// Bytes of keys and values held.
    pub fn bytes(&self) -> u64 {
        self.f32.bytes() + self.bf16.bytes()
    }

    /// Bytes of the buffers of steps so far.
    pub fn buffer_bytes(&self) -> u64 {
        let f32 = self.f32.scratch.bytes() + self.f32.last.bytes();
        f32 + self.bf16.scratch.bytes() + self.bf16.last.bytes()
    }

    /// Entries that each row has.
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.length).collect()
    }

    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(crate) fn rows_mut(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    pub(crate) fn rope(&self) -> &Rope {
        &self.rope
    }
}

impl Row {
    /// The row with `entries` new entries, for attention.
    pub(crate) fn with(self, entries: usize) -> CachedRow {
        CachedRow { entries, past: self.length, first: self.first }
    }
}

/// The part of a cache that is stored as S.
pub(crate) trait Cached: Activation {
    fn held(cache: &mut KvCache) -> &mut Held<Self>;
}

impl Cached for f32 {
    fn held(cache: &mut KvCache) -> &mut Held<Self> {
        &mut cache.f32
    }
}

impl Cached for bf16 {
    fn held(cache: &mut KvCache) -> &mut Held<Self> {
        &mut cache.bf16
    }
}
