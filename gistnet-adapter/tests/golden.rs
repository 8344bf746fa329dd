//! Every golden case of GistNet: outputs and all gradients. Where they come from stands in
//! integration-tests/fixtures/README.md.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use common::{Case, close, golden, small};
use gistnet_adapter::losses::contrastive;
use gistnet_adapter::{GistNet, GistNetConfig, Head, Mode, Pooling};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;

const GIST: f64 = 2e-5;
/// Of the largest value of the gradient.
const GRADIENT: f64 = 1e-4;

/// Output and gradients of one case, whose tensors begin with `prefix`.
fn holds(name: &str, prefix: &str, config: GistNetConfig) -> Result<[f64; 2]> {
    let case = golden(name)?;
    let mut net = case.network(config)?;
    net.params_mut().set_learning([Group::Gistnet])?;
    let blocks = case.leaf("in.blocks")?;
    let mask = case.mask("in.key_padding_mask")?;
    let gists = net.forward(&blocks, mask.as_deref())?;
    let off = close(&gists, case.get(&format!("{prefix}.out"))?)?;
    assert!(off < GIST, "{name}: gists differ by {off}");

    let mut gradients = Gradients::new();
    net.backward(&gists, case.get("in.probe")?.clone(), None, &mut gradients)?;
    // What is zero but for rounding, as where a token attends to itself alone, is held against the other gradients.
    let mut largest = 0f64;
    for (parameter, _) in net.config().tensors() {
        largest = largest.max(size(case.get(&format!("{prefix}.grad.w.{parameter}"))?)?);
    }
    let relative = |got: &Tensor, want: &Tensor, what: &str| -> Result<f64> {
        let off = close(got, want)? / size(want)?.max(1e-3 * largest);
        assert!(off < GRADIENT, "{name}: gradient of {what} differs by {off} of its largest value");
        Ok(off)
    };
    let mut worst = 0f64;
    for (parameter, _) in net.config().tensors() {
        let want = case.get(&format!("{prefix}.grad.w.{parameter}"))?;
        let got = gradients.get(&parameter).unwrap();
        let got = Tensor::from_slice(got, want.shape(), &Device::Cpu)?;
        worst = worst.max(relative(&got, want, &parameter)?);
    }
    // Of the inputs: the same walk, as a sum that candle differentiates itself.
    let sum = (net.forward(&blocks, mask.as_deref())? * case.get("in.probe")?)?.sum_all()?;
    let want = case.get(&format!("{prefix}.grad.blocks"))?;
    let zeros = blocks.zeros_like()?;
    let grads = sum.backward()?;
    worst = worst.max(relative(grads.get(&blocks).unwrap_or(&zeros), want, "the children")?);
    Ok([off, worst])
}

fn size(of: &Tensor) -> Result<f64> {
    Ok(f64::from(of.abs()?.max_all()?.to_scalar::<f32>()?))
}

