//! Values that are not ordinary numbers: NaN, infinity, denormals, scores without bounds, rows that see nothing.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::attention::reference::sees;
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::{Store, bf16};
use support::{BOTH, Case, Outcome, SHIFTED, Tolerance, WINDOW, near, widened};

/// Which rows [head width] of out, dq, dk and dv a bad row of operand `which` (q, k, v, d_out) at entry `at` of head `head`
/// may reach in a batch of one: by the definition of attention, through what each query sees.
fn reached(case: &Case, which: usize, at: usize, head: usize) -> [Vec<bool>; 4] {
    let s = &case.sizes;
    let group = s.heads / s.kv_heads;
    let sees = |h: usize, i: usize, j: usize| sees(s, case.pattern, &case.rows, 0, h, i, j);
    let mut queries = vec![false; s.entries * s.heads];
    for h in 0..s.heads {
        for i in 0..s.entries {
            queries[i * s.heads + h] = match which {
                0 | 3 => (i, h) == (at, head) && sees(h, i, i),
                _ => h / group == head && sees(h, i, at),
            };
        }
    }
    let mut keys = vec![false; s.entries * s.kv_heads];
    for h in 0..s.heads {
        for i in (0..s.entries).filter(|i| queries[i * s.heads + h]) {
            for j in (0..s.entries).filter(|j| sees(h, i, *j)) {
                keys[j * s.kv_heads + h / group] = true;
            }
        }
    }
    let out = if which == 3 { vec![false; queries.len()] } else { queries.clone() };
    [out, queries, keys.clone(), keys]
}

/// Puts `value` in one row of one operand: whatever it may not reach stays as it was, and NaN arrives where it has to.
fn check_bad_row<S: Store>(
    case: &Case,
    products: Products,
    clean: &Outcome<S>,
    which: usize,
    at: usize,
    head: usize,
    value: f32,
) -> Result<()> {
    let (width, kv) = (case.sizes.width, which == 1 || which == 2);
    let heads = if kv { case.sizes.kv_heads } else { case.sizes.heads };
    let mut operands = case.operands();
    operands[which][(at * heads + head) * width..][..width].fill(value);
    let got = case.outcome::<S>(&operands, products)?;
    let all = |x: &Outcome<S>| {
        let [q, k, v] = x.gradients.each_ref().map(|g| widened(g));
        [widened(&x.out), q, k, v]
    };
    let tolerance = Tolerance::of::<S>(products);
    let reached = reached(case, which, at, head);
    for (i, ((got, clean), reached)) in all(&got).iter().zip(all(clean)).zip(&reached).enumerate() {
        let name = ["out", "dq", "dk", "dv"][i];
        let what = format!(
            "{case:?} {products:?} {:?}: {value} in operand {which} at {at}, {head}: {name}",
            S::DTYPE
        );
        let (mut kept, mut want) = (Vec::new(), Vec::new());
        for (row, reached) in reached.iter().enumerate() {
            let row = row * width..(row + 1) * width;
            if !reached {
                kept.extend_from_slice(&got[row.clone()]);
                want.extend_from_slice(&clean[row]);
            } else if i == 0 && value.is_nan() {
                assert!(got[row].iter().all(|x| x.is_nan()), "{what}: NaN arrives");
            } else if i == 0 && which == 2 && value.is_infinite() {
                assert!(got[row].iter().all(|x| !x.is_finite()), "{what}: infinity arrives");
            }
        }
        near(&what, &kept, &want, tolerance.gradient);
    }
    Ok(())
}

