//! Generation over a cache on the device: logits of prompts and steps, tokens, memory.

use anyhow::{Context, Result, ensure};
use megacontext_base::buffers::{PassShape, gpu};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::generate::{Addition, Generation, KvCache, Sampling, pass_entries, room};
use megacontext_base::lora::{LoraConfig, Names};
use megacontext_kernels::precision::Precision;

use crate::adapters::lora;
use crate::memory::model;
use crate::models::FOLDERS;
use crate::support::{attach, close, device, distance, open, without_blas};

fn tokens(decoder: &Decoder, length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 37 + i * i * 5 + seed * 11 + 3) % decoder.config().vocab_size) as u32).collect()
}

/// Logits after four prompts of which two are alike, then after steps of which some rows take one token, some several and some
/// none.
fn logits(decoder: &Decoder) -> Result<Vec<f32>> {
    let c = decoder.config();
    let rows: Vec<Vec<u32>> =
        [5, 26, 26, 11].iter().enumerate().map(|(row, length)| tokens(decoder, length + 9, row)).collect();
    let rooms: Vec<usize> = rows.iter().map(Vec::len).collect();
    let mut cache = KvCache::new(decoder, c.rope(&c.rope_scaling), &rooms)?;
    let prompts: Vec<&[u32]> = rows.iter().map(|row| &row[..row.len() - 9]).collect();
    let mut all = decoder.prefill(&mut cache, &prompts, &mut |_| true)?.context("nobody cancelled")?;
    let steps: [&[(usize, usize)]; 4] =
        [&[(0, 1), (1, 1), (2, 1), (3, 1)], &[(2, 1), (0, 3)], &[(3, 2), (1, 2), (0, 4)], &[(2, 7)]];
    for (number, step) in steps.into_iter().enumerate() {
        let lengths = cache.lengths();
        let additions: Vec<Addition> = step
            .iter()
            .map(|(row, count)| Addition {
                row: *row,
                tokens: &rows[*row][lengths[*row]..][..*count],
                logits: number != 2 || *row != 1,
            })
            .collect();
        all.extend(decoder.advance(&mut cache, &additions)?);
    }
    let unasked = Addition { row: 3, tokens: &rows[3][13..15], logits: false };
    ensure!(decoder.advance(&mut cache, &[unasked])?.is_empty(), "logits that nobody asked for");
    ensure!(decoder.advance(&mut cache, &[])?.is_empty(), "logits of no rows");
    ensure!(cache.lengths() == [13, 29, 35, 16], "{:?}", cache.lengths());
    Ok(all)
}

#[test]
fn logits_over_a_cache_are_the_processors_in_every_family() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in FOLDERS {
        let mut decoder = open(folder, Precision::F32, &[])?;
        let expected = logits(&decoder)?;
        decoder.set_device(&lease.device)?;
        close(folder, &logits(&decoder)?, &expected, 1e-4)?;
    }
    Ok(())
}

#[test]
fn logits_over_a_cache_are_the_processors_with_slopes() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let small = open("llama/tied_f32", Precision::F32, &[])?;
    let mut config = DecoderConfig { vocab_size: 60, ..small.config().clone() };
    config.positions.alibi = true;
    let mut decoder = Decoder::random(config, 5, Precision::F32, &[])?;
    let expected = logits(&decoder)?;
    decoder.set_device(&lease.device)?;
    close("ALiBi", &logits(&decoder)?, &expected, 1e-4)
}

#[test]
fn logits_over_a_cache_are_the_processors_in_rounded_classes() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in ["llama/tied_f32", "families/gemma3_bf16"] {
        let exact = logits(&open(folder, Precision::F32, &[])?)?;
        for precision in [Precision::Mixed, Precision::Bf16] {
            let mut decoder = open(folder, precision, &[])?;
            let host = distance(&logits(&decoder)?, &exact);
            decoder.set_device(&lease.device)?;
            let here = distance(&logits(&decoder)?, &exact);
            ensure!(
                here <= 2.0 * host + 0.01,
                "{folder}, {precision}: {here} from f32, the processor {host}"
            );
        }
    }
    Ok(())
}

