//! Which keys a query sees, as one contiguous range of keys per query and head.
//!
//! Every pattern of this crate gives each query one range lo..hi, and both ends never fall as the query advances.
//! The tiled kernels rely on exactly that. Units: entries of a row. Errors: `KernelError::Argument`.

use std::ops::Range;

use crate::error::{KernelError, Result};

pub(crate) const OP: &str = "attention";

/// Which keys a query may see, before row lengths and segments narrow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Every key up to and including the query's own.
    Dense,
    /// Causal within groups of `group` entries; the second half of the query heads has its groups moved by half a
    /// group (rounded down when `group` is odd). A group of at least T is [`Pattern::Dense`].
    ShiftedSparse {
        /// Entries in a group, at least 2.
        group: usize,
    },
    /// The groups of [`Pattern::ShiftedSparse`], in which every query sees all keys. A group of at least T is
    /// [`Pattern::Bidirectional`].
    ShiftedBidirectional {
        /// Entries in a group, at least 2.
        group: usize,
    },
    /// The last `window` keys up to and including the query's own (Mistral's sliding window).
    SlidingWindow {
        /// Keys a query sees, at least 1.
        window: usize,
    },
    /// Every key of the row, or of the query's segment.
    Bidirectional,
}

/// What is valid in each row of the batch. The default is: everything, one segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// `lengths[b]` entries of row b are valid, at most T. Entries past them are neither queries (their outputs and
    /// gradients are zero) nor keys.
    pub lengths: Option<Vec<usize>>,
    /// `segments[b]` are the strictly ascending starts of the segments packed into row b, the first one 0. No query
    /// sees a key of another segment.
    pub segments: Option<Vec<Vec<usize>>>,
}

