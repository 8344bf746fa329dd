//! Gradients against finite differences, of the network and of the terms on gists; what masks do.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use common::{close, random, small};
use gistnet_adapter::losses::{LossConfig, OnGists};
use gistnet_adapter::{GistNet, GistNetConfig, Head, Mode, Padding, Pooling};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;

const MASK: [bool; 16] = [
    true, true, false, true, true, false, true, false, //
    true, true, true, true, true, true, true, true,
];

fn learning(config: GistNetConfig) -> Result<GistNet> {
    let mut net = GistNet::new(config, 9)?;
    if net.params().contains("cls_token") {
        net.params_mut().set("cls_token", &random(&[1, 1, 16], 4))?;
    }
    net.params_mut().set_learning([Group::Gistnet])?;
    Ok(net)
}

/// Holds one gradient against differences of `loss`, along the gradient itself: the step's whole effect is in it, so f32
/// leaves three digits.
fn along(
    what: &str,
    value: &Tensor,
    gradient: &Tensor,
    mut loss: impl FnMut(&Tensor) -> Result<f64>,
) -> Result<()> {
    let length = f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    assert!(length > 1e-5, "{what}: a gradient of length {length}");
    // Short, since relu bends.
    let step = 2e-3;
    let moved = |sign: f64| -> Result<Tensor> { Ok((value + (gradient * (sign * step / length))?)?) };
    let measured = (loss(&moved(1.0)?)? - loss(&moved(-1.0)?)?) / (2.0 * step);
    let off = (measured - length).abs() / length;
    assert!(off < 0.02, "{what}: gradient of length {length}, differences give {measured}");
    Ok(())
}

fn every_parameter(config: GistNetConfig, mask: Option<&[bool]>) -> Result<()> {
    let what = format!("{config:?}");
    let mut net = learning(config)?;
    let children = Var::from_tensor(&random(&[2, 8, 16], 1))?.into_inner();
    let probe = random(&[2, 16], 2);
    let mut gradients = Gradients::new();
    net.backward(&net.forward(&children, mask)?, probe.clone(), None, &mut gradients)?;
    let loss = |net: &GistNet, children: &Tensor| -> Result<f64> {
        let product = (net.forward(children, mask)? * &probe)?;
        Ok(product.flatten_all()?.to_vec1::<f32>()?.iter().map(|v| f64::from(*v)).sum())
    };
    let names: Vec<String> = net.params().names().map(str::to_string).collect();
    assert_eq!(gradients.names().collect::<Vec<_>>(), names);
    for name in names {
        let value = net.params().get(&name).context("value")?.copy()?;
        let gradient = gradients.get(&name).context("gradient")?;
        let gradient = Tensor::from_slice(gradient, value.shape(), value.device())?;
        along(&format!("{what}: {name}"), &value, &gradient, |moved| {
            net.params_mut().set(&name, moved)?;
            loss(&net, &children)
        })?;
        net.params_mut().set(&name, &value)?;
    }
    let sum = (net.forward(&children, mask)? * &probe)?.sum_all()?;
    let gradient = sum.backward()?.get(&children).context("children")?.clone();
    along(&format!("{what}: children"), &children.detach(), &gradient, |moved| loss(&net, moved))
}

fn poolings() -> [Pooling; 3] {
    [Pooling::Mean, Pooling::Query, Pooling::Cls]
}

#[test]
fn of_every_parameter_and_the_children() -> Result<()> {
    for pooling in poolings() {
        for head in [Head::Linear, Head::Mlp] {
            every_parameter(GistNetConfig { pooling, head, layers: 1, ..small(8) }, None)?;
        }
    }
    every_parameter(GistNetConfig { causal: true, ..small(8) }, None)?;
    every_parameter(GistNetConfig { mode: Mode::Mean, ..small(8) }, None)
}

#[test]
fn under_a_mask_with_gaps() -> Result<()> {
    for padding in [Padding::Excluded, Padding::Zeroed] {
        for pooling in poolings() {
            every_parameter(GistNetConfig { pooling, padding, layers: 1, ..small(8) }, Some(&MASK))?;
        }
        every_parameter(GistNetConfig { mode: Mode::Mean, padding, ..small(8) }, Some(&MASK))?;
    }
    every_parameter(GistNetConfig { causal: true, layers: 1, ..small(8) }, Some(&MASK))
}

