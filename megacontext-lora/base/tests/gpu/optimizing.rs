//! Steps of the optimiser where gradients have stayed: what is learned, whose values are the newest, moments from one device to the
//! other.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use megacontext_base::decoder::Decoder;
use megacontext_base::device::Device;
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::lora::{LoraConfig, Names};
use megacontext_base::params::Group;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;

use crate::adapters::lora;
use crate::models::FOLDERS;
use crate::support::{Case, attach, close, device, distance, open, without_blas};

/// With an epsilon beside which the sign of a gradient that is nearly 0 counts for little.
fn adamw() -> AdamWConfig {
    AdamWConfig { eps: 1e-3, weight_decay: 0.01, clip: 0.5, ..AdamWConfig::default() }
}

const ADAPTED: [Group; 3] = [Group::Lora, Group::Embeddings, Group::Norms];

/// A model with an adapter, in training.
fn adapted(folder: &str, precision: Precision, lora: LoraConfig) -> Result<Decoder> {
    let mut decoder = open(folder, precision, &[])?;
    attach(&mut decoder, lora)?;
    decoder.params_mut().set_learning(ADAPTED)?;
    Ok(decoder)
}

/// Some steps of two micro-batches each; the gradient norms.
fn train(decoder: &Decoder, optimizer: &mut Optimizer, steps: usize) -> Result<Vec<f32>> {
    let [one, mut other] = [Pattern::Dense, Pattern::ShiftedSparse { group: 8 }]
        .map(|pattern| Case::new(decoder, 17, pattern).unwrap());
    other.tokens.reverse();
    let mut gradients = Gradients::staying();
    let mut norms = Vec::new();
    for _ in 0..steps {
        gradients.clear();
        one.accumulate(decoder, &mut gradients)?;
        other.accumulate(decoder, &mut gradients)?;
        norms.push(optimizer.step(decoder.params(), &gradients, 1e-2)? as f32);
    }
    Ok(norms)
}

/// What has been learned, by name.
fn learned(decoder: &Decoder) -> Result<BTreeMap<String, Vec<f32>>> {
    let named = decoder.params().trainable()?.into_iter();
    named.map(|(name, leaf)| Ok((name, leaf.flatten_all()?.to_vec1()?))).collect()
}

fn close_learned(what: &str, got: &Decoder, expected: &Decoder, bound: f32) -> Result<()> {
    let (got, expected) = (learned(got)?, learned(expected)?);
    ensure!(!expected.is_empty() && got.keys().eq(expected.keys()), "{what}: {:?}", got.keys());
    for (name, expected) in &expected {
        close(&format!("{what}: {name}"), &got[name], expected, bound)?;
    }
    Ok(())
}

