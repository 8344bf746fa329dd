//! Adapters of every kind that PEFT writes: their logits with ours, in memory and merged; ours written and read back.
//!
//! The numbers are those of `integration-tests/fixtures/peft`, see the README there.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use megacontext_base::adapter::{Adapter, AdapterConfig, MegacontextKey, read_adapter, write_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::hf_export::Dtype;
use megacontext_base::lora_only::export_lora_only;
use megacontext_base::merge::merge;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

const KINDS: [&str; 11] = [
    "patterns_layers",
    "expression_rslora",
    "all_linear_excluded",
    "dora",
    "mlp_and_head",
    "embeddings",
    "embeddings_tied",
    "tokens_tied",
    "tokens_untied",
    "saved_modules",
    "pissa",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures")
}

struct Case {
    base: PathBuf,
    adapter: Adapter,
    tokens: Vec<u32>,
    batch: usize,
    golden: Tensor,
}

impl Case {
    fn read(kind: &str) -> Self {
        let dir = fixtures().join("peft").join(kind);
        let adapter = read_adapter(&dir).unwrap();
        let base = adapter.config.base_model_name_or_path.clone().unwrap();
        let file = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap();
        let rows = file["tokens"].to_vec2::<i64>().unwrap();
        Self {
            base: fixtures().join("llama").join(base),
            adapter,
            batch: rows.len(),
            tokens: rows.concat().into_iter().map(|t| t as u32).collect(),
            golden: file["logits"].clone(),
        }
    }

    fn weights(&self) -> Weights {
        Weights::open(&self.base).unwrap()
    }

    fn decoder(&self) -> Decoder {
        let config = DecoderConfig::from_dir(&self.base).unwrap();
        Decoder::from_weights(config, &self.weights(), Precision::F32, &[]).unwrap()
    }

    fn adapted(&self, adapter: &Adapter) -> Decoder {
        let mut decoder = self.decoder();
        let config = decoder.config().clone();
        adapter.check_against(&config, &self.weights().fingerprint()).unwrap();
        adapter.load_into(&config, decoder.params_mut()).unwrap();
        decoder.set_lora(Some(adapter.lora())).unwrap();
        decoder
    }

    fn logits(&self, decoder: &Decoder) -> Tensor {
        let c = decoder.config();
        let rope = c.rope(&c.rope_scaling).sequence(self.tokens.len() / self.batch).unwrap();
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        decoder.logits(&decoder.embed(&self.tokens, self.batch).unwrap(), &with).unwrap()
    }

    /// Largest difference of logits from PEFT's.
    fn gap(&self, decoder: &Decoder) -> f32 {
        let logits = self.logits(decoder);
        assert_eq!(logits.dims(), self.golden.dims());
        (&logits - &self.golden).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }
}

#[test]
fn every_kind_has_pefts_logits() {
    for kind in KINDS {
        let case = Case::read(kind);
        let plain = case.gap(&case.decoder());
        assert!(plain > 1e-2, "{kind}: the adapter changes the logits by {plain} only");
        let gap = case.gap(&case.adapted(&case.adapter));
        println!("{kind}: largest difference {gap:e}");
        assert!(gap <= 1e-4, "{kind}: largest difference {gap:e}");
    }
}

#[test]
fn every_kind_merged_into_a_folder_has_pefts_logits() {
    for kind in KINDS {
        let case = Case::read(kind);
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("merged");
        let base = DecoderConfig::from_dir(&case.base).unwrap();
        let report = merge(&case.weights(), &base, &case.adapter, &out, Some(Dtype::F32)).unwrap();
        assert!(!report.untied, "{kind}");
        let merged = Decoder::from_weights(
            DecoderConfig::from_dir(&out).unwrap(),
            &Weights::open(&out).unwrap(),
            Precision::F32,
            &[],
        );
        let gap = case.gap(&merged.unwrap());
        assert!(gap <= 1e-4, "{kind}: largest difference {gap:e}");
    }
}

#[test]
fn every_kind_merged_in_memory_has_pefts_logits_and_comes_out_again() {
    for kind in KINDS {
        let case = Case::read(kind);
        let mut decoder = case.adapted(&case.adapter);
        let before = case.logits(&decoder).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(decoder.merge_adapter().unwrap() > 0);
        let gap = case.gap(&decoder);
        assert!(gap <= 1e-4, "{kind}: largest difference {gap:e}");
        decoder.unmerge_adapter().unwrap();
        let after = case.logits(&decoder).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(before, after, "{kind}");
    }
}

#[test]
fn every_kind_is_written_as_it_was_read() {
    for kind in KINDS {
        let case = Case::read(kind);
        let root = tempfile::tempdir().unwrap();
        let base = DecoderConfig::from_dir(&case.base).unwrap();
        let tensors: Vec<(String, Tensor)> =
            case.adapter.parameters(&base).map(|(name, t)| (name.to_string(), t.clone())).collect();
        let whole = tensors.iter().map(|(name, _)| name.as_str());
        let whole = whole.filter(|n| !n.contains(".lora_") && !n.contains(".token_adapter."));
        let own = MegacontextKey {
            base_fingerprint: case.weights().fingerprint(),
            rope_scaling: base.rope_scaling.clone(),
            base_rope_scaling: Some(base.rope_scaling.clone()),
            base_rope_theta: Some(base.rope_theta),
            original_max_position_embeddings: base.original_context(),
            context_length: 64,
            positions: Default::default(),
            sigma_scales: None,
        };
        let config = AdapterConfig::new(&case.adapter.lora(), &base, whole, &case.base, own).unwrap();
        let dir = root.path().join("ours");
        write_adapter(&dir, &config, &tensors).unwrap();
        let gap = case.gap(&case.adapted(&read_adapter(&dir).unwrap()));
        assert!(gap <= 1e-4, "{kind}: largest difference {gap:e}");
    }
}

#[test]
fn dora_for_readers_of_lora_alone_is_refused() {
    let case = Case::read("dora");
    let root = tempfile::tempdir().unwrap();
    let base = DecoderConfig::from_dir(&case.base).unwrap();
    let out = root.path().join("out");
    let error = export_lora_only(&case.weights(), &base, &case.adapter, &out, Dtype::F32).unwrap_err();
    assert!(error.to_string().contains("expected plain LoRA, got DoRA"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_copy_of_another_bases_embedding_is_refused() {
    let case = Case::read("embeddings");
    let base = DecoderConfig::from_dir(&case.base).unwrap();
    let weights = case.weights();
    let of_base = |name: &str| weights.values::<f32>(name, weights.shape(name).unwrap());
    case.adapter.check_copies(&base, of_base).unwrap();
    let other = |name: &str| of_base(name).map(|values| values.iter().map(|v| v + 1.0).collect());
    let error = case.adapter.check_copies(&base, other).unwrap_err().to_string();
    assert!(error.contains("the adapter was made for another base"), "{error}");
}