impl Rows {
    pub(crate) fn check(&self, batch: usize, entries: usize) -> Result<()> {
        let refuse = |message: String| Err(KernelError::argument(OP, message));
        if let Some(lengths) = &self.lengths {
            if lengths.len() != batch {
                return refuse(format!("expected {batch} row lengths, got {}", lengths.len()));
            }
            if let Some((b, length)) = lengths.iter().enumerate().find(|(_, length)| **length > entries) {
                return refuse(format!("row {b}: expected a length of at most T = {entries}, got {length}"));
            }
        }
        if let Some(segments) = &self.segments {
            if segments.len() != batch {
                return refuse(format!("expected segments for {batch} rows, got {}", segments.len()));
            }
            for (b, starts) in segments.iter().enumerate() {
                if starts.first() != Some(&0) {
                    let got = starts.first().map_or("none".to_string(), usize::to_string);
                    return refuse(format!("row {b}: expected the first segment to start at 0, got {got}"));
                }
                if let Some(pair) = starts.windows(2).find(|pair| pair[0] >= pair[1]) {
                    return refuse(format!(
                        "row {b}: expected ascending segment starts, got {} after {}",
                        pair[1], pair[0]
                    ));
                }
                if let Some(start) = starts.iter().find(|start| **start > 0 && **start >= entries) {
                    return refuse(format!(
                        "row {b}: expected segment starts below T = {entries}, got {start}"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Pattern {
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::ShiftedSparse { group } | Self::ShiftedBidirectional { group } if group < 2 => {
                Err(KernelError::argument(OP, format!("expected a group of at least 2 entries, got {group}")))
            }
            Self::SlidingWindow { window: 0 } => {
                Err(KernelError::argument(OP, "expected a window of at least 1 entry, got 0"))
            }
            _ => Ok(()),
        }
    }
}

/// The first key that query `i` of a head may see by the pattern alone; `shifted` is [`shifted`] of the head.
pub(super) fn lower(pattern: Pattern, entries: usize, shifted: bool, i: usize) -> usize {
    match pattern {
        Pattern::ShiftedSparse { group } | Pattern::ShiftedBidirectional { group } if group < entries => {
            let shift = if shifted { group / 2 } else { 0 };
            if i < shift { 0 } else { shift + (i - shift) / group * group }
        }
        Pattern::SlidingWindow { window } => (i + 1).saturating_sub(window),
        _ => 0,
    }
}

/// One past the last key that query `i` of a head may see by the pattern alone; at most `entries`.
fn upper(pattern: Pattern, entries: usize, shifted: bool, i: usize) -> usize {
    match pattern {
        Pattern::ShiftedBidirectional { group } if group < entries => {
            let shift = if shifted { group / 2 } else { 0 };
            let end = if i < shift { shift } else { lower(pattern, entries, shifted, i) + group };
            end.min(entries)
        }
        Pattern::Bidirectional | Pattern::ShiftedBidirectional { .. } => entries,
        _ => i + 1,
    }
}

/// Whether the groups of a query head are moved by half a group.
pub(super) fn shifted(head: usize, heads: usize) -> bool {
    head >= heads.div_ceil(2)
}

/// The keys lo[i]..hi[i] that query i sees, for the valid queries of one row.
#[derive(Debug)]
pub(super) struct Bounds {
    pub lo: Vec<u32>,
    pub hi: Vec<u32>,
}

impl Bounds {
    /// Valid queries of the row.
    pub fn len(&self) -> usize {
        self.lo.len()
    }

    /// Keys that at least one of `queries` sees, as far as they lie between; queries past the valid ones see none.
    pub fn keys(&self, queries: &Range<usize>) -> Range<usize> {
        let end = queries.end.min(self.len());
        if queries.start >= end {
            return 0..0;
        }
        self.lo[queries.start] as usize..self.hi[end - 1] as usize
    }
}

/// The bounds of every row and head: heads differ only in whether their groups are shifted.
#[derive(Debug)]
pub(super) struct Plan {
    /// Per row: unshifted heads, then shifted heads where the pattern has any.
    bounds: Vec<Vec<Bounds>>,
    heads: usize,
}

impl Plan {
    /// `pattern` and `rows` must have passed their checks.
    pub fn new(pattern: Pattern, rows: &Rows, batch: usize, entries: usize, heads: usize) -> Self {
        let shifts: &[bool] = match pattern {
            Pattern::ShiftedSparse { group } | Pattern::ShiftedBidirectional { group } if group < entries => {
                &[false, true]
            }
            _ => &[false],
        };
        let bounds = (0..batch)
            .map(|b| {
                let length = rows.lengths.as_ref().map_or(entries, |lengths| lengths[b]);
                let starts = rows.segments.as_ref().map_or(&[0][..], |segments| &segments[b]);
                let of_shift = |shifted: &bool| {
                    let mut segment = 0;
                    let (mut lo, mut hi) = (Vec::with_capacity(length), Vec::with_capacity(length));
                    for i in 0..length {
                        if starts.get(segment + 1) == Some(&i) {
                            segment += 1;
                        }
                        let valid = starts.get(segment + 1).map_or(length, |next| length.min(*next));
                        lo.push(starts[segment].max(lower(pattern, entries, *shifted, i)) as u32);
                        hi.push(valid.min(upper(pattern, entries, *shifted, i)) as u32);
                    }
                    Bounds { lo, hi }
                };
                shifts.iter().map(of_shift).collect()
            })
            .collect();
        Self { bounds, heads }
    }

    /// The bounds of row `b` for query head `h`.
    pub fn bounds(&self, b: usize, h: usize) -> &Bounds {
        let of_row = &self.bounds[b];
        if shifted(h, self.heads) { &of_row[of_row.len() - 1] } else { &of_row[0] }
    }
}

/// ALiBi's slopes for `heads` query heads: 2^(−8(h+1)/H) where H is a power of two; otherwise those of the next smaller
/// power of two, followed by every second one of the next larger.
///
/// Source: Press et al. 2022, and the authors' code for the second case.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let of_power = |n: usize| (0..n).map(move |h| (2f64.powf(-8.0 * (h + 1) as f64 / n as f64)) as f32);
    let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    of_power(whole).chain(of_power(2 * whole).step_by(2)).take(heads).collect()
}
