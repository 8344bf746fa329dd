//! The shared-prefix form against plain attention in f64 over the document's first entries followed by the row's own, and
//! what rows may and may not feel of each other.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::prefix::{Continuations, Document, Own, PrefixAttention};
use megacontext_kernels::attention::reference::{self, Problem, Sizes};
use megacontext_kernels::attention::slices::{Gradients, Mixed};
use megacontext_kernels::attention::{Pattern, Rows, alibi_slopes};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::{Store, bf16};
use support::{BOTH, Outcome, SHIFTED, Tolerance, WINDOW, near, stored, values, widened};

/// n rows of R entries, H and Hkv heads of width D, over a document of T entries.
#[derive(Clone, Debug)]
struct Case {
    n: usize,
    entries: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    document: usize,
    pattern: Pattern,
    rows: Continuations,
    slopes: Option<Vec<f32>>,
}

#[derive(Clone)]
struct Operands {
    /// The document's k and v.
    document: [Vec<f32>; 2],
    /// q, k and v of the rows.
    own: [Vec<f32>; 3],
    d_out: Vec<f32>,
}

impl Case {
    /// `sizes` is R, H, Hkv, D.
    fn new([entries, heads, kv_heads, width]: [usize; 4], document: usize, prefix: &[usize]) -> Self {
        let rows = Continuations { prefix: prefix.to_vec(), lengths: None, lower: None };
        let (n, pattern) = (prefix.len(), Pattern::Dense);
        Self { n, entries, heads, kv_heads, width, document, pattern, rows, slopes: None }
    }

    fn pattern(self, pattern: Pattern) -> Self {
        Self { pattern, ..self }
    }

    fn lengths(mut self, lengths: &[usize]) -> Self {
        self.rows.lengths = Some(lengths.to_vec());
        self
    }

    fn lower(mut self, lower: &[usize]) -> Self {
        self.rows.lower = Some(lower.to_vec());
        self
    }

    fn scale(&self) -> f64 {
        2.5 / (self.width as f64).sqrt()
    }

    fn length(&self, row: usize) -> usize {
        self.rows.lengths.as_ref().map_or(self.entries, |lengths| lengths[row])
    }

    fn operands(&self) -> Operands {
        let kv = self.kv_heads * self.width;
        let (q, own) = (self.n * self.entries * self.heads * self.width, self.n * self.entries * kv);
        Operands {
            document: [values(self.document * kv, 5), values(self.document * kv, 6)],
            own: [values(q, 1), values(own, 2), values(own, 3)],
            d_out: values(q, 4),
        }
    }

    fn outcome<S: Store>(&self, x: &Operands, products: Products) -> Result<Outcome<S>> {
        let sizes = [self.n, self.entries, self.heads, self.kv_heads, self.width];
        let mut attention =
            PrefixAttention::new(sizes, self.document, self.scale(), self.pattern, self.rows.clone())?
                .with_products(products);
        if let Some(slopes) = &self.slopes {
            attention = attention.with_slopes(slopes)?;
        }
        let [q, k, v] = x.own.each_ref().map(|x| stored::<S>(x));
        let [document_k, document_v] = x.document.each_ref().map(|x| stored::<S>(x));
        let own = Own { q: &q, k: &k, v: &v };
        let document = Document { k: &document_k, v: &document_v };
        let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
        attention.forward_into(own, document, &mut mixed);
        attention.backward_into(own, document, &mixed, &x.d_out, &mut gradients);
        Ok(Outcome::new(mixed, gradients))
    }

