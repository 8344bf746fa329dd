//! The decoder against transformers' own numbers, and the rules of parameter groups.
//!
//! The fixtures are small random Llama folders; where they come from stands in integration-tests/fixtures/README.md.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeTables;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows, attention};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Lora, Weight, linear};
use megacontext_kernels::loss::{Gradient, IGNORE, head_cross_entropy};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::rope::rope;
use megacontext_kernels::{mlp, norm, vjp};

const FOLDERS: [&str; 4] =
    ["tied_f32", "untied_bf16_sharded", "tied_f16_linear_old_keys", "untied_f32_linear"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

fn open(name: &str) -> Result<Decoder> {
    let dir = folder(name);
    Ok(Decoder::from_weights(DecoderConfig::from_dir(&dir)?, &Weights::open(&dir)?, Precision::F32, &[])?)
}

struct Case {
    tokens: Vec<u32>,
    batch: usize,
    rope: RopeTables,
    rows: Rows,
}

fn case(decoder: &Decoder, name: &str) -> Result<(Case, HashMap<String, Tensor>)> {
    let expected = candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu)?;
    let tokens = expected.get("tokens").context("tokens")?;
    let (batch, length) = tokens.dims2()?;
    let flat: Vec<i64> = tokens.flatten_all()?.to_vec1()?;
    let c = decoder.config();
    let rope = c.rope(&c.rope_scaling).sequence(length)?;
    let tokens = flat.iter().map(|t| *t as u32).collect();
    Ok((Case { tokens, batch, rope, rows: Rows::default() }, expected))
}

impl Case {
    fn forward(&self, pattern: Pattern) -> Forward<'_> {
        Forward { pattern, rope: &self.rope, rows: &self.rows, dropout_seed: None }
    }

    /// Next tokens within each row; nothing is scored at a row's end.
    fn targets(&self) -> Vec<u32> {
        let length = self.tokens.len() / self.batch;
        (0..self.tokens.len())
            .map(|i| if (i + 1) % length == 0 { IGNORE } else { self.tokens[i + 1] })
            .collect()
    }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

#[test]
fn logits_and_gradients_equal_transformers() -> Result<()> {
    for name in FOLDERS {
        let mut decoder = open(name)?;
        let (case, expected) = case(&decoder, name)?;
        let x = decoder.embed(&case.tokens, case.batch)?;
        let logits = decoder.logits(&x, &case.forward(Pattern::Dense))?;
        let difference = largest_difference(&logits, &expected["logits"].to_dtype(DType::F32)?)?;
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");

        decoder.params_mut().set_learning([Group::Base, Group::Embeddings, Group::Norms])?;
        let targets = case.targets();
        let count = targets.iter().filter(|t| **t != IGNORE).count();
        let mut gradients = Gradients::new();
        let forward = case.forward(Pattern::Dense);
        let scale = 1.0 / count as f64;
        decoder.accumulate_gradients(
            &case.tokens,
            case.batch,
            &targets,
            &forward,
            scale,
            false,
            &mut gradients,
        )?;
        let mut checked = 0;
        for (key, want) in expected.iter().filter(|(k, _)| k.starts_with("grad.")) {
            let got = gradients.get(&key["grad.".len()..]).with_context(|| format!("{name}: no {key}"))?;
            let got = Tensor::from_slice(got, want.shape(), &Device::Cpu)?;
            let size = want.abs()?.max_all()?.to_scalar::<f32>()?;
            let difference = largest_difference(&got, want)? / size;
            assert!(difference < 1e-3, "{name}: {key} differs by {difference} of its largest value");
            checked += 1;
        }
        assert!(checked > 2, "{name}: only {checked} gradients in the fixture");
    }
    Ok(())
}

