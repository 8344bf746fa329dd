//! Running new entries of rows over their cache, on the decoder's machine.
//!
//! New entries of all rows lie one after the other, N of them: no padding, whatever each row brings. Every block makes
//! their queries, keys and values, puts keys and values into the cache, attends over it and goes on; the logits are made of
//! each row's last entry alone. Long prompts go in pieces of [`PIECE`] entries, cut at the same places whether a row is
//! alone or not, and at most [`PASS`] entries run together, so that the memory of a pass does not grow with the prompt.
//!
//! Shapes: N new entries, E model width, V vocabulary. Errors: a row that there is not, twice the same row, no tokens,
//! unknown tokens, more than a row has room for; nothing has changed then.

use std::ops::Range;

use megacontext_kernels::attention::decode::CachedRow;
use megacontext_kernels::attention::{Pattern, alibi_slopes};
use megacontext_kernels::cpu::Values;

use super::cache::{Held, KvCache};
use crate::block::{Attending, Block, ByWindow, Tables};
use crate::buffers::{Activation, PassShape, Scratch, evaluation_bytes, logits_bytes};
use crate::decoder::Decoder;
use crate::error::{BaseError, Result};
use crate::machine::{AttentionSpec, Machine, on_machine};
use crate::rope::Entries;

/// Entries of a prompt that run together.
pub const PIECE: usize = 512;
/// Entries of all rows that run together.
pub const PASS: usize = 2048;

/// What a step adds to a row.
#[derive(Clone, Copy, Debug)]
pub struct Addition<'a> {
    /// Number of the row.
    pub row: usize,
    /// Its new tokens, at least one.
    pub tokens: &'a [u32],
    /// Whether the logits after the last of them are wanted.
    pub logits: bool,
}

/// Cosines and sines of the new entries, each row's for the length that it can come to.
#[derive(Default)]
struct Turned {
    global: [Vec<f32>; 2],
    /// Of blocks that turn by a base of their own.
    local: Option<[Vec<f32>; 2]>,
}

impl Turned {
    fn slices(&self) -> Tables<'_> {
        Tables {
            global: self.global.each_ref().map(Vec::as_slice),
            local: self.local.as_ref().map(|local| local.each_ref().map(Vec::as_slice)),
        }
    }
}

fn tables(cache: &KvCache, additions: &[Addition]) -> Result<Turned> {
    let mut all = Turned::default();
    for add in additions {
        let row = cache.rows()[add.row];
        let mu: Vec<f64> = (row.length..row.length + add.tokens.len()).map(|at| at as f64).collect();
        let own = cache.rope().place(&Entries { mu: &mu, length: Some(row.room), ..Entries::default() })?;
        for (all, own) in all.global.iter_mut().zip([&own.cos_nd, &own.sin_nd]) {
            all.extend_from_slice(&Values::of(own)?);
        }
        if let Some(own) = &own.local {
            for (all, own) in all.local.get_or_insert_default().iter_mut().zip(own) {
                all.extend_from_slice(&Values::of(own)?);
            }
        }
    }
    Ok(all)
}

fn input<T>(message: String) -> Result<T> {
    Err(BaseError::Input { message })
}

/// Prompts of these lengths as passes run them: rows, and which of a row's tokens.
fn passes(prompts: &[usize]) -> Vec<Vec<(usize, Range<usize>)>> {
    let longest = prompts.iter().copied().max().unwrap_or(0);
    let cut = |start: usize| {
        let left = prompts.iter().enumerate().filter(move |(_, length)| start < **length);
        left.map(move |(row, length)| (row, start..(*length).min(start + PIECE))).collect::<Vec<_>>()
    };
    let starts = (0..longest).step_by(PIECE);
    starts.flat_map(|start| cut(start).chunks(PASS / PIECE).map(<[_]>::to_vec).collect::<Vec<_>>()).collect()
}

/// Entries of the largest pass over prompts of these lengths, and of the steps after them.
pub fn pass_entries(prompts: &[usize]) -> usize {
    let entries =
        passes(prompts).into_iter().map(|pass| pass.into_iter().map(|(_, tokens)| tokens.len()).sum());
    entries.max().unwrap_or(0).max(prompts.len())
}

/// Bytes that generating takes besides the weights: keys and values for rows that become `rooms` entries long, the buffers
/// of a pass over their prompts, LoRA's among them, and the logits of a step with what an adapter on the head makes for them.
pub fn generation_bytes(decoder: &crate::config::DecoderConfig, pass: PassShape, rooms: &[usize]) -> u64 {
    let cache = KvCache::planned_bytes(decoder, pass.precision, rooms.iter().sum());
    let buffers = evaluation_bytes(decoder, pass);
    cache + buffers.activations + buffers.workspace + logits_bytes(decoder, pass, rooms.len())
}

