//! Attention by brute force in f64, forward and backward: what the tiled kernels are held against.
//!
//! Written from the definition alone: a predicate says whether a query sees a key, and every pair is asked. Slow on
//! purpose. Arguments are trusted; a wrong length panics.

use super::pattern::{Pattern, Rows};

/// Sizes of the operands: q is [B, T, H, D], k and v are [B, T, Hkv, D], all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// B.
    pub batch: usize,
    /// T.
    pub entries: usize,
    /// H.
    pub heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// D.
    pub width: usize,
}

impl Sizes {
    fn q(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.entries + t) * self.heads + h) * self.width
    }

    fn kv(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.entries + t) * self.kv_heads + h / (self.heads / self.kv_heads)) * self.width
    }
}

/// Whether query `i` of head `h` in row `b` sees key `j`.
pub fn sees(sizes: &Sizes, pattern: Pattern, rows: &Rows, b: usize, h: usize, i: usize, j: usize) -> bool {
    let length = rows.lengths.as_ref().map_or(sizes.entries, |lengths| lengths[b]);
    if i >= length || j >= length {
        return false;
    }
    if let Some(segments) = &rows.segments {
        let segment = |t: usize| segments[b].iter().filter(|start| **start <= t).count();
        if segment(i) != segment(j) {
            return false;
        }
    }
    match pattern {
        Pattern::Bidirectional => true,
        Pattern::Dense => j <= i,
        Pattern::SlidingWindow { window } => j <= i && i - j < window,
        Pattern::ShiftedSparse { group } if group >= sizes.entries => j <= i,
        Pattern::ShiftedSparse { group } => {
            let shift = if h < sizes.heads.div_ceil(2) { 0 } else { group / 2 };
            let start = if i < shift { 0 } else { shift + group * ((i - shift) / group) };
            (start..=i).contains(&j)
        }
    }
}

/// The keys a query sees with their probabilities.
fn probabilities(
    q: &[f64],
    k: &[f64],
    sizes: &Sizes,
    scale: f64,
    (b, h, i): (usize, usize, usize),
    seen: impl Fn(usize) -> bool,
) -> Vec<(usize, f64)> {
    let q = &q[sizes.q(b, i, h)..][..sizes.width];
    let mut scores: Vec<(usize, f64)> = (0..sizes.entries)
        .filter(|j| seen(*j))
        .map(|j| {
            let k = &k[sizes.kv(b, j, h)..][..sizes.width];
            (j, scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>())
        })
        .collect();
    let top = scores.iter().fold(f64::NEG_INFINITY, |top, (_, s)| top.max(*s));
    let total: f64 = scores.iter().map(|(_, s)| (s - top).exp()).sum();
    for (_, s) in &mut scores {
        *s = (*s - top).exp() / total;
    }
    scores
}

/// The result [B, T, H, D].
pub fn forward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    sizes: &Sizes,
    scale: f64,
    pattern: Pattern,
    rows: &Rows,
) -> Vec<f64> {
    let mut out = vec![0f64; q.len()];
    for b in 0..sizes.batch {
        for h in 0..sizes.heads {
            for i in 0..sizes.entries {
                let at = sizes.q(b, i, h);
                let seen = |j| sees(sizes, pattern, rows, b, h, i, j);
                for (j, p) in probabilities(q, k, sizes, scale, (b, h, i), seen) {
                    for d in 0..sizes.width {
                        out[at + d] += p * v[sizes.kv(b, j, h) + d];
                    }
                }
            }
        }
    }
    out
}

/// Gradients of Σ d_out·result.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Of q.
    pub q: Vec<f64>,
    /// Of k.
    pub k: Vec<f64>,
    /// Of v.
    pub v: Vec<f64>,
}

/// The gradients of q, k and v for the gradient `d_out` of the result.
pub fn backward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    d_out: &[f64],
    sizes: &Sizes,
    scale: f64,
    pattern: Pattern,
    rows: &Rows,
) -> Gradients {
    let mut gradients = Gradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    let width = sizes.width;
    for b in 0..sizes.batch {
        for h in 0..sizes.heads {
            for i in 0..sizes.entries {
                let at = sizes.q(b, i, h);
                let g = &d_out[at..at + width];
                let seen = |j| sees(sizes, pattern, rows, b, h, i, j);
                let probabilities = probabilities(q, k, sizes, scale, (b, h, i), seen);
                let d_p = |j: usize| -> f64 {
                    g.iter().zip(&v[sizes.kv(b, j, h)..][..width]).map(|(g, v)| g * v).sum()
                };
                let mean: f64 = probabilities.iter().map(|(j, p)| p * d_p(*j)).sum();
                for (j, p) in &probabilities {
                    let key = sizes.kv(b, *j, h);
                    let d_score = p * (d_p(*j) - mean) * scale;
                    for d in 0..width {
                        gradients.q[at + d] += d_score * k[key + d];
                        gradients.k[key + d] += d_score * q[at + d];
                        gradients.v[key + d] += p * g[d];
                    }
                }
            }
        }
    }
    gradients
}