#[test]
fn nan_and_infinity_reach_what_sees_them_and_nothing_else() -> Result<()> {
    let sizes = [1, 150, 4, 2, 20];
    let mut cases: Vec<Case> =
        [Pattern::Dense, SHIFTED(16), SHIFTED(31), SHIFTED(32), SHIFTED(64), WINDOW(20), WINDOW(100)]
            .map(|pattern| Case::new(sizes, pattern))
            .into();
    cases.push(Case::new(sizes, Pattern::Dense).lengths(&[97]).segments(&[&[0, 33, 64]]));
    // Boundaries where a whole panel sees part of a tile without any mask, and where two panels share a tile.
    cases.push(Case::new(sizes, Pattern::Bidirectional).segments(&[&[0, 32, 64, 96]]));
    cases.push(Case::new(sizes, Pattern::Bidirectional).segments(&[&[0, 40, 104]]));
    cases.push(Case::new(sizes, Pattern::Bidirectional).lengths(&[128]));
    for case in &cases {
        for products in BOTH {
            let clean = case.outcome::<f32>(&case.operands(), products)?;
            let clean_bf16 = case.outcome::<bf16>(&case.operands(), products)?;
            for (turn, at) in [0, 31, 32, 45, 64, 96, 127, 149].into_iter().enumerate() {
                for which in 0..4 {
                    let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(turn + which) % 3];
                    let head = if which == 1 || which == 2 { turn % 2 } else { turn % 4 };
                    check_bad_row(case, products, &clean, which, at, head, value)?;
                    if turn % 3 == 0 {
                        check_bad_row(case, products, &clean_bf16, which, at, head, value)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn values_that_only_bf16_calls_infinite_stay_where_they_are_seen() -> Result<()> {
    // The largest f32 rounds to infinity in bf16.
    let case = Case::new([1, 100, 2, 1, 16], SHIFTED(32));
    for products in BOTH {
        let clean = case.outcome::<f32>(&case.operands(), products)?;
        for which in 0..4 {
            check_bad_row(&case, products, &clean, which, 40, 0, f32::MAX)?;
        }
    }
    Ok(())
}

#[test]
fn a_nan_does_not_coarsen_the_gradients_of_others() -> Result<()> {
    // Large scores: probabilities found again from operands that are rounded otherwise than forward's would be far off.
    let case = Case::new([1, 60, 1, 1, 16], Pattern::Dense).scale(40.0);
    let clean = case.outcome::<f32>(&case.operands(), Products::Bf16)?;
    check_bad_row(&case, Products::Bf16, &clean, 0, 45, 0, f32::NAN)?;
    check_bad_row(&case, Products::Bf16, &clean, 1, 59, 0, f32::NAN)
}

fn all_zero<S: Store>(outcome: &Outcome<S>) -> bool {
    outcome.out.iter().all(|x| x.get() == 0.0) && outcome.gradients.iter().flatten().all(|x| *x == 0.0)
}

#[test]
fn rows_of_length_zero_give_zeros_in_every_class() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(4), WINDOW(3), Pattern::Bidirectional] {
        for products in BOTH {
            let case = Case::new([2, 70, 3, 1, 9], pattern).lengths(&[0, 0]);
            assert!(all_zero(&case.outcome::<f32>(&case.operands(), products)?), "{case:?} {products:?}");
            assert!(all_zero(&case.outcome::<bf16>(&case.operands(), products)?), "{case:?} {products:?}");
        }
    }
    Ok(())
}

#[test]
fn buffers_of_an_earlier_pass_leave_nothing_in_rows_that_see_nothing() -> Result<()> {
    use megacontext_kernels::attention::slices::{Gradients, Mixed};
    let case = Case::new([2, 70, 3, 1, 9], Pattern::Dense).lengths(&[0, 31]);
    let [q, k, v, d_out] = case.operands();
    let fresh = case.outcome::<f32>(&case.operands(), Products::F32)?;
    let mut mixed = Mixed { out: vec![f32::NAN; 9], lse: vec![f32::NAN; 5000] };
    let mut gradients =
        Gradients { q: vec![f32::NAN; 9000], k: vec![f32::NAN; 3], v: vec![f32::NAN; q.len()] };
    let prepared = case.prepared(Products::F32)?;
    prepared.forward_into(&q, &k, &v, &mut mixed);
    prepared.backward_into(&q, &k, &v, &mixed, &d_out, &mut gradients);
    assert_eq!(Outcome::new(mixed, gradients), fresh);
    Ok(())
}

#[test]
fn scores_that_are_all_minus_infinity_give_zeros() -> Result<()> {
    for products in BOTH {
        for pattern in [Pattern::Dense, SHIFTED(8), WINDOW(5), Pattern::Bidirectional] {
            let case = Case::new([1, 70, 2, 1, 8], pattern);
            let mut operands = case.operands();
            operands[0].fill(1e30);
            operands[1].fill(-1e30);
            assert!(all_zero(&case.outcome::<f32>(&operands, products)?), "{case:?} {products:?}");
            assert!(all_zero(&case.outcome::<bf16>(&operands, products)?), "{case:?} {products:?}");
        }
    }
    Ok(())
}

#[test]
fn some_scores_of_minus_infinity_are_keys_not_seen() -> Result<()> {
    // Keys 0 to 9 score −∞ for every query: entries from 10 on see what they would see without them.
    let case = Case::new([1, 70, 2, 1, 8], Pattern::Dense);
    let without = case.clone().segments(&[&[0, 10]]);
    let mut operands = case.operands();
    operands[0].iter_mut().for_each(|x| *x = x.abs() + 0.1);
    let want = without.outcome::<f32>(&operands, Products::F32)?;
    operands[1][..80].fill(f32::NEG_INFINITY);
    let got = case.outcome::<f32>(&operands, Products::F32)?;
    let row = 2 * 8;
    assert!(got.out[..10 * row].iter().all(|x| *x == 0.0), "queries that see only −∞");
    near("the others", &widened(&got.out[10 * row..]), &widened(&want.out[10 * row..]), 2e-6);
    near("their dv", &widened(&got.gradients[2][80..]), &widened(&want.gradients[2][80..]), 5e-6);
    Ok(())
}

#[test]
fn denormals() -> Result<()> {
    for products in BOTH {
        let case = Case::new([1, 130, 2, 1, 8], SHIFTED(50)).scale(1.0);
        let mut operands = case.operands();
        for operand in &mut operands {
            operand.iter_mut().for_each(|x| *x *= 1e-39);
        }
        let got = case.outcome::<f32>(&operands, products)?;
        for (name, values) in [("out", &got.out), ("dq", &got.gradients[0]), ("dv", &got.gradients[2])] {
            // Denormals, or zero where instructions take them for zero.
            assert!(values.iter().all(|x| x.abs() < 1e-37), "{products:?} {name}");
        }
        // Scores of zero: every key seen counts alike, and values of ordinary size are averaged.
        let mut operands = case.operands();
        operands[0].iter_mut().for_each(|x| *x *= 1e-39);
        let got = case.outcome::<f32>(&operands, products)?;
        operands[0].fill(0.0);
        let want = case.outcome::<f32>(&operands, products)?;
        near("averages", &widened(&got.out), &widened(&want.out), 1e-6);
    }
    Ok(())
}

#[test]
fn scales_of_zero_and_below() -> Result<()> {
    for scale in [0.0, -0.4] {
        for pattern in [Pattern::Dense, SHIFTED(30), WINDOW(40), Pattern::Bidirectional] {
            let case = Case::new([1, 140, 3, 1, 16], pattern).scale(scale);
            case.check_stored::<f32>()?;
            case.check_stored::<bf16>()?;
            case.slopes(&[0.5, 0.25, -0.125]).check_stored::<f32>()?;
        }
    }
    Ok(())
}

#[test]
fn large_scores() -> Result<()> {
    for factor in [300.0, -300.0] {
        for pattern in [Pattern::Dense, SHIFTED(256)] {
            let case = Case::new([1, 600, 2, 1, 8], pattern).scale(factor);
            for products in BOTH {
                let got = case.outcome::<f32>(&case.operands(), products)?;
                assert!(got.out.iter().all(|x| x.abs() <= 1.01), "averages of values in −1..1");
                assert!(got.gradients.iter().flatten().all(|x| x.is_finite()));
            }
            // Scores of some hundreds carry f32's rounding of 1e-5 to 1e-4 into the exponent.
            let wide = case.operands().each_ref().map(|x| widened(x));
            let [q, k, v, d_out] = &wide;
            let got = case.outcome::<f32>(&case.operands(), Products::F32)?;
            let want = megacontext_kernels::attention::reference::forward(q, k, v, &case.problem());
            near("forward", &widened(&got.out), &want, 1e-3);
            let want = megacontext_kernels::attention::reference::backward(q, k, v, d_out, &case.problem());
            for (name, got, want) in [
                ("dq", &got.gradients[0], &want.q),
                ("dk", &got.gradients[1], &want.k),
                ("dv", &got.gradients[2], &want.v),
            ] {
                near(name, &widened(got), want, 1e-3);
            }
        }
    }
    Ok(())
}

#[test]
fn scores_that_grow_from_tile_to_tile() -> Result<()> {
    // Every tile moves the running top by far more than the online softmax leaves unscaled.
    for step in [0.05f32, 0.5, 5.0] {
        let case = Case::new([1, 400, 1, 1, 8], Pattern::Dense).scale(1.0);
        let mut operands = case.operands();
        operands[0].fill(1.0);
        for (j, key) in operands[1].chunks_exact_mut(8).enumerate() {
            key.fill(0.0);
            key[0] = step * j as f32;
        }
        let [q, k, v, _] = operands.each_ref().map(|x| widened(x));
        let want = megacontext_kernels::attention::reference::forward(&q, &k, &v, &case.problem());
        let got = case.outcome::<f32>(&operands, Products::F32)?;
        near("growing", &widened(&got.out), &want, 1e-4);
    }
    Ok(())
}
