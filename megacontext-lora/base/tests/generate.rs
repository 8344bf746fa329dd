//! Generation over a cache: against what transformers generates, against forward passes without a cache, and what rows may
//! and may not feel of each other.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use megacontext_base::adapter::read_adapter;
use megacontext_base::buffers::{PassShape, evaluation_bytes, training_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::generate::{
    Addition, Continuation, Generation, KvCache, PIECE, Sampling, generation_bytes, pass_entries, room, unpad,
};
use megacontext_base::lora::{LoraConfig, Names};
use megacontext_base::rope::{Entries, RopeScaling};
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures")
}

/// The model folder of this name, of whatever family.
fn folder(name: &str) -> PathBuf {
    let of = |kind: &str| fixtures().join(kind).join(name);
    ["llama", "families"].map(of).into_iter().find(|path| path.is_dir()).unwrap()
}

fn open(name: &str, precision: Precision) -> Decoder {
    let dir = folder(name);
    let config = DecoderConfig::from_dir(&dir).unwrap();
    Decoder::from_weights(config, &Weights::open(&dir).unwrap(), precision, &[]).unwrap()
}

fn cache(decoder: &Decoder, rooms: &[usize]) -> Result<KvCache> {
    let c = decoder.config();
    Ok(KvCache::new(decoder, c.rope(&c.rope_scaling), rooms)?)
}

fn greedy<'a>(decoder: &'a Decoder, max_new_tokens: usize, end: &'a [u32]) -> Generation<'a> {
    Generation { max_new_tokens, end, sampling: Sampling::Greedy, scaling: &decoder.config().rope_scaling }
}

fn generate(decoder: &Decoder, prompts: &[Vec<u32>], with: &Generation) -> Vec<Continuation> {
    decoder.generate(prompts, with, &mut |_| true).unwrap().unwrap()
}

/// Tokens that look like nothing in particular.
fn prompt(length: usize, seed: u32, vocab: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            1 + (state >> 16) % (vocab as u32 - 1)
        })
        .collect()
}

/// Logits [T, V] of a row by one forward pass without a cache.
fn whole(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let c = decoder.config();
    let rope = c.rope(&c.rope_scaling).sequence(tokens.len())?;
    let rows = Rows::default();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
    Ok(decoder.logits(&decoder.embed(tokens, 1)?, &with)?.squeeze(0)?.to_vec2()?)
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) -> f32 {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let most = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(most <= tolerance, "{what}: expected at most {tolerance}, got {most}");
    most
}

struct Golden {
    name: String,
    tokens: Vec<u32>,
    mask: Vec<u8>,
    batch: usize,
    new: Vec<Vec<i64>>,
    logits: Vec<Vec<Vec<f32>>>,
    end: Vec<u32>,
}

fn golden(path: &Path) -> Result<Golden> {
    let file: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu)?;
    let of = |name: &str| file.get(name).context("a tensor of the golden file");
    let ids = |name: &str| -> Result<Vec<u32>> {
        Ok(of(name)?.flatten_all()?.to_vec1::<i64>()?.into_iter().map(|id| id as u32).collect())
    };
    Ok(Golden {
        name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
        tokens: ids("tokens")?,
        mask: of("mask")?.flatten_all()?.to_vec1()?,
        batch: of("tokens")?.dims2()?.0,
        new: of("new")?.to_vec2()?,
        logits: of("logits")?.to_vec3()?,
        end: ids("end")?,
    })
}

fn goldens() -> Vec<Golden> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(fixtures().join("generate")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 4, "{paths:?}");
    paths.iter().map(|path| golden(path).unwrap()).collect()
}

