//! LoRA and its relatives, on linear layers, embedding and head; positions with uncertainty.

use anyhow::{Result, ensure};
use megacontext_base::lora::{LoraConfig, LoraInit, Names, TokenIndices};
use megacontext_base::params::Group;
use megacontext_base::rope::{Entries, SIGMA};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;

use crate::support::{Case, attach, close_gradients, device, distance, open};

/// On every linear layer of the blocks.
pub fn lora(dropout: f64) -> LoraConfig {
    LoraConfig { r: 4, dropout, target_modules: Names::Pattern("all-linear".into()), ..LoraConfig::default() }
}

fn kinds() -> Vec<(&'static str, LoraConfig)> {
    let list = |names: &[&str]| Names::List(names.iter().map(ToString::to_string).collect());
    let ends = |names: &[&str]| LoraConfig { target_modules: list(names), ..lora(0.0) };
    vec![
        ("LoRA", lora(0.0)),
        ("dropout", lora(0.3)),
        ("DoRA", LoraConfig { use_dora: true, ..lora(0.0) }),
        ("PiSSA", LoraConfig { init: LoraInit::Pissa, ..lora(0.2) }),
        ("embedding", ends(&["q_proj", "embed_tokens"])),
        (
            "rows",
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Embedding(vec![3, 11, 40])),
                ..lora(0.0)
            },
        ),
    ]
}

#[test]
fn every_kind_of_adapter_is_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in ["llama/tied_f32", "llama/untied_f32_linear"] {
        for (kind, config) in kinds() {
            let what = format!("{folder}, {kind}");
            let mut decoder = open(folder, Precision::F32, &[])?;
            attach(&mut decoder, config)?;
            decoder.params_mut().set_learning([Group::Lora, Group::Norms])?;
            let mut case = Case::new(&decoder, 21, Pattern::ShiftedSparse { group: 8 })?;
            case.dropout_seed = Some(11);
            let (expected, gradients) = case.gradients(&decoder)?;
            ensure!(
                gradients.names().any(|name| name.contains("lora_A") || name.contains("delta")),
                "{what}"
            );
            decoder.set_device(&lease.device)?;
            let (got, on_device) = case.gradients(&decoder)?;
            ensure!((got.sum - expected.sum).abs() <= 1e-5 * expected.sum, "{what}: {got:?}, {expected:?}");
            close_gradients(&what, &on_device, &gradients, 2e-4)?;
        }
    }
    Ok(())
}

#[test]
fn lora_on_an_untied_head_is_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut decoder = open("llama/untied_f32_linear", Precision::F32, &[])?;
    let names = ["q_proj", "lm_head"].map(String::from).to_vec();
    attach(&mut decoder, LoraConfig { target_modules: Names::List(names), ..lora(0.0) })?;
    decoder.params_mut().set_learning([Group::Lora, Group::Embeddings])?;
    let case = Case::new(&decoder, 21, Pattern::Dense)?;
    let (_, gradients) = case.gradients(&decoder)?;
    decoder.set_device(&lease.device)?;
    close_gradients("lm_head", &case.gradients(&decoder)?.1, &gradients, 2e-4)
}

#[test]
fn rounded_classes_keep_lora_near_f32() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let made = |precision| -> Result<_> {
        let mut decoder = open("llama/tied_f32", precision, &[])?;
        attach(&mut decoder, lora(0.0))?;
        decoder.params_mut().set_learning([Group::Lora, Group::Embeddings, Group::Norms])?;
        Ok(decoder)
    };
    let exact = made(Precision::F32)?;
    let case = Case::new(&exact, 21, Pattern::ShiftedSparse { group: 8 })?;
    let (_, gradients) = case.gradients(&exact)?;
    for precision in [Precision::Mixed, Precision::Bf16] {
        let mut decoder = made(precision)?;
        let (_, on_host) = case.gradients(&decoder)?;
        decoder.set_device(&lease.device)?;
        let (_, on_device) = case.gradients(&decoder)?;
        for name in gradients.names() {
            let exact = gradients.get(name).unwrap();
            let [host, here] = [&on_host, &on_device].map(|of| distance(of.get(name).unwrap(), exact));
            ensure!(here <= 2.0 * host + 0.01, "{precision} {name}: {here} from f32, the processor {host}");
        }
    }
    Ok(())
}

#[test]
fn the_gradient_of_sigma_is_the_processors() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for folder in ["llama/tied_f32", "families/gemma3_bf16", "families/nanochat_bf16"] {
        let mut decoder = open(folder, Precision::F32, &[])?;
        decoder.attach_sigma(3)?;
        decoder.params_mut().set_learning([Group::Sigma])?;
        let mut case = Case::new(&decoder, 20, Pattern::Dense)?;
        let lod: Vec<u32> = (0..20).map(|i| [0, 0, 1, 2, 0][i % 5]).collect();
        let c = decoder.config();
        let (mu, sigma) = c.positions.sigma.tile(&lod);
        let scales = decoder.sigma_scales();
        let entries = Entries {
            mu: &mu,
            sigma: Some(&sigma),
            lod: Some(&lod),
            scales: scales.as_deref(),
            length: Some(64),
        };
        case.rope = c.rope(&c.rope_scaling).place(&entries)?;
        case.batch = 1;
        case.tokens.truncate(20);
        case.targets.truncate(20);
        let (_, gradients) = case.gradients(&decoder)?;
        ensure!(
            gradients.get(SIGMA).is_some_and(|g| g.iter().any(|g| g.abs() > 1e-6)),
            "{folder}: no gradient"
        );
        decoder.set_device(&lease.device)?;
        close_gradients(folder, &case.gradients(&decoder)?.1, &gradients, 1e-3)?;
    }
    Ok(())
}
