//! Loss@H of contexts that share a beginning, against every context run by itself from its logits.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::{
    Entry, GistTree, Hierarchy, HorizonLoss, HorizonObjective, Limits, TokenEmbeddings, WorkingContext,
};
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::Gradients;
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::random::{Random, mix};
use megacontext_base::rope::SigmaRule;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

use super::support::{Kind, Plain, base, says};

const K: usize = 4;
/// Tokens of the history, and behind it.
const T: usize = 45;
const H: usize = 6;

struct Case {
    decoder: Decoder,
    tree: GistTree,
    future: Vec<u32>,
}

impl Case {
    fn new(name: &str) -> Self {
        let dir =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures").join(name);
        let weights = Weights::open(&dir).unwrap();
        let config = DecoderConfig::from_dir(&dir).unwrap();
        let decoder = Decoder::from_weights(config, &weights, Precision::F32, &[]).unwrap();
        let (width, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size as u64);
        let tokens: Vec<u32> = (0..(T + H) as u64).map(|i| (mix(i + 5) % vocabulary) as u32).collect();
        let mut tree = GistTree::new(Hierarchy::new(K, 2).unwrap(), width, base()).unwrap();
        tree.append(&tokens[..T], &decoder, &Plain::new(Kind::Mean, K, width, 0)).unwrap();
        Self { decoder, tree, future: tokens[T..].to_vec() }
    }

    fn loss(&self, pattern: Pattern) -> HorizonLoss<'_> {
        let rule = SigmaRule { block: K, ..SigmaRule::default() };
        HorizonLoss::new(&self.decoder, &self.decoder.config().rope_scaling, rule, pattern).unwrap()
    }

    /// Contexts that differ from the first one nowhere, late, early, in several places, in where they begin.
    fn contexts(&self) -> Vec<WorkingContext> {
        let limits = Limits::new(T, 3).unwrap();
        let first = WorkingContext::rebuild(&self.tree, Limits::new(24, 3).unwrap(), u64::MAX).unwrap();
        let first = WorkingContext::new(first.entries().to_vec(), &self.tree, limits).unwrap();
        let gists: Vec<usize> = (0..first.cost()).filter(|at| first.entries()[*at].lod > 0).collect();
        let mut all = vec![first.clone(), first.clone()];
        for at in [gists[0], gists[gists.len() / 2], *gists.last().unwrap()] {
            let mut edited = first.clone();
            edited.expand(at).unwrap();
            all.push(edited);
        }
        let mut edited = all[2].clone();
        edited.collapse(edited.cost() - 3 - K - (T - 3) % K).unwrap();
        all.push(edited);
        let recent = (20..T as u64).map(|start| Entry { start, lod: 0 }).collect();
        all.push(WorkingContext::new(recent, &self.tree, limits).unwrap());
        all
    }

    /// The plain way: the whole context and its future through the model, and logits turned into NLL in f64.
    fn plain(&self, context: &WorkingContext, pattern: Pattern) -> f64 {
        let c = self.decoder.config();
        let rule = SigmaRule { block: K, ..SigmaRule::default() };
        let mut input = context.input(&self.tree, &self.decoder, &rule).unwrap();
        let read = &self.future[..H - 1];
        input.embeddings_we.extend(TokenEmbeddings::embeddings(&self.decoder, read).unwrap());
        for (j, _) in read.iter().enumerate() {
            input.mu_w.push((T + j) as f64);
            input.sigma_w.push(0.0);
            input.lod_w.push(0);
        }
        let n = input.mu_w.len();
        let rope = c.rope(&c.rope_scaling).place(&input.places(None)).unwrap();
        let x = Tensor::from_vec(input.embeddings_we, (1, n, c.hidden_size), &Device::Cpu).unwrap();
        let with = Forward { pattern, rope: &rope, rows: &Rows::default(), dropout_seed: None };
        let logits: Vec<Vec<f32>> =
            self.decoder.logits(&x, &with).unwrap().squeeze(0).unwrap().to_vec2().unwrap();
        let nll = |(j, token): (usize, &u32)| {
            let row = &logits[context.cost() - 1 + j];
            let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
            sum.ln() - f64::from(row[*token as usize])
        };
        self.future.iter().enumerate().map(nll).sum::<f64>() / H as f64
    }
}

