//! Attention by brute force in f64, forward and backward: what the tiled kernels are held against.
//!
//! Written from the definition alone: a predicate says whether a query sees a key, and every pair is asked. Slow on
//! purpose. Arguments are trusted; a wrong length panics.
//!
//! The shared-prefix form has no reference of its own: it is this attention over the document's first entries followed by
//! the row's own, with a lower bound as the start of a segment.

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

/// What is computed, besides the operands.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Shapes.
    pub sizes: Sizes,
    /// Multiplies q·k.
    pub scale: f64,
    /// Which keys a query sees.
    pub pattern: Pattern,
    /// Row lengths and packed segments.
    pub rows: &'a Rows,
    /// ALiBi's slope of each query head: scores are lowered by slope·|i − j|.
    pub slopes: Option<&'a [f32]>,
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
        Pattern::ShiftedBidirectional { group } => {
            let shift = if h < sizes.heads.div_ceil(2) { 0 } else { group / 2 };
            let number = |t: usize| if t < shift { 0 } else { 1 + (t - shift) / group };
            group >= sizes.entries || number(i) == number(j)
        }
    }
}

impl Problem<'_> {
    /// The keys that query `i` of head `h` in row `b` sees, with their probabilities.
    pub fn probabilities(&self, q: &[f64], k: &[f64], [b, h, i]: [usize; 3]) -> Vec<(usize, f64)> {
        let sizes = &self.sizes;
        let q = &q[sizes.q(b, i, h)..][..sizes.width];
        let slope = self.slopes.map_or(0.0, |slopes| f64::from(slopes[h]));
        let mut scores: Vec<(usize, f64)> = (0..sizes.entries)
            .filter(|j| sees(sizes, self.pattern, self.rows, b, h, i, *j))
            .map(|j| {
                let k = &k[sizes.kv(b, j, h)..][..sizes.width];
                let product = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                (j, self.scale * product - slope * i.abs_diff(j) as f64)
            })
            .collect();
        let top = scores.iter().fold(f64::NEG_INFINITY, |top, (_, s)| top.max(*s));
        let total: f64 = scores.iter().map(|(_, s)| (s - top).exp()).sum();
        for (_, s) in &mut scores {
            *s = (*s - top).exp() / total;
        }
        scores
    }

    /// Every query as [row, head, entry], in the order of the result.
    fn queries(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let Sizes { batch, entries, heads, .. } = self.sizes;
        (0..batch).flat_map(move |b| (0..entries).flat_map(move |i| (0..heads).map(move |h| [b, h, i])))
    }
}

/// The result [B, T, H, D].
pub fn forward(q: &[f64], k: &[f64], v: &[f64], problem: &Problem<'_>) -> Vec<f64> {
    problem.queries().flat_map(|query| forward_of(q, k, v, problem, query)).collect()
}

/// The result (D values) of one query (row, head, entry).
pub fn forward_of(q: &[f64], k: &[f64], v: &[f64], problem: &Problem<'_>, [b, h, i]: [usize; 3]) -> Vec<f64> {
    let sizes = &problem.sizes;
    let mut out = vec![0f64; sizes.width];
    for (j, p) in problem.probabilities(q, k, [b, h, i]) {
        for (out, v) in out.iter_mut().zip(&v[sizes.kv(b, j, h)..]) {
            *out += p * v;
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

impl Gradients {
    /// Zeros for these operands.
    pub fn zeros(q: &[f64], k: &[f64], v: &[f64]) -> Self {
        Self { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] }
    }
}

/// The gradients of q, k and v for the gradient `d_out` of the result.
pub fn backward(q: &[f64], k: &[f64], v: &[f64], d_out: &[f64], problem: &Problem<'_>) -> Gradients {
    let mut gradients = Gradients::zeros(q, k, v);
    for query in problem.queries() {
        backward_of(q, k, v, d_out, problem, query, &mut gradients);
    }
    gradients
}

/// What one query [row, head, entry] adds to the gradients.
pub fn backward_of(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    d_out: &[f64],
    problem: &Problem<'_>,
    [b, h, i]: [usize; 3],
    gradients: &mut Gradients,
) {
    let (sizes, width) = (&problem.sizes, problem.sizes.width);
    let at = sizes.q(b, i, h);
    let g = &d_out[at..at + width];
    let probabilities = problem.probabilities(q, k, [b, h, i]);
    let d_p: Vec<f64> = probabilities
        .iter()
        .map(|(j, _)| g.iter().zip(&v[sizes.kv(b, *j, h)..][..width]).map(|(g, v)| g * v).sum())
        .collect();
    let mean: f64 = probabilities.iter().zip(&d_p).map(|((_, p), d_p)| p * d_p).sum();
    for ((j, p), d_p) in probabilities.iter().zip(d_p) {
        let key = sizes.kv(b, *j, h);
        let d_score = p * (d_p - mean) * problem.scale;
        for d in 0..width {
            gradients.q[at + d] += d_score * k[key + d];
            gradients.k[key + d] += d_score * q[at + d];
            gradients.v[key + d] += p * g[d];
        }
    }
}
