//! Keys and values of rows that grow: what generation keeps instead of running the past again.
//!
//! A cache has a fixed number of rows, each with room for a stated number of entries of its own, so that short rows pay
//! nothing for long ones. Memory is taken when the cache is made, where the decoder's passes run: 2·layers·C·G·D values, C the room
//! of all rows together, in the storage of activations (f32, or bf16 in the class of that name). The processor's system gives pages
//! as entries are written, a GPU all of them at once.
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

use crate::buffers::{Activation, ByStorage, KeysValues, Scratch, keys_values_bytes};
use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::{BaseError, Result};
use crate::machine::{Host, Machine, on_machine};
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

/// What lies on one machine in one storage: the caches of all blocks, and the buffers of a step.
pub(crate) struct Held<M: Machine, S: Activation> {
    pub layers: Vec<KeysValues<M, S>>,
    pub scratch: Scratch<M, S>,
    /// The stream at the entries whose logits are wanted.
    pub last: M::Buffer<S>,
}

impl<M: Machine, S: Activation> Default for Held<M, S> {
    fn default() -> Self {
        Self { layers: Vec::new(), scratch: Scratch::default(), last: M::Buffer::default() }
    }
}

impl<M: Machine, S: Activation> Held<M, S> {
    fn new(machine: &M, config: &DecoderConfig, entries: usize) -> Result<Self> {
        Ok(Self { layers: KeysValues::of_blocks(machine, config, entries)?, ..Self::default() })
    }

    fn bytes(&self) -> u64 {
        self.layers.iter().map(KeysValues::bytes).sum()
    }

    fn buffer_bytes(&self) -> u64 {
        self.scratch.bytes() + M::bytes(&self.last)
    }
}

/// What lies on one machine.
pub(crate) type HeldAs<M> = ByStorage<Held<M, f32>, Held<M, bf16>>;

/// Rows of tokens that were run, ready to be continued.
pub struct KvCache {
    rows: Vec<Row>,
    rope: Rope,
    pub(crate) host: HeldAs<Host>,
    #[cfg(feature = "cuda")]
    pub(crate) gpu: HeldAs<crate::machine::gpu::Gpu>,
}

impl KvCache {
    /// An empty cache where the decoder's passes run, for rows with room for `rooms` entries each; `rope` are the positions
    /// of all.
    ///
    /// # Errors
    /// No rows, a row without room, or no memory.
    pub fn new(decoder: &Decoder, rope: Rope, rooms: &[usize]) -> Result<Self> {
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
        let mut cache = Self {
            rows,
            rope,
            host: HeldAs::default(),
            #[cfg(feature = "cuda")]
            gpu: HeldAs::default(),
        };
        on_machine!(decoder, |machine: M, S| {
            *M::held::<S>(&mut cache) = Held::new(machine, decoder.config(), first)?;
        });
        Ok(cache)
    }

    /// Bytes of keys and values for `entries` entries of all rows together.
    pub fn planned_bytes(config: &DecoderConfig, precision: Precision, entries: usize) -> u64 {
        keys_values_bytes(config, precision, entries)
    }

    /// Bytes of keys and values held, wherever they lie.
    pub fn bytes(&self) -> u64 {
        let bytes = self.host.bytes(Held::bytes, Held::bytes);
        #[cfg(feature = "cuda")]
        let bytes = bytes + self.gpu.bytes(Held::bytes, Held::bytes);
        bytes
    }

    /// Bytes of the buffers of steps so far, wherever they lie.
    pub fn buffer_bytes(&self) -> u64 {
        let bytes = self.host.bytes(Held::buffer_bytes, Held::buffer_bytes);
        #[cfg(feature = "cuda")]
        let bytes = bytes + self.gpu.bytes(Held::buffer_bytes, Held::buffer_bytes);
        bytes
    }

    /// Entries that each row has.
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.length).collect()
    }

    /// Was it made for a model of these sizes and class, where its passes run?
    pub(crate) fn fits(&self, decoder: &Decoder) -> bool {
        let (c, held) = (decoder.config(), self.capacity());
        on_machine!(decoder, |_machine: M, S| {
            let layers = &M::held_in::<S>(self).layers;
            let values = held * c.num_key_value_heads * c.head_dim;
            layers.len() == c.num_hidden_layers && layers.iter().all(|layer| M::len(&layer.k) == values)
        })
    }

    /// C.
    pub(crate) fn capacity(&self) -> usize {
        self.rows.iter().map(|row| row.room).sum()
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
