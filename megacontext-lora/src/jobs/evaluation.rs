//! What evaluations and runs share: the model they are about, and what their results depend on.

use std::path::Path;

use megacontext_base::config::DecoderConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::{ModelDir, to_value};

/// Settings of an evaluation that its results do not depend on.
const BESIDE: [&str; 3] = ["out", "resume", "threads"];

/// What the results of an evaluation depend on: its settings and the bytes it reads. `data` is a hash of the text, where
/// there is text.
pub(crate) fn identity(
    job: &str,
    settings: &impl Serialize,
    model: &ModelDir,
    adapter: Option<&Path>,
    data: Option<String>,
) -> Result<Value> {
    let mut settings = to_value(settings)?;
    if let Value::Object(settings) = &mut settings {
        settings.retain(|key, _| !BESIDE.contains(&key.as_str()));
    }
    let adapter = match adapter {
        None => None,
        Some(dir) => {
            let path = dir.join("adapter_model.safetensors");
            Some(hex(&Sha256::digest(std::fs::read(&path).at(&path)?)))
        }
    };
    Ok(json!({
        "job": job,
        "version": env!("CARGO_PKG_VERSION"),
        "settings": settings,
        "base_fingerprint": model.weights.fingerprint(),
        "adapter_sha256": adapter,
        "data_sha256": data,
    }))
}

/// A hash of tokens and where documents end.
pub(crate) fn hash_of<'a>(documents: impl IntoIterator<Item = &'a Vec<u32>>) -> String {
    let mut hash = Sha256::new();
    for document in documents {
        hash.update((document.len() as u64).to_le_bytes());
        document.iter().for_each(|token| hash.update(token.to_le_bytes()));
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How a model attends in use: dense, but for the windows that it states.
pub(crate) fn dense_name(config: &DecoderConfig) -> String {
    match config.architecture.windows()[..] {
        [] => "dense".to_string(),
        ref windows => {
            let windows: Vec<String> = windows.iter().map(usize::to_string).collect();
            format!("dense (sliding window {})", windows.join(", "))
        }
    }
}

/// What the settings name, as it was when the run began: a run that goes on with something else would not end the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Inputs {
    /// Fingerprint of the base's weights.
    pub base: String,
    /// SHA-256 of the tokens to train and to evaluate on.
    text: String,
    threads: usize,
}

impl Inputs {
    /// Of a model and the documents of a run, in their order.
    pub(crate) fn of<'a>(model: &ModelDir, documents: impl IntoIterator<Item = &'a Vec<u32>>) -> Self {
        Self {
            base: model.weights.fingerprint(),
            text: hash_of(documents),
            threads: rayon::current_num_threads(),
        }
    }

    /// Refuses other weights and other text; returns a warning for another number of threads.
    pub(crate) fn check(&self, now: &Self) -> Result<Option<String>> {
        let differs = |what: &str, began: &str, now: &str| {
            let (began, now) = (&began[..12.min(began.len())], &now[..12.min(now.len())]);
            Err(PluginError::usage(format!(
                "resume: {what} is not what the run began with: expected sha256 {began}…, got {now}…; bring it back, or \
                 begin a new run in another folder"
            )))
        };
        if self.base != now.base {
            return differs("the base model", &self.base, &now.base);
        }
        if self.text != now.text {
            return differs("the text of --data", &self.text, &now.text);
        }
        let warning = format!(
            "the run began with {} threads and goes on with {}: the last bits of the result may differ",
            self.threads, now.threads
        );
        Ok((self.threads != now.threads).then_some(warning))
    }
}