#[test]
fn through_both_levels_of_a_hierarchy() -> Result<()> {
    let net = learning(GistNetConfig { block: 4, ..small(4) })?;
    let entries = Var::from_tensor(&random(&[2, 16, 16], 1))?.into_inner();
    let probe = random(&[2, 1, 16], 2);
    let root = |entries: &Tensor| -> Result<Tensor> { Ok(net.hierarchy(entries, 2)?[1].clone()) };
    let gradient = (root(&entries)? * &probe)?.sum_all()?.backward()?;
    let gradient = gradient.get(&entries).context("entries")?.clone();
    along("entries", &entries.detach(), &gradient, |moved| {
        Ok(f64::from((root(moved)? * &probe)?.sum_all()?.to_scalar::<f32>()?))
    })?;
    // The parameters' gradient is that of both uses: one of them alone is another.
    let levels = net.hierarchy(&entries, 2)?;
    let mut both = Gradients::new();
    net.backward(&levels[1], probe.clone(), None, &mut both)?;
    let below = levels[0].detach();
    let above = net.forward(&below, None)?;
    let mut upper = Gradients::new();
    net.backward(&above, probe.reshape((2, 16))?, None, &mut upper)?;
    assert!(close(&above, &levels[1].reshape((2, 16))?)? < 1e-6);
    let name = "head.mlp.0.weight";
    assert_ne!(both.get(name), upper.get(name));
    Ok(())
}

#[test]
fn a_hierarchy_of_another_number_of_entries_is_refused() -> Result<()> {
    let net = GistNet::new(small(8), 1)?;
    let error = net.hierarchy(&random(&[1, 63, 16], 1), 2).unwrap_err().to_string();
    assert!(error.contains("8^levels entries, got 2 levels and 63 entries"), "{error}");
    Ok(())
}

#[test]
fn terms_on_gists_join_the_loss_over_the_base() -> Result<()> {
    let net = learning(GistNetConfig { layers: 1, ..small(8) })?;
    let children = random(&[4, 8, 16], 1);
    let (probe, before) = (random(&[4, 16], 2), random(&[4, 16], 3));
    let config =
        LossConfig { contrastive: 0.7, margin: 1.8, stability: 0.3, pooling: 0.5, ..LossConfig::default() };
    let gists = net.forward(&children, None)?;
    let of = |gists_ne| OnGists {
        gists_ne,
        children_nke: &children,
        neighbours: &[[0, 1], [2, 3]],
        checkpoint_ne: Some(&before),
    };
    let term = config.on_gists(&of(&gists))?.context("a term")?;
    let mut together = Gradients::new();
    net.backward(&gists, probe.clone(), Some(&term), &mut together)?;

    // The same in two walks: first the term's gradient of the gists, then both gradients at once.
    let leaf = Var::from_tensor(&gists.detach())?.into_inner();
    let of_term = config.on_gists(&of(&leaf))?.context("a term")?.backward()?;
    let d_gists = (&probe + of_term.get(&leaf).context("gists")?)?;
    let mut apart = Gradients::new();
    net.backward(&net.forward(&children, None)?, d_gists, None, &mut apart)?;
    for name in together.names() {
        let (a, b) = (together.get(name).unwrap(), apart.get(name).context("apart")?);
        let size = b.iter().fold(1e-3f32, |size, v| size.max(v.abs()));
        let off = a.iter().zip(b).fold(0f32, |off, (a, b)| off.max((a - b).abs())) / size;
        assert!(off < 1e-5, "{name} differs by {off}");
    }
    Ok(())
}

#[test]
fn padding_takes_no_part_wherever_it_stands() -> Result<()> {
    for pooling in poolings() {
        for mode in [Mode::Transformer, Mode::Mean] {
            if mode == Mode::Mean && pooling != Pooling::Mean {
                continue;
            }
            let net = GistNet::new(GistNetConfig { pooling, mode, ..small(8) }, 9)?;
            let children = random(&[2, 8, 16], 1);
            let gists = net.forward(&children, Some(&MASK))?;
            let mut filled: Vec<f32> = children.flatten_all()?.to_vec1()?;
            for (at, _) in MASK.iter().enumerate().filter(|(_, valid)| !**valid) {
                filled[at * 16..(at + 1) * 16].fill(f32::NAN);
            }
            let filled = Tensor::from_vec(filled, (2, 8, 16), children.device())?;
            assert_eq!(close(&net.forward(&filled, Some(&MASK))?, &gists)?, 0.0);
            // A block without padding is what it is without a mask.
            let plain = net.forward(&children, None)?;
            assert!(close(&plain.get(1)?, &gists.get(1)?)? < 1e-6);
            assert!(close(&plain.get(0)?, &gists.get(0)?)? > 1e-3);
        }
    }
    Ok(())
}

#[test]
fn padding_at_the_end_is_a_shorter_block() -> Result<()> {
    for pooling in poolings() {
        let net = GistNet::new(GistNetConfig { pooling, ..small(8) }, 9)?;
        let mut short = GistNet::new(GistNetConfig { pooling, ..small(5) }, 9)?;
        for name in net.params().names() {
            short.params_mut().set(name, &net.params().get(name).context("value")?)?;
        }
        let children = random(&[3, 8, 16], 1);
        let mask: Vec<bool> = (0..24).map(|at| at % 8 < 5).collect();
        let first = children.narrow(1, 0, 5)?.contiguous()?;
        assert!(close(&net.forward(&children, Some(&mask))?, &short.forward(&first, None)?)? < 1e-6);
    }
    Ok(())
}

