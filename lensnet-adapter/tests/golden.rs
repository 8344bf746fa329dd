//! Every golden case of LensNet: scores and all gradients, and what a batch without a mask does to them.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::Result;
use candle_core::{Device, Tensor};
use common::{close, golden, size, small};
use lensnet_adapter::{Contexts, Head, LensNetConfig};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_base::tower::Angles;

const SCORE: f64 = 2e-5;
/// Of the largest value of the gradient.
const GRADIENT: f64 = 1e-4;

fn holds(name: &str, config: LensNetConfig) -> Result<[f64; 2]> {
    let case = golden(name)?;
    let mut net = case.network(config)?;
    net.params_mut().set_learning([Group::Lensnet])?;
    let entries = case.leaf("in.embeddings")?;
    let (b, w, _) = entries.dims3()?;
    let (lod, start) = (case.lods("in.lods")?, case.starts("in.positions")?);
    let table =
        |which: &str| case.get(&format!("fp32.in.{which}"))?.reshape((b * w, 4)).map_err(anyhow::Error::from);
    let (cos, sin) = (table("cos")?, table("sin")?);
    let angles = Angles { cos: &cos, sin: &sin };
    let of = Contexts { entries_bwe: &entries, lod: &lod, start: &start, lengths: None, tail: None };
    let scores = net.forward(&of, angles)?;
    let off = close(&scores, case.get("fp32.scores")?)?;
    assert!(off < SCORE, "{name}: scores differ by {off}");

    let probe = case.get("in.probe")?;
    let mut gradients = Gradients::new();
    net.backward(&scores, probe.clone(), &mut gradients)?;
    // What is zero but for rounding is held against the other gradients.
    let mut largest = 0f64;
    for (parameter, _) in net.config().tensors() {
        largest = largest.max(size(case.get(&format!("fp32.grad.w.{parameter}"))?)?);
    }
    let mut worst = 0f64;
    let mut hold = |got: &Tensor, want: &Tensor, what: &str| -> Result<()> {
        let off = close(got, want)? / size(want)?.max(1e-3 * largest);
        assert!(off < GRADIENT, "{name}: gradient of {what} differs by {off} of its largest value");
        worst = worst.max(off);
        Ok(())
    };
    for (parameter, _) in net.config().tensors() {
        let want = case.get(&format!("fp32.grad.w.{parameter}"))?;
        let got = Tensor::from_slice(gradients.get(&parameter).unwrap(), want.shape(), &Device::Cpu)?;
        hold(&got, want, &parameter)?;
    }
    let grads = (net.forward(&of, angles)? * probe)?.sum_all()?.backward()?;
    hold(grads.get(&entries).unwrap(), case.get("fp32.grad.embeddings")?, "the entries")?;

    // Alone, a row's distances are in units of its own largest position.
    for row in 0..b {
        let (entries, cos, sin) = (
            entries.narrow(0, row, 1)?.contiguous()?,
            cos.narrow(0, row * w, w)?.contiguous()?,
            sin.narrow(0, row * w, w)?.contiguous()?,
        );
        let of = Contexts {
            entries_bwe: &entries,
            lod: &lod[row * w..(row + 1) * w],
            start: &start[row * w..(row + 1) * w],
            lengths: None,
            tail: None,
        };
        let alone = net.forward(&of, Angles { cos: &cos, sin: &sin })?;
        let off = close(&alone, case.get(&format!("fp32.scores_row{row}_alone"))?)?;
        assert!(off < SCORE, "{name}: scores of row {row} alone differ by {off}");
    }
    Ok([off, worst])
}

#[test]
fn scores_and_gradients() -> Result<()> {
    let mut worst = [0f64; 2];
    for block in [4, 32] {
        for (head, name) in
            [(Head::Linear, "linear_gaussian"), (Head::Mlp, "mlp_gaussian"), (Head::Mlp, "mlp_simple")]
        {
            let found =
                holds(&format!("lens_k{block}_{name}"), LensNetConfig { head, ..small(block).original() })?;
            worst = [worst[0].max(found[0]), worst[1].max(found[1])];
        }
    }
    println!("six cases: scores within {:.1e}, gradients within {:.1e}", worst[0], worst[1]);
    Ok(())
}

/// The original's stack of variants: rows filled up in front with zeros, which take part.
#[test]
fn a_stack_filled_up_in_front() -> Result<()> {
    let case = golden("lens_padded_stack")?;
    let net = case.network(small(4).original())?;
    let rule = SigmaRule { preset: SigmaPreset::Original, block: 64, uniform: false };
    let read = |v: usize| -> Result<(Tensor, Vec<u8>, Vec<u64>)> {
        let of = |what: &str| format!("in.v{v}.{what}");
        Ok((case.get(&of("embeddings"))?.clone(), case.lods(&of("lods"))?, case.starts(&of("positions"))?))
    };
    let mut stack = (Vec::new(), Vec::new(), Vec::new());
    for v in [0, 1] {
        let (entries, lod, start) = read(v)?;
        let tables = net.angles(&lod, &start, &rule)?;
        let angles = Angles { cos: &tables.cos_nd, sin: &tables.sin_nd };
        let of = Contexts { entries_bwe: &entries, lod: &lod, start: &start, lengths: None, tail: None };
        let off = close(&net.forward(&of, angles)?, case.get(&format!("fp32.v{v}.scores_unpadded"))?)?;
        assert!(off < SCORE, "variant {v} alone: scores differ by {off}");
        let fill = 20 - lod.len();
        stack.0.push(entries.pad_with_zeros(1, fill, 0)?);
        stack.1.extend(std::iter::repeat_n(0, fill).chain(lod));
        stack.2.extend(std::iter::repeat_n(0, fill).chain(start));
    }
    let entries = Tensor::cat(&stack.0, 0)?;
    let tables = net.angles(&stack.1, &stack.2, &rule)?;
    let angles = Angles { cos: &tables.cos_nd, sin: &tables.sin_nd };
    let of = Contexts { entries_bwe: &entries, lod: &stack.1, start: &stack.2, lengths: None, tail: None };
    let scores = net.forward(&of, angles)?;
    for (v, count) in [(0, 20), (1, 14)] {
        let own = scores.narrow(0, v, 1)?.narrow(1, 20 - count, count)?;
        let want = case.get(&format!("fp32.v{v}.scores"))?;
        let off = close(&own, want)?;
        println!("variant {v} in the stack: within {off:.1e}");
        assert!(off < SCORE, "variant {v} in the stack: scores differ by {off}");
        let moved = close(want, case.get(&format!("fp32.v{v}.scores_unpadded"))?)?;
        assert_eq!(moved > 0.04, v == 1, "variant {v}: {moved}");
    }
    Ok(())
}
