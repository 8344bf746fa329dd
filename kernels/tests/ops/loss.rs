//! Losses over the output head, against plain f64 and finite differences.

use megacontext_kernels::error::Result;
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss::{
    Divergence, Gradient, Head, HeadLoss, IGNORE, Targets, Teacher, chunk_rows, head_cross_entropy,
    head_divergence,
};

use crate::support::*;

const F32: Products = Products::F32;

fn capped(logits: Vec<f64>, cap: Option<f64>) -> Vec<f64> {
    match cap {
        None => logits,
        Some(cap) => logits.into_iter().map(|z| cap * (z / cap).tanh()).collect(),
    }
}

/// Log-probabilities of rows of logits.
fn log_softmax(logits: &[f64], vocab: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in logits.chunks(vocab) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + row.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        out.extend(row.iter().map(|z| z - lse));
    }
    out
}

/// NLL by position.
fn reference_nll(h: &[f64], w: &[f64], sizes: [usize; 3], targets: &[u32], cap: Option<f64>) -> Vec<f64> {
    let [_, e, v] = sizes;
    let logs = log_softmax(&capped(matmul_t(h, w, e, v), cap), v);
    let nll = |(row, t): (&[f64], &u32)| if *t == IGNORE { 0.0 } else { -row[*t as usize] };
    logs.chunks(v).zip(targets).map(nll).collect()
}

/// KL by position, given the teacher's logits.
fn reference_kl(z: &[f64], teacher: &[f64], vocab: usize) -> Vec<f64> {
    let (q, p) = (log_softmax(z, vocab), log_softmax(teacher, vocab));
    let kl = |(q, p): (&[f64], &[f64])| q.iter().zip(p).map(|(q, p)| p.exp() * (p - q)).sum();
    q.chunks(vocab).zip(p.chunks(vocab)).map(kl).collect()
}

fn plain_nll(h: &[f32], w: &[f32], sizes: [usize; 3], targets: &[u32], wanted: Gradient) -> Result<HeadLoss> {
    head_cross_entropy(h, Weight::F32(w), sizes, targets, wanted, F32)
}

/// Some targets, the fourth of them ignored.
fn some_targets(n: usize, v: usize) -> Vec<u32> {
    (0..n as u32).map(|i| if i == 3 { IGNORE } else { i * 2 % v as u32 }).collect()
}

#[test]
fn head_cross_entropy_matches_differences_with_weights_and_cap() {
    let sizes @ [n, e, v] = [9, 5, 21];
    let targets = some_targets(n, v);
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let some = numbers(n, 3);
    for weights in [None, Some(&some[..])] {
        // A cap near the logits, so that its slope matters.
        for cap in [None, Some(1.5f32)] {
            let reference = |x: &[Vec<f64>]| reference_nll(&x[0], &x[1], sizes, &targets, cap.map(f64::from));
            let each: Vec<f32> = (0..n).map(|i| 0.5 * weights.map_or(1.0, |w| w[i])).collect();
            let want = differences(&[h.clone(), w.clone()], &each, &reference);
            let mut head = vec![1f32; v * e];
            let gradient = Gradient::HiddenAndHead { scale: 0.5, head: &mut head };
            let under = Head { softcap: cap, ..Weight::F32(&w).into() };
            let targets = Targets { ids: &targets, weights };
            let loss = head_cross_entropy(&h, under, sizes, targets, gradient, F32).unwrap();
            assert_eq!(loss.count, n - 1);
            assert_eq!(loss.nll[3], 0.0);
            close(&loss.nll, &reference(&[wide(&h), wide(&w)]), 1e-5, "nll");
            assert!((loss.sum() - loss.nll.iter().map(|v| f64::from(*v)).sum::<f64>()).abs() < 1e-9);
            let d_hidden = loss.d_hidden.unwrap();
            close(&d_hidden, &want[0], 1e-4, "d hidden");
            close(&head, &want[1].iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-4, "d head, added");
            let only = head_cross_entropy(&h, under, sizes, targets, Gradient::Hidden { scale: 0.5 }, F32);
            assert_eq!(only.unwrap().d_hidden.unwrap(), d_hidden);
            let again = head_cross_entropy(&h, under, sizes, targets, Gradient::Skip, F32).unwrap();
            assert_eq!(again.nll, loss.nll);
            assert!(again.d_hidden.is_none());
        }
    }
}