    /// out, dq, dk and dv of the rows, each row run as a sequence of its own.
    fn reference<S: Store>(&self, x: &Operands) -> [Vec<f64>; 4] {
        let (q_row, kv_row) = (self.heads * self.width, self.kv_heads * self.width);
        let mut all: [Vec<f64>; 4] = Default::default();
        for row in 0..self.n {
            let (prefix, length) = (self.rows.prefix[row], self.length(row));
            let lower = self.rows.lower.as_ref().map_or(0, |lower| lower[row]);
            let starts = if lower > 0 { vec![0, lower] } else { vec![0] };
            let rows = Rows { lengths: None, segments: Some(vec![starts]) };
            let (heads, kv_heads, width) = (self.heads, self.kv_heads, self.width);
            let problem = Problem {
                sizes: Sizes {
                    batch: 1,
                    entries: self.document.max(prefix + length),
                    heads,
                    kv_heads,
                    width,
                },
                scale: self.scale(),
                pattern: self.pattern,
                rows: &rows,
                slopes: self.slopes.as_deref(),
            };
            let own = |values: &[f32], of: usize| -> Vec<f64> {
                widened(&stored::<S>(&values[row * self.entries * of..][..length * of]))
            };
            let after = |before: Vec<f64>, own: Vec<f64>| [before, own].concat();
            let document = |values: &[f32]| widened(&stored::<S>(&values[..prefix * kv_row]));
            // The document's queries are no one's: they are never run.
            let q = after(vec![0.0; prefix * q_row], own(&x.own[0], q_row));
            let k = after(document(&x.document[0]), own(&x.own[1], kv_row));
            let v = after(document(&x.document[1]), own(&x.own[2], kv_row));
            let d_out = &x.d_out[row * self.entries * q_row..][..length * q_row];
            let d_out = after(vec![0.0; prefix * q_row], widened(d_out));
            let (mut out, mut gradients) = (Vec::new(), reference::Gradients::zeros(&q, &k, &v));
            for i in prefix..prefix + length {
                for h in 0..self.heads {
                    out.extend(reference::forward_of(&q, &k, &v, &problem, [0, h, i]));
                    reference::backward_of(&q, &k, &v, &d_out, &problem, [0, h, i], &mut gradients);
                }
            }
            let of_row = [
                out,
                gradients.q.split_off(prefix * q_row),
                gradients.k.split_off(prefix * kv_row),
                gradients.v.split_off(prefix * kv_row),
            ];
            for ((all, mut of_row), row) in all.iter_mut().zip(of_row).zip([q_row, q_row, kv_row, kv_row]) {
                of_row.resize(self.entries * row, 0.0);
                all.append(&mut of_row);
            }
        }
        all
    }

    fn check<S: Store>(&self) -> Result<()> {
        let x = self.operands();
        let [out, dq, dk, dv] = self.reference::<S>(&x);
        for products in BOTH {
            let tolerance = Tolerance::of::<S>(products);
            let got = self.outcome::<S>(&x, products)?;
            let what = |part: &str| format!("{self:?} {products:?} of {:?}: {part}", S::DTYPE);
            near(&what("forward"), &widened(&got.out), &out, tolerance.forward);
            for (i, (name, want)) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().enumerate() {
                near(&what(name), &widened(&got.gradients[i]), want, tolerance.gradient);
            }
        }
        Ok(())
    }
}

fn patterns(document: usize) -> Vec<Pattern> {
    // Groups of 64 and more: heads with and without shift; 7 and 33: odd halves.
    let groups = [2, 7, 33, 64, 100, document + 1, document + 70].into_iter().filter(|group| *group >= 2);
    let windows = [1, 20, 65, 150];
    std::iter::once(Pattern::Dense)
        .chain(groups.map(SHIFTED))
        .chain(windows.into_iter().map(WINDOW))
        .collect()
}

