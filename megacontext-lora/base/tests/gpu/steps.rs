//! Losses, gradients and optimiser steps.

use anyhow::{Result, ensure};
use megacontext_base::buffers::Buffers;
use megacontext_base::device::Device;
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

use crate::models::FOLDERS;
use crate::support::{Case, close, close_gradients, device, distance, open};

const WHOLE: [Group; 3] = [Group::Base, Group::Embeddings, Group::Norms];

#[test]
fn losses_and_gradients_are_the_processors_in_every_family() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in FOLDERS {
        let mut decoder = open(folder, Precision::F32, &WHOLE)?;
        let case = Case::new(&decoder, 21, Pattern::Dense)?;
        let (expected, gradients) = case.gradients(&decoder)?;
        decoder.set_device(&lease.device)?;
        let (got, on_device) = case.gradients(&decoder)?;
        ensure!((got.sum - expected.sum).abs() <= 1e-5 * expected.sum, "{folder}: {got:?}, {expected:?}");
        ensure!(got.count == expected.count, "{folder}: {got:?}, {expected:?}");
        close_gradients(folder, &on_device, &gradients, 1e-4)?;
    }
    Ok(())
}

#[test]
fn every_pattern_row_length_and_segment_is_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let folder = "llama/untied_f32_linear";
    let lengths = Rows { lengths: Some(vec![17, 24]), segments: None };
    let segments = Rows { lengths: None, segments: Some(vec![vec![0, 5, 16], vec![0]]) };
    let cases = [
        (Pattern::ShiftedSparse { group: 8 }, Rows::default()),
        (Pattern::SlidingWindow { window: 6 }, Rows::default()),
        (Pattern::Dense, lengths),
        (Pattern::Dense, segments),
    ];
    for (pattern, rows) in cases {
        let mut decoder = open(folder, Precision::F32, &WHOLE)?;
        let case = Case { rows, ..Case::new(&decoder, 24, pattern)? };
        let (expected, gradients) = case.gradients(&decoder)?;
        decoder.set_device(&lease.device)?;
        let (got, on_device) = case.gradients(&decoder)?;
        ensure!((got.sum - expected.sum).abs() <= 1e-5 * expected.sum, "{pattern:?}: {got:?}, {expected:?}");
        close_gradients(&format!("{pattern:?}"), &on_device, &gradients, 1e-4)?;
    }
    Ok(())
}

