//! Which keys a query sees, as one contiguous range of keys per query and head.
//!
//! Every pattern of this crate gives each query one range lo..hi, and both ends never fall as the query advances.
//! The tiled kernels rely on exactly that. Units: entries of a row. Errors: `KernelError::Argument`.

use std::ops::Range;

use crate::error::{KernelError, Result};

pub(super) const OP: &str = "attention";

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
    pub(super) fn check(&self, batch: usize, entries: usize) -> Result<()> {
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
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::ShiftedSparse { group } if group < 2 => {
                Err(KernelError::argument(OP, format!("expected a group of at least 2 entries, got {group}")))
            }
            _ => Ok(()),
        }
    }
}

/// The keys lo[i]..hi[i] that query i sees, for the valid queries of one row.
#[derive(Debug)]
pub(super) struct Bounds {
    pub lo: Vec<usize>,
    pub hi: Vec<usize>,
}

impl Bounds {
    /// Valid queries of the row.
    pub fn len(&self) -> usize {
        self.lo.len()
    }

    /// Keys that at least one of `queries` (not empty) sees, as far as they lie between.
    pub fn keys(&self, queries: &Range<usize>) -> Range<usize> {
        self.lo[queries.start]..self.hi[queries.end - 1]
    }

    /// Whether some query of `queries` does not see some key of `keys`.
    pub fn masked(&self, queries: &Range<usize>, keys: &Range<usize>) -> bool {
        self.lo[queries.end - 1] > keys.start || self.hi[queries.start] < keys.end
    }

    /// The part of `keys` that query i sees, counted from the first of them.
    pub fn seen(&self, i: usize, keys: &Range<usize>) -> Range<usize> {
        let start = self.lo[i].clamp(keys.start, keys.end) - keys.start;
        let end = self.hi[i].clamp(keys.start, keys.end) - keys.start;
        start..end.max(start)
    }

    /// Cuts `queries` into tiles of at most `rows`, preferring to cut where the lower bound moves.
    pub fn tiles(&self, queries: Range<usize>, rows: usize) -> Vec<Range<usize>> {
        let smallest = (rows / 4).max(1);
        let mut tiles = Vec::new();
        let mut start = queries.start;
        for i in queries.clone() {
            let moved = i > start && self.lo[i] != self.lo[i - 1] && i - start >= smallest;
            if i - start == rows || moved {
                tiles.push(start..i);
                start = i;
            }
        }
        if start < queries.end {
            tiles.push(start..queries.end);
        }
        tiles
    }
}

/// The bounds of every row and head: heads differ only in whether their groups are shifted.
#[derive(Debug)]
pub(super) struct Plan {
    /// Per row: unshifted heads, then shifted heads where the pattern has any.
    bounds: Vec<Vec<Bounds>>,
    /// Heads from this one on are shifted.
    first_shifted: usize,
}

impl Plan {
    /// `pattern` and `rows` must have passed their checks.
    pub fn new(pattern: Pattern, rows: &Rows, batch: usize, entries: usize, heads: usize) -> Self {
        let group = match pattern {
            Pattern::ShiftedSparse { group } if group < entries => Some(group),
            _ => None,
        };
        let shifts: &[usize] = match group {
            Some(group) => &[0, group / 2],
            None => &[0],
        };
        let bounds = (0..batch)
            .map(|b| {
                let length = rows.lengths.as_ref().map_or(entries, |lengths| lengths[b]);
                let starts = rows.segments.as_ref().map_or(&[0][..], |segments| &segments[b]);
                let of_shift = |shift: &usize| {
                    let mut segment = 0;
                    let (mut lo, mut hi) = (Vec::with_capacity(length), Vec::with_capacity(length));
                    for i in 0..length {
                        if starts.get(segment + 1) == Some(&i) {
                            segment += 1;
                        }
                        let group_start = match group {
                            Some(group) if i >= *shift => shift + (i - shift) / group * group,
                            _ => 0,
                        };
                        lo.push(starts[segment].max(group_start));
                        hi.push(match pattern {
                            Pattern::Bidirectional => {
                                starts.get(segment + 1).map_or(length, |next| length.min(*next))
                            }
                            _ => i + 1,
                        });
                    }
                    Bounds { lo, hi }
                };
                shifts.iter().map(of_shift).collect()
            })
            .collect();
        Self { bounds, first_shifted: heads.div_ceil(2) }
    }

    /// The bounds of row `b` for query head `h`.
    pub fn bounds(&self, b: usize, h: usize) -> &Bounds {
        let of_row = &self.bounds[b];
        if h >= self.first_shifted { &of_row[of_row.len() - 1] } else { &of_row[0] }
    }
}