#[test]
fn equals_attention_over_the_whole_sequence() -> Result<()> {
    const HEADS: [[usize; 2]; 6] = [[1, 1], [3, 1], [4, 2], [5, 5], [9, 3], [8, 1]];
    const WIDTHS: [usize; 5] = [8, 13, 64, 17, 33];
    let mut turn = 0;
    for document in [0, 1, 31, 64, 65, 150, 200] {
        for pattern in patterns(document) {
            for entries in [1, 2, 9, 33, 65] {
                turn += 1;
                let ([heads, kv_heads], width) = (HEADS[turn % 6], WIDTHS[turn % 5]);
                // No prefix, all of the document, and something between.
                let prefix = [0, document, document * (turn % 11) / 11];
                let mut case =
                    Case::new([entries, heads, kv_heads, width], document, &prefix).pattern(pattern);
                if turn % 3 == 0 {
                    case = case.lengths(&[entries, entries * (turn % 4) / 4, entries.div_ceil(2)]);
                }
                if turn % 4 < 2 {
                    case = case.lower(&prefix.map(|prefix| prefix * (turn % 5) / 4));
                }
                if turn % 5 == 0 {
                    case.slopes = Some(alibi_slopes(heads));
                }
                if turn % 2 == 0 { case.check::<f32>()? } else { case.check::<bf16>()? }
            }
        }
    }
    Ok(())
}

#[test]
fn heads_of_several_panels_over_a_document_of_many_tiles() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(256), SHIFTED(333), WINDOW(300)] {
        let case = Case::new([40, 6, 2, 16], 700, &[700, 511]).pattern(pattern);
        case.check::<f32>()?;
        case.lower(&[100, 511]).check::<bf16>()?;
    }
    Ok(())
}

#[test]
fn no_rows_and_rows_of_length_zero() -> Result<()> {
    for products in BOTH {
        let case = Case::new([5, 2, 1, 8], 40, &[]);
        assert!(case.outcome::<f32>(&case.operands(), products)?.out.is_empty());
        let case = Case::new([5, 2, 1, 8], 40, &[40, 0]).lengths(&[0, 0]);
        let got = case.outcome::<f32>(&case.operands(), products)?;
        assert!(got.out.iter().chain(got.gradients.iter().flatten()).all(|x| *x == 0.0));
    }
    Ok(())
}

fn causal_case(pattern: Pattern) -> Case {
    Case::new([70, 4, 2, 8], 150, &[150, 97, 0]).pattern(pattern).lower(&[20, 0, 0])
}