#[test]
fn head_cross_entropy_goes_over_chunks() {
    // More positions than a chunk holds, with ignored ones at its edge; every gradient is a sum over them all.
    let v = 40_000;
    let rows = chunk_rows(v);
    let sizes @ [n, e, _] = [rows + rows / 2, 3, v];
    let mut targets: Vec<u32> = (0..n as u32).map(|i| i * 37 % v as u32).collect();
    targets[rows - 1..rows + 2].fill(IGNORE);
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let (h64, w64) = (wide(&h), wide(&w));
    let mut want_head = vec![0f64; v * e];
    let mut want_hidden = vec![0f64; n * e];
    let mut want_nll = vec![0f64; n];
    for i in 0..n {
        if targets[i] == IGNORE {
            continue;
        }
        let row = &h64[i * e..][..e];
        let logs = log_softmax(&matmul_t(row, &w64, e, v), v);
        want_nll[i] = -logs[targets[i] as usize];
        for (t, log) in logs.iter().enumerate() {
            let d = log.exp() - f64::from(u8::from(t == targets[i] as usize));
            for k in 0..e {
                want_hidden[i * e + k] += d * w64[t * e + k];
                want_head[t * e + k] += d * row[k];
            }
        }
    }
    let mut head = vec![0f32; v * e];
    let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
    let loss = plain_nll(&h, &w, sizes, &targets, wanted).unwrap();
    assert_eq!(loss.count, n - 3);
    close(&loss.nll, &want_nll, 1e-5, "nll");
    close(&loss.d_hidden.unwrap(), &want_hidden, 1e-4, "d hidden");
    close(&head, &want_head, 1e-4, "d head");
}

#[test]
fn head_cross_entropy_reads_bf16_and_takes_bf16_products() {
    let sizes @ [n, e, v] = [40, 64, 300];
    let targets = some_targets(n, v);
    let (h, w) = (rounded(&numbers(n * e, 1)), rounded(&numbers(v * e, 2)));
    let (h32, w32) = (narrow(&h), narrow(&w));
    let run = |stored: bool, products| {
        let mut head = vec![0f32; v * e];
        let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
        let loss = if stored {
            head_cross_entropy(&h, Weight::Bf16(&w), sizes, &targets, wanted, products)
        } else {
            head_cross_entropy(&h32, Weight::F32(&w32), sizes, &targets, wanted, products)
        };
        let loss = loss.unwrap();
        (loss.nll, loss.d_hidden.unwrap(), head)
    };
    let exact = run(false, F32);
    let stored = run(true, F32);
    close(&stored.0, &wide(&exact.0), 1e-5, "bf16 storage, nll");
    close(&stored.1, &wide(&exact.1), 1e-5, "bf16 storage, d hidden");
    close(&stored.2, &wide(&exact.2), 1e-5, "bf16 storage, d head");
    for stored in [false, true] {
        let got = run(stored, Products::Bf16);
        // The values are bf16 already, so the logits are exact, and gradients lose what their rounding loses.
        close(&got.0, &wide(&exact.0), 1e-5, "bf16 products, nll");
        close(&got.1, &wide(&exact.1), BF16, "bf16 products, d hidden");
        close(&got.2, &wide(&exact.2), BF16, "bf16 products, d head");
    }
}

#[test]
fn head_cross_entropy_survives_large_logits_and_passes_nan_on() {
    let (h, w) = ([1e4, f32::NAN, f32::INFINITY, 1.0], [1.0, -1.0]);
    let nll = plain_nll(&h, &w, [4, 1, 2], &[1, 0, 0, 1], Gradient::Skip).unwrap().nll;
    assert_eq!(nll[0], 2e4);
    assert!(nll[1].is_nan());
    assert!(!nll[2].is_finite());
    assert!((nll[3] - 2.126_928).abs() < 1e-6);
}

