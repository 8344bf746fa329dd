//! New entries over caches against plain attention in f64 over each whole row, and what rows may and may not feel of each
//! other and of how they were cut.
#![allow(clippy::unwrap_used)]

#[path = "attention/pages.rs"]
#[allow(dead_code)]
mod pages;
#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::decode::{Cache, CacheAttention, CachedRow};
use megacontext_kernels::attention::reference::{self, Problem, Sizes};
use megacontext_kernels::attention::slices::Mixed;
use megacontext_kernels::attention::{Pattern, Rows, alibi_slopes};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::{Store, bf16};
use pages::{Guarded, SIDES};
use support::{BOTH, SHIFTED, Tolerance, WINDOW, near, stored, values, widened};

/// Rows as (past, new entries); H and Hkv heads of width D.
#[derive(Clone, Debug)]
struct Case {
    rows: Vec<(usize, usize)>,
    heads: usize,
    kv_heads: usize,
    width: usize,
    pattern: Pattern,
    slopes: Option<Vec<f32>>,
}

/// q of the new entries; k and v of the caches, in which rows lie `GAP` entries apart.
#[derive(Clone)]
struct Operands {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const GAP: usize = 3;

impl Case {
    fn new([heads, kv_heads, width]: [usize; 3], rows: &[(usize, usize)]) -> Self {
        Self { rows: rows.to_vec(), heads, kv_heads, width, pattern: Pattern::Dense, slopes: None }
    }

    fn pattern(self, pattern: Pattern) -> Self {
        Self { pattern, ..self }
    }

    fn scale(&self) -> f64 {
        2.5 / (self.width as f64).sqrt()
    }

    fn cached(&self) -> Vec<CachedRow> {
        let mut first = 0;
        let of = |(past, entries): &(usize, usize)| {
            let row = CachedRow { entries: *entries, past: *past, first };
            first += past + entries + GAP;
            row
        };
        self.rows.iter().map(of).collect()
    }

    /// Entries of the caches, nothing after the last row.
    fn held(&self) -> usize {
        self.cached().last().map_or(0, |row| row.first + row.past + row.entries)
    }

    fn operands(&self) -> Operands {
        let new: usize = self.rows.iter().map(|row| row.1).sum();
        let kv = self.held() * self.kv_heads * self.width;
        Operands { q: values(new * self.heads * self.width, 1), k: values(kv, 2), v: values(kv, 3) }
    }

    fn attention(&self, products: Products) -> Result<CacheAttention> {
        let sizes = [self.heads, self.kv_heads, self.width];
        let attention =
            CacheAttention::new(sizes, self.scale(), self.pattern, self.cached())?.with_products(products);
        Ok(match &self.slopes {
            Some(slopes) => attention.with_slopes(slopes)?,
            None => attention,
        })
    }

    fn run<S: Store>(&self, x: &Operands, products: Products) -> Result<Mixed<S>> {
        let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| stored::<S>(x));
        let mut mixed = Mixed::default();
        self.attention(products)?.forward_into(&q, Cache { k: &k, v: &v }, &mut mixed);
        Ok(mixed)
    }

    /// Results and log-sum-exps, each row run as a sequence of its own.
    fn reference<S: Store>(&self, x: &Operands) -> (Vec<f64>, Vec<f64>) {
        let (q_row, kv_row) = (self.heads * self.width, self.kv_heads * self.width);
        let (mut out, mut lse, mut at) = (Vec::new(), Vec::new(), 0);
        let all = Rows::default();
        for row in self.cached() {
            let length = row.past + row.entries;
            let problem = Problem {
                sizes: Sizes {
                    batch: 1,
                    entries: length,
                    heads: self.heads,
                    kv_heads: self.kv_heads,
                    width: self.width,
                },
                scale: self.scale(),
                pattern: self.pattern,
                rows: &all,
                slopes: self.slopes.as_deref(),
            };
            let of_cache = |values: &[f32]| {
                widened(&stored::<S>(&values[row.first * kv_row..(row.first + length) * kv_row]))
            };
            let (k, v) = (of_cache(&x.k), of_cache(&x.v));
            // Queries of the past are no one's: they are never run.
            let mut q = vec![0.0; row.past * q_row];
            q.extend(widened(&stored::<S>(&x.q[at * q_row..(at + row.entries) * q_row])));
            for i in row.past..length {
                for h in 0..self.heads {
                    out.extend(reference::forward_of(&q, &k, &v, &problem, [0, h, i]));
                    let (j, p) = problem.probabilities(&q, &k, [0, h, i])[0];
                    let group = self.heads / self.kv_heads;
                    let dot: f64 = (0..self.width)
                        .map(|d| {
                            q[i * q_row + h * self.width + d] * k[j * kv_row + h / group * self.width + d]
                        })
                        .sum();
                    let slope = self.slopes.as_ref().map_or(0.0, |s| f64::from(s[h]));
                    lse.push(self.scale() * dot - slope * (i - j) as f64 - p.ln());
                }
            }
            at += row.entries;
        }
        (out, lse)
    }

