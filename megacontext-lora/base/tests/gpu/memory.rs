//! What a pass takes of the device's memory against what was said before.

use anyhow::{Result, ensure};
use megacontext_base::buffers::{Buffers, PassShape, gpu};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::gradients::Gradients;
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;

use crate::adapters::lora;
use crate::support::{Case, attach, device, open, without_blas};

/// Wide enough for what is counted to be more than what is not.
pub fn model(folder: &str, precision: Precision, learning: &[Group]) -> Result<Decoder> {
    let small = open(folder, Precision::F32, &[])?;
    let config = DecoderConfig { vocab_size: 600, ..small.config().clone() };
    Ok(Decoder::random(config, 1, precision, learning)?)
}

#[test]
fn a_step_takes_what_was_said() -> Result<()> {
    const LENGTH: usize = 48;
    let Some(lease) = device()? else { return Ok(()) };
    let Some(memory) = lease.memory() else {
        println!("skipped: a GPU counts in larger pieces than these models have");
        return Ok(());
    };
    let adapted = [Group::Lora, Group::Embeddings, Group::Norms];
    let whole = [Group::Base, Group::Embeddings, Group::Norms];
    let cases: [(&str, &[Group], Option<LoraConfig>); 4] = [
        ("llama/tied_f32", &adapted, Some(lora(0.0))),
        ("llama/untied_f32_linear", &whole, None),
        ("llama/tied_f32", &adapted, Some(LoraConfig { use_dora: true, ..lora(0.0) })),
        ("families/gpt_neox_f32", &whole, None),
    ];
    for (folder, learning, adapter) in cases {
        for precision in Precision::ALL {
            for recompute in [true, false] {
                let what = format!("{folder}, {learning:?}, {precision}, recomputed {recompute}");
                let mut decoder = model(folder, precision, learning)?;
                if let Some(adapter) = &adapter {
                    attach(&mut decoder, adapter.clone())?;
                }
                decoder.params_mut().set_learning(learning.iter().copied())?;
                let case = Case { recompute, ..Case::new(&decoder, LENGTH, Pattern::Dense)? };
                let before = memory.now()?;
                decoder.set_device(&lease.device)?;
                let mut gradients = Gradients::new();
                lease.device.forget_peak()?;
                for _ in 0..2 {
                    let with = case.forward();
                    decoder.accumulate_gradients(
                        &case.tokens,
                        case.batch,
                        &case.targets,
                        &with,
                        1.0,
                        recompute,
                        &mut gradients,
                    )?;
                }
                let c = decoder.config();
                let walked = c.num_hidden_layers - decoder.lowest_learning_block();
                let pass = PassShape { entries: case.tokens.len(), precision, lora: decoder.lora_modules() };
                let said = gpu::training_bytes(c, pass, walked, recompute, learning);
                lease.took(&what, before, without_blas(said))?;
            }
        }
    }
    Ok(())
}

#[test]
fn an_evaluation_takes_what_was_said() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let Some(memory) = lease.memory() else { return Ok(()) };
    for precision in Precision::ALL {
        let mut decoder = model("llama/tied_f32", precision, &[])?;
        let case = Case::new(&decoder, 48, Pattern::Dense)?;
        let before = memory.now()?;
        decoder.set_device(&lease.device)?;
        let mut buffers = Buffers::default();
        lease.device.forget_peak()?;
        for _ in 0..2 {
            decoder.score(&case.tokens, case.batch, &case.targets, &case.forward(), &mut buffers)?;
        }
        let pass = PassShape { entries: case.tokens.len(), precision, lora: None };
        let said = gpu::evaluation_bytes(decoder.config(), pass);
        lease.took(&precision.to_string(), before, without_blas(said))?;
        // On a thread that never ran a pass: hosts let go of sessions wherever they like.
        std::thread::spawn(move || drop((buffers, decoder))).join().unwrap();
        ensure!(memory.now()? == before, "{precision}: memory of a model that is gone is still there");
    }
    Ok(())
}