#[test]
fn continues_as_transformers_does() -> Result<()> {
    for golden in goldens() {
        let decoder = open(&golden.name, Precision::F32);
        let rows = unpad(&golden.tokens, &golden.mask, golden.batch)?;
        let steps = golden.new[0].len();
        let got = generate(&decoder, &rows, &greedy(&decoder, steps, &golden.end));
        for (row, (got, want)) in got.iter().zip(&golden.new).enumerate() {
            let mut own: Vec<i64> = got.tokens.iter().chain(&got.ended).map(|t| i64::from(*t)).collect();
            own.resize(steps, -1);
            assert_eq!(&own, want, "{} row {row}", golden.name);
        }
        // The logits of every step, fed with transformers' own tokens.
        let rooms: Vec<usize> = rows.iter().map(|row| room(row.len(), steps)).collect();
        let mut cache = cache(&decoder, &rooms)?;
        let vocab = decoder.config().vocab_size;
        let whole: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let mut logits = decoder.prefill(&mut cache, &whole, &mut |_| true)?.unwrap();
        let mut growing: Vec<usize> = (0..rows.len()).collect();
        let mut most = 0f32;
        for step in 0..steps {
            for (row, logits) in growing.iter().zip(logits.chunks_exact(vocab)) {
                let what = format!("{} row {row} step {step}", golden.name);
                most = most.max(close(&what, logits, &golden.logits[*row][step], 1e-4));
            }
            let token = |row: usize| [golden.new[row][step] as u32];
            growing.retain(|row| !golden.end.contains(&token(*row)[0]));
            if step + 1 == steps || growing.is_empty() {
                break;
            }
            let tokens: Vec<[u32; 1]> = growing.iter().map(|row| token(*row)).collect();
            let new: Vec<Addition> = growing
                .iter()
                .zip(&tokens)
                .map(|(row, tokens)| Addition { row: *row, tokens, logits: true })
                .collect();
            logits = decoder.advance(&mut cache, &new)?;
        }
        println!("{}: largest difference of logits {most:e}", golden.name);
    }
    Ok(())
}

#[test]
fn padding_on_either_side_is_no_different_from_none() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let rows: Vec<Vec<u32>> = [5, 17, 1].iter().map(|n| prompt(*n, *n as u32, 64)).collect();
    let padded = |left: bool| {
        let (mut tokens, mut mask) = (Vec::new(), Vec::new());
        for row in &rows {
            let (pad, one) = (vec![0u32; 17 - row.len()], vec![1u8; row.len()]);
            let zero = vec![0u8; pad.len()];
            let (t, m) = if left {
                ([&pad[..], row].concat(), [zero, one].concat())
            } else {
                ([row, &pad[..]].concat(), [one, zero].concat())
            };
            tokens.extend(t);
            mask.extend(m);
        }
        unpad(&tokens, &mask, 3)
    };
    assert_eq!(padded(true)?, rows);
    assert_eq!(padded(false)?, rows);
    let together = generate(&decoder, &rows, &greedy(&decoder, 20, &[]));
    for (row, together) in rows.iter().zip(&together) {
        let alone = generate(&decoder, std::slice::from_ref(row), &greedy(&decoder, 20, &[]));
        assert_eq!(&alone[0], together);
    }
    Ok(())
}

#[test]
fn a_row_has_the_logits_it_has_alone() -> Result<()> {
    for precision in Precision::ALL {
        let decoder = open("tied_f32", precision);
        let rows: Vec<Vec<u32>> = [PIECE + 9, 3, 70].iter().map(|n| prompt(*n, *n as u32, 64)).collect();
        let run = |rows: &[Vec<u32>]| -> Result<Vec<f32>> {
            let mut cache = cache(&decoder, &rows.iter().map(|row| row.len() + 1).collect::<Vec<_>>())?;
            let prompts: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
            let mut all = decoder.prefill(&mut cache, &prompts, &mut |_| true)?.unwrap();
            let new: Vec<Addition> =
                (0..rows.len()).map(|row| Addition { row, tokens: &[7], logits: true }).collect();
            all.extend(decoder.advance(&mut cache, &new)?);
            Ok(all)
        };
        let together = run(&rows)?;
        // A bf16 stream rounds at 2⁻⁹ of its size, and the last bit of an f32 sum can tip a rounding over.
        let tolerance = if precision == Precision::F32 { 1e-5 } else { 0.2 };
        for (row, tokens) in rows.iter().enumerate() {
            let alone = run(std::slice::from_ref(tokens))?;
            for (step, alone) in alone.chunks_exact(64).enumerate() {
                let own = &together[(step * 3 + row) * 64..][..64];
                close(&format!("{precision} row {row} step {step}"), own, alone, tolerance);
            }
        }
    }
    Ok(())
}

