//! Losses over the output head, in chunks of positions: next-token cross-entropy, and divergence from a teacher.
//!
//! Sources: cross-entropy NLL_i = logsumexp_v(z_iv) − z_i,target with z = h·Wᵀ; distillation (Hinton et al. 2015)
//! KL(teacher ‖ student) = Σ_v p_v·(log p_v − log q_v), at temperature 1; the cap on logits z = c·tanh(h·Wᵀ/c) as in Gemma
//! 2 and nanochat (c = 15).
//! The logits of all positions never exist at once: a chunk's logits are made, turned into their own gradient in
//! place, multiplied back into the gradients of the hidden states and of the head, and forgotten.
//!
//! Shapes: h [N, E], W [V, E], targets N; sizes are given as `[N, E, V]`. h and W are stored in f32 or bf16, gradients are
//! f32. Units: nats. Sums over positions in f64.
//! A target of [`IGNORE`] takes no part. A NaN or an infinity among a position's logits shows in that position's loss;
//! when the weighted sum of the losses is not finite, no gradient is given and none has been added.
//!
//! Errors: sizes that do not agree, targets outside the vocabulary, weights that are not finite, a cap that is not above 0.
//! Left out: label smoothing, temperatures.

mod head;
mod rows;
mod walk;

use rayon::prelude::*;

pub use self::head::{Head, HeadGradients, Rows};
use crate::error::{KernelError, Result};
use crate::gemm::Products;
use crate::store::Store;
use walk::{Objective, Student, walk};

const OP: &str = "head loss";

/// The target of a position that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// Bytes of logits alive at one time; at least one position is always taken. Every chunk streams the head, and its
/// gradient, through memory.
const LOGIT_BYTES: usize = 64 << 20;

/// Rows of logits alive at one time for a vocabulary of `vocab`.
pub fn chunk_rows(vocab: usize) -> usize {
    (LOGIT_BYTES / (4 * vocab.max(1))).clamp(1, 4096)
}

/// What positions should predict.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The next token of each position, or [`IGNORE`].
    pub ids: &'a [u32],
    /// What a position's NLL counts in the sum whose gradient is taken; 1 where there are none.
    pub weights: Option<&'a [f32]>,
}

impl<'a> From<&'a [u32]> for Targets<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Self { ids, weights: None }
    }
}

impl<'a> From<&'a Vec<u32>> for Targets<'a> {
    fn from(ids: &'a Vec<u32>) -> Self {
        Self { ids, weights: None }
    }
}

/// What a teacher says of the same positions.
#[derive(Clone, Copy, Debug)]
pub enum Teacher<'a, T> {
    /// Its logits [N, V], after its cap if it has one; log-probabilities are logits too.
    Logits(&'a [T]),
    /// Its hidden states [N, `width`] and its head [V, `width`]: the logits are made chunk by chunk.
    Hidden {
        /// h.
        h: &'a [T],
        /// E of the teacher.
        width: usize,
        /// W.
        head: Head<'a>,
    },
}

/// How gradients are wanted.
pub enum Gradient<'a> {
    /// None: evaluation.
    Skip,
    /// With respect to h only, of `scale`·Σ weight·loss.
    Hidden {
        /// Multiplies the gradient, for example 1 / number of tokens in the whole batch.
        scale: f32,
    },
    /// With respect to h and, added to the buffer [V·E], to the head's weight.
    HiddenAndHead {
        /// As above.
        scale: f32,
        /// Row-major [V, E].
        head: &'a mut [f32],
    },
    /// With respect to h and, added to the buffers that are there, to the head's parameters.
    HiddenAndParts {
        /// As above.
        scale: f32,
        /// Where to.
        into: HeadGradients<'a>,
    },
}

/// What cross-entropy gives back.
#[derive(Debug)]
pub struct HeadLoss {
    /// NLL of each position in nats, 0 where ignored.
    pub nll: Vec<f32>,
    /// Number of scored positions.
    pub count: usize,
    /// The gradient of h, [N, E]; present when it was asked for with a scale other than 0 and the sum of the losses is
    /// finite.
    pub d_hidden: Option<Vec<f32>>,
}

impl HeadLoss {
    /// Σ NLL in nats, unweighted.
    pub fn sum(&self) -> f64 {
        self.nll.iter().map(|v| f64::from(*v)).sum()
    }
}

/// What the divergence from a teacher gives back.
#[derive(Debug)]
pub struct Divergence {
    /// KL(teacher ‖ student) of each position in nats.
    pub kl: Vec<f32>,
    /// As in [`HeadLoss`].
    pub d_hidden: Option<Vec<f32>>,
}