#[test]
fn a_loss_that_is_not_finite_leaves_the_heads_gradient_alone() {
    let v = 40_000;
    // The damage is in the last chunk.
    let n = 2 * chunk_rows(v);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let mut h = numbers(2 * n, 1);
        h[2 * n - 1] = bad;
        let mut w = numbers(2 * v, 2);
        w[1] = 3.0;
        let mut head = vec![0.25f32; 2 * v];
        let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
        let targets = vec![1u32; n];
        let loss = plain_nll(&h, &w, [n, 2, v], &targets, wanted).unwrap();
        assert!(!loss.sum().is_finite() && loss.d_hidden.is_none(), "{bad}");
        assert!(loss.nll[..n - 1].iter().all(|v| v.is_finite()));
        assert!(head.iter().all(|v| *v == 0.25), "{bad}");
        let loss = plain_nll(&h, &w, [n, 2, v], &targets, Gradient::Hidden { scale: 1.0 }).unwrap();
        assert!(loss.d_hidden.is_none());
    }
}

#[test]
fn hidden_states_that_only_look_dangerous_still_give_gradients() {
    // 1e38 times a head of 1e-38 is a logit of one.
    let (h, w) = ([1e38f32, 1.0], [1e-38f32, -1e-38, 0.0]);
    let mut head = [0f32; 3];
    let wanted = Gradient::HiddenAndHead { scale: 1e-38, head: &mut head };
    let loss = plain_nll(&h, &w, [2, 1, 3], &[0, 1], wanted).unwrap();
    assert!(loss.sum().is_finite() && loss.d_hidden.is_some());
    assert!(head[0] < -0.3 && head[1] > 0.08, "{head:?}");
}

#[test]
fn a_position_without_weight_adds_nothing_even_where_it_is_nan() {
    let (h, w) = ([1.0, f32::NAN, -0.5], numbers(7, 1));
    let run = |h: &[f32], ids: &[u32], weights: Option<&[f32]>| {
        let mut head = vec![0f32; 7];
        let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
        let sizes = [h.len(), 1, 7];
        let loss =
            head_cross_entropy(h, Weight::F32(&w), sizes, Targets { ids, weights }, wanted, F32).unwrap();
        (loss.nll, loss.d_hidden.unwrap(), head)
    };
    let (nll, d_hidden, head) = run(&h, &[3, 4, 5], Some(&[1.0, 0.0, 1.0]));
    let (nll_without, d_without, head_without) = run(&[1.0, -0.5], &[3, 5], None);
    assert!(nll[1].is_nan());
    assert_eq!([nll[0], nll[2]], nll_without[..]);
    assert_eq!(d_hidden[1], 0.0);
    assert_eq!([d_hidden[0], d_hidden[2]], d_without[..]);
    close(&head, &wide(&head_without), 1e-6, "head");
}

#[test]
fn all_positions_ignored_is_no_loss() {
    let wanted = Gradient::Hidden { scale: 1.0 };
    let loss = plain_nll(&[1.0, 2.0], &[0.5; 3], [2, 1, 3], &[IGNORE; 2], wanted).unwrap();
    assert_eq!((loss.nll, loss.count, loss.d_hidden.unwrap()), (vec![0.0; 2], 0, vec![0.0; 2]));
}