fn poolings() -> [(Pooling, &'static str); 3] {
    [(Pooling::Mean, "mean"), (Pooling::Query, "query"), (Pooling::Cls, "cls")]
}

fn heads() -> [(Head, &'static str); 2] {
    [(Head::Linear, "linear"), (Head::Mlp, "mlp")]
}

fn report(what: &str, found: &[[f64; 2]]) {
    let worst = |side: usize| found.iter().fold(0f64, |worst, of| worst.max(of[side]));
    println!(
        "{what}: {} cases, gists within {:.1e}, gradients within {:.1e}",
        found.len(),
        worst(0),
        worst(1)
    );
}

#[test]
fn a_transformer_before_every_pooling_and_head() -> Result<()> {
    let mut found = Vec::new();
    for block in [8, 32] {
        for (pooling, pooled) in poolings() {
            for (head, headed) in heads() {
                let config = GistNetConfig { pooling, head, ..small(block) }.original();
                found.push(holds(&format!("gist_tf_k{block}_{pooled}_{headed}"), "fp32", config)?);
            }
        }
    }
    report("transformer", &found);
    Ok(())
}

#[test]
fn no_transformer() -> Result<()> {
    let mut found = Vec::new();
    for block in [8, 32] {
        for (head, headed) in heads() {
            let config = GistNetConfig { mode: Mode::Mean, head, ..small(block) };
            found.push(holds(&format!("gist_mean_k{block}_{headed}"), "fp32", config)?);
        }
    }
    report("mean", &found);
    Ok(())
}

#[test]
fn attention_that_sees_both_ways() -> Result<()> {
    let mut found = Vec::new();
    for (pooling, name, head) in [
        (Pooling::Cls, "cls_linear", Head::Linear),
        (Pooling::Mean, "mean_mlp", Head::Mlp),
        (Pooling::Query, "query_linear", Head::Linear),
    ] {
        let config = GistNetConfig { pooling, head, ..small(8) };
        found.push(holds(&format!("gist_bidir_k8_{name}"), "derived", config)?);
    }
    report("bidirectional", &found);
    Ok(())
}

#[test]
fn padding_as_the_original_means_it() -> Result<()> {
    let mut found = Vec::new();
    for (pooling, pooled) in poolings() {
        let config = GistNetConfig { pooling, head: Head::Linear, ..small(8) }.original();
        found.push(holds(&format!("gist_masked_k8_{pooled}"), "derived", config)?);
    }
    report("masked", &found);
    Ok(())
}

#[test]
fn two_levels_by_one_network() -> Result<()> {
    let case = golden("gist_hier_k8")?;
    let net = case.network(small(8).original())?;
    let base = case.get("in.base")?;
    let (rows, _, width) = base.dims3()?;
    // What does not fill a block stays as it is.
    let levels = net.hierarchy(&base.narrow(1, 0, 64)?.contiguous()?, 2)?;
    let of_level = |level: usize, count: usize| levels[level].reshape((rows, count, width));
    let off = close(&of_level(0, 8)?, case.get("fp32.lod1")?)?;
    let off = off.max(close(&of_level(1, 1)?, case.get("fp32.lod2")?)?);
    println!("two levels: within {off:.1e}");
    assert!(off < GIST, "gists differ by {off}");
    Ok(())
}

/// The gist of ΔNLL's case, and how near it is to that of the next block.
#[test]
fn the_hinge_pushes_neighbours_apart() -> Result<()> {
    let case = golden("delta_nll")?;
    let config = GistNetConfig { block: 8, layers: 1, ..GistNetConfig::new(32, 4) }.original();
    let mut net = case.network_of("w.gist.", config)?;
    net.params_mut().set_learning([Group::Gistnet])?;
    let table = golden("gpt_mha")?.get("w.transformer.wte.weight")?.clone();
    let tokens = case.get("in.tokens")?.to_dtype(DType::U32)?;
    let blocks = |from: usize| -> Result<Tensor> {
        let ids = tokens.narrow(1, from, 8)?.contiguous()?.flatten_all()?;
        Ok(table.index_select(&ids, 0)?.reshape((2, 8, 32))?)
    };
    let gists = net.forward(&blocks(16)?, None)?;
    let off = close(&gists, case.get("derived.start.gist")?)?;
    assert!(off < GIST, "gists differ by {off}");

    let next = net.forward(&blocks(24)?, None)?;
    let both = Tensor::cat(&[&gists, &next], 0)?;
    for row in 0..2 {
        for (margin, name) in [(0.2, "hinge_m02"), (1.6, "hinge_m16")] {
            let hinge = contrastive(&both, &[[row, row + 2]], margin)?.to_scalar::<f32>()?;
            let want = case.get(&format!("derived.start.{name}"))?.get(row)?.to_scalar::<f32>()?;
            assert!((hinge - want).abs() < 2e-5, "{name} of row {row}: {hinge}, expected {want}");
        }
    }
    Ok(())
}

/// Causal attention before a prepended token gives a constant; that is why it is not the default.
#[test]
fn a_prepended_token_that_sees_itself_alone_says_nothing_of_the_block() -> Result<()> {
    let children = common::random(&[2, 8, 16], 5);
    for (causal, constant) in [(true, true), (false, false)] {
        let config = GistNetConfig { pooling: Pooling::Cls, causal, ..small(8) };
        let mut net = GistNet::new(config, 1)?;
        let token = common::random(&[1, 1, 16], 6);
        net.params_mut().set("cls_token", &token)?;
        let gists = net.forward(&children, None)?;
        let apart = close(&gists.get(0)?, &gists.get(1)?)?;
        assert_eq!(apart < 1e-6, constant, "causal {causal}: gists are {apart} apart");
    }
    Ok(())
}

#[test]
fn all_cases_are_read() -> Result<()> {
    let mut cases: Vec<String> = std::fs::read_dir(Case::folder())?
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("gist_"))
        .collect();
    cases.sort();
    assert_eq!(cases.len(), 23, "the tests above name 23 cases, the folder has {cases:?}");
    Ok(())
}
