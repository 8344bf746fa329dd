//! LoRA and rows of their own on embeddings and on the output head: values against f64, gradients against differences.

use megacontext_kernels::embedding::{LoraTable, gather_rows_into, scatter_rows};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Dropout, LoraSlices, Weight};
use megacontext_kernels::loss::{
    Gradient, Head, HeadGradients, IGNORE, Rows, head_cross_entropy, head_logits,
};
use megacontext_kernels::store::{Store, bf16};

use crate::support::{close, differences, matmul_t, numbers, refuses, rounded, wide};

const VOCAB: usize = 11;
const WIDTH: usize = 6;
const IDS: [u32; 7] = [3, 0, 3, 10, 7, 0, 3];

#[test]
fn lora_on_a_table_matches_f64_and_differences() {
    let (table, rank, scale) = (numbers(VOCAB * WIDTH, 1), 3, 0.7f32);
    let (a, b, g) = (numbers(rank * VOCAB, 2), numbers(WIDTH * rank, 3), numbers(IDS.len() * WIDTH, 4));
    let reference = |v: &[Vec<f64>]| -> Vec<f64> {
        let row = |id: u32, e: usize| {
            let change = (0..rank).map(|r| v[1][e * rank + r] * v[0][r * VOCAB + id as usize]).sum::<f64>();
            f64::from(table[id as usize * WIDTH + e]) + f64::from(scale) * change
        };
        IDS.iter().flat_map(|id| (0..WIDTH).map(move |e| (*id, e))).map(|(id, e)| row(id, e)).collect()
    };
    let lora = LoraTable { a: &a, b: &b, rank, scale };
    let inputs = [a.clone(), b.clone()];
    let value = reference(&inputs.each_ref().map(|v| wide(v)));
    let mut rows = vec![0f32; IDS.len() * WIDTH];
    lora.gather_into(Weight::F32(&table), WIDTH, &IDS, &mut rows).unwrap();
    close(&rows, &value, 1e-6, "rows");
    let mut stored = rounded(&rows);
    lora.gather_into(Weight::F32(&table), WIDTH, &IDS, &mut stored).unwrap();
    for (stored, want) in stored.iter().zip(&value) {
        let least = (f64::from(bf16::put(*want as f32).get()) - want).abs();
        assert!((f64::from(stored.get()) - want).abs() <= least + 1e-6);
    }
    let want = differences(&inputs, &g, &reference);
    let (mut da, mut db) = (vec![1f32; a.len()], vec![1f32; b.len()]);
    lora.gradients(&g, WIDTH, &IDS, &mut da, &mut db).unwrap();
    for (i, got) in [&da, &db].into_iter().enumerate() {
        close(got, &want[i].iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-4, &format!("gradient {i}"));
    }
}

#[test]
fn own_rows_take_the_place_of_the_tables() {
    let (table, ids) = (numbers(VOCAB * WIDTH, 1), [7u32, 3]);
    let (values, g) = (numbers(ids.len() * WIDTH, 2), numbers(IDS.len() * WIDTH, 3));
    let own = Rows { ids: &ids, values: &values };
    let mut rows = vec![0f32; IDS.len() * WIDTH];
    gather_rows_into(Weight::F32(&table), own, WIDTH, &IDS, &mut rows).unwrap();
    let mut want = vec![1f64; values.len()];
    for (n, (row, id)) in rows.chunks(WIDTH).zip(IDS).enumerate() {
        match ids.iter().position(|own| *own == id) {
            None => assert_eq!(row, &table[id as usize * WIDTH..][..WIDTH]),
            Some(at) => {
                assert_eq!(row, &values[at * WIDTH..][..WIDTH]);
                (0..WIDTH).for_each(|e| want[at * WIDTH + e] += f64::from(g[n * WIDTH + e]));
            }
        }
    }
    let mut into = vec![1f32; values.len()];
    scatter_rows(&g, WIDTH, &IDS, &ids, &mut into).unwrap();
    close(&into, &want, 1e-6, "gradient of own rows");
}

