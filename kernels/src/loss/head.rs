//! The output head of a loss: its logits and their way back, with LoRA beside the weight or rows in place of some of its own.
//!
//! Sources: z = h·Wᵀ, capped at ±c where there is a cap; LoRA (Hu et al. 2021) z += s·drop(h)·Aᵀ·Bᵀ; rows of W that learn by
//! themselves, z_v = h·ρ_v for the tokens v that have one. Backward of the latter: their columns of dz meet ρ instead of W.
//! Dropout's mask is a function of the place among the scored positions, so that both ways see the same.
//!
//! Shapes: h [n, E], W [V, E], z [n, V], A [r, E], B [V, r], ρ [k, E]. All but h and W in f32.
//! Left out: DoRA and PiSSA on the head.

use rayon::prelude::*;

use super::rows::cap_row;
use crate::gemm::{Mat, Products, matmul_with};
use crate::linear::{LoraSlices, Weight};
use crate::math::{add_row, convert};
use crate::skinny;
use crate::store::Store;

/// Rows that stand in the place of some of a table's own.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Which, each once.
    pub ids: &'a [u32],
    /// ρ [k, E].
    pub values: &'a [f32],
}

/// The output head W [V, E].
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// W.
    pub weight: Weight<'a>,
    /// c, where logits are capped at ±c.
    pub softcap: Option<f32>,
    /// LoRA beside W; DoRA and PiSSA are not read.
    pub lora: Option<&'a LoraSlices<'a>>,
    /// Rows in place of W's.
    pub rows: Option<Rows<'a>>,
}

impl<'a> From<Weight<'a>> for Head<'a> {
    fn from(weight: Weight<'a>) -> Self {
        Self { weight, softcap: None, lora: None, rows: None }
    }
}

/// Where a head's gradients are added; none where a parameter is frozen.
#[derive(Default)]
pub struct HeadGradients<'a> {
    /// dW [V, E].
    pub weight: Option<&'a mut [f32]>,
    /// dA [r, E].
    pub a: Option<&'a mut [f32]>,
    /// dB [V, r].
    pub b: Option<&'a mut [f32]>,
    /// dρ [k, E].
    pub rows: Option<&'a mut [f32]>,
}

impl HeadGradients<'_> {
    pub(super) fn any(&self) -> bool {
        self.weight.is_some() || self.a.is_some() || self.b.is_some() || self.rows.is_some()
    }
}