    fn check<S: Store>(&self) -> Result<()> {
        let x = self.operands();
        let (out, lse) = self.reference::<S>(&x);
        for products in BOTH {
            let tolerance = Tolerance::of::<S>(products);
            let got = self.run::<S>(&x, products)?;
            let what = |part: &str| format!("{self:?} {products:?} of {:?}: {part}", S::DTYPE);
            near(&what("out"), &widened(&got.out), &out, tolerance.forward);
            near(&what("lse"), &widened(&got.lse), &lse, 4.0 * tolerance.forward);
        }
        Ok(())
    }
}

const PATTERNS: [Pattern; 5] = [
    Pattern::Dense,
    Pattern::SlidingWindow { window: 1 },
    Pattern::SlidingWindow { window: 20 },
    Pattern::SlidingWindow { window: 65 },
    Pattern::SlidingWindow { window: 5000 },
];

#[test]
fn equals_attention_over_the_whole_row() -> Result<()> {
    const HEADS: [[usize; 2]; 7] = [[1, 1], [3, 1], [4, 2], [5, 5], [9, 3], [8, 1], [20, 1]];
    const WIDTHS: [usize; 6] = [8, 13, 64, 17, 33, 1];
    let mut turn = 0;
    for past in [0, 1, 31, 63, 64, 65, 150] {
        for pattern in PATTERNS {
            for entries in [0, 1, 2, 9, 33, 65] {
                turn += 1;
                let ([heads, kv_heads], width) = (HEADS[turn % 7], WIDTHS[turn % 6]);
                // Beside rows of other lengths, single ones and none among them.
                let rows = [(past, entries), (past / 3, 1), (past, turn % 3), (0, entries.min(3))];
                let mut case = Case::new([heads, kv_heads, width], &rows).pattern(pattern);
                if turn % 4 == 0 {
                    case.slopes = Some(alibi_slopes(heads));
                }
                if turn % 2 == 0 { case.check::<f32>()? } else { case.check::<bf16>()? }
            }
        }
    }
    Ok(())
}

#[test]
fn single_entries_over_caches_of_many_pieces() -> Result<()> {
    // Pieces are 1024 keys: one, one and a key, several, a window that begins inside one.
    for (pattern, past) in
        [(Pattern::Dense, 1023), (Pattern::Dense, 1024), (Pattern::Dense, 3500), (WINDOW(1500), 3100)]
    {
        let mut case = Case::new([6, 2, 40], &[(past, 1), (70, 2), (past / 2, 1)]).pattern(pattern);
        case.check::<f32>()?;
        case.slopes = Some(alibi_slopes(6));
        case.check::<bf16>()?;
    }
    Ok(())
}