/// Logits and the sum of losses in f64: h, A, B, own rows.
struct HeadCase {
    n: usize,
    rank: usize,
    w: Vec<f32>,
    targets: Vec<u32>,
    own: Option<[u32; 2]>,
    cap: Option<f32>,
    /// drop(·) of scored rows, in their order.
    mask: Vec<f32>,
}

impl HeadCase {
    fn logits(&self, v: &[Vec<f64>]) -> Vec<f64> {
        let mut z = matmul_t(&v[0], &wide(&self.w), WIDTH, VOCAB);
        let kept: Vec<f64> = v[0].iter().zip(&self.mask).map(|(h, m)| h * f64::from(*m)).collect();
        let up = matmul_t(&matmul_t(&kept, &v[1], WIDTH, self.rank), &v[2], self.rank, VOCAB);
        z.iter_mut().zip(up).for_each(|(z, up)| *z += f64::from(0.7f32) * up);
        for (at, id) in self.own.iter().flatten().enumerate() {
            for n in 0..self.n {
                z[n * VOCAB + *id as usize] =
                    (0..WIDTH).map(|e| v[0][n * WIDTH + e] * v[3][at * WIDTH + e]).sum();
            }
        }
        if let Some(cap) = self.cap.map(f64::from) {
            z.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
        }
        z
    }

    fn losses(&self, v: &[Vec<f64>]) -> Vec<f64> {
        let z = self.logits(v);
        let of = |n: usize| match self.targets[n] {
            IGNORE => 0.0,
            target => {
                let z = &z[n * VOCAB..][..VOCAB];
                z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[target as usize]
            }
        };
        (0..self.n).map(of).collect()
    }
}

#[test]
fn lora_and_own_rows_on_the_head_match_f64_and_differences() {
    let (n, rank) = (5, 2);
    let plain = vec![1f32; n * WIDTH];
    let dropout = Dropout { p: 0.3, seed: 5 };
    // Position 2 is not scored, so that the mask of position 3 is that of the third row.
    let targets = vec![3, 0, IGNORE, 10, 3];
    let mut dropped = vec![1f32; (n - 1) * WIDTH];
    dropout.apply(&mut dropped);
    let mask: Vec<f32> = [&dropped[..2 * WIDTH], &[1.0; WIDTH], &dropped[2 * WIDTH..]].concat();
    for (own, cap, dropout, mask) in [
        (None, None, None, plain.clone()),
        (None, None, Some(dropout), mask),
        (Some([3, 8]), None, None, plain.clone()),
        (Some([3, 8]), Some(1.5), None, plain.clone()),
    ] {
        let w = numbers(VOCAB * WIDTH, 1);
        let case = HeadCase { n, rank, w: w.clone(), targets: targets.clone(), own, cap, mask };
        let inputs = [
            numbers(n * WIDTH, 2),
            numbers(rank * WIDTH, 3),
            numbers(VOCAB * rank, 4),
            numbers(2 * WIDTH, 5),
        ];
        let [h, a, b, values] = &inputs;
        let lora = LoraSlices { a, b, rank, scale: 0.7, dropout, initial: None, dora: None };
        let rows = own.as_ref().map(|ids| Rows { ids, values });
        let head = Head { weight: Weight::F32(&w), softcap: cap, lora: Some(&lora), rows };
        let exact: Vec<Vec<f64>> = inputs.iter().map(|v| wide(v)).collect();
        let sizes = [n, WIDTH, VOCAB];
        if dropout.is_none() {
            let logits = head_logits(h, head, sizes, Products::F32).unwrap();
            close(&logits, &case.logits(&exact), 1e-5, "logits");
        }
        let want = differences(&inputs, &vec![0.5; n], &|v| case.losses(v));
        let [_, mut da, mut db, mut d_own] = inputs.each_ref().map(|v| vec![1f32; v.len()]);
        let into = HeadGradients {
            weight: None,
            a: Some(&mut da),
            b: Some(&mut db),
            rows: rows.map(|_| &mut d_own[..]),
        };
        let wanted = Gradient::HiddenAndParts { scale: 0.5, into };
        let loss = head_cross_entropy(h, head, sizes, &targets, wanted, Products::F32).unwrap();
        close(&loss.nll, &case.losses(&exact), 1e-5, "losses");
        close(&loss.d_hidden.unwrap(), &want[0], 1e-4, "hidden states");
        let mut got = vec![(&da, 1), (&db, 2)];
        got.extend(own.map(|_| (&d_own, 3)));
        for (got, i) in got {
            close(got, &want[i].iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-4, &format!("gradient {i}"));
        }
    }
}