impl Head<'_> {
    /// drop(h) in f32 for the rows from number `first` on, or none where nothing is dropped.
    fn dropped<X: Store>(lora: &LoraSlices, h: &[X], width: usize, first: usize) -> Option<Vec<f32>> {
        let dropout = lora.dropout?;
        let mut kept = vec![0f32; h.len()];
        convert(h, &mut kept);
        dropout.apply_at(first * width, &mut kept);
        Some(kept)
    }

    /// s·drop(h)·Aᵀ.
    fn low<X: Store>(lora: &LoraSlices, h: &[X], width: usize, first: usize) -> Vec<f32> {
        let mut low = vec![0f32; h.len() / width * lora.rank];
        let a = Mat::new(lora.a, lora.rank, width);
        match Self::dropped(lora, h, width, first) {
            None => skinny::down(h, a, lora.scale, None, &mut low),
            Some(kept) => skinny::down(&kept, a, lora.scale, None, &mut low),
        }
        low
    }

    /// Capped logits `z` [n, V] of `h` [n, E], whose first row is number `first`.
    pub(super) fn logits<X: Store>(
        &self,
        [width, vocab]: [usize; 2],
        h: &[X],
        first: usize,
        z: &mut [f32],
        products: Products,
    ) {
        self.weight.apply([vocab, width], h, z, false, products);
        if let Some(lora) = self.lora {
            let low = Self::low(lora, h, width, first);
            skinny::up_add(&low, Mat::new(lora.b, vocab, lora.rank).t(), None, z);
        }
        if let Some(rows) = self.rows {
            let own = Mat::new(rows.values, rows.ids.len(), width);
            let mut columns = vec![0f32; h.len() / width * rows.ids.len()];
            let h = Mat::new(h, h.len() / width, width);
            matmul_with(&mut columns, h, own.t(), 1.0, false, products);
            for (z, columns) in z.chunks_exact_mut(vocab).zip(columns.chunks_exact(rows.ids.len())) {
                for (id, value) in rows.ids.iter().zip(columns) {
                    z[*id as usize] = *value;
                }
            }
        }
        if let Some(cap) = self.softcap {
            z.par_chunks_mut(vocab).for_each(|z| cap_row(z, cap));
        }
    }

    /// The gradient of `h` [n, E] into `dh` for that of its logits, `dz` [n, V], which is used up; the parameters' are added
    /// to `into`. Of the cap, nothing: it is in `dz`.
    pub(super) fn backward<X: Store>(
        &self,
        [width, vocab]: [usize; 2],
        h: &[X],
        first: usize,
        dz: &mut [f32],
        dh: &mut [f32],
        into: &mut HeadGradients,
        products: Products,
    ) {
        let count = h.len() / width;
        let mut columns = Vec::new();
        if let Some(rows) = self.rows {
            // W's own rows of these tokens took no part.
            for dz in dz.chunks_exact_mut(vocab) {
                columns.extend(rows.ids.iter().map(|id| std::mem::take(&mut dz[*id as usize])));
            }
        }
        self.weight.apply_transposed([vocab, width], dz, dh, false, products);
        if let Some(dw) = into.weight.as_deref_mut() {
            let (dz, h) = (Mat::new(dz, count, vocab), Mat::new(h, count, width));
            matmul_with(dw, dz.t(), h, 1.0, true, products);
        }
        if let Some(rows) = self.rows {
            let columns = Mat::new(&columns, count, rows.ids.len());
            matmul_with(dh, columns, Mat::new(rows.values, rows.ids.len(), width), 1.0, true, products);
            if let Some(d_rows) = into.rows.as_deref_mut() {
                matmul_with(d_rows, columns.t(), Mat::new(h, count, width), 1.0, true, products);
            }
        }
        let Some(lora) = self.lora else { return };
        let mut low_gradient = vec![0f32; count * lora.rank];
        skinny::down(dz, Mat::new(lora.b, vocab, lora.rank).t(), lora.scale, None, &mut low_gradient);
        let kept = Self::dropped(lora, h, width, first);
        if let Some(da) = into.a.as_deref_mut() {
            match &kept {
                None => skinny::outer_add(&low_gradient, lora.rank, h, width, None, da, false),
                Some(kept) => skinny::outer_add(&low_gradient, lora.rank, kept, width, None, da, false),
            }
        }
        if let Some(db) = into.b.as_deref_mut() {
            skinny::outer_add(&Self::low(lora, h, width, first), lora.rank, dz, vocab, None, db, true);
        }
        let a = Mat::new(lora.a, lora.rank, width);
        match lora.dropout {
            None => skinny::up_add(&low_gradient, a, None, dh),
            Some(dropout) => {
                let mut through = vec![0f32; dh.len()];
                skinny::up_add(&low_gradient, a, None, &mut through);
                dropout.apply_at(first * width, &mut through);
                add_row(dh, &through);
            }
        }
    }

    /// How far LoRA and rows can move a logit for hidden states of at most `largest`.
    pub(super) fn reach(&self, width: usize, largest: f32) -> f32 {
        let sum = |row: &[f32]| row.iter().map(|v| v.abs()).sum::<f32>();
        let most = |values: &[f32], width: usize| {
            values.chunks_exact(width).map(sum).fold(0f32, |a, b| if b > a || b.is_nan() { b } else { a })
        };
        let lora = self.lora.map_or(0.0, |lora| {
            let keep = lora.dropout.map_or(1.0, |d| (1.0 / (1.0 - d.p)) as f32);
            lora.scale.abs() * keep * largest * most(lora.a, width) * most(lora.b, lora.rank)
        });
        lora + self.rows.map_or(0.0, |rows| largest * most(rows.values, width))
    }
}