#[test]
fn a_row_is_the_same_alone_and_among_others() -> Result<()> {
    for pattern in PATTERNS {
        for products in BOTH {
            let case = Case::new([4, 2, 24], &[(130, 1), (7, 40), (0, 1), (1200, 1)]).pattern(pattern);
            let x = case.operands();
            let all = case.run::<f32>(&x, products)?;
            let (q_row, kv_row, mut at) = (4 * 24, 2 * 24, 0);
            for row in case.cached() {
                let alone = Case { rows: vec![(row.past, row.entries)], ..case.clone() };
                let own = Operands {
                    q: x.q[at * q_row..(at + row.entries) * q_row].to_vec(),
                    k: x.k[row.first * kv_row..].to_vec(),
                    v: x.v[row.first * kv_row..].to_vec(),
                };
                let got = alone.run::<f32>(&own, products)?;
                assert!(got.out == all.out[at * q_row..(at + row.entries) * q_row], "{pattern:?} {row:?}");
                at += row.entries;
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_outside_what_an_entry_sees_is_read() -> Result<()> {
    // Later entries of the row, what lies between rows, and what a window has left behind.
    for products in BOTH {
        for entries in [1, 5] {
            let case = Case::new([4, 2, 8], &[(90, entries), (40, 1)]).pattern(WINDOW(30));
            let x = case.operands();
            let clean = case.run::<f32>(&x, products)?;
            for bad in [f32::NAN, f32::INFINITY] {
                let mut y = x.clone();
                let length = 90 + entries;
                for values in [&mut y.k, &mut y.v] {
                    // The first new entry sees keys 61..91 of row 0; row 1 begins after a gap and sees its last 30.
                    values[..61 * 16].fill(bad);
                    values[length * 16..(length + GAP + 11) * 16].fill(bad);
                }
                let got = case.run::<f32>(&y, products)?;
                near("out", &widened(&got.out), &widened(&clean.out), Tolerance::of::<f32>(products).forward);
            }
        }
    }
    Ok(())
}

#[test]
fn nan_arrives_in_its_kv_head_alone() -> Result<()> {
    for products in BOTH {
        for entries in [1, 4] {
            let case = Case::new([4, 2, 8], &[(70, entries)]);
            let clean = case.run::<f32>(&case.operands(), products)?;
            for which in 0..2 {
                let mut x = case.operands();
                [&mut x.k, &mut x.v][which][20 * 16..20 * 16 + 8].fill(f32::NAN);
                let got = case.run::<f32>(&x, products)?;
                for (i, (got, clean)) in got.out.iter().zip(&clean.out).enumerate() {
                    let head = i / 8 % 4;
                    assert!(
                        if head < 2 { got.is_nan() } else { got == clean },
                        "{entries} {which} {i}: {got}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_same_bytes_whatever_the_threads() -> Result<()> {
    let case = Case::new([6, 2, 16], &[(3000, 1), (100, 65), (64, 1)]);
    let x = case.operands();
    for products in BOTH {
        let first = case.run::<f32>(&x, products)?;
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let again = pool.install(|| case.run::<f32>(&x, products))?;
            assert!(again.out == first.out && again.lse == first.lse, "{threads} threads, {products:?}");
        }
    }
    Ok(())
}

fn flush<S: Store>(case: &Case, products: Products) -> Result<()> {
    let x = case.operands();
    let want = case.run::<S>(&x, products)?;
    for side in SIDES {
        let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| Guarded::new(&stored::<S>(x), side));
        let mut mixed = Mixed::default();
        case.attention(products)?.forward_into(&q, Cache { k: &k, v: &v }, &mut mixed);
        assert!(mixed.out == want.out, "{case:?} {products:?} {side:?}");
    }
    Ok(())
}

#[test]
fn caches_flush_against_forbidden_pages() -> Result<()> {
    for products in BOTH {
        for (past, entries) in [(0, 1), (1, 1), (63, 1), (64, 1), (200, 1), (10, 5), (63, 33)] {
            for [heads, kv_heads, width] in [[1, 1, 1], [3, 1, 7], [4, 2, 16], [2, 2, 33]] {
                let case = Case::new([heads, kv_heads, width], &[(past, entries)]);
                flush::<f32>(&case, products)?;
                flush::<bf16>(&case, products)?;
            }
        }
    }
    Ok(())
}

#[test]
fn no_rows_and_rows_without_new_entries() -> Result<()> {
    let case = Case::new([4, 2, 8], &[]);
    assert!(case.run::<f32>(&case.operands(), Products::F32)?.out.is_empty());
    let case = Case::new([4, 2, 8], &[(9, 0), (0, 0)]);
    assert!(case.run::<f32>(&case.operands(), Products::F32)?.out.is_empty());
    Ok(())
}

fn refused(sizes: [usize; 3], pattern: Pattern) -> String {
    let rows = vec![CachedRow { entries: 1, past: 9, first: 0 }];
    CacheAttention::new(sizes, 1.0, pattern, rows).unwrap_err().to_string()
}

#[test]
fn a_shifted_sparse_pattern() {
    assert_eq!(
        refused([2, 1, 8], SHIFTED(4)),
        "attention: expected dense or sliding-window attention over a cache, got ShiftedSparse { group: 4 }"
    );
}

#[test]
fn a_bidirectional_pattern() {
    assert!(refused([2, 1, 8], Pattern::Bidirectional).ends_with("over a cache, got Bidirectional"));
}

#[test]
fn a_window_of_no_keys() {
    assert!(refused([2, 1, 8], WINDOW(0)).contains("expected a window of at least 1 entry, got 0"));
}

#[test]
fn query_heads_that_kv_heads_do_not_divide() {
    assert!(refused([3, 2, 8], Pattern::Dense).contains("3 query heads and 2 kv heads"));
}

#[test]
fn a_head_wider_than_the_kernels() {
    assert!(refused([2, 1, 257], Pattern::Dense).contains("a head width of 1 to 256, got 257"));
}

#[test]
fn a_row_longer_than_can_be_counted() {
    let rows = vec![CachedRow { entries: 1, past: usize::MAX, first: 0 }];
    let error = CacheAttention::new([2, 1, 8], 1.0, Pattern::Dense, rows).unwrap_err().to_string();
    assert!(error.contains("expected at most 1073741823 entries"), "{error}");
}

#[test]
fn slopes_for_other_heads() {
    let attention = CacheAttention::new([2, 1, 8], 1.0, Pattern::Dense, Vec::new()).unwrap();
    let error = attention.with_slopes(&[1.0]).unwrap_err().to_string();
    assert!(error.contains("expected 2 slopes, one per query head, got 1"), "{error}");
}
