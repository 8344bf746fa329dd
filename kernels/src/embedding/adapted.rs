//! Embeddings of a frozen table with an adapter: LoRA beside it, or rows of its own for some tokens.
//!
//! Source: LoRA (Hu et al. 2021) on a table, row t is E_t + s·B·A_t, A_t the t-th column of A. Gradients for those of the rows
//! g_n with tokens t_n: dB = s·Σ_n g_n·A_{t_n}ᵀ, dA_t = s·Bᵀ·Σ_{t_n = t} g_n. A row of its own takes the gradients of its token.
//! Dropout has no place here: A's input is a token.
//!
//! Shapes: A [r, V], B [E, r], rows [N, E], own rows [k, E]; A, B and gradients f32. A row stored in bf16 is rounded once.
//! Errors: an id that is not in the table; sizes that do not agree.

use super::{OP, check, check_rows, gather_into, rows_of};
use crate::error::{KernelError, Result};
use crate::gemm::Mat;
use crate::linear::Weight;
use crate::loss::Rows;
use crate::math::{add_row, convert};
use crate::skinny;
use crate::store::Store;

/// Values of rows that are held in f32 at a time before they are rounded.
pub const HELD: usize = 1 << 18;

/// LoRA's factors beside a table.
#[derive(Clone, Copy, Debug)]
pub struct LoraTable<'a> {
    /// A [r, V].
    pub a: &'a [f32],
    /// B [E, r].
    pub b: &'a [f32],
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f32,
}

impl LoraTable<'_> {
    /// V, where sizes agree.
    fn vocab(&self, width: usize) -> Result<usize> {
        let vocab = rows_of(self.a.len(), self.rank).map(|_| self.a.len() / self.rank)?;
        if self.b.len() != width * self.rank {
            let expected = format!("B [{width}, {}]", self.rank);
            return Err(KernelError::shape(OP, expected, format!("{} values", self.b.len())));
        }
        Ok(vocab)
    }

    /// s·A_t of every token, [N, r].
    fn low(&self, ids: &[u32], vocab: usize) -> Vec<f32> {
        let column = |id: u32| (0..self.rank).map(move |r| self.scale * self.a[r * vocab + id as usize]);
        ids.iter().flat_map(|id| column(*id)).collect()
    }

    fn b_mat(&self, width: usize) -> Mat<'_> {
        Mat::new(self.b, width, self.rank).t()
    }

    /// Rows `ids` of a table of rows of `width` values, with LoRA's part, into `out` [N, E].
    ///
    /// # Errors
    /// When sizes do not agree or an id is not in the table.
    pub fn gather_into<X: Store>(
        &self,
        table: Weight,
        width: usize,
        ids: &[u32],
        out: &mut [X],
    ) -> Result<()> {
        let vocab = self.vocab(width)?;
        let rows = rows_of(table.len(), width)?;
        if vocab != rows {
            return Err(KernelError::shape(
                OP,
                format!("A [{}, {rows}]", self.rank),
                format!("[.., {vocab}]"),
            ));
        }
        check_rows(out.len(), ids, width)?;
        check(ids, vocab)?;
        if let Some(out) = X::as_f32_mut(out) {
            gather_into(table, width, ids, out)?;
            skinny::up_add(&self.low(ids, vocab), self.b_mat(width), None, out);
            return Ok(());
        }
        let many = (HELD / width).max(1);
        let mut sums = vec![0f32; many.min(ids.len()) * width];
        for (ids, out) in ids.chunks(many).zip(out.chunks_mut(many * width)) {
            let sums = &mut sums[..out.len()];
            gather_into(table, width, ids, sums)?;
            skinny::up_add(&self.low(ids, vocab), self.b_mat(width), None, sums);
            convert(sums, out);
        }
        Ok(())
    }

    /// Adds the factors' gradients for those of the rows, `g` [N, E], to `da` [r, V] and `db` [E, r], in token order.
    ///
    /// # Errors
    /// When sizes do not agree or an id is not in the table; then nothing has been added.
    pub fn gradients(
        &self,
        g: &[f32],
        width: usize,
        ids: &[u32],
        da: &mut [f32],
        db: &mut [f32],
    ) -> Result<()> {
        let vocab = self.vocab(width)?;
        check_rows(g.len(), ids, width)?;
        check(ids, vocab)?;
        if da.len() != self.a.len() || db.len() != self.b.len() {
            let expected = format!("gradients of {} and {} values", self.a.len(), self.b.len());
            return Err(KernelError::shape(OP, expected, format!("{} and {}", da.len(), db.len())));
        }
        skinny::outer_add(&self.low(ids, vocab), self.rank, g, width, None, db, true);
        let mut low_gradient = vec![0f32; ids.len() * self.rank];
        skinny::down(g, self.b_mat(width), self.scale, None, &mut low_gradient);
        for (id, low) in ids.iter().zip(low_gradient.chunks_exact(self.rank)) {
            for (r, value) in low.iter().enumerate() {
                da[r * vocab + *id as usize] += value;
            }
        }
        Ok(())
    }
}

fn check_own(own: &Rows, width: usize) -> Result<()> {
    let expected = own.ids.len() * width;
    if own.values.len() != expected {
        return Err(KernelError::shape(
            OP,
            format!("own rows of {expected} values"),
            format!("{}", own.values.len()),
        ));
    }
    Ok(())
}

/// Rows `ids` of a table of rows of `width` values, some tokens' out of `own`, into `out` [N, E].
///
/// # Errors
/// When sizes do not agree or an id is not in the table.
pub fn gather_rows_into<X: Store>(
    table: Weight,
    own: Rows,
    width: usize,
    ids: &[u32],
    out: &mut [X],
) -> Result<()> {
    check_own(&own, width)?;
    check(own.ids, rows_of(table.len(), width)?)?;
    gather_into(table, width, ids, out)?;
    for (out, id) in out.chunks_exact_mut(width).zip(ids) {
        if let Some(at) = own.ids.iter().position(|own| own == id) {
            convert(&own.values[at * width..][..width], out);
        }
    }
    Ok(())
}

/// Adds the gradients `g` [N, E] of rows whose tokens have a row of their own to `into` [k, E], in token order.
///
/// # Errors
/// When sizes do not agree; then nothing has been added.
pub fn scatter_rows(g: &[f32], width: usize, ids: &[u32], own: &[u32], into: &mut [f32]) -> Result<()> {
    check_rows(g.len(), ids, width)?;
    check_rows(into.len(), own, width)?;
    for (g, id) in g.chunks_exact(width).zip(ids) {
        if let Some(at) = own.iter().position(|own| own == id) {
            add_row(&mut into[at * width..][..width], g);
        }
    }
    Ok(())
}