#[test]
fn what_is_learned_is_the_processors_in_every_family() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in FOLDERS {
        let (host, mut here) =
            (adapted(folder, Precision::F32, lora(0.0))?, adapted(folder, Precision::F32, lora(0.0))?);
        here.set_device(&lease.device)?;
        let (mut on_host, mut on_device) = (Optimizer::new(adamw()), Optimizer::new(adamw()));
        let (expected, got) = (train(&host, &mut on_host, 3)?, train(&here, &mut on_device, 3)?);
        close(&format!("{folder}: gradient norms"), &got, &expected, 1e-3)?;
        close_learned(folder, &here, &host, 1e-3)?;
        let (expected, got) = (on_host.moments()?, on_device.moments()?);
        ensure!(got.len() == expected.len());
        for ((name, got), (of, expected)) in got.iter().zip(&expected) {
            ensure!(name == of, "{folder}: {name}, {of}");
            close(&format!("{folder}: {name}"), got, expected, 5e-3)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_learned_is_the_processors_with_every_adapter() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let list = |names: &[&str]| Names::List(names.iter().map(ToString::to_string).collect());
    // Of an adapted end the host makes the gradients, of the rest of the table it stands on the device: both are one step.
    let ends = LoraConfig { target_modules: list(&["q_proj", "embed_tokens"]), ..lora(0.0) };
    for (what, adapter) in
        [("DoRA", LoraConfig { use_dora: true, ..lora(0.0) }), ("dropout", lora(0.2)), ("ends", ends)]
    {
        for folder in ["llama/tied_f32", "llama/untied_f32_linear"] {
            let what = format!("{folder}, {what}");
            let host = adapted(folder, Precision::F32, adapter.clone())?;
            let mut here = adapted(folder, Precision::F32, adapter.clone())?;
            here.set_device(&lease.device)?;
            let expected = train(&host, &mut Optimizer::new(adamw()), 3)?;
            let got = train(&here, &mut Optimizer::new(adamw()), 3)?;
            close(&format!("{what}: gradient norms"), &got, &expected, 1e-3)?;
            close_learned(&what, &here, &host, 1e-3)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_learned_in_rounded_classes_is_as_near_to_f32_as_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let run = |precision: Precision, device: &Device| -> Result<Vec<f32>> {
        let mut decoder = adapted("llama/tied_f32", precision, lora(0.0))?;
        let before = learned(&decoder)?;
        decoder.set_device(device)?;
        train(&decoder, &mut Optimizer::new(adamw()), 4)?;
        let after = learned(&decoder)?;
        Ok(after.iter().flat_map(|(name, now)| now.iter().zip(&before[name]).map(|(a, b)| a - b)).collect())
    };
    let exact = run(Precision::F32, &Device::Cpu)?;
    for precision in [Precision::Mixed, Precision::Bf16] {
        let [host, here] = [&Device::Cpu, &lease.device].map(|device| run(precision, device));
        let (host, here) = (distance(&host?, &exact), distance(&here?, &exact));
        ensure!(here <= 2.0 * host + 0.02, "{precision}: {here} from f32, the processor {host}");
    }
    Ok(())
}

#[test]
fn training_goes_from_one_device_to_the_other_and_back() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for precision in [Precision::F32, Precision::Bf16] {
        let whole = adapted("llama/tied_f32", precision, lora(0.0))?;
        train(&whole, &mut Optimizer::new(adamw()), 6)?;
        let mut moving = adapted("llama/tied_f32", precision, lora(0.0))?;
        let mut optimizer = Optimizer::new(adamw());
        let bound = if precision == Precision::F32 { 1e-3 } else { 6e-2 };
        for to in [&lease.device, &Device::Cpu, &lease.device] {
            moving.set_device(to)?;
            train(&moving, &mut optimizer, 1)?;
            // By a file, as a run that is taken up does; the values lie here then.
            let moments = optimizer.moments()?.into_iter().map(|(name, values)| (name, values.into_owned()));
            let moments: Vec<_> = moments.collect();
            let mut read = Optimizer::new(adamw());
            read.import(moving.params(), moments)?;
            optimizer = read;
            train(&moving, &mut optimizer, 1)?;
        }
        close_learned(&format!("{precision}"), &moving, &whole, bound)?;
    }
    Ok(())
}

#[test]
fn whoever_asks_gets_the_newest_values() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let name = "model.embed_tokens.weight";
    let mut decoder = adapted("llama/tied_f32", Precision::Bf16, lora(0.0))?;
    decoder.set_device(&lease.device)?;
    let first = decoder.params().values(name)?.to_f32();
    let hash = decoder.params().group_hash(Group::Embeddings)?;
    let mut optimizer = Optimizer::new(adamw());
    train(&decoder, &mut optimizer, 1)?;
    let second = decoder.params().values(name)?.to_f32();
    ensure!(second != first, "nothing was learned");
    ensure!(decoder.params().group_hash(Group::Embeddings)? != hash);
    train(&decoder, &mut optimizer, 1)?;
    let third: Vec<f32> = decoder.params().get(name).context("a table")?.flatten_all()?.to_vec1()?;
    ensure!(third != second);
    // What is written here is what passes read there.
    let value = decoder.params().get(name).context("a table")?.zeros_like()?;
    train(&decoder, &mut optimizer, 1)?;
    decoder.params_mut().set(name, &value)?;
    ensure!(decoder.params().values(name)?.to_f32().iter().all(|value| *value == 0.0));
    let case = Case::new(&decoder, 9, Pattern::Dense)?;
    let hidden = decoder.embed(&case.tokens[..3], 1)?.flatten_all()?.to_vec1::<f32>()?;
    ensure!(hidden.iter().all(|value| *value == 0.0));
    // A clip that is not finite changes nothing.
    let bad = decoder.params().get("model.norm.weight").context("a norm")?;
    decoder.params_mut().set("model.norm.weight", &(bad * f64::NAN)?)?;
    let before = learned(&decoder)?;
    ensure!(train(&decoder, &mut optimizer, 1).is_err(), "a loss that is no number was learned from");
    let after = learned(&decoder)?;
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    ensure!(after.iter().all(|(name, now)| same(now, &before[name])));
    Ok(())
}

#[test]
fn a_gradient_in_two_places_is_refused_before_anything_is_changed() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = adapted("llama/tied_f32", Precision::F32, lora(0.0))?;
    decoder.set_device(&lease.device)?;
    let mut gradients = Gradients::staying();
    Case::new(&decoder, 9, Pattern::Dense)?.accumulate(&decoder, &mut gradients)?;
    let before = learned(&decoder)?;
    gradients.buffer("model.norm.weight", decoder.config().hidden_size)[3] = 0.5;
    let mut optimizer = Optimizer::new(adamw());
    let refused = optimizer.step(decoder.params(), &gradients, 1e-2).unwrap_err().to_string();
    ensure!(refused.contains("expected a gradient in one place, got parts here and on a GPU"), "{refused}");
    ensure!(learned(&decoder)? == before && optimizer.moments()?.is_empty());
    Ok(())
}

#[test]
fn a_step_of_the_optimizer_takes_what_was_said() -> Result<()> {
    use megacontext_base::buffers::{PassShape, gpu};

    let Some(lease) = device()? else { return Ok(()) };
    let Some(memory) = lease.memory() else { return Ok(()) };
    for precision in Precision::ALL {
        let mut decoder = crate::memory::model("llama/tied_f32", precision, &ADAPTED)?;
        attach(&mut decoder, lora(0.0))?;
        decoder.params_mut().set_learning(ADAPTED)?;
        let before = memory.now()?;
        decoder.set_device(&lease.device)?;
        lease.device.forget_peak()?;
        let mut optimizer = Optimizer::new(adamw());
        train(&decoder, &mut optimizer, 2)?;
        let (c, lora) = (decoder.config(), decoder.lora_modules());
        let walked = c.num_hidden_layers - decoder.lowest_learning_block();
        let pass = PassShape { entries: 34, precision, lora };
        let step = gpu::training_bytes(c, pass, walked, true, &ADAPTED);
        let said = step.with_optimizer(gpu::optimizer_bytes(c, precision, &ADAPTED, lora, true));
        lease.took(&precision.to_string(), before, without_blas(said))?;
        drop((decoder, optimizer));
        ensure!(memory.now()? == before, "memory of a model that is gone is still there");
    }
    Ok(())
}