#[test]
fn entries_keep_their_places_behind_padding() -> Result<()> {
    let net = GistNet::new(GistNetConfig { pooling: Pooling::Query, ..small(8) }, 9)?;
    let children = random(&[1, 8, 16], 1);
    let gap: Vec<bool> = (0..8).map(|at| at != 3).collect();
    let end: Vec<bool> = (0..8).map(|at| at != 7).collect();
    let order = Tensor::new(&[0u32, 1, 2, 4, 5, 6, 7, 3], children.device())?;
    let moved = children.index_select(&order, 1)?;
    let (gap, end) = (net.forward(&children, Some(&gap))?, net.forward(&moved, Some(&end))?);
    assert!(close(&gap, &end)? > 1e-3, "the same entries at other places gave the same gist");
    Ok(())
}

#[test]
fn children_of_another_shape_are_refused() -> Result<()> {
    let net = GistNet::new(small(8), 1)?;
    let error = net.forward(&random(&[2, 7, 16], 1), None).unwrap_err().to_string();
    assert!(error.contains("children: expected [N, 8, 16] with N of at least 1, got [2, 7, 16]"), "{error}");
    Ok(())
}

#[test]
fn a_gradient_of_another_shape_is_refused() -> Result<()> {
    let net = learning(small(8))?;
    let gists = net.forward(&random(&[2, 8, 16], 1), None)?;
    let mut gradients = Gradients::new();
    let error = net.backward(&gists, random(&[3, 16], 1), None, &mut gradients).unwrap_err().to_string();
    assert!(error.contains("expected gradient [2, 16], got [3, 16]"), "{error}");
    assert_eq!(gradients.names().count(), 0);
    Ok(())
}

#[test]
fn a_frozen_network_has_no_way_back() -> Result<()> {
    let net = GistNet::new(small(8), 1)?;
    let gists = net.forward(&random(&[2, 8, 16], 1), None)?;
    assert!(!gists.track_op());
    let error = net.backward(&gists, gists.clone(), None, &mut Gradients::new()).unwrap_err().to_string();
    assert!(error.contains("backward: expected a network that learns, got a frozen one"), "{error}");
    Ok(())
}

#[test]
fn attention_entropy_lies_between_one_key_and_all_alike() -> Result<()> {
    let children = random(&[2, 8, 16], 1);
    let mut net = GistNet::new(small(8), 1)?;
    let of = net.attention_entropy(&children, None)?;
    assert!(of.len() == 2 && of.iter().all(|bits| (0.5..3.0).contains(bits)), "{of:?}");
    // Queries of length zero look at all keys alike: 8 of them, or 5 and 8 under the mask, each from as many queries.
    net.params_mut().set("blocks.0.attn.c_q.weight", &random(&[16, 16], 1).zeros_like()?)?;
    assert!((net.attention_entropy(&children, None)?[0] - 3.0).abs() < 1e-9);
    let masked = net.attention_entropy(&children, Some(&MASK))?[0];
    assert!((masked - (5.0 * 5f64.log2() + 8.0 * 3.0) / 13.0).abs() < 1e-9, "{masked}");
    assert!(
        GistNet::new(GistNetConfig { mode: Mode::Mean, ..small(8) }, 1)?
            .attention_entropy(&children, None)?
            .is_empty()
    );
    Ok(())
}

#[test]
fn attention_entropy_of_zeroed_padding_is_refused() -> Result<()> {
    let net = GistNet::new(small(8).original(), 1)?;
    let error = net.attention_entropy(&random(&[2, 8, 16], 1), Some(&MASK)).unwrap_err().to_string();
    assert!(error.contains("expected padding that is excluded, got zeroed"), "{error}");
    Ok(())
}

#[test]
fn the_same_seed_begins_with_the_same_values_in_their_bounds() -> Result<()> {
    let hash = |seed| GistNet::new(small(8), seed)?.params().group_hash(Group::Gistnet);
    assert_eq!(hash(3)?, hash(3)?);
    assert_ne!(hash(3)?, hash(4)?);
    let net = GistNet::new(GistNetConfig { pooling: Pooling::Cls, ..small(8) }, 3)?;
    for (name, bound) in [
        ("blocks.0.attn.c_q.weight", 0.25f32),
        ("blocks.1.mlp.c_proj.weight", 0.125),
        ("head.proj.0.bias", 0.25),
        ("head.proj.2.weight", 1.0 / 32f32.sqrt()),
    ] {
        let values: Vec<f32> = net.params().get(name).context("value")?.flatten_all()?.to_vec1()?;
        let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        assert!(largest <= bound && largest > 0.8 * bound, "{name}: {largest} for a bound of {bound}");
    }
    Ok(())
}