/// Caps logits: z = cap·tanh(z/cap).
pub fn softcap(z: &mut [f32], cap: f32) {
    crate::cpu::for_rows(z, 1, |_, z| rows::cap_row(z, cap));
}

fn values(what: &str, expected: usize, got: usize) -> Result<()> {
    if expected != got {
        return Err(KernelError::shape(OP, format!("{what} of {expected} values"), format!("{got}")));
    }
    Ok(())
}

fn check_head<T>(what: &str, h: &[T], head: &Head, [n, width, vocab]: [usize; 3]) -> Result<()> {
    if width == 0 || vocab == 0 {
        let got = format!("width {width} and vocabulary {vocab}");
        return Err(KernelError::shape(OP, "a width and a vocabulary of at least 1", got));
    }
    values(&format!("{what} hidden states [{n}, {width}]"), n * width, h.len())?;
    values(&format!("{what} head [{vocab}, {width}]"), vocab * width, head.weight.len())?;
    if let Some(lora) = head.lora {
        if lora.rank == 0 {
            return Err(KernelError::shape(OP, "LoRA of rank at least 1", "0"));
        }
        values(&format!("{what} head's A [{}, {width}]", lora.rank), lora.rank * width, lora.a.len())?;
        values(&format!("{what} head's B [{vocab}, {}]", lora.rank), vocab * lora.rank, lora.b.len())?;
    }
    if let Some(rows) = &head.rows {
        let count = rows.ids.len();
        values(&format!("{what} head's own rows [{count}, {width}]"), count * width, rows.values.len())?;
        if let Some(bad) = rows.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(KernelError::argument(OP, format!("row: expected below {vocab}, got {bad}")));
        }
    }
    match head.softcap {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(KernelError::argument(OP, format!("softcap: expected above 0, got {cap}")))
        }
        _ => Ok(()),
    }
}

fn check_wanted(
    weights: Option<&[f32]>,
    head: &Head,
    wanted: &Gradient,
    [n, width, vocab]: [usize; 3],
) -> Result<()> {
    if let Some(weights) = weights {
        values("weights", n, weights.len())?;
        if let Some(bad) = weights.iter().find(|w| !w.is_finite()) {
            return Err(KernelError::argument(OP, format!("weight: expected a finite one, got {bad}")));
        }
    }
    if let Gradient::HiddenAndHead { head, .. } = wanted {
        values("a head gradient", vocab * width, head.len())?;
    }
    if let Gradient::HiddenAndParts { into, .. } = wanted {
        let rank = head.lora.map_or(0, |lora| lora.rank);
        let own = head.rows.map_or(0, |rows| rows.ids.len());
        let parts = [
            ("a head gradient", &into.weight, vocab * width),
            ("a gradient of the head's A", &into.a, rank * width),
            ("a gradient of the head's B", &into.b, vocab * rank),
            ("a gradient of the head's own rows", &into.rows, own * width),
        ];
        for (what, buffer, expected) in parts {
            buffer.as_ref().map_or(Ok(()), |buffer| values(what, expected, buffer.len()))?;
        }
    }
    match wanted {
        Gradient::Hidden { scale }
        | Gradient::HiddenAndHead { scale, .. }
        | Gradient::HiddenAndParts { scale, .. }
            if !scale.is_finite() =>
        {
            Err(KernelError::argument(OP, format!("scale: expected a finite one, got {scale}")))
        }
        _ => Ok(()),
    }
}

/// Capped logits [N, V] of hidden states [N, E] under a head; for few positions, as they are held whole.
///
/// # Errors
/// When sizes do not agree.
pub fn head_logits<'a, X: Store>(
    h: &[X],
    head: impl Into<Head<'a>>,
    sizes: [usize; 3],
    products: Products,
) -> Result<Vec<f32>> {
    let head = head.into();
    let [n, width, vocab] = sizes;
    check_head("the", h, &head, sizes)?;
    let mut logits = vec![0f32; n * vocab];
    if n > 0 {
        head.logits([width, vocab], h, 0, &mut logits, products);
    }
    Ok(logits)
}

struct CrossEntropy<'a> {
    ids: &'a [u32],
    cap: Option<f32>,
}

impl Objective for CrossEntropy<'_> {
    fn copies(&self) -> usize {
        1
    }

    fn bounded(&self) -> bool {
        true
    }

    fn begin(&mut self, _: &[usize]) {}

    fn row(&self, _: usize, position: usize, z: &mut [f32], scale: f32) -> f32 {
        rows::nll(z, self.ids[position] as usize, scale, self.cap)
    }
}