#[test]
fn logits_over_a_cache_are_the_processors_with_adapters() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let list = |names: &[&str]| Names::List(names.iter().map(ToString::to_string).collect());
    let ends = LoraConfig { target_modules: list(&["q_proj", "lm_head", "embed_tokens"]), ..lora(0.0) };
    for (what, adapter) in
        [("blocks", lora(0.0)), ("DoRA", LoraConfig { use_dora: true, ..lora(0.0) }), ("ends", ends)]
    {
        let mut decoder = open("llama/untied_f32_linear", Precision::F32, &[])?;
        let bare = logits(&decoder)?;
        attach(&mut decoder, adapter)?;
        let expected = logits(&decoder)?;
        ensure!(distance(&expected, &bare) > 1e-3, "{what}: the adapter changes nothing");
        decoder.set_device(&lease.device)?;
        close(what, &logits(&decoder)?, &expected, 1e-4)?;
    }
    Ok(())
}

#[test]
fn texts_are_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let drawn = Sampling::Nucleus { temperature: 0.8, top_p: 0.9, seed: 4 };
    for (folder, sampling) in [("llama/tied_f32", Sampling::Greedy), ("families/qwen2_f16", drawn)] {
        let mut decoder = open(folder, Precision::F32, &[])?;
        let prompts: Vec<Vec<u32>> =
            [4, 19].iter().map(|length| tokens(&decoder, *length, *length)).collect();
        let run = |decoder: &Decoder, end: &[u32]| -> Result<_> {
            let scaling = &decoder.config().rope_scaling;
            let with = Generation { max_new_tokens: 8, end, sampling, scaling };
            decoder.generate(&prompts, &with, &mut |_| true)?.context("nobody cancelled")
        };
        // A row that ends in the middle takes part in nothing any more.
        let end = [run(&decoder, &[])?[1].tokens[3]];
        let expected = run(&decoder, &end)?;
        ensure!(expected[1].ended == Some(end[0]), "{expected:?}");
        decoder.set_device(&lease.device)?;
        let got = run(&decoder, &end)?;
        ensure!(got == expected, "{folder}: expected {expected:?}, got {got:?}");
    }
    Ok(())
}

#[test]
fn a_cache_of_another_device_is_refused() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/tied_f32", Precision::F32, &[])?;
    let c = decoder.config().clone();
    let mut cache = KvCache::new(&decoder, c.rope(&c.rope_scaling), &[8])?;
    decoder.prefill(&mut cache, &[&[1, 2, 3]], &mut |_| true)?;
    decoder.set_device(&lease.device)?;
    let add = [Addition { row: 0, tokens: &[4], logits: true }];
    let refused = decoder.advance(&mut cache, &add).unwrap_err().to_string();
    ensure!(refused.contains("made for the model's sizes and class and on its device"), "{refused}");
    ensure!(cache.lengths() == [3], "{:?}", cache.lengths());
    Ok(())
}

#[test]
fn generating_takes_what_was_said() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let Some(memory) = lease.memory() else { return Ok(()) };
    for precision in Precision::ALL {
        // Many short rows, and few long ones.
        for prompts in [vec![9usize; 6], vec![70, 51]] {
            let mut decoder = model("llama/tied_f32", precision, &[])?;
            let before = memory.now()?;
            decoder.set_device(&lease.device)?;
            let rows: Vec<Vec<u32>> = prompts.iter().map(|length| tokens(&decoder, *length, 1)).collect();
            lease.device.forget_peak()?;
            let scaling = &decoder.config().rope_scaling;
            let with = Generation { max_new_tokens: 3, end: &[], sampling: Sampling::Greedy, scaling };
            decoder.generate(&rows, &with, &mut |_| true)?.context("nobody cancelled")?;
            let rooms: Vec<usize> = prompts.iter().map(|length| room(*length, 3)).collect();
            let pass = PassShape { entries: pass_entries(&prompts), precision, lora: None };
            let said = gpu::generation_bytes(decoder.config(), pass, &rooms);
            lease.took(&format!("{precision}, {prompts:?}"), before, without_blas(said))?;
        }
    }
    Ok(())
}
