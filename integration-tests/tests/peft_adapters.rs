//! A session of the plugin beside adapters that PEFT wrote, copies of the base and modules in full among them: PEFT's logits
//! while one is in use, and afterwards the base, to the bit.
//!
//! Golden logits are PEFT's (see `fixtures/README.md`).

#![allow(clippy::unwrap_used)] // Helpers of tests, which the lint does not see as tests.

use std::collections::BTreeMap;

use integration_tests::{fixture, model_with_tokenizer, plugin};
use megacontext_lora_abi::{ContextView, LoadOptions, Plugin, Session, TensorViewMut};
use serde_json::{Value, json};

/// Entries of the golden models' vocabulary.
const VOCAB: usize = 64;

/// Tokens [T] and their logits [T, V].
type Row = (Vec<u32>, Vec<f32>);

/// An adapter of `fixtures/peft`: its base's name, and rows with PEFT's logits.
fn golden(kind: &str) -> (String, Vec<Row>) {
    let dir = fixture("peft").join(kind);
    let config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
    let length = tokens.shape()[1];
    let ids = tokens.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
    let values = logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    let (ids, values): (Vec<u32>, Vec<f32>) = (ids.collect(), values.collect());
    let rows =
        ids.chunks(length).map(<[u32]>::to_vec).zip(values.chunks(length * VOCAB).map(<[f32]>::to_vec));
    (config["base_model_name_or_path"].as_str().unwrap().to_owned(), rows.collect())
}

fn logits(session: &Session, tokens: &[u32]) -> Vec<f32> {
    let mut out = vec![0f32; tokens.len() * VOCAB];
    let view = TensorViewMut::new(&mut out, &[tokens.len(), VOCAB]).unwrap();
    session.logits(ContextView::tokens(tokens), view).unwrap();
    out
}

/// Every value that the session's model has, by name.
fn parameters(session: &Session) -> BTreeMap<String, Vec<u32>> {
    let groups = session.parameter_groups().unwrap();
    let names =
        groups.as_object().unwrap().values().flat_map(|group| group["parameters"].as_array().unwrap());
    let bits = |name: &str| -> Vec<u32> {
        let values = session.parameter(name).unwrap().to_vec::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    names.map(|p| p["name"].as_str().unwrap()).map(|name| (name.to_owned(), bits(name))).collect()
}

#[test]
fn every_kind_has_pefts_logits_and_leaves_the_base_as_it_was() {
    let plugin = Plugin::load(plugin().unwrap(), &LoadOptions::default()).unwrap();
    let mut kinds: Vec<String> = std::fs::read_dir(fixture("peft"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kinds.sort();
    // Copies of the base's embedding, and a norm and a head in full, are among them.
    for kind in ["embeddings", "embeddings_tied", "saved_modules"] {
        assert!(kinds.iter().any(|k| k == kind), "{kinds:?}");
    }
    // One session for each base: all its adapters are loaded beside each other and used in turn.
    for base in ["tied_f32", "untied_f32_linear"] {
        let folder = tempfile::tempdir().unwrap();
        model_with_tokenizer(&format!("llama/{base}"), VOCAB, folder.path()).unwrap();
        let session = plugin.open_session(&json!({ "base": folder.path() }), ()).unwrap();
        let before = parameters(&session);
        assert!(before.len() > 10 && before.values().all(|values| !values.is_empty()));
        let own: Vec<&String> = kinds.iter().filter(|kind| golden(kind).0 == base).collect();
        assert!(own.len() >= 2, "{own:?}");
        for kind in &own {
            session.load_adapter(kind, &fixture("peft").join(kind)).unwrap();
        }
        assert!(parameters(&session) == before, "loading alone changes nothing");
        for kind in &own {
            let (_, rows) = golden(kind);
            let bare: Vec<Vec<f32>> = rows.iter().map(|(tokens, _)| logits(&session, tokens)).collect();
            session.set_adapter(Some(kind)).unwrap();
            for ((tokens, expected), bare) in rows.iter().zip(&bare) {
                let got = logits(&session, tokens);
                let gap =
                    |other: &[f32]| got.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(gap(bare) > 1e-2, "{kind}: the adapter changes the logits by {} only", gap(bare));
                assert!(gap(expected) <= 1e-4, "{kind}: largest difference {}", gap(expected));
            }
            session.set_adapter(None).unwrap();
            for ((tokens, _), bare) in rows.iter().zip(&bare) {
                assert!(logits(&session, tokens) == *bare, "{kind}: the base's logits are others now");
            }
            assert!(parameters(&session) == before, "{kind}: the base is another now");
        }
    }
}
