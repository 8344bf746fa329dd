//! What evaluations and runs share: the model they are about, and what their results depend on.

use std::path::Path;

use megacontext_base::config::DecoderConfig;
use megacontext_base::device::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::{ModelDir, to_value};

/// Settings of an evaluation that its results do not depend on.
const BESIDE: [&str; 4] = ["out", "resume", "threads", "device"];

/// What the results of an evaluation depend on: its settings and the bytes it reads; and the device that it begins on. `data` is
/// a hash of the text, where there is text.
pub(crate) fn identity(
    job: &str,
    settings: &impl Serialize,
    model: &ModelDir,
    adapter: Option<&Path>,
    device: &Device,
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
        "device": device.describe(),
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
    /// What it ran on; checkpoints of older versions do not say, they are of the processor.
    #[serde(default = "processor")]
    device: String,
}

fn processor() -> String {
    Device::Cpu.describe()
}

impl Inputs {
    /// Of a model on a device and the documents of a run, in their order.
    pub(crate) fn of<'a>(
        model: &ModelDir,
        device: &Device,
        documents: impl IntoIterator<Item = &'a Vec<u32>>,
    ) -> Self {
        Self {
            base: model.weights.fingerprint(),
            text: hash_of(documents),
            threads: rayon::current_num_threads(),
            device: device.describe(),
        }
    }

    /// Refuses other weights and other text; returns warnings for another number of threads and another device.
    pub(crate) fn check(&self, now: &Self) -> Result<Vec<String>> {
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
        let mut warnings = Vec::new();
        if self.threads != now.threads {
            warnings.push(format!(
                "the run began with {} threads and goes on with {}: the last bits of the result may differ",
                self.threads, now.threads
            ));
        }
        warnings.extend(another_device(&self.device, &now.device));
        Ok(warnings)
    }
}

/// A warning where what began on one device goes on on another.
pub(crate) fn another_device(began: &str, now: &str) -> Option<String> {
    (began != now).then(|| format!("begun on {began}, goes on on {now}: the result may differ a little"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs { base: "b".into(), text: "t".into(), threads: 2, device: processor() }
    }

    #[test]
    fn another_device_or_number_of_threads_is_a_warning_each() {
        let began = inputs();
        assert!(began.check(&inputs()).unwrap().is_empty());
        let now =
            Inputs { threads: 3, device: "cuda:0 (NVIDIA H200, compute capability 9.0)".into(), ..inputs() };
        assert_eq!(
            began.check(&now).unwrap(),
            [
                "the run began with 2 threads and goes on with 3: the last bits of the result may differ",
                "begun on cpu, goes on on cuda:0 (NVIDIA H200, compute capability 9.0): the result may differ a little",
            ]
        );
    }

    #[test]
    fn a_checkpoint_of_before_devices_is_of_the_processor() {
        let old: Inputs = serde_json::from_value(json!({ "base": "b", "text": "t", "threads": 2 })).unwrap();
        assert_eq!(old, inputs());
    }

    #[test]
    fn other_weights_and_other_text_are_refused() {
        for (now, what) in [
            (Inputs { base: "c".into(), ..inputs() }, "the base model"),
            (Inputs { text: "u".into(), ..inputs() }, "the text of --data"),
        ] {
            let error = inputs().check(&now).unwrap_err().to_string();
            assert!(error.contains(&format!("resume: {what} is not what the run began with")), "{error}");
        }
    }
}