impl Decoder {
    /// Runs the prompts, one for each row of an empty cache; the logits [rows, V] after each. `going` is asked after every
    /// pass, with the entries that it ran, whether to go on; none where it said no.
    ///
    /// # Errors
    /// See the module.
    pub fn prefill(
        &self,
        cache: &mut KvCache,
        prompts: &[&[u32]],
        going: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Vec<f32>>> {
        let (rows, vocab) = (cache.rows().len(), self.config().vocab_size);
        if prompts.len() != rows {
            return input(format!(
                "prompts: expected one for each of the cache's {rows} rows, got {}",
                prompts.len()
            ));
        }
        if let Some(row) = cache.rows().iter().position(|row| row.length > 0) {
            return input(format!("prompts: expected an empty cache, but row {row} has entries"));
        }
        let whole: Vec<Addition> =
            prompts.iter().enumerate().map(|(row, tokens)| Addition { row, tokens, logits: true }).collect();
        self.check_additions(cache, &whole)?;
        let mut logits = vec![0f32; rows * vocab];
        let lengths: Vec<usize> = prompts.iter().map(|tokens| tokens.len()).collect();
        for pass in passes(&lengths) {
            let pieces: Vec<Addition> = pass
                .into_iter()
                .map(|(row, tokens)| Addition {
                    row,
                    logits: tokens.end == lengths[row],
                    tokens: &prompts[row][tokens],
                })
                .collect();
            let got = self.advance(cache, &pieces)?;
            let wanted = pieces.iter().filter(|piece| piece.logits);
            for (piece, got) in wanted.zip(got.chunks_exact(vocab)) {
                logits[piece.row * vocab..][..vocab].copy_from_slice(got);
            }
            if !going(pieces.iter().map(|piece| piece.tokens.len()).sum()) {
                return Ok(None);
            }
        }
        Ok(Some(logits))
    }

    /// Runs new entries of some rows; the logits [n, V] of the n additions that want them, in their order.
    ///
    /// # Errors
    /// See the module.
    pub fn advance(&self, cache: &mut KvCache, additions: &[Addition]) -> Result<Vec<f32>> {
        self.check_additions(cache, additions)?;
        if !cache.fits(self) {
            return input(
                "cache: expected one that was made for the model's sizes and class and on its device, got another's"
                    .into(),
            );
        }
        if additions.is_empty() {
            return Ok(Vec::new());
        }
        on_machine!(self, |machine: M, S| self.advance_in::<M, S>(machine, cache, additions))
    }

    fn check_additions(&self, cache: &KvCache, additions: &[Addition]) -> Result<()> {
        let (rows, vocab) = (cache.rows(), self.config().vocab_size);
        let mut seen = vec![false; rows.len()];
        for Addition { row, tokens, .. } in additions {
            let Some(of) = rows.get(*row) else {
                return input(format!("rows: expected a row below {}, got {row}", rows.len()));
            };
            if std::mem::replace(&mut seen[*row], true) {
                return input(format!("rows: expected each row once, got row {row} twice"));
            }
            if tokens.is_empty() {
                return input(format!("tokens: expected at least one for row {row}, got none"));
            }
            if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
                return input(format!("tokens: row {row}: expected ids below {vocab}, got {token}"));
            }
            if tokens.len() > of.room - of.length {
                return input(format!(
                    "tokens: row {row} has room for {} more entries, got {}",
                    of.room - of.length,
                    tokens.len()
                ));
            }
        }
        Ok(())
    }

    fn advance_in<M: Machine, S: Activation>(
        &self,
        machine: &M,
        cache: &mut KvCache,
        additions: &[Addition],
    ) -> Result<Vec<f32>> {
        let c = self.config();
        let tokens: Vec<u32> = additions.iter().flat_map(|add| add.tokens).copied().collect();
        let tables = tables(cache, additions)?;
        let rows: Vec<CachedRow> =
            additions.iter().map(|add| cache.rows()[add.row].with(add.tokens.len())).collect();
        let slopes = c.positions.alibi.then(|| alibi_slopes(c.num_attention_heads));
        let sizes = [1, tokens.len(), c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let capacity = cache.capacity();
        let attention = ByWindow::new(Pattern::Dense, c, |pattern| {
            let (scale, products) = (c.architecture.query_scale, self.precision().products());
            let slopes = slopes.as_deref().map(|slopes| (slopes, None));
            let spec = AttentionSpec { sizes, scale, pattern, products, slopes };
            machine.caching(&spec, capacity, &rows)
        })?;
        self.params().check_mapped()?;
        let pass = self.pass(machine, Attending::Elsewhere, tables.slices(), None, tokens.len(), None)?;

        let Held { layers, scratch, last } = M::held::<S>(cache);
        scratch.prepare(c.num_hidden_layers, c.num_hidden_layers, true);
        let Scratch { saved, workspace, x, stream, .. } = scratch;
        let saved = &mut saved[0];
        machine.gather(self, &tokens, x)?;
        self.enter(machine, x, stream)?;
        for (number, layer) in layers.iter_mut().enumerate() {
            let block = Block::new(number, &pass)?;
            block.qkv(x, saved, workspace)?;
            block.size_mixed(saved)?;
            let how = attention.of(c.architecture.layers[number].window);
            let qkv = [&saved.q, &saved.k, &saved.v];
            machine.attend_cached(how, qkv, layer, &mut saved.mixed, &mut saved.lse)?;
            block.rest(x, stream, saved, workspace)?;
            std::mem::swap(x, stream);
        }

        let ends = additions.iter().scan(0u32, |end, add| {
            *end += add.tokens.len() as u32;
            Some((*end - 1, add.logits))
        });
        let wanted: Vec<u32> = ends.filter(|(_, wanted)| *wanted).map(|(at, _)| at).collect();
        let logits = if wanted.is_empty() {
            Vec::new()
        } else {
            machine.rows_of(x, c.hidden_size, &wanted, last)?;
            let hidden = self.final_norm(machine, last, &mut workspace.normed)?;
            machine.logits(self, hidden)?
        };
        for add in additions {
            cache.rows_mut()[add.row].length += add.tokens.len();
        }
        Ok(logits)
    }
}