#[test]
fn shared_beginnings_change_no_loss() {
    for name in
        ["llama/tied_f32", "families/mistral_window_bf16", "families/gemma3_bf16", "families/nanochat_bf16"]
    {
        let case = Case::new(name);
        let contexts = case.contexts();
        let all: Vec<&WorkingContext> = contexts.iter().collect();
        for pattern in [Pattern::Dense, Pattern::ShiftedSparse { group: 8 }] {
            let got =
                case.loss(pattern).measure(&case.tree, &all, &case.future, &mut Buffers::default()).unwrap();
            assert_eq!(got[0], got[1], "the same context");
            let mut most = 0f64;
            for (number, context) in contexts.iter().enumerate() {
                let expected = case.plain(context, pattern);
                let off = (got[number] - expected).abs();
                assert!(off < 1e-5, "{name}, {pattern:?}, context {number}: {} for {expected}", got[number]);
                most = most.max((got[number] - got[0]).abs());
            }
            // An edit before a sliding window may change nothing; the one of where the context begins does.
            assert!(most > 1e-6, "{name}: contexts that differ have losses that do");
        }
    }
}

#[test]
fn contexts_that_end_elsewhere_are_refused() {
    let case = Case::new("llama/tied_f32");
    let limits = Limits::new(T, 0).unwrap();
    let until = |end: u64| {
        let entries = (0..end).map(|start| Entry { start, lod: 0 }).collect();
        WorkingContext::new(entries, &case.tree, limits).unwrap()
    };
    let loss = case.loss(Pattern::Dense);
    let (a, b) = (until(40), until(41));
    let found = loss.measure(&case.tree, &[&a, &b], &case.future, &mut Buffers::default());
    says(found, &["expected contexts that end at one token", "40", "41"]);
}

#[test]
fn no_future_is_refused() {
    let case = Case::new("llama/tied_f32");
    let context = WorkingContext::recent(&case.tree, Limits::new(T, 0).unwrap()).unwrap();
    let found = case.loss(Pattern::Dense).measure(&case.tree, &[&context], &[], &mut Buffers::default());
    says(found, &["expected a future of at least 1 token, got none"]);
}

/// No teacher, no dropout.
fn plainly(weight: f64) -> HorizonObjective<'static> {
    HorizonObjective { weight, kl: 0.0, teacher: None, dropout_seed: None, recompute: true }
}

impl Case {
    /// LoRA whose B is not 0 any more, and learns.
    fn with_lora(mut self, groups: &[Group]) -> Self {
        self.decoder.attach_lora(LoraConfig::default(), 4).unwrap();
        let params = self.decoder.params_mut();
        let names: Vec<String> =
            params.names().filter(|n| n.ends_with("lora_B.weight")).map(str::to_string).collect();
        let mut random = Random::new(5);
        for name in names {
            let shape = params.shape(&name).unwrap().to_vec();
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| random.uniform(-0.05, 0.05) as f32).collect();
            params.set(&name, &Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap();
        }
        params.set_learning(groups.iter().copied()).unwrap();
        self
    }
}

#[test]
fn a_step_finds_the_measured_loss_and_its_slope() {
    for name in ["llama/tied_f32", "families/gemma3_bf16", "families/nanochat_bf16"] {
        let mut case = Case::new(name);
        let teacher = case.loss(Pattern::Dense).teacher(&case.tree, &case.future).unwrap();
        case = case.with_lora(&[Group::Lora]);
        let context = case.contexts().remove(0);
        let objective = HorizonObjective { kl: 0.6, teacher: Some(&teacher), ..plainly(0.8) };
        let step = |case: &Case, gradients: &mut Gradients| {
            let loss = case.loss(Pattern::Dense);
            let found = loss.accumulate(&case.tree, &context, &case.future, &objective, gradients).unwrap();
            let measured =
                loss.measure(&case.tree, &[&context], &case.future, &mut Buffers::default()).unwrap();
            assert!((found.loss - measured[0]).abs() < 1e-5, "{name}: {} for {}", found.loss, measured[0]);
            0.8 * (found.loss + 0.6 * found.kl.unwrap())
        };
        let mut gradients = Gradients::new();
        step(&case, &mut gradients);
        let names: Vec<String> = gradients.names().map(str::to_string).collect();
        assert!(
            !names.is_empty() && names.iter().all(|n| case.decoder.params().group(n) == Some(Group::Lora))
        );
        // All factors together along their gradient, as far as f32 sees it.
        let square =
            |name: &String| gradients.get(name).unwrap().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let length = names.iter().map(square).sum::<f64>().sqrt();
        let values: Vec<Tensor> =
            names.iter().map(|name| case.decoder.params().get(name).unwrap().copy().unwrap()).collect();
        let far = (2e-3 / length).clamp(1e-3, 2e-2);
        let mut moved = |sign: f64| {
            for (name, value) in names.iter().zip(&values) {
                let d =
                    Tensor::from_slice(gradients.get(name).unwrap(), value.shape(), &Device::Cpu).unwrap();
                let value = (value + (d * (sign * far / length)).unwrap()).unwrap();
                case.decoder.params_mut().set(name, &value).unwrap();
            }
            step(&case, &mut Gradients::new())
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * far);
        assert!((slope - length).abs() / length < 0.02, "{name}: gradient {length}, differences {slope}");
    }
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let case = Case::new("llama/tied_f32").with_lora(&[Group::Lora]);
    let loss = case.loss(Pattern::Dense);
    let teacher = loss.teacher(&case.tree, &case.future).unwrap();
    let whole = WorkingContext::recent(&case.tree, Limits::new(T, 0).unwrap()).unwrap();
    let (mut with, mut without) = (Gradients::new(), Gradients::new());
    let objective = HorizonObjective { kl: 1.0, teacher: Some(&teacher), ..plainly(1.0) };
    let found = loss.accumulate(&case.tree, &whole, &case.future, &objective, &mut with).unwrap();
    loss.accumulate(&case.tree, &whole, &case.future, &plainly(1.0), &mut without).unwrap();
    assert!(found.kl.unwrap().abs() < 1e-6, "{found:?}");
    let full = loss.measure(&case.tree, &[&whole], &case.future, &mut Buffers::default()).unwrap()[0];
    assert!((found.loss - full).abs() < 1e-5, "{found:?} for {full}");
    for name in without.names() {
        let (a, b) = (with.get(name).unwrap(), without.get(name).unwrap());
        let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off < 1e-5, "{name}: {off}");
    }
}

