//! Every engine this machine has against sums in f64, at odd sizes, with guard values around C, and with pages without
//! access around all three operands.

use super::pack;
use super::{Block, Engine, LANES, ROWS};
use crate::cpu::{Level, best};
use crate::gemm::Mat;
use crate::store::{Store, bf16};

fn engines() -> Vec<Engine> {
    let mut engines = Vec::new();
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        match level {
            Level::Portable | Level::Avx2 | Level::Avx512 => engines.push(Engine::F32(level)),
            pairs => engines.push(Engine::Pairs(pairs)),
        }
    }
    assert!(engines.len() >= 2, "{:?} has portable products and software tiles", best());
    engines
}

fn values(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

fn stored<S: Store>(engine: Engine, x: f32) -> f64 {
    let x = S::put(x).get();
    f64::from(match engine {
        Engine::F32(_) => x,
        Engine::Pairs(_) => bf16::put(x).get(),
    })
}

/// A [rows, depth] and B [depth, lanes] with both ways of lying, multiplied after packing.
fn check<S: Store>(engine: Engine, rows: usize, depth: usize, lanes: usize, add: bool) {
    let (av, bv) = (values(rows * depth, 1), values(depth * lanes, 2));
    let expect = |m: usize, l: usize| -> f64 {
        (0..depth)
            .map(|k| stored::<S>(engine, av[m * depth + k]) * stored::<S>(engine, bv[k * lanes + l]))
            .sum()
    };
    let put = |v: &[f32]| -> Vec<S> { v.iter().map(|x| S::put(*x)).collect() };
    let (a, b) = (put(&av), put(&bv));
    let turned = |v: &[S], rows: usize, cols: usize| -> Vec<S> {
        (0..rows * cols).map(|i| v[(i % rows) * cols + i / rows]).collect()
    };
    let (at, bt) = (turned(&a, rows, depth), turned(&b, depth, lanes));
    let words = engine.words(depth);
    let (lda, width) = (words + 3, lanes.next_multiple_of(16));
    let padded = rows.next_multiple_of(ROWS);
    let _guard = engine.enter();
    for transposed in [false, true] {
        let (mut ap, mut bp) = (vec![0u32; padded * lda], vec![7u32; words * LANES]);
        let (am, bm) = match transposed {
            false => (Mat::new(&a, rows, depth), Mat::new(&b, depth, lanes)),
            true => (Mat::new(&at, depth, rows).t(), Mat::new(&bt, lanes, depth).t()),
        };
        pack::a_form(engine, am, &mut ap, lda);
        pack::b_form(engine, bm, &mut bp, LANES, width);
        let mut c = vec![0.5f32; padded * LANES];
        // SAFETY: all buffers are padded as `block` asks.
        unsafe {
            engine.block(Block {
                rows,
                lanes: width,
                words,
                a: ap.as_ptr(),
                lda,
                b: bp.as_ptr(),
                ldb: LANES,
                c: c.as_mut_ptr(),
                ldc: LANES,
                add,
            });
        }
        for m in 0..rows {
            for l in 0..LANES {
                let got = f64::from(c[m * LANES + l]);
                let want = match (l < lanes, l < width, add) {
                    (true, _, true) => expect(m, l) + 0.5,
                    (true, _, false) => expect(m, l),
                    (false, true, false) => 0.0,
                    _ => 0.5,
                };
                assert!(
                    (got - want).abs() <= 1e-5 * (depth as f64).max(1.0),
                    "{engine:?} {rows}x{depth}x{lanes} transposed {transposed} add {add} ({m}, {l}): expected {want}, got {got}"
                );
            }
        }
    }
}

#[test]
fn every_engine_equals_sums_in_f64() {
    for engine in engines() {
        for rows in (1..=34).chain([48, 61]) {
            for (depth, lanes) in [(1, 16), (2, 32), (7, 5), (33, 31), (64, 17), (130, 32)] {
                check::<f32>(engine, rows, depth, lanes, rows % 2 == 0);
                check::<bf16>(engine, rows, depth, lanes, rows % 2 == 1);
            }
        }
    }
}

/// The values of a strided operand up to its last one: what [`Engine::block`] may touch and no more.
fn extent(rows: usize, row: usize, ld: usize) -> usize {
    (rows - 1) * ld + row
}

#[cfg(unix)]
#[path = "../../tests/attention/pages.rs"]
mod pages;

#[cfg(unix)]
#[test]
fn no_engine_leaves_its_operands() {
    use pages::{Guarded, SIDES};
    for engine in engines() {
        let _guard = engine.enter();
        // Tiles are whole; vectors keep to the sizes they are given.
        let whole = matches!(engine, Engine::Pairs(Level::SoftwareTiles | Level::Amx));
        for rows in (1..=33usize).chain([47, 64]) {
            for (words, lanes, slack) in
                [(1usize, 16, 0), (2, 32, 1), (5, 32, 0), (16, 16, 16), (17, 32, 3), (48, 32, 0)]
            {
                let (words, padded) = match whole {
                    true => (words.next_multiple_of(16), rows.next_multiple_of(ROWS)),
                    false => (words, rows),
                };
                let (lda, ld) = (words + slack, lanes + slack);
                for side in SIDES {
                    let a = Guarded::new(&vec![0x3f80_3f80u32; extent(padded, words, lda)], side);
                    let b = Guarded::new(&vec![0x3f80_3f80u32; extent(words, lanes, ld)], side);
                    let mut c = Guarded::new(&vec![0.5f32; extent(padded, lanes, ld)], side);
                    for add in [false, true] {
                        // SAFETY: the operands hold what `block` says it touches, which is what this test is about.
                        unsafe {
                            engine.block(Block {
                                rows,
                                lanes,
                                words,
                                a: a.as_ptr(),
                                lda,
                                b: b.as_ptr(),
                                ldb: ld,
                                c: c.as_mut_ptr(),
                                ldc: ld,
                                add,
                            });
                        }
                    }
                    let one = f32::from_bits(0x3f80_3f80);
                    let product = match engine {
                        Engine::F32(_) => one * one * words as f32,
                        Engine::Pairs(_) => 2.0 * words as f32,
                    };
                    for row in 0..rows {
                        for lane in 0..ld.min(c.len() - row * ld) {
                            let want = if lane < lanes { 2.0 * product } else { 0.5 };
                            let got = c[row * ld + lane];
                            assert!(
                                (got - want).abs() <= 1e-5 * want,
                                "{engine:?} {rows} {words} {lanes}: {got}, {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
