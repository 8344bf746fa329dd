//! Every length from 1 to 200 against the f64 reference: patterns, groups, heads, widths, lengths, segments and slopes
//! walk through their values in steps that share no factor, so that over the lengths each meets each.
//!
//! At the slowest levels of instructions every seventh length is run.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::{Pattern, alibi_slopes};
use megacontext_kernels::cpu::{Level, level};
use megacontext_kernels::store::bf16;
use rayon::prelude::*;
use support::{Case, SHIFTED, SHIFTED_BOTH, WINDOW};

const HEADS: [[usize; 2]; 9] = [[1, 1], [2, 1], [3, 1], [4, 2], [5, 5], [9, 3], [6, 2], [8, 1], [3, 3]];
const WIDTHS: [usize; 16] = [8, 64, 13, 32, 16, 96, 24, 1, 40, 128, 33, 48, 17, 256, 80, 7];

/// The case of a length: `turn` tells apart several of the same length.
fn case(entries: usize, turn: usize, pattern: Pattern) -> Case {
    let step = entries + 67 * turn;
    let [heads, kv_heads] = HEADS[step % HEADS.len()];
    let width = WIDTHS[step % WIDTHS.len()];
    let batch = 1 + step % 5 / 3;
    let mut case = Case::new([batch, entries, heads, kv_heads, width], pattern);
    let of_row = |b: usize, salt: usize| (step * (7 + salt) + b * 31) % (entries + 1);
    if step % 7 < 3 {
        let lengths: Vec<usize> = (0..batch).map(|b| of_row(b, 0)).collect();
        case = case.lengths(&lengths);
    }
    if step % 11 < 4 {
        let segments: Vec<Vec<usize>> = (0..batch)
            .map(|b| {
                let mut starts = vec![0, of_row(b, 4), of_row(b, 6), of_row(b, 12)];
                starts.retain(|start| *start < entries);
                starts.sort_unstable();
                starts.dedup();
                starts
            })
            .collect();
        case = case.segments(&segments.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }
    if step % 13 < 4 {
        case = case.slopes(&alibi_slopes(heads));
    }
    case
}

fn for_every_length(run: impl Fn(usize) -> Result<()> + Send + Sync) -> Result<()> {
    let few = matches!(level(), Level::Portable | Level::SoftwareTiles);
    let lengths: Vec<usize> = (1..=200).step_by(if few { 7 } else { 1 }).collect();
    lengths.into_par_iter().with_max_len(1).try_for_each(run)
}

#[test]
fn shifted_sparse() -> Result<()> {
    for_every_length(|entries| {
        // Groups from 2 to T + 3.
        case(entries, 0, SHIFTED(2 + entries * 17 % (entries + 2))).check_stored::<f32>()?;
        case(entries, 0, SHIFTED(2 + (entries * 5 + 1) % (entries + 2))).check_stored::<bf16>()?;
        case(entries, 1, SHIFTED(2 + entries * entries / 3 % (entries + 2))).check_stored::<f32>()
    })
}

#[test]
fn shifted_sparse_both_ways() -> Result<()> {
    for_every_length(|entries| {
        case(entries, 8, SHIFTED_BOTH(2 + entries * 17 % (entries + 2))).check_stored::<f32>()?;
        let group = 2 + (entries * 5 + 1) % (entries + 2);
        if entries % 3 == 2 { case(entries, 9, SHIFTED_BOTH(group)).check_stored::<bf16>() } else { Ok(()) }
    })
}

#[test]
fn dense() -> Result<()> {
    for_every_length(|entries| {
        case(entries, 2, Pattern::Dense).check_stored::<f32>()?;
        if entries % 3 == 0 { case(entries, 3, Pattern::Dense).check_stored::<bf16>() } else { Ok(()) }
    })
}

#[test]
fn sliding_window() -> Result<()> {
    for_every_length(|entries| {
        case(entries, 4, WINDOW(1 + entries * 13 % (entries + 2))).check_stored::<f32>()?;
        let window = 1 + entries * 29 % (entries + 2);
        if entries % 3 == 1 { case(entries, 5, WINDOW(window)).check_stored::<bf16>() } else { Ok(()) }
    })
}

#[test]
fn bidirectional() -> Result<()> {
    for_every_length(|entries| {
        case(entries, 6, Pattern::Bidirectional).check_stored::<f32>()?;
        if entries % 3 == 2 {
            case(entries, 7, Pattern::Bidirectional).check_stored::<bf16>()
        } else {
            Ok(())
        }
    })
}