#[test]
fn an_own_entry_never_influences_an_earlier_one_or_another_row() -> Result<()> {
    for pattern in patterns(150) {
        for products in BOTH {
            let case = causal_case(pattern);
            let x = case.operands();
            let before = case.outcome::<f32>(&x, products)?;
            for (row, j) in [(0, 0), (0, 33), (1, 64), (2, 69)] {
                let mut changed = x.clone();
                for (values, heads) in changed.own.iter_mut().zip([4, 2, 2]) {
                    let of = heads * case.width;
                    values[(row * 70 + j) * of..][..of].iter_mut().for_each(|x| *x = 30.0 * *x + 0.5);
                }
                let after = case.outcome::<f32>(&changed, products)?;
                let of = 4 * case.width;
                let (at, end) = ((row * 70 + j) * of, (row + 1) * 70 * of);
                assert_eq!(after.out[..at], before.out[..at], "{pattern:?} {products:?} row {row} entry {j}");
                assert_eq!(after.out[end..], before.out[end..], "{pattern:?} {products:?}: rows after {row}");
                assert_ne!(after.out[at..end], before.out[at..end], "the entry itself does change");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_later_entries_and_other_rows_are_exactly_zero() -> Result<()> {
    for pattern in patterns(150) {
        for products in BOTH {
            let case = causal_case(pattern);
            for (row, i) in [(0, 0), (0, 40), (1, 63), (2, 30)] {
                let mut x = case.operands();
                let at = (row * 70 + i) * 4 * case.width;
                x.d_out.iter_mut().enumerate().for_each(|(d, g)| {
                    *g = if (at..at + 4 * case.width).contains(&d) { *g } else { 0.0 };
                });
                let got = case.outcome::<f32>(&x, products)?;
                for (gradient, heads) in got.gradients.iter().zip([4, 2, 2]) {
                    let of = heads * case.width;
                    let may = row * 70 * of..(row * 70 + i + 1) * of;
                    let outside = gradient.iter().enumerate().filter(|(d, _)| !may.contains(d));
                    assert!(
                        outside.into_iter().all(|(_, g)| *g == 0.0),
                        "{pattern:?} {products:?} {row} {i}"
                    );
                }
                let dv = &got.gradients[2];
                assert!(dv.iter().any(|g| *g != 0.0), "the entry's own gradient");
            }
        }
    }
    Ok(())
}

#[test]
fn the_document_outside_prefix_and_lower_bound_is_not_read() -> Result<()> {
    for pattern in patterns(150) {
        for products in BOTH {
            let case = Case::new([20, 4, 2, 8], 150, &[100, 90]).pattern(pattern).lower(&[40, 33]);
            let x = case.operands();
            let clean = case.outcome::<f32>(&x, products)?;
            for value in [f32::NAN, f32::INFINITY] {
                let mut bad = x.clone();
                for document in &mut bad.document {
                    document[..33 * 16].fill(value);
                    document[100 * 16..].fill(value);
                }
                let got = case.outcome::<f32>(&bad, products)?;
                let tolerance = Tolerance::of::<f32>(products).gradient;
                near("out", &widened(&got.out), &widened(&clean.out), tolerance);
                for (got, clean) in got.gradients.iter().zip(&clean.gradients) {
                    near("gradient", &widened(got), &widened(clean), tolerance);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn nan_and_infinity_stay_in_their_row_and_head() -> Result<()> {
    // Three entries and four heads: all queries of a kv head share one panel.
    for pattern in [Pattern::Dense, SHIFTED(40), WINDOW(9)] {
        for products in BOTH {
            let case = Case::new([3, 4, 2, 8], 60, &[60, 37]).pattern(pattern);
            let clean = case.outcome::<f32>(&case.operands(), products)?;
            let tolerance = Tolerance::of::<f32>(products).gradient;
            for value in [f32::NAN, f32::INFINITY] {
                for which in 0..3 {
                    // Row 0, entry 1, head 0.
                    let mut x = case.operands();
                    let heads = [4, 2, 2][which];
                    x.own[which][heads * 8..][..8].fill(value);
                    let got = case.outcome::<f32>(&x, products)?;
                    let what = format!("{pattern:?} {products:?} {value} in {which}");
                    for row in 0..2 {
                        for entry in 0..3 {
                            for head in 0..4 {
                                let at = ((row * 3 + entry) * 4 + head) * 8;
                                let seen = row == 0
                                    && if which == 0 {
                                        (entry, head) == (1, 0)
                                    } else {
                                        entry >= 1 && head < 2
                                    };
                                let out = &got.out[at..at + 8];
                                if !seen {
                                    near(&what, &widened(out), &widened(&clean.out[at..at + 8]), tolerance);
                                } else if value.is_nan() {
                                    assert!(out.iter().all(|x| x.is_nan()), "{what}: NaN arrives");
                                }
                            }
                        }
                    }
                    // Row 1, and the second kv head of row 0, keep their gradients.
                    for (gradient, (clean, heads)) in
                        got.gradients.iter().zip(clean.gradients.iter().zip([4, 2, 2]))
                    {
                        for row in 0..6 {
                            let of = if row < 3 { heads / 2 * 8..heads * 8 } else { 0..heads * 8 };
                            let of = row * heads * 8 + of.start..row * heads * 8 + of.end;
                            near(&what, &widened(&gradient[of.clone()]), &widened(&clean[of]), tolerance);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_same_bytes_whatever_the_threads() -> Result<()> {
    let case = Case::new([65, 6, 2, 16], 300, &[300, 17, 0, 255, 128]).pattern(SHIFTED(200));
    let x = case.operands();
    for products in BOTH {
        let first = case.outcome::<f32>(&x, products)?;
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let again = pool.install(|| case.outcome::<f32>(&x, products))?;
            assert!(again == first, "{threads} threads, {products:?}");
        }
    }
    Ok(())
}