#[test]
fn rounded_classes_are_as_near_to_f32_as_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in
        ["llama/tied_f32", "families/qwen3_bf16_sharded", "families/gpt_neox_f32", "families/gemma3_bf16"]
    {
        let exact = open(folder, Precision::F32, &WHOLE)?;
        let case = Case::new(&exact, 21, Pattern::Dense)?;
        let (loss, gradients) = case.gradients(&exact)?;
        for precision in [Precision::Mixed, Precision::Bf16] {
            let mut decoder = open(folder, precision, &WHOLE)?;
            let (_, on_host) = case.gradients(&decoder)?;
            decoder.set_device(&lease.device)?;
            let (got, on_device) = case.gradients(&decoder)?;
            ensure!((got.sum - loss.sum).abs() <= 5e-3 * loss.sum, "{folder} {precision}: {got:?}, {loss:?}");
            for name in gradients.names() {
                let exact = gradients.get(name).unwrap();
                let [host, here] = [&on_host, &on_device].map(|of| distance(of.get(name).unwrap(), exact));
                // The device rounds more: low-rank values, gradients that products read.
                ensure!(
                    here <= 2.0 * host + 0.01,
                    "{folder} {precision} {name}: {here} from f32, the processor {host}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits_and_so_does_the_same_step() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for precision in Precision::ALL {
        let mut decoder = open("llama/tied_f32", precision, &WHOLE)?;
        decoder.set_device(&lease.device)?;
        let mut case = Case::new(&decoder, 21, Pattern::ShiftedSparse { group: 8 })?;
        let (_, first) = case.gradients(&decoder)?;
        let (_, again) = case.gradients(&decoder)?;
        case.recompute = false;
        let (_, kept) = case.gradients(&decoder)?;
        for name in first.names() {
            ensure!(first.get(name) == again.get(name), "{precision} {name}: another step, other bits");
            ensure!(first.get(name) == kept.get(name), "{precision} {name}: recomputed, other bits");
        }
    }
    Ok(())
}

#[test]
fn training_on_the_device_leads_where_it_leads_on_the_processor() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let train = |to: &Device| -> Result<(Vec<f64>, Vec<f32>)> {
        let mut decoder = open("llama/tied_f32", Precision::F32, &WHOLE)?;
        decoder.set_device(to)?;
        let case = Case::new(&decoder, 21, Pattern::ShiftedSparse { group: 8 })?;
        let mut optimizer = Optimizer::new(AdamWConfig::default());
        let mut losses = Vec::new();
        for _ in 0..6 {
            let (loss, gradients) = case.gradients(&decoder)?;
            optimizer.step(decoder.params(), &gradients, 1e-2)?;
            losses.push(loss.sum / loss.count as f64);
        }
        let mut buffers = Buffers::default();
        let nll = decoder.score(&case.tokens, case.batch, &case.targets, &case.forward(), &mut buffers)?;
        Ok((losses, nll))
    };
    let (expected, host_nll) = train(&Device::Cpu)?;
    let (got, device_nll) = train(&lease.device)?;
    ensure!(expected[5] < expected[0] - 0.5, "the processor learns: {expected:?}");
    for (got, expected) in got.iter().zip(&expected) {
        ensure!((got - expected).abs() < 2e-3, "{got}, the processor {expected}");
    }
    close("NLL after training", &device_nll, &host_nll, 1e-2)
}

#[test]
fn merging_and_replacing_parameters_is_seen() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/tied_f32", Precision::F32, &[])?;
    decoder.set_device(&lease.device)?;
    let case = Case::new(&decoder, 21, Pattern::Dense)?;
    let mut buffers = Buffers::default();
    let mut score = |decoder: &_| -> Result<Vec<f32>> {
        let with = case.forward();
        Ok(megacontext_base::decoder::Decoder::score(
            decoder,
            &case.tokens,
            case.batch,
            &case.targets,
            &with,
            &mut buffers,
        )?)
    };
    let plain = score(&decoder)?;
    crate::support::attach(&mut decoder, crate::adapters::lora(0.0))?;
    let adapted = score(&decoder)?;
    ensure!(plain != adapted, "LoRA changes nothing");
    decoder.merge_adapter()?;
    close("merged", &score(&decoder)?, &adapted, 1e-4)?;
    decoder.unmerge_adapter()?;
    ensure!(score(&decoder)? == adapted, "unmerging does not give back what was there");
    decoder.set_lora(None)?;
    ensure!(score(&decoder)? == plain, "without LoRA the model is not what it was");
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_leaves_no_gradient_behind() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/tied_f32", Precision::F32, &WHOLE)?;
    let name = "model.norm.weight";
    let value = decoder.params().get(name).unwrap();
    decoder.params_mut().set(name, &(value * f64::INFINITY)?)?;
    decoder.set_device(&lease.device)?;
    let case = Case::new(&decoder, 21, Pattern::Dense)?;
    let mut gradients = Gradients::new();
    let with = case.forward();
    let refused = decoder
        .accumulate_gradients(&case.tokens, case.batch, &case.targets, &with, 1.0, true, &mut gradients)
        .unwrap_err()
        .to_string();
    ensure!(refused.contains("loss: expected a finite number"), "{refused}");
    ensure!(gradients.names().next().is_none(), "a gradient is left");
    Ok(())
}

#[test]
fn hidden_states_and_logits_are_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in ["llama/tied_f32", "families/nanochat_bf16"] {
        let mut decoder = open(folder, Precision::F32, &[])?;
        let case = Case::new(&decoder, 21, Pattern::Dense)?;
        let x = decoder.embed(&case.tokens, case.batch)?;
        let all = |decoder: &megacontext_base::decoder::Decoder| -> Result<[Vec<f32>; 3]> {
            let with = case.forward();
            let flat = |t: candle_core::Tensor| t.flatten_all()?.to_vec1::<f32>();
            let nll = decoder.nll(&x, &case.targets, &with)?;
            Ok([flat(decoder.hidden(&x, &with)?)?, flat(decoder.logits(&x, &with)?)?, nll])
        };
        let expected = all(&decoder)?;
        decoder.set_device(&lease.device)?;
        for (got, expected) in all(&decoder)?.iter().zip(&expected) {
            close(folder, got, expected, 1e-4)?;
        }
    }
    Ok(())
}

#[test]
fn memory_of_passes_and_models_is_given_back() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/tied_f32", Precision::F32, &WHOLE)?;
    decoder.set_device(&lease.device)?;
    let case = Case::new(&decoder, 21, Pattern::Dense)?;
    let (_, mut gradients) = case.gradients(&decoder)?;
    ensure!(
        gradients.passes().device_bytes() > 0 && gradients.passes().bytes() == 0,
        "passes lie on the device"
    );
    gradients.release_passes();
    ensure!(gradients.passes().device_bytes() == 0, "passes are let go");
    decoder.set_device(&Device::Cpu)?;
    ensure!(decoder.device().is_cpu(), "back on the processor");
    let (_, gradients) = case.gradients(&decoder)?;
    ensure!(
        gradients.passes().device_bytes() == 0 && gradients.passes().bytes() > 0,
        "passes lie on the host"
    );
    Ok(())
}
