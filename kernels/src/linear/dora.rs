//! DoRA: the direction of a weight learns through LoRA, the length of each of its rows by itself.
//!
//! Source: Liu et al. 2024, W' = diag(m/n)·(W + s·B·A), n the lengths of the rows of W + s·B·A. Section 4.3: n counts as a
//! constant in the backward pass. With c = m/n and z = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ, y = c∘z, and for the gradient g of y:
//!   dx, dA, dB are LoRA's for the gradient c∘g,  dm_o = Σ_n g_no·z_no / n_o.
//! z is made again for dm, which costs one product with W more than LoRA's backward. PEFT drops the input of W too while
//! training with dropout; here, as in LoRA, only that of A is dropped, so that one product with W serves both. Without dropout,
//! and so in every evaluation, the two are the same.
//!
//! Shapes: W [O, I], m, n and c [O], g and z [n, O]. Lengths are summed in f64.
//! Errors: none; a length of 0 gives infinities, which is the caller's to refuse.

use rayon::prelude::*;

use super::{Layer, LoraSlices, Weight, many, sized};
use crate::cpu::{for_rows, multiversion};
use crate::math::convert;
use crate::skinny;
use crate::store::Store;

/// Columns of a task of the magnitudes' gradient.
const COLUMNS: usize = 128;

/// DoRA's magnitudes beside a layer, as what the results are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Dora<'a> {
    /// c = m/n \[O\].
    pub scale: &'a [f32],
    /// n \[O\], of [`row_norms`].
    pub norms: &'a [f32],
}

multiversion! {
    /// Length of `row` + `scale`·`b`·A, which is left in `row`.
    fn length(row: &mut [f32], a: &[f32], b: &[f32], scale: f32) -> f32 {
        for (a, b) in a.chunks_exact(row.len()).zip(b) {
            let b = b * scale;
            for (row, a) in row.iter_mut().zip(a) {
                *row += b * a;
            }
        }
        let mut lanes = [0f64; 8];
        for part in row.chunks(8) {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        lanes.iter().sum::<f64>().sqrt() as f32
    }
}

multiversion! {
    /// y (+)= c∘z for one row.
    fn scale_row<Y: Store>(z: &[f32], c: &[f32], y: &mut [Y], accumulate: bool) {
        for ((z, c), y) in z.iter().zip(c).zip(y) {
            let before = if accumulate { y.get() } else { 0.0 };
            *y = Y::put(before + c * z);
        }
    }
}

multiversion! {
    /// out = c∘g for one row.
    fn scaled_row<G: Store>(g: &[G], c: &[f32], out: &mut [f32]) {
        for ((g, c), out) in g.iter().zip(c).zip(out) {
            *out = c * g.get();
        }
    }
}

multiversion! {
    /// sums += g∘z.
    fn add_products<G: Store>(g: &[G], z: &[f32], sums: &mut [f32]) {
        for ((g, z), sum) in g.iter().zip(z).zip(sums) {
            *sum += g.get() * z;
        }
    }
}

/// Lengths of the rows of W + s·B·A into `norms` \[O\], for W [O, I].
///
/// # Panics
/// When sizes do not agree.
pub fn row_norms(weight: Weight, [out, inp]: [usize; 2], lora: &LoraSlices, norms: &mut [f32]) {
    assert!(weight.len() == out * inp && norms.len() == out, "W [O, I] and norms [O]");
    assert!(lora.a.len() == lora.rank * inp && lora.b.len() == out * lora.rank, "A [r, I] and B [O, r]");
    if inp == 0 {
        return norms.fill(0.0);
    }
    norms.par_iter_mut().enumerate().with_min_len(16).for_each_init(
        || vec![0f32; inp],
        |row, (o, norm)| {
            let at = o * inp..(o + 1) * inp;
            match weight {
                Weight::F32(w) => convert(&w[at], row),
                Weight::Bf16(w) => convert(&w[at], row),
            }
            *norm = length(row, lora.a, &lora.b[o * lora.rank..][..lora.rank], lora.scale);
        },
    );
}

impl Dora<'_> {
    /// `y` (+)= c∘`z`, both [n, O].
    pub(super) fn finish<Y: Store>(&self, z: &[f32], y: &mut [Y], accumulate: bool) {
        let width = self.scale.len();
        for_rows(y, width, |first, y| {
            let z = &z[first * width..][..y.len()];
            for (z, y) in z.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                scale_row(z, self.scale, y, accumulate);
            }
        });
    }

    /// The rows of a [O, r] each times its c.
    pub(super) fn scaled_rows(&self, values: &[f32], rank: usize) -> Vec<f32> {
        let rows = values.chunks_exact(rank).zip(self.scale);
        rows.flat_map(|(row, c)| row.iter().map(move |value| value * c)).collect()
    }

    /// `out` [O, r] += the rows of `values` each times its c.
    pub(super) fn add_scaled_rows(&self, values: &[f32], rank: usize, out: &mut [f32]) {
        for ((row, c), out) in values.chunks_exact(rank).zip(self.scale).zip(out.chunks_exact_mut(rank)) {
            for (value, out) in row.iter().zip(out) {
                *out += c * value;
            }
        }
    }
}

impl Layer<'_> {
    /// `dx` (+)= (c∘`g`)·W, a part of the rows at a time.
    pub(super) fn through_scaled<G: Store>(
        &self,
        dora: Dora,
        g: &[G],
        dx: &mut [f32],
        accumulate: bool,
        held: &mut Vec<f32>,
    ) {
        let (out, inp) = (self.out, self.inp);
        let many = many(out);
        for (g, dx) in g.chunks((many * out).max(1)).zip(dx.chunks_mut((many * inp).max(1))) {
            let scaled = sized(held, g.len());
            for_rows(scaled, out, |first, scaled| {
                let g = &g[first * out..][..scaled.len()];
                for (g, scaled) in g.chunks_exact(out).zip(scaled.chunks_exact_mut(out)) {
                    scaled_row(g, dora.scale, scaled);
                }
            });
            self.weight.apply_transposed([out, inp], scaled, dx, accumulate, self.products);
        }
    }

    /// `dm` [O] += Σ_n g∘z / n, z made again from `x` and `low` = s·drop(x)·Aᵀ.
    pub(super) fn magnitude_gradient<X: Store, G: Store>(
        &self,
        lora: &LoraSlices,
        dora: Dora,
        x: &[X],
        g: &[G],
        low: &[f32],
        dm: &mut [f32],
        held: &mut Vec<f32>,
    ) {
        let (out, inp) = (self.out, self.inp);
        let many = many(out);
        let mut sums = vec![0f32; out];
        for (i, g) in g.chunks((many * out).max(1)).enumerate() {
            let (first, count) = (i * many, g.len() / out);
            let z = sized(held, g.len());
            self.weight.apply([out, inp], &x[first * inp..][..count * inp], z, false, self.products);
            skinny::up_add(&low[first * lora.rank..][..count * lora.rank], lora.b_mat(out), None, z);
            let z = &*z;
            sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
                let at = task * COLUMNS;
                for row in 0..count {
                    let own = row * out + at..row * out + at + sums.len();
                    add_products(&g[own.clone()], &z[own], sums);
                }
            });
        }
        for ((dm, sum), norm) in dm.iter_mut().zip(&sums).zip(dora.norms) {
            *dm += sum / norm;
        }
    }
}