#[test]
fn prompts_and_steps_equal_a_pass_over_the_whole_row() -> Result<()> {
    for precision in Precision::ALL {
        let tolerance = if precision == Precision::F32 { 5e-5 } else { 0.5 };
        for name in ["tied_f32", "untied_f32_linear"] {
            let decoder = open(name, precision);
            // Over several pieces, and over as many rows as run in more than one pass.
            let tokens = prompt(2 * PIECE + 37, 3, 64);
            let want = whole(&decoder, &tokens)?;
            let cuts: Vec<usize> = vec![2 * PIECE + 30, 40, PIECE, 1, PIECE - 1, PIECE + 1, 600, 2 * PIECE];
            let mut cache = cache(&decoder, &vec![tokens.len(); cuts.len()])?;
            let prompts: Vec<&[u32]> = cuts.iter().map(|cut| &tokens[..*cut]).collect();
            let got = decoder.prefill(&mut cache, &prompts, &mut |_| true)?.unwrap();
            for (cut, got) in cuts.iter().zip(got.chunks_exact(64)) {
                close(&format!("{name} {precision} prompt {cut}"), got, &want[cut - 1], tolerance);
            }
            assert_eq!(cache.lengths(), cuts);
            // Then the first row by single tokens, the second by several.
            for step in 0..7 {
                let at = 2 * PIECE + 30 + step;
                let new = [
                    Addition { row: 0, tokens: &tokens[at..at + 1], logits: true },
                    Addition { row: 1, tokens: &tokens[40 + 3 * step..43 + 3 * step], logits: step % 2 == 0 },
                ];
                let got = decoder.advance(&mut cache, &new)?;
                assert_eq!(got.len(), if step % 2 == 0 { 128 } else { 64 });
                close(&format!("{name} {precision} step {step}"), &got[..64], &want[at], tolerance);
                if step % 2 == 0 {
                    let what = format!("{name} {precision} steps of three {step}");
                    close(&what, &got[64..], &want[42 + 3 * step], tolerance);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_scaling_by_length_is_that_of_the_rows_room() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let (c, tokens) = (decoder.config(), prompt(80, 5, 64));
    let rope = c.rope(&RopeScaling::Dynamic { factor: 2.0, original: 32 });
    let want = |length: usize| -> Result<Vec<Vec<f32>>> {
        let mu: Vec<f64> = (0..80).map(f64::from).collect();
        let rope = rope.place(&Entries { mu: &mu, length: Some(length), ..Entries::default() })?;
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        Ok(decoder.logits(&decoder.embed(&tokens, 1)?, &with)?.squeeze(0)?.to_vec2()?)
    };
    // Rows of other lengths beside each other, and the prompt is shorter than what the row comes to.
    let mut cache = KvCache::new(&decoder, rope.clone(), &[80, 200])?;
    let got = decoder.prefill(&mut cache, &[&tokens[..40], &tokens[..70]], &mut |_| true)?.unwrap();
    close("prompt", &got[..64], &want(80)?[39], 2e-5);
    close("longer row", &got[64..], &want(200)?[69], 2e-5);
    let new = [Addition { row: 0, tokens: &tokens[40..80], logits: true }];
    close("step", &decoder.advance(&mut cache, &new)?, &want(80)?[79], 2e-5);
    let apart = want(200)?[79].iter().zip(&want(80)?[79]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(apart > 0.01, "the length matters, got {apart}");
    Ok(())
}

#[test]
fn lora_takes_part() -> Result<()> {
    let dir = folder("tied_f32");
    let (config, weights) = (DecoderConfig::from_dir(&dir)?, Weights::open(&dir)?);
    let mut decoder = Decoder::from_weights(config.clone(), &weights, Precision::F32, &[])?;
    let bare = whole(&decoder, &prompt(20, 4, 64))?;
    let adapter = read_adapter(&fixtures().join("llama/tied_f32_peft"))?;
    adapter.load_into(&config, decoder.params_mut())?;
    decoder.set_lora(Some(adapter.lora()))?;
    let tokens = prompt(20, 4, 64);
    let want = whole(&decoder, &tokens)?;
    let mut cache = cache(&decoder, &[20])?;
    decoder.prefill(&mut cache, &[&tokens[..19]], &mut |_| true)?;
    let got = decoder.advance(&mut cache, &[Addition { row: 0, tokens: &tokens[19..], logits: true }])?;
    close("adapted", &got, &want[19], 2e-5);
    let apart = got.iter().zip(&bare[19]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(apart > 0.1, "the adapter changes the logits, got {apart}");
    Ok(())
}

#[test]
fn memory_is_what_was_planned() -> Result<()> {
    for precision in Precision::ALL {
        let decoder = open("tied_f32", precision);
        let c = decoder.config();
        let (lengths, rooms) = ([700, 30, 200], [710, 40, 210]);
        let mut cache = cache(&decoder, &rooms)?;
        assert_eq!(cache.bytes(), KvCache::planned_bytes(c, precision, 960));
        let prompts = lengths.map(|n| prompt(n, n as u32, 64));
        decoder.prefill(&mut cache, &prompts.each_ref().map(Vec::as_slice), &mut |_| true)?;
        let pass = PassShape { entries: pass_entries(&lengths), precision, lora: None };
        let planned = generation_bytes(c, pass, &rooms);
        let held = cache.bytes() + cache.buffer_bytes();
        assert!(held <= planned && held > planned / 10 * 9, "{precision}: planned {planned}, held {held}");
    }
    Ok(())
}

#[test]
fn lora_is_in_the_memory_planned() -> Result<()> {
    let (lengths, rooms) = ([700, 30, 200], [710, 40, 210]);
    for precision in Precision::ALL {
        let measured = |lora: Option<LoraConfig>| -> Result<(u64, u64)> {
            let mut decoder = open("tied_f32", precision);
            if let Some(lora) = lora {
                decoder.attach_lora(lora, 1)?;
            }
            let c = decoder.config();
            let mut cache = cache(&decoder, &rooms)?;
            let prompts = lengths.map(|n| prompt(n, n as u32, 64));
            decoder.prefill(&mut cache, &prompts.each_ref().map(Vec::as_slice), &mut |_| true)?;
            let pass = PassShape { entries: pass_entries(&lengths), precision, lora: decoder.lora_modules() };
            Ok((generation_bytes(c, pass, &rooms), cache.bytes() + cache.buffer_bytes()))
        };
        let (planned, held) = measured(None)?;
        let (planned_more, held_more) = measured(Some(LoraConfig { r: 16, ..LoraConfig::default() }))?;
        assert!(held_more > held, "{precision}: the low-rank values are held");
        assert_eq!(planned_more - planned, held_more - held, "{precision}");
    }
    Ok(())
}

#[test]
fn lora_on_a_tied_embedding_is_in_the_memory_planned_for_the_ends() -> Result<()> {
    // Of rank 4 on a table of 64 rows of 32 values: 384 values of factors, which the head turns round for itself. Of
    // low-rank values 4 for each entry with logits; walking back, gradients of all these too.
    let decoder = open("tied_f32", Precision::F32);
    let c = decoder.config();
    let lora = LoraConfig { r: 4, target_modules: Names::list(["embed_tokens"]), ..LoraConfig::default() };
    let modules = lora.resolve(c)?;
    let pass = |lora| PassShape { entries: 10, precision: Precision::F32, lora };
    let more = |of: &dyn Fn(PassShape) -> u64| of(pass(Some(&modules))) - of(pass(None));
    assert_eq!(more(&|pass| training_bytes(c, pass, 2, true).total()), 4 * (2 * 384 + 2 * 10 * 4));
    assert_eq!(more(&|pass| evaluation_bytes(c, pass).total()), 4 * (384 + 10 * 4));
    assert_eq!(more(&|pass| generation_bytes(c, pass, &[20, 30, 40])), 4 * (384 + 3 * 4));
    Ok(())
}

#[test]
fn draws_are_seeded_and_a_rows_own() {
    let decoder = open("tied_f32", Precision::F32);
    let nucleus = |seed| Generation {
        sampling: Sampling::Nucleus { temperature: 1.5, top_p: 0.9, seed },
        ..greedy(&decoder, 30, &[])
    };
    let rows = [prompt(5, 1, 64), prompt(9, 2, 64)];
    let got = generate(&decoder, &rows, &nucleus(1));
    assert_eq!(generate(&decoder, &rows, &nucleus(1)), got);
    assert_ne!(generate(&decoder, &rows, &nucleus(2)), got);
    assert_eq!(generate(&decoder, &rows[..1], &nucleus(1))[0], got[0]);
    assert_ne!(generate(&decoder, &[rows[0].clone(), rows[0].clone()], &nucleus(1))[1], got[0]);
}

#[test]
fn a_row_that_ended_leaves_the_others_alone() {
    let decoder = open("tied_f32", Precision::F32);
    let rows = [prompt(5, 1, 64), prompt(9, 2, 64)];
    let free = generate(&decoder, &rows, &greedy(&decoder, 16, &[]));
    assert!(free.iter().all(|row| row.tokens.len() == 16 && row.ended.is_none()));
    let end = free[0].tokens[3];
    let ended = generate(&decoder, &rows, &greedy(&decoder, 16, &[63, end]));
    let cut = |all: &Continuation| match all.tokens.iter().position(|t| [63, end].contains(t)) {
        Some(at) => Continuation { tokens: all.tokens[..at].to_vec(), ended: Some(all.tokens[at]) },
        None => all.clone(),
    };
    assert_eq!(ended, free.iter().map(cut).collect::<Vec<_>>());
    assert!(ended[0].ended.is_some() && ended[0].tokens.len() < 4);
}

#[test]
fn who_is_asked_can_stop_it() {
    let decoder = open("tied_f32", Precision::F32);
    let rows = [prompt(PIECE + 1, 1, 64)];
    for stop_at in 1..=4 {
        let mut passes = Vec::new();
        let got = decoder.generate(&rows, &greedy(&decoder, 5, &[]), &mut |entries| {
            passes.push(entries);
            passes.len() < stop_at
        });
        assert!(got.unwrap().is_none());
        assert_eq!(passes, [PIECE, 1, 1, 1][..stop_at]);
    }
}

fn refused(prompts: &[Vec<u32>], change: impl FnOnce(&mut Generation)) -> String {
    let decoder = open("tied_f32", Precision::F32);
    let mut with = greedy(&decoder, 4, &[]);
    change(&mut with);
    decoder.generate(prompts, &with, &mut |_| true).unwrap_err().to_string()
}

#[test]
fn no_prompts() {
    assert_eq!(refused(&[], |_| ()), "decoder: prompts: expected at least one, got none");
}

#[test]
fn an_empty_prompt() {
    let error = refused(&[vec![1], vec![]], |_| ());
    assert_eq!(error, "decoder: prompts: row 1: expected at least one token, got none");
}

#[test]
fn a_token_the_model_does_not_have() {
    let error = refused(&[vec![1, 64]], |_| ());
    assert_eq!(error, "decoder: tokens: row 0: expected ids below 64, got 64");
}

#[test]
fn no_tokens_to_make() {
    let error = refused(&[vec![1]], |with| with.max_new_tokens = 0);
    assert_eq!(error, "decoder: max_new_tokens: expected at least 1, got 0");
}

#[test]
fn a_temperature_of_zero() {
    let sampling = Sampling::Nucleus { temperature: 0.0, top_p: 1.0, seed: 0 };
    let error = refused(&[vec![1]], |with| with.sampling = sampling);
    assert!(error.contains("temperature: expected a number above 0, got 0"), "{error}");
}

#[test]
fn more_tokens_than_a_row_has_room_for() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let mut cache = cache(&decoder, &[4, 9])?;
    decoder.prefill(&mut cache, &[&[1, 2, 3], &[4]], &mut |_| true)?;
    let new =
        [Addition { row: 1, tokens: &[1], logits: true }, Addition { row: 0, tokens: &[1, 2], logits: true }];
    let error = decoder.advance(&mut cache, &new).unwrap_err().to_string();
    assert_eq!(error, "decoder: tokens: row 0 has room for 1 more entries, got 2");
    assert_eq!(cache.lengths(), [3, 1]);
    Ok(())
}

#[test]
fn a_row_twice_in_a_step() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let mut cache = cache(&decoder, &[4])?;
    let one = Addition { row: 0, tokens: &[1], logits: true };
    let error = decoder.advance(&mut cache, &[one, one]).unwrap_err().to_string();
    assert_eq!(error, "decoder: rows: expected each row once, got row 0 twice");
    Ok(())
}

#[test]
fn a_row_that_there_is_not() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let mut cache = cache(&decoder, &[4])?;
    let new = [Addition { row: 1, tokens: &[1], logits: true }];
    let error = decoder.advance(&mut cache, &new).unwrap_err().to_string();
    assert_eq!(error, "decoder: rows: expected a row below 1, got 1");
    Ok(())
}

#[test]
fn prompts_over_a_cache_in_use() -> Result<()> {
    let decoder = open("tied_f32", Precision::F32);
    let mut cache = cache(&decoder, &[4])?;
    decoder.prefill(&mut cache, &[&[1]], &mut |_| true)?;
    let error = decoder.prefill(&mut cache, &[&[1]], &mut |_| true).unwrap_err().to_string();
    assert_eq!(error, "decoder: prompts: expected an empty cache, but row 0 has entries");
    Ok(())
}

#[test]
fn caches_without_rows_or_room() {
    let decoder = open("tied_f32", Precision::F32);
    let error = |rooms: &[usize]| cache(&decoder, rooms).err().unwrap().to_string();
    assert_eq!(error(&[]), "decoder: cache: expected at least one row, got none");
    assert_eq!(error(&[3, 0]), "decoder: cache: row 1: expected room for at least 1 entry, got 0");
}

#[test]
fn a_mask_with_a_hole() {
    let error = unpad(&[1, 2, 3, 4], &[1, 0, 1, 0], 1).unwrap_err().to_string();
    assert!(
        error.contains("row 0: expected padding to the left or to the right, got a hole at 1"),
        "{error}"
    );
}

#[test]
fn a_row_of_padding_alone() {
    let error = unpad(&[1, 2, 3, 4], &[1, 1, 0, 0], 2).unwrap_err().to_string();
    assert!(error.contains("row 1: expected at least one token, got padding alone"), "{error}");
}

#[test]
fn a_batch_of_no_rows() {
    for (tokens, mask, batch) in [(3, 3, 0), (3, 3, 2), (4, 3, 2), (0, 0, 1)] {
        let error = unpad(&vec![1; tokens], &vec![1; mask], batch).unwrap_err().to_string();
        assert!(error.contains("expected tokens and a mask of one size"), "{error}");
    }
}

#[test]
fn the_scaling_that_is_asked_for() {
    let decoder = open("tied_f32", Precision::F32);
    let rows = [prompt(30, 8, 64)];
    let scaling = RopeScaling::from_factor(4.0).unwrap();
    let plain = generate(&decoder, &rows, &greedy(&decoder, 20, &[]));
    let scaled = generate(&decoder, &rows, &Generation { scaling: &scaling, ..greedy(&decoder, 20, &[]) });
    assert_ne!(plain, scaled);
}
