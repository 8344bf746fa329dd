//! The walk over the output head in chunks of positions that all losses here share.
//!
//! A chunk's logits are made, handed to the loss row by row, which turns them into their own gradient, multiplied back
//! into the gradients of the hidden states and of the head, and forgotten. Positions that are not scored are left out of
//! the products.
//!
//! The head's gradient is added to the caller's buffer chunk by chunk; that a later chunk's loss is not finite must not
//! leave part of it there. So before anything is added, the sizes of hidden states and head bound every logit. Where the
//! bound says nothing (NaN, infinity, or more than 10³⁷), the losses are computed once without gradients first.

use rayon::prelude::*;

use super::rows::magnitude;
use super::{Gradient, Head, HeadGradients, chunk_rows};
use crate::gemm::Products;
use crate::linear::Weight;
use crate::math::convert;
use crate::store::Store;

/// Logits below this cannot overflow on the way to a loss.
const SAFE: f32 = 1e37;

/// A loss of each position over its logits.
pub(super) trait Objective: Sync {
    /// Rows of logits that are alive for each position of a chunk.
    fn copies(&self) -> usize;
    /// Whether finite logits of the student are sure to give a finite loss.
    fn bounded(&self) -> bool;
    /// Makes ready for the rows of a chunk.
    fn begin(&mut self, positions: &[usize]);
    /// The loss of `position`, which is number `place` of its chunk, over its capped logits `z`. Unless `scale` is 0 they
    /// become `scale` times its gradient.
    fn row(&self, place: usize, position: usize, z: &mut [f32], scale: f32) -> f32;
}

/// Hidden states [N, E] under a head.
#[derive(Clone, Copy)]
pub(super) struct Student<'a, X> {
    pub h: &'a [X],
    pub head: Head<'a>,
    pub sizes: [usize; 3],
    pub products: Products,
}

impl<X: Store> Student<'_, X> {
    /// The rows of h at these positions, one after the other.
    pub fn rows(&self, positions: &[usize], out: &mut Vec<X>) {
        let width = self.sizes[1];
        out.clear();
        for position in positions {
            out.extend_from_slice(&self.h[position * width..][..width]);
        }
    }

    /// Capped logits of rows of hidden states, the first of which is number `first` of those that are walked.
    pub fn logits(&self, rows: &[X], first: usize, z: &mut [f32]) {
        let [_, width, vocab] = self.sizes;
        self.head.logits([width, vocab], rows, first, z, self.products);
    }

    /// Whether every logit is sure to be finite.
    pub fn bounded(&self) -> bool {
        let [_, width, _] = self.sizes;
        let most = |values: Vec<f32>| {
            values.into_iter().fold(0f32, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) })
        };
        let h = most(self.h.par_chunks(width).map(|row| magnitude(row).0).collect());
        let w = most(match self.head.weight {
            Weight::F32(w) => w.par_chunks(width).map(|row| magnitude(row).1).collect(),
            Weight::Bf16(w) => w.par_chunks(width).map(|row| magnitude(row).1).collect(),
        });
        h.is_finite() && w.is_finite() && h * w + self.head.reach(width, h) < SAFE
    }
}

/// What a walk gives back: losses by position, and the gradient of h [N, E].
pub(super) type Walked = (Vec<f32>, Option<Vec<f32>>);

fn weight(weights: Option<&[f32]>, position: usize) -> f32 {
    weights.map_or(1.0, |w| w[position])
}

/// Losses of the positions in `scored`, and the gradients of Σ scale·weight·loss that are wanted, unless that sum is not
/// finite.
pub(super) fn walk<X: Store>(
    student: Student<'_, X>,
    objective: &mut impl Objective,
    scored: &[usize],
    weights: Option<&[f32]>,
    wanted: Gradient,
) -> Walked {
    let (scale, mut into) = match wanted {
        Gradient::Skip => (0.0, HeadGradients::default()),
        Gradient::Hidden { scale } => (scale, HeadGradients::default()),
        Gradient::HiddenAndHead { scale, head } => {
            (scale, HeadGradients { weight: Some(head), ..Default::default() })
        }
        Gradient::HiddenAndParts { scale, into } => (scale, into),
    };
    let finite = |losses: &[f32]| {
        let counted = scored.iter().filter(|p| weight(weights, **p) != 0.0);
        counted.map(|p| f64::from(weight(weights, *p)) * f64::from(losses[*p])).sum::<f64>().is_finite()
    };
    if scale != 0.0 && into.any() && !(student.bounded() && objective.bounded()) {
        let (losses, _) = pass(student, objective, scored, weights, 0.0, &mut HeadGradients::default());
        if !finite(&losses) {
            return (losses, None);
        }
    }
    let (losses, d_hidden) = pass(student, objective, scored, weights, scale, &mut into);
    let d_hidden = d_hidden.filter(|_| finite(&losses));
    (losses, d_hidden)
}

fn pass<X: Store>(
    student: Student<'_, X>,
    objective: &mut impl Objective,
    scored: &[usize],
    weights: Option<&[f32]>,
    scale: f32,
    into: &mut HeadGradients,
) -> Walked {
    let [n, width, vocab] = student.sizes;
    let chunk = chunk_rows(vocab * objective.copies()).min(scored.len());
    let mut losses = vec![0f32; n];
    let mut d_hidden = (scale != 0.0).then(|| vec![0f32; n * width]);
    let mut logits = vec![0f32; chunk * vocab];
    let mut d_rows = vec![0f32; if scale != 0.0 { chunk * width } else { 0 }];
    let mut h_rows = Vec::with_capacity(chunk * width);
    for (number, positions) in scored.chunks(chunk.max(1)).enumerate() {
        let first = number * chunk;
        let count = positions.len();
        student.rows(positions, &mut h_rows);
        objective.begin(positions);
        let z = &mut logits[..count * vocab];
        student.logits(&h_rows, first, z);
        let row = |(place, (z, position)): (usize, (&mut [f32], &usize))| {
            let scale = scale * weight(weights, *position);
            let loss = objective.row(place, *position, z, scale);
            if scale == 0.0 {
                z.fill(0.0);
            }
            loss
        };
        let values: Vec<f32> = z.par_chunks_mut(vocab).zip(positions).enumerate().map(row).collect();
        for (position, value) in positions.iter().zip(values) {
            losses[*position] = value;
        }
        let Some(d_hidden) = &mut d_hidden else { continue };
        // A position without weight adds nothing even where it is NaN.
        for (position, row) in positions.iter().zip(h_rows.chunks_exact_mut(width)) {
            if weight(weights, *position) == 0.0 {
                row.fill(X::default());
            }
        }
        let d_rows = &mut d_rows[..count * width];
        student.head.backward([width, vocab], &h_rows, first, z, d_rows, into, student.products);
        for (position, row) in positions.iter().zip(d_rows.chunks_exact(width)) {
            convert(row, &mut d_hidden[position * width..][..width]);
        }
    }
    (losses, d_hidden)
}