#[test]
fn a_head_whose_factors_are_infinite_leaves_every_gradient_alone() {
    let (h, w, a) = (numbers(2 * WIDTH, 1), numbers(VOCAB * WIDTH, 2), numbers(WIDTH, 3));
    let mut b = numbers(VOCAB, 4);
    b[4] = f32::INFINITY;
    let lora = LoraSlices { a: &a, b: &b, rank: 1, scale: 1.0, dropout: None, initial: None, dora: None };
    let head = Head { lora: Some(&lora), ..Weight::F32(&w).into() };
    let (mut da, mut db) = (vec![0f32; WIDTH], vec![0f32; VOCAB]);
    let into = HeadGradients { a: Some(&mut da), b: Some(&mut db), ..Default::default() };
    let wanted = Gradient::HiddenAndParts { scale: 1.0, into };
    let loss = head_cross_entropy(&h, head, [2, WIDTH, VOCAB], &[1, 2][..], wanted, Products::F32).unwrap();
    assert!(loss.d_hidden.is_none() && !loss.sum().is_finite());
    assert!(da.iter().chain(&db).all(|v| *v == 0.0));
}

#[test]
fn a_table_refuses_factors_of_another_size() {
    let (table, mut out) = (numbers(VOCAB * WIDTH, 1), vec![0f32; WIDTH]);
    let lora = LoraTable { a: &[0.0; 2 * VOCAB], b: &[0.0; 5], rank: 2, scale: 1.0 };
    refuses(lora.gather_into(Weight::F32(&table), WIDTH, &[0], &mut out), "B [6, 2]");
    let lora = LoraTable { a: &[0.0; 8], b: &[0.0; 2 * WIDTH], rank: 2, scale: 1.0 };
    refuses(lora.gather_into(Weight::F32(&table), WIDTH, &[0], &mut out), "A [2, 11]");
}

#[test]
fn a_head_refuses_factors_and_rows_that_do_not_fit() {
    let (h, w) = (numbers(WIDTH, 1), numbers(VOCAB * WIDTH, 2));
    let logits = |head: Head| head_logits(&h, head, [1, WIDTH, VOCAB], Products::F32);
    let base = Head::from(Weight::F32(&w));
    let lora = LoraSlices {
        a: &[0.0; 6],
        b: &[0.0; 9],
        rank: 1,
        scale: 1.0,
        dropout: None,
        initial: None,
        dora: None,
    };
    refuses(logits(Head { lora: Some(&lora), ..base }), "head's B [11, 1]");
    refuses(logits(Head { rows: Some(Rows { ids: &[1], values: &[0.0; 5] }), ..base }), "own rows [1, 6]");
    refuses(
        logits(Head { rows: Some(Rows { ids: &[11], values: &[0.0; 6] }), ..base }),
        "row: expected below 11, got 11",
    );
    let wanted = Gradient::HiddenAndParts {
        scale: 1.0,
        into: HeadGradients { a: Some(&mut [0.0; 6]), ..Default::default() },
    };
    refuses(
        head_cross_entropy(&h, base, [1, WIDTH, VOCAB], &[0][..], wanted, Products::F32),
        "gradient of the head's A of 0 values",
    );
}