#[test]
fn embeddings_learn_from_the_tokens_among_the_entries() {
    for name in ["llama/tied_f32", "families/gemma3_bf16", "families/nanochat_bf16"] {
        let case = Case::new(name).with_lora(&[Group::Lora, Group::Embeddings, Group::Norms]);
        let whole = WorkingContext::recent(&case.tree, Limits::new(T, 0).unwrap()).unwrap();
        let mut got = Gradients::new();
        let loss = case.loss(Pattern::Dense);
        loss.accumulate(&case.tree, &whole, &case.future, &plainly(1.0), &mut got).unwrap();
        // The same as a plain step over the tokens, of which the last H are scored.
        let tokens: Vec<u32> = case.tree.tokens().iter().chain(&case.future).copied().collect();
        let targets: Vec<u32> = (1..tokens.len())
            .map(|at| if at < T { megacontext_kernels::loss::IGNORE } else { tokens[at] })
            .collect();
        let c = case.decoder.config();
        let rope = c.rope(&c.rope_scaling).sequence(tokens.len() - 1).unwrap();
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let mut expected = Gradients::new();
        let inputs = &tokens[..tokens.len() - 1];
        let scale = 1.0 / H as f64;
        case.decoder.accumulate_gradients(inputs, 1, &targets, &with, scale, true, &mut expected).unwrap();
        assert_eq!(got.names().collect::<Vec<_>>(), expected.names().collect::<Vec<_>>(), "{name}");
        for parameter in expected.names() {
            let (a, b) = (got.get(parameter).unwrap(), expected.get(parameter).unwrap());
            let largest = b.iter().fold(0f32, |most, v| most.max(v.abs()));
            let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(off <= 1e-4 * largest, "{name}: {parameter}: {off} of {largest}");
        }
    }
}

#[test]
fn a_head_that_learns_has_no_teacher_of_hidden_states() {
    let case = Case::new("llama/tied_f32").with_lora(&[Group::Lora, Group::Embeddings]);
    let loss = case.loss(Pattern::Dense);
    let teacher = loss.teacher(&case.tree, &case.future).unwrap();
    let whole = WorkingContext::recent(&case.tree, Limits::new(T, 0).unwrap()).unwrap();
    let objective = HorizonObjective { kl: 1.0, teacher: Some(&teacher), ..plainly(1.0) };
    let mut gradients = Gradients::new();
    let found = loss.accumulate(&case.tree, &whole, &case.future, &objective, &mut gradients);
    says(found, &["expected an output head that is frozen", "got one that learns"]);
    assert_eq!(gradients.names().count(), 0);
    let short = HorizonObjective { teacher: Some(&teacher[1..]), ..objective };
    let found = loss.accumulate(&case.tree, &whole, &case.future, &short, &mut gradients);
    says(found, &["expected the teacher's hidden states of 6 scored entries"]);
}