/// A decoder with LoRA whose B is not zero, so that every path carries signal.
fn adapted(name: &str, dropout: f64) -> Result<Decoder> {
    let mut decoder = open(name)?;
    let lora = LoraConfig { r: 2, dropout, ..LoraConfig::default() };
    decoder.attach_lora(lora, 5)?;
    let names: Vec<String> =
        decoder.params().names().filter(|n| n.contains("lora_B")).map(String::from).collect();
    for (i, name) in names.iter().enumerate() {
        let shape = decoder.params().get(name).context("B")?.shape().clone();
        let values: Vec<f32> = (0..shape.elem_count()).map(|j| ((i + j) % 5) as f32 * 0.02 - 0.04).collect();
        decoder.params_mut().set(name, &Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    decoder.params_mut().set_learning([Group::Lora, Group::Embeddings, Group::Norms])?;
    Ok(decoder)
}

fn gradients_of(
    decoder: &Decoder,
    case: &Case,
    recompute: bool,
    dropout_seed: Option<u64>,
) -> Result<Gradients> {
    let mut gradients = Gradients::new();
    let forward = Forward { dropout_seed, ..case.forward(Pattern::ShiftedSparse { group: 4 }) };
    decoder.accumulate_gradients(
        &case.tokens,
        case.batch,
        &case.targets(),
        &forward,
        0.1,
        recompute,
        &mut gradients,
    )?;
    Ok(gradients)
}

/// The loss of [`Case::targets`] as one candle graph of single operations, and its gradients: the same model written a
/// second time, for comparison.
fn taped(decoder: &Decoder, case: &Case, pattern: Pattern) -> Result<BTreeMap<String, Vec<f32>>> {
    let c = decoder.config();
    let params = decoder.params();
    let leaves: HashMap<String, Tensor> = params.trainable().unwrap().into_iter().collect();
    let read = |name: &str| leaves.get(name).cloned().or_else(|| params.get(name)).context("parameter");
    let (b, t) = (case.batch, case.tokens.len() / case.batch);
    let scale = 1.0 / (c.head_dim as f64).sqrt();
    let mut x = decoder.embed(&case.tokens, b)?;
    for layer in 0..c.num_hidden_layers {
        let path = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        let plain =
            |x: &Tensor, module: &str| -> Result<Tensor> { Ok(linear(x, &read(&path(module))?, None)?) };
        let project = |x: &Tensor, target: &str| -> Result<Tensor> {
            let module = format!("self_attn.{target}");
            let name = format!("model.layers.{layer}.{module}");
            let Some(lora) = decoder.lora_modules().and_then(|lora| lora.get(&name)) else {
                return plain(x, &module);
            };
            let a_ri = read(&path(&format!("{module}.lora_A")))?;
            let b_or = read(&path(&format!("{module}.lora_B")))?;
            let w = read(&path(&module))?;
            let lora = Lora { a_ri: &a_ri, b_or: &b_or, scale: lora.scale, dropout: None };
            Ok(linear(x, &w, Some(lora))?)
        };
        let n = norm::rms_norm(&x, &read(&path("input_layernorm"))?, c.rms_norm_eps)?;
        let heads = |x: Tensor, h: usize| x.reshape((b, t, h, c.head_dim));
        let q = heads(project(&n, "q_proj")?, c.num_attention_heads)?;
        let k = heads(project(&n, "k_proj")?, c.num_key_value_heads)?;
        let v = heads(project(&n, "v_proj")?, c.num_key_value_heads)?;
        let q = rope(&q, &case.rope.cos_nd, &case.rope.sin_nd)?;
        let k = rope(&k, &case.rope.cos_nd, &case.rope.sin_nd)?;
        let mixed = attention(&q, &k, &v, scale, pattern, &case.rows)?.reshape((b, t, ()))?;
        x = (x + project(&mixed, "o_proj")?)?;
        let n = norm::rms_norm(&x, &read(&path("post_attention_layernorm"))?, c.rms_norm_eps)?;
        let gated = mlp::swiglu(&plain(&n, "mlp.gate_proj")?, &plain(&n, "mlp.up_proj")?)?;
        x = (x + plain(&gated, "mlp.down_proj")?)?;
    }
    let hidden = norm::rms_norm(&x, &read("model.norm.weight")?, c.rms_norm_eps)?;
    let head =
        params.get("lm_head.weight").or_else(|| params.get("model.embed_tokens.weight")).context("head")?;
    let values = |t: &Tensor| t.detach().flatten_all()?.to_vec1::<f32>();
    let (flat, head, sizes) = (values(&hidden)?, values(&head)?, [b * t, c.hidden_size, c.vocab_size]);
    let (targets, wanted) = (case.targets(), Gradient::Hidden { scale: 0.1 });
    let loss = head_cross_entropy(&flat, Weight::F32(&head), sizes, &targets, wanted, Products::F32)?;
    let d_hidden = Tensor::from_vec(loss.d_hidden.context("gradient")?, hidden.shape(), hidden.device())?;
    let grads = vjp::seed(&hidden, d_hidden)?.backward()?;
    let mut gradients = BTreeMap::new();
    for (name, leaf) in params.trainable().unwrap() {
        if let Some(gradient) = grads.get(&leaf) {
            gradients.insert(name, gradient.flatten_all()?.to_vec1()?);
        }
    }
    Ok(gradients)
}

#[test]
fn blocks_equal_the_same_model_taped_by_candle() -> Result<()> {
    for (name, groups) in [
        ("untied_f32_linear", vec![Group::Lora, Group::Norms]),
        ("tied_f32", vec![Group::Lora]),
        ("tied_f32", vec![Group::Norms]),
    ] {
        let mut decoder = adapted(name, 0.0)?;
        decoder.params_mut().set_learning(groups)?;
        let (case, _) = case(&decoder, name)?;
        let ours = gradients_of(&decoder, &case, true, None)?;
        let tape = taped(&decoder, &case, Pattern::ShiftedSparse { group: 4 })?;
        assert_eq!(ours.names().collect::<Vec<_>>(), tape.keys().collect::<Vec<_>>());
        for name in ours.names() {
            let (a, b) = (ours.get(name).context("ours")?, tape.get(name).context("tape")?);
            let size = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
            let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / size;
            assert!(worst < 1e-4, "{name}: differs by {worst} of its largest value");
        }
    }
    Ok(())
}

#[test]
fn rope_tables_of_another_length_are_refused() -> Result<()> {
    let decoder = open("tied_f32")?;
    let (mut case, _) = case(&decoder, "tied_f32")?;
    let c = decoder.config();
    case.rope = c.rope(&c.rope_scaling).sequence(3)?;
    let x = decoder.embed(&case.tokens, case.batch)?;
    let error = decoder.hidden(&x, &case.forward(Pattern::Dense)).err().context("an error")?.to_string();
    assert!(error.contains("rope tables: expected") && error.contains("got [3, "), "{error}");
    Ok(())
}

#[test]
fn a_new_adapter_changes_nothing() -> Result<()> {
    let plain = open("tied_f32")?;
    let (case, _) = case(&plain, "tied_f32")?;
    let mut lora = open("tied_f32")?;
    lora.attach_lora(LoraConfig::default(), 1)?;
    let x = plain.embed(&case.tokens, case.batch)?;
    let a = plain.logits(&x, &case.forward(Pattern::Dense))?;
    let b = lora.logits(&x, &case.forward(Pattern::Dense))?;
    assert_eq!(largest_difference(&a, &b)?, 0.0);
    Ok(())
}

#[test]
fn groups_as_long_as_the_text_are_dense() -> Result<()> {
    let decoder = open("tied_f32")?;
    let (case, _) = case(&decoder, "tied_f32")?;
    let x = decoder.embed(&case.tokens, case.batch)?;
    let dense = decoder.logits(&x, &case.forward(Pattern::Dense))?;
    let group = case.tokens.len();
    let sparse = decoder.logits(&x, &case.forward(Pattern::ShiftedSparse { group: 2 * group }))?;
    assert!(largest_difference(&dense, &sparse)? < 1e-5);
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits_dropout_included() -> Result<()> {
    let decoder = adapted("tied_f32", 0.2)?;
    let (case, _) = case(&decoder, "tied_f32")?;
    let kept = gradients_of(&decoder, &case, false, Some(3))?;
    let again = gradients_of(&decoder, &case, true, Some(3))?;
    let other = gradients_of(&decoder, &case, true, Some(4))?;
    let names: Vec<&str> = kept.names().collect();
    assert_eq!(names, again.names().collect::<Vec<_>>());
    assert!(names.iter().all(|n| kept.get(n) == again.get(n)));
    assert!(names.iter().any(|n| kept.get(n) != other.get(n)), "dropout did nothing");
    Ok(())
}

#[test]
fn gradients_match_finite_differences_through_the_whole_model() -> Result<()> {
    let mut decoder = adapted("untied_f32_linear", 0.0)?;
    let (case, _) = case(&decoder, "untied_f32_linear")?;
    let gradients = gradients_of(&decoder, &case, true, None)?;
    let loss = |decoder: &Decoder| -> Result<f64> {
        let x = decoder.embed(&case.tokens, case.batch)?;
        let nll = decoder.nll(&x, &case.targets(), &case.forward(Pattern::ShiftedSparse { group: 4 }))?;
        Ok(0.1 * nll.iter().map(|v| f64::from(*v)).sum::<f64>())
    };
    for (name, leaf) in decoder.params().trainable().unwrap() {
        let gradient = gradients.get(&name).with_context(|| format!("{name} has no gradient"))?;
        // The entry with the largest gradient, moved both ways: f32 leaves about three digits.
        let at = (0..gradient.len())
            .max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs()))
            .context("size")?;
        let values: Vec<f32> = leaf.flatten_all()?.to_vec1()?;
        let step = 5e-3f32;
        let mut sides = [0.0; 2];
        for (side, sign) in sides.iter_mut().zip([1.0, -1.0]) {
            let mut moved = values.clone();
            moved[at] += sign * step;
            decoder.params_mut().set(&name, &Tensor::from_vec(moved, leaf.shape(), &Device::Cpu)?)?;
            *side = loss(&decoder)?;
        }
        decoder.params_mut().set(&name, &Tensor::from_vec(values, leaf.shape(), &Device::Cpu)?)?;
        let measured = (sides[0] - sides[1]) / (2.0 * f64::from(step));
        let error = (measured - f64::from(gradient[at])).abs() / measured.abs().max(0.05);
        assert!(error < 0.03, "{name}[{at}]: gradient {}, differences give {measured}", gradient[at]);
    }
    Ok(())
}

#[test]
fn frozen_groups_get_no_gradient_and_keep_their_bytes() -> Result<()> {
    let mut decoder = adapted("tied_f32", 0.0)?;
    let (case, _) = case(&decoder, "tied_f32")?;
    let all = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora];
    let phases: [&[Group]; 4] =
        [&[Group::Lora], &[Group::Norms], &[Group::Embeddings], &[Group::Lora, Group::Norms]];
    let mut optimizer = Optimizer::new(AdamWConfig::default());
    for learning in phases {
        decoder.params_mut().set_learning(learning.iter().copied())?;
        let before: Vec<String> =
            all.iter().map(|g| decoder.params().group_hash(*g)).collect::<Result<_, _>>()?;
        let gradients = gradients_of(&decoder, &case, true, None)?;
        for name in gradients.names() {
            assert!(
                learning.contains(&decoder.config().group_of(name)),
                "{name} is frozen and got a gradient"
            );
        }
        assert_eq!(gradients.names().count(), decoder.params().trainable().unwrap().len());
        optimizer.step(decoder.params(), &gradients, 1e-2)?;
        for (group, before) in all.iter().zip(before) {
            let changed = decoder.params().group_hash(*group)? != before;
            assert_eq!(changed, learning.contains(group), "{group} while {learning:?} learns");
        }
    }
    Ok(())
}

#[test]
fn lora_on_the_last_block_walks_no_further_back() -> Result<()> {
    let mut decoder = open("tied_f32")?;
    let last = decoder.config().num_hidden_layers - 1;
    decoder.attach_lora(LoraConfig { layers: Some(vec![last].into()), ..LoraConfig::default() }, 1)?;
    decoder.params_mut().set_learning([Group::Lora])?;
    let (case, _) = case(&decoder, "tied_f32")?;
    let gradients = gradients_of(&decoder, &case, false, None)?;
    assert!(gradients.names().all(|n| n.starts_with(&format!("model.layers.{last}."))));
    assert_eq!(gradients.names().count(), 8);
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    let decoder = adapted("tied_f32", 0.0)?;
    let before = decoder.params().group_hash(Group::Norms)?;
    let mut gradients = Gradients::new();
    gradients.buffer("model.norm.weight", decoder.config().hidden_size)[0] = f32::NAN;
    let error = Optimizer::new(AdamWConfig::default()).step(decoder.params(), &gradients, 1.0).unwrap_err();
    assert!(error.to_string().contains("finite"), "{error}");
    assert_eq!(decoder.params().group_hash(Group::Norms)?, before);
    Ok(())
}