#[test]
fn the_loss_gives_the_same_bytes_on_any_number_of_threads() {
    let sizes @ [n, e, v] = [70, 33, 1000];
    let (h, w, targets) = (numbers(n * e, 1), numbers(v * e, 2), some_targets(n, v));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut head = vec![0f32; v * e];
        let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
        let loss = pool.install(|| plain_nll(&h, &w, sizes, &targets, wanted)).unwrap();
        (loss.nll, loss.d_hidden, head)
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn divergence_matches_differences_with_every_kind_of_teacher() {
    let sizes @ [n, e, v] = [7, 5, 21];
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let (e_t, weights) = (4, numbers(n, 3));
    let (h_t, w_t) = (numbers(n * e_t, 4), numbers(v * e_t, 5));
    for cap in [None, Some(1.5f32)] {
        let wide_cap = cap.map(f64::from);
        let teacher = capped(matmul_t(&wide(&h_t), &wide(&w_t), e_t, v), wide_cap);
        let logits: Vec<f32> = teacher.iter().map(|z| *z as f32).collect();
        let logs: Vec<f32> = log_softmax(&teacher, v).iter().map(|z| *z as f32).collect();
        let reference =
            |x: &[Vec<f64>]| reference_kl(&capped(matmul_t(&x[0], &x[1], e, v), wide_cap), &teacher, v);
        let each: Vec<f32> = weights.iter().map(|w| 0.5 * w).collect();
        let want = differences(&[h.clone(), w.clone()], &each, &reference);
        let value = reference(&[wide(&h), wide(&w)]);
        let under = Head { softcap: cap, ..Weight::F32(&w).into() };
        let teaching = Head { softcap: cap, ..Weight::F32(&w_t).into() };
        for (name, teacher) in [
            ("logits", Teacher::Logits(&logits[..])),
            ("log-probabilities", Teacher::Logits(&logs[..])),
            ("hidden states", Teacher::Hidden { h: &h_t[..], width: e_t, head: teaching }),
        ] {
            let mut head = vec![1f32; v * e];
            let wanted = Gradient::HiddenAndHead { scale: 0.5, head: &mut head };
            let Divergence { kl, d_hidden } =
                head_divergence(&h, under, sizes, teacher, Some(&weights), wanted, F32).unwrap();
            close(&kl, &value, 1e-5, &format!("{name}, kl"));
            close(&d_hidden.unwrap(), &want[0], 1e-4, &format!("{name}, d hidden"));
            let added: Vec<f64> = want[1].iter().map(|v| v + 1.0).collect();
            close(&head, &added, 1e-4, &format!("{name}, d head"));
            let again = head_divergence(&h, under, sizes, teacher, None, Gradient::Skip, F32).unwrap();
            assert_eq!(again.kl, kl);
            assert!(again.d_hidden.is_none());
        }
    }
}

#[test]
fn divergence_from_itself_is_nothing() {
    let sizes @ [n, e, v] = [5, 8, 300];
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let head = Head::from(Weight::F32(&w));
    let teacher = Teacher::Hidden { h: &h[..], width: e, head };
    let wanted = Gradient::Hidden { scale: 1.0 };
    let Divergence { kl, d_hidden } = head_divergence(&h, head, sizes, teacher, None, wanted, F32).unwrap();
    assert!(kl.iter().all(|v| v.abs() < 1e-5), "{kl:?}");
    assert!(d_hidden.unwrap().iter().all(|v| v.abs() < 1e-5));
}

#[test]
fn divergence_reads_a_teacher_stored_in_bf16() {
    let sizes @ [n, e, v] = [5, 8, 300];
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let stored = rounded(&numbers(n * v, 3));
    let exact = narrow(&stored);
    let head = Weight::F32(&w);
    let got = head_divergence(&h, head, sizes, Teacher::Logits(&stored), None, Gradient::Skip, F32).unwrap();
    let want = head_divergence(&h, head, sizes, Teacher::Logits(&exact), None, Gradient::Skip, F32).unwrap();
    assert_eq!(got.kl, want.kl);
}

#[test]
fn a_teacher_may_exclude_tokens_and_its_nan_comes_through() {
    let (h, w) = ([1.0f32, 1.0, 1.0], [0.3f32, -0.2, 0.9]);
    // −∞ excludes; NaN is damage.
    let teacher =
        [0.0, f32::NEG_INFINITY, 0.0, 0.0, f32::NAN, 0.0, f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
    let run = |n: usize| {
        let mut head = [0.25f32; 3];
        let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut head };
        let teacher = Teacher::Logits(&teacher[..3 * n]);
        let got = head_divergence(&h[..n], Weight::F32(&w), [n, 1, 3], teacher, None, wanted, F32).unwrap();
        (got, head)
    };
    let (got, head) = run(1);
    let q = log_softmax(&[0.3, -0.2, 0.9], 3);
    let want = 0.5 * (0.5f64.ln() - q[0]) + 0.5 * (0.5f64.ln() - q[2]);
    close(&got.kl, &[want], 1e-5, "kl");
    assert!(got.d_hidden.is_some() && head.iter().all(|v| v.is_finite() && *v != 0.25));
    let (got, head) = run(3);
    assert!(got.kl[0].is_finite() && got.kl[1].is_nan() && (f64::from(got.kl[2]) + q[1]).abs() < 1e-5);
    assert!(got.d_hidden.is_none());
    assert_eq!(head, [0.25; 3]);
}

#[test]
fn the_loss_refuses_a_target_outside_the_vocabulary() {
    refuses(
        plain_nll(&[0.0; 2], &[0.0; 6], [1, 2, 3], &[3], Gradient::Skip),
        "target: expected below 3, got 3",
    );
}

#[test]
fn the_loss_refuses_another_number_of_targets() {
    refuses(
        plain_nll(&[0.0; 2], &[0.0; 6], [1, 2, 3], &[0, 1], Gradient::Skip),
        "targets of 1 values, got 2",
    );
}

#[test]
fn the_loss_refuses_hidden_states_of_another_size() {
    refuses(plain_nll(&[0.0; 3], &[0.0; 6], [1, 2, 3], &[0], Gradient::Skip), "hidden states [1, 2] of 2");
}

#[test]
fn the_loss_refuses_a_head_of_another_size() {
    refuses(
        plain_nll(&[0.0; 2], &[0.0; 5], [1, 2, 3], &[0], Gradient::Skip),
        "head [3, 2] of 6 values, got 5",
    );
}

#[test]
fn the_loss_refuses_an_empty_vocabulary() {
    refuses(plain_nll(&[], &[], [0, 2, 0], &[], Gradient::Skip), "at least 1, got width 2 and vocabulary 0");
}

#[test]
fn the_loss_refuses_a_head_gradient_of_another_size() {
    let wanted = Gradient::HiddenAndHead { scale: 1.0, head: &mut [0.0; 5] };
    refuses(plain_nll(&[0.0; 2], &[0.0; 6], [1, 2, 3], &[0], wanted), "a head gradient of 6 values, got 5");
}

#[test]
fn the_loss_refuses_a_scale_that_is_not_finite() {
    let wanted = Gradient::Hidden { scale: f32::NAN };
    refuses(
        plain_nll(&[0.0; 2], &[0.0; 6], [1, 2, 3], &[0], wanted),
        "scale: expected a finite one, got NaN",
    );
}

fn weighted(weights: &[f32]) -> Result<HeadLoss> {
    let targets = Targets { ids: &[0], weights: Some(weights) };
    head_cross_entropy(&[0f32; 2], Weight::F32(&[0.0; 6]), [1, 2, 3], targets, Gradient::Skip, F32)
}

#[test]
fn the_loss_refuses_another_number_of_weights() {
    refuses(weighted(&[1.0, 1.0]), "weights of 1 values, got 2");
}

#[test]
fn the_loss_refuses_a_weight_that_is_not_finite() {
    refuses(weighted(&[f32::INFINITY]), "weight: expected a finite one, got inf");
}

#[test]
fn the_loss_refuses_a_cap_that_is_not_above_zero() {
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let head = Head { softcap: Some(cap), ..Weight::F32(&[0.0; 6]).into() };
        let got = head_cross_entropy(&[0f32; 2], head, [1, 2, 3], &vec![0u32], Gradient::Skip, F32);
        refuses(got, "softcap: expected above 0");
    }
}

#[test]
fn divergence_refuses_teachers_of_another_size() {
    let run = |teacher: Teacher<f32>| {
        let head = Weight::F32(&[0.0; 6]);
        head_divergence(&[0f32; 2], head, [1, 2, 3], teacher, None, Gradient::Skip, F32)
    };
    refuses(run(Teacher::Logits(&[0.0; 2])), "the teacher's logits [1, 3] of 3 values, got 2");
    let head = Head::from(Weight::F32(&[0.0; 6]));
    refuses(run(Teacher::Hidden { h: &[0.0; 3], width: 2, head }), "the teacher's hidden states [1, 2]");
    refuses(run(Teacher::Hidden { h: &[0.0; 1], width: 1, head }), "the teacher's head [3, 1]");
}
