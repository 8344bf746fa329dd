//! Rows that continue a document, and steps over entries of mixed levels.

use anyhow::{Context, Result, ensure};
use candle_core::{Device as Host, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::{Continuation, ContinuationLoss, Decoder, EntryStep, Objective};
use megacontext_base::device::Device;
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;
use megacontext_base::random::Random;
use megacontext_base::rope::Entries;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;

use crate::models::FOLDERS;
use crate::support::{Case, close, close_gradients, device, distance, open};

const T: usize = 30;
const R: usize = 9;

/// Losses and gradients of three rows of a document that ran on this device.
fn continued(decoder: &Decoder, pattern: Pattern, kl: bool) -> Result<(Vec<f32>, ContinuationLoss)> {
    let c = decoder.config();
    let vocab = c.vocab_size as u32;
    let tokens: Vec<u32> = (0..T as u32).map(|i| (i * 37 + i * i * 5 + 11) % vocab).collect();
    let mut buffers = Buffers::default();
    let rope = c.rope(&c.rope_scaling).sequence(T)?;
    let document = decoder.run_document(&tokens, pattern, &rope, kl, &mut buffers)?;
    ensure!((document.device_bytes() > 0) != decoder.device().is_cpu(), "the document lies elsewhere");

    let prefix = [4usize, 11, 17];
    let lengths = [R, R - 2, R];
    let mut random = Random::named(3, "rows");
    let x: Vec<f32> = (0..3 * R * c.hidden_size).map(|_| random.normal() as f32 * 0.3).collect();
    let x_nre = Tensor::from_vec(x, (3, R, c.hidden_size), &Host::Cpu)?;
    let mu: Vec<f64> = prefix.iter().flat_map(|p| (0..R).map(move |i| (p + i) as f64)).collect();
    let entries = Entries { mu: &mu, length: Some(T), ..Entries::default() };
    let rope = c.rope(&c.rope_scaling).place(&entries)?;
    let scored = |row: usize, i: usize| i >= 3 && i < lengths[row];
    let at = |i: usize| (i / R, i % R);
    let targets: Vec<u32> = (0..3 * R)
        .map(at)
        .map(|(row, i)| if scored(row, i) { tokens[prefix[row] + i + 1] } else { IGNORE })
        .collect();
    let teacher: Vec<usize> = (0..3 * R).map(|i| prefix[i / R] + i % R).collect();
    let weights: Vec<f32> = (0..3 * R).map(|i| 0.5 + 0.1 * (i % 4) as f32).collect();
    let rows = Continuation {
        prefix: &prefix,
        lengths: Some(&lengths),
        x_nre: &x_nre,
        rope: &rope,
        targets: &targets,
        teacher: kl.then_some(&teacher),
    };
    let objective = Objective { nll: 0.5, kl: if kl { 0.7 } else { 0.0 }, weights: Some(&weights) };
    let made = decoder.continue_document(&document, &rows, Some(objective), true, &mut buffers)?;
    let plain = decoder.continue_document(&document, &rows, None, true, &mut buffers)?;
    ensure!(made.nll == plain.nll && made.kl == plain.kl, "with and without gradients");
    Ok((document.nll().to_vec(), made))
}

fn flat(tensor: Option<&Tensor>) -> Result<Vec<f32>> {
    Ok(tensor.context("a gradient")?.flatten_all()?.to_vec1()?)
}

#[test]
fn rows_of_documents_are_the_processors_in_every_family() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in FOLDERS {
        let mut decoder = open(folder, Precision::F32, &[])?;
        let (nll, expected) = continued(&decoder, Pattern::Dense, true)?;
        decoder.set_device(&lease.device)?;
        let (document, got) = continued(&decoder, Pattern::Dense, true)?;
        close(&format!("{folder}: the document"), &document, &nll, 1e-4)?;
        close(&format!("{folder}: NLL"), &got.nll, &expected.nll, 1e-4)?;
        let [kl, expected_kl] = [&got, &expected].map(|loss| loss.kl.clone().unwrap_or_default());
        close(&format!("{folder}: KL"), &kl, &expected_kl, 1e-3)?;
        let (d, expected) = (flat(got.d_nre.as_ref())?, flat(expected.d_nre.as_ref())?);
        close(&format!("{folder}: gradient"), &d, &expected, 2e-4)?;
    }
    Ok(())
}

