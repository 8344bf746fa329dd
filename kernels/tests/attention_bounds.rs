//! Attention over operands that lie flush against pages without access: no read leaves them.
#![cfg(unix)]

#[path = "attention/pages.rs"]
#[allow(dead_code)]
mod pages;
#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::attention::prefix::{Continuations, Document, Own, PrefixAttention};
use megacontext_kernels::attention::slices::{Gradients, Mixed};
use megacontext_kernels::gemm::{Mat, Products, matmul_with};
use megacontext_kernels::store::{Store, bf16};
use pages::{Guarded, SIDES, Side};
use support::{BOTH, Case, Outcome, SHIFTED, WINDOW, stored, values};

fn check<S: Store>(case: &Case, products: Products, side: Side) -> Result<()> {
    let operands = case.operands();
    let want = case.outcome::<S>(&operands, products)?;
    let [q, k, v, d_out] = &operands;
    let [q, k, v] = [q, k, v].map(|x| Guarded::new(&stored::<S>(x), side));
    let d_out = Guarded::new(d_out, side);
    let prepared = case.prepared(products)?;
    let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
    prepared.forward_into(&q, &k, &v, &mut mixed);
    prepared.backward_into(&q, &k, &v, &mixed, &d_out, &mut gradients);
    assert_eq!(Outcome::new(mixed, gradients), want, "{case:?} {products:?} {side:?}");
    Ok(())
}

#[test]
fn operands_flush_against_forbidden_pages() -> Result<()> {
    let patterns = [Pattern::Dense, SHIFTED(10), WINDOW(7), Pattern::Bidirectional];
    for side in SIDES {
        for products in BOTH {
            for (turn, entries) in
                [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 300].into_iter().enumerate()
            {
                for [heads, kv_heads, width] in
                    [[1, 1, 1], [3, 1, 7], [4, 2, 16], [2, 2, 33], [1, 1, 64], [2, 1, 255]]
                {
                    let case = Case::new([1, entries, heads, kv_heads, width], patterns[turn % 4]);
                    check::<f32>(&case, products, side)?;
                    check::<bf16>(&case, products, side)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn documents_and_rows_flush_against_forbidden_pages() -> Result<()> {
    for side in SIDES {
        for products in BOTH {
            for (document, entries, width) in
                [(1, 1, 1), (31, 2, 7), (64, 33, 16), (65, 9, 33), (200, 65, 64)]
            {
                let (heads, kv_heads) = (4, 2);
                let own = |heads: usize, seed| Guarded::new(&values(2 * entries * heads * width, seed), side);
                let whole = |seed| Guarded::new(&values(document * kv_heads * width, seed), side);
                let (q, k, v, d_out) = (own(heads, 1), own(kv_heads, 2), own(kv_heads, 3), own(heads, 4));
                let (document_k, document_v) = (whole(5), whole(6));
                let rows = Continuations { prefix: vec![document, document / 2], ..Continuations::default() };
                let sizes = [2, entries, heads, kv_heads, width];
                let attention =
                    PrefixAttention::new(sizes, document, 0.3, SHIFTED(40), rows)?.with_products(products);
                let (own, document) =
                    (Own { q: &q, k: &k, v: &v }, Document { k: &document_k, v: &document_v });
                let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
                attention.forward_into(own, document, &mut mixed);
                attention.backward_into(own, document, &mixed, &d_out, &mut gradients);
                assert!(mixed.out.iter().chain(&gradients.k).all(|x| x.is_finite()));
            }
        }
    }
    Ok(())
}

/// `out` = a·b, with every operand and the result flush, each operand lying either way.
fn product<A: Store, B: Store, C: Store>([m, k, n]: [usize; 3], products: Products, side: Side) {
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let (a, b) = (Guarded::new(&stored::<A>(&a), side), Guarded::new(&stored::<B>(&b), side));
    for turn in 0..4 {
        let a = if turn % 2 == 0 { Mat::new(&a, m, k) } else { Mat::new(&a, k, m).t() };
        let b = if turn < 2 { Mat::new(&b, k, n) } else { Mat::new(&b, n, k).t() };
        let mut out = Guarded::new(&stored::<C>(&values(m * n, 3)), side);
        matmul_with(&mut out, a, b, 0.5, turn == 1, products);
        assert!(out.iter().all(|x| x.get().is_finite()));
    }
}

#[test]
fn matrices_flush_against_forbidden_pages() {
    for side in SIDES {
        for products in BOTH {
            for m in [1, 2, 12, 13, 17, 33, 97] {
                for (k, n) in [(1, 1), (2, 17), (7, 33), (31, 64), (64, 8), (65, 100), (385, 31)] {
                    product::<f32, f32, f32>([m, k, n], products, side);
                    product::<bf16, f32, f32>([m, k, n], products, side);
                    product::<f32, bf16, f32>([m, k, n], products, side);
                    product::<bf16, bf16, bf16>([m, k, n], products, side);
                }
            }
        }
    }
}