/// Cross-entropy of `targets` under softmax(h·Wᵀ); `sizes` are `[N, E, V]`.
///
/// # Errors
/// When sizes do not agree, a target is outside the vocabulary, or a weight or the scale is not finite; then nothing has
/// been added to the head's gradient.
pub fn head_cross_entropy<'a, X: Store>(
    h: &[X],
    head: impl Into<Head<'a>>,
    sizes: [usize; 3],
    targets: impl Into<Targets<'a>>,
    wanted: Gradient,
    products: Products,
) -> Result<HeadLoss> {
    let (head, Targets { ids, weights }) = (head.into(), targets.into());
    let [n, _, vocab] = sizes;
    check_head("the", h, &head, sizes)?;
    values("targets", n, ids.len())?;
    if let Some(bad) = ids.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
        return Err(KernelError::argument(OP, format!("target: expected below {vocab}, got {bad}")));
    }
    check_wanted(weights, &head, &wanted, sizes)?;
    let scored: Vec<usize> = (0..n).filter(|i| ids[*i] != IGNORE).collect();
    let student = Student { h, head, sizes, products };
    let objective = &mut CrossEntropy { ids, cap: head.softcap };
    let (nll, d_hidden) = walk(student, objective, &scored, weights, wanted);
    Ok(HeadLoss { nll, count: scored.len(), d_hidden })
}

struct FromTeacher<'a, T> {
    teacher: Teacher<'a, T>,
    vocab: usize,
    /// The student's.
    cap: Option<f32>,
    products: Products,
    rows: Vec<T>,
    logits: Vec<f32>,
}

impl<'a, T: Store> FromTeacher<'a, T> {
    fn hidden(&self) -> Option<Student<'a, T>> {
        match self.teacher {
            Teacher::Logits(_) => None,
            Teacher::Hidden { h, width, head } => {
                let sizes = [h.len() / width.max(1), width, self.vocab];
                Some(Student { h, head, sizes, products: self.products })
            }
        }
    }
}

impl<T: Store> Objective for FromTeacher<'_, T> {
    fn copies(&self) -> usize {
        match self.teacher {
            Teacher::Logits(_) => 1,
            Teacher::Hidden { .. } => 2,
        }
    }

    fn bounded(&self) -> bool {
        match (self.teacher, self.hidden()) {
            (Teacher::Logits(t), _) => {
                t.par_chunks(self.vocab).all(|row| rows::magnitude(row).0 < f32::INFINITY)
            }
            (_, Some(teacher)) => teacher.bounded(),
            (_, None) => false,
        }
    }

    fn begin(&mut self, positions: &[usize]) {
        if let Some(teacher) = self.hidden() {
            teacher.rows(positions, &mut self.rows);
            self.logits.resize(positions.len() * self.vocab, 0.0);
            teacher.logits(&self.rows, 0, &mut self.logits);
        }
    }

    fn row(&self, place: usize, position: usize, z: &mut [f32], scale: f32) -> f32 {
        match self.teacher {
            Teacher::Logits(t) => rows::kl(z, &t[position * self.vocab..][..self.vocab], scale, self.cap),
            Teacher::Hidden { .. } => {
                rows::kl(z, &self.logits[place * self.vocab..][..self.vocab], scale, self.cap)
            }
        }
    }
}

/// KL(teacher ‖ student) of every position, the student being softmax(h·Wᵀ); `sizes` are the student's `[N, E, V]`. The
/// teacher gets no gradient. A position of weight 0 has a value and no gradient.
///
/// # Errors
/// As [`head_cross_entropy`], and when the teacher's sizes do not agree.
pub fn head_divergence<'a, X: Store, T: Store>(
    h: &[X],
    head: impl Into<Head<'a>>,
    sizes: [usize; 3],
    teacher: Teacher<T>,
    weights: Option<&[f32]>,
    wanted: Gradient,
    products: Products,
) -> Result<Divergence> {
    let head = head.into();
    let [n, _, vocab] = sizes;
    check_head("the student's", h, &head, sizes)?;
    match &teacher {
        Teacher::Logits(t) => values(&format!("the teacher's logits [{n}, {vocab}]"), n * vocab, t.len())?,
        Teacher::Hidden { h, width, head } => check_head("the teacher's", h, head, [n, *width, vocab])?,
    }
    check_wanted(weights, &head, &wanted, sizes)?;
    let scored: Vec<usize> = (0..n).collect();
    let student = Student { h, head, sizes, products };
    let (rows, logits) = (Vec::new(), Vec::new());
    let objective = &mut FromTeacher { teacher, vocab, cap: head.softcap, products, rows, logits };
    let (kl, d_hidden) = walk(student, objective, &scored, weights, wanted);
    Ok(Divergence { kl, d_hidden })
}