#[test]
fn rows_of_documents_are_the_processors_in_rounded_classes() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let exact = continued(&open("llama/tied_f32", Precision::F32, &[])?, Pattern::Dense, false)?.1;
    for precision in [Precision::Mixed, Precision::Bf16] {
        let mut decoder = open("llama/tied_f32", precision, &[])?;
        let host = continued(&decoder, Pattern::Dense, false)?.1;
        decoder.set_device(&lease.device)?;
        let here = continued(&decoder, Pattern::Dense, false)?.1;
        close(&format!("{precision}: NLL"), &here.nll, &exact.nll, 2e-2)?;
        let [exact, host, here] = [&exact, &host, &here].map(|loss| flat(loss.d_nre.as_ref()));
        let (exact, host, here) = (exact?, host?, here?);
        let (host, here) = (distance(&host, &exact), distance(&here, &exact));
        ensure!(here <= 2.0 * host + 0.01, "{precision}: {here} from f32, the processor {host}");
    }
    Ok(())
}

#[test]
fn a_document_of_another_device_is_refused() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/tied_f32", Precision::F32, &[])?;
    let c = decoder.config().clone();
    let (rope, mut buffers) = (c.rope(&c.rope_scaling).sequence(T)?, Buffers::default());
    let tokens = vec![1u32; T];
    let document = decoder.run_document(&tokens, Pattern::Dense, &rope, false, &mut buffers)?;
    decoder.set_device(&lease.device)?;
    let x_nre = Tensor::zeros((1, 2, c.hidden_size), candle_core::DType::F32, &Host::Cpu)?;
    let rope = c.rope(&c.rope_scaling).sequence(2)?;
    let rows = Continuation {
        prefix: &[3],
        lengths: None,
        x_nre: &x_nre,
        rope: &rope,
        targets: &[1, 2],
        teacher: None,
    };
    let refused =
        decoder.continue_document(&document, &rows, None, true, &mut buffers).unwrap_err().to_string();
    ensure!(refused.contains("in the model's class and on its device"), "{refused}");
    Ok(())
}

#[test]
fn steps_over_entries_are_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for (kl, learning) in [(0.0, vec![Group::Embeddings, Group::Norms]), (0.4, vec![Group::Base])] {
        let mut decoder = open("llama/untied_f32_linear", Precision::F32, &learning)?;
        let mut case = Case::new(&decoder, 18, Pattern::Dense)?;
        case.tokens.truncate(18);
        case.targets.truncate(18);
        // Every fourth entry is a gist.
        let mut x: Vec<f32> = decoder.embed(&case.tokens, 1)?.flatten_all()?.to_vec1()?;
        let width = decoder.config().hidden_size;
        for at in (0..18).step_by(4) {
            case.tokens[at] = IGNORE;
            x[at * width..][..width].iter_mut().for_each(|x| *x += 0.2);
        }
        let scored = case.targets.iter().filter(|target| **target != IGNORE).count();
        let mut random = Random::named(9, "teacher");
        let teacher: Vec<f32> = (0..scored * width).map(|_| random.normal() as f32).collect();
        let step = EntryStep {
            x_te: &x,
            tokens: &case.tokens,
            targets: &case.targets,
            nll: 0.3,
            kl,
            teacher: Some(&teacher),
        };
        if kl != 0.0 {
            // The head is the teacher's too, so it is frozen.
            decoder.params_mut().set_learning([Group::Norms])?;
        }
        let run = |decoder: &Decoder| -> Result<_> {
            let mut gradients = Gradients::new();
            let loss = decoder.accumulate_entries(&step, &case.forward(), true, &mut gradients)?;
            Ok((loss, gradients))
        };
        let (expected, gradients) = run(&decoder)?;
        decoder.set_device(&lease.device)?;
        let (got, on_device) = run(&decoder)?;
        ensure!((got.nll - expected.nll).abs() <= 1e-5 * expected.nll, "{got:?}, {expected:?}");
        let [got, expected] = [got, expected].map(|loss| loss.kl.unwrap_or(f64::NAN));
        ensure!((got - expected).abs() <= 1e-4 * expected, "KL {got}, {expected}");
        close_gradients("entries", &on_device, &gradients, 2e-4)?;
        decoder.set_device(&Device::Cpu)?;
    }
    Ok(())
}
