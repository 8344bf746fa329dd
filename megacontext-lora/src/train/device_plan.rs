//! What a run will take of a GPU, said before its first step and held against what is free there.
//!
//! Where a model's passes run on a GPU, their buffers, copies of the parameters, gradients and the optimiser of what learns lie there;
//! the host keeps parameters as they are stored, and moments where a checkpoint asks for them. The counts are
//! [`megacontext_base::buffers::gpu`]'s.
//!
//! Units: bytes. Errors: more than is free, with the numbers and what would help.

use megacontext_base::buffers::gpu::GpuBytes;
use megacontext_base::device::Device;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};

use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::train::plan::bytes;

/// Bytes on a GPU by kind, at the fullest moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DevicePlan {
    /// The GPU's number.
    pub ordinal: usize,
    /// By kind.
    #[serde(flatten)]
    pub bytes: GpuBytes,
    /// Documents that rows continue: their keys, values and hidden states.
    pub documents: u64,
    /// All of it.
    pub total: u64,
    /// What is free on it now.
    pub free: u64,
}

impl DevicePlan {
    /// Of passes of which the fullest takes `bytes`, beside `documents` bytes of documents; none on the processor.
    ///
    /// # Errors
    /// When the device does not say what is free.
    pub(crate) fn of(device: &Device, bytes: GpuBytes, documents: u64) -> Result<Option<Self>> {
        let Some((ordinal, free)) = device.memory().map_err(model_error)? else { return Ok(None) };
        Ok(Some(Self { ordinal, bytes, documents, total: bytes.total() + documents, free }))
    }

    /// Refuses what does not fit. `help` is what would make it smaller, besides a narrower storage.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn check(&self, dtype: Precision, help: &[&str]) -> Result<()> {
        if self.total <= self.free {
            return Ok(());
        }
        let narrower = (!dtype.stores_bf16()).then_some("--dtype bf16");
        let help: Vec<&str> = help.iter().copied().chain(narrower).collect();
        Err(PluginError::memory(format!(
            "the run needs about {} of cuda:{}, where {} are free: {}. What would help: {}",
            bytes(self.total),
            self.ordinal,
            bytes(self.free),
            self.kinds(),
            help.join(", ")
        )))
    }

    fn kinds(&self) -> String {
        let GpuBytes { weights, gradients, optimizer, activations, workspace, passing } = self.bytes;
        let documents = match self.documents {
            0 => String::new(),
            documents => format!(", documents {}", bytes(documents)),
        };
        format!(
            "weights {}, gradients {}, optimizer {}, activations {}, workspace {}, loss and calls {}{documents}",
            bytes(weights),
            bytes(gradients),
            bytes(optimizer),
            bytes(activations),
            bytes(workspace),
            bytes(passing)
        )
    }

    /// A line for people.
    pub fn text(&self) -> String {
        format!(
            "on cuda:{}: about {} of memory ({}), {} free",
            self.ordinal,
            bytes(self.total),
            self.kinds(),
            bytes(self.free)
        )
    }
}

/// Bytes of a GPU that a run was planned to take, and those that were in use at the fullest moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// As planned.
    pub planned_bytes: u64,
    /// At the peak.
    pub peak_bytes: u64,
}

impl DeviceMemory {
    /// Of a run with this plan on this device; none on the processor, and where the device does not say.
    pub(crate) fn of(plan: Option<&DevicePlan>, device: &Device) -> Option<Self> {
        let peak = device.peak_bytes().ok().flatten();
        plan.zip(peak).map(|(plan, peak_bytes)| Self { planned_bytes: plan.total, peak_bytes })
    }

    /// In words.
    pub(crate) fn text(&self) -> String {
        format!("planned {}, at most {} used", bytes(self.planned_bytes), bytes(self.peak_bytes))
    }
}

/// `text` with the device's line behind it, where there is one.
pub(crate) fn with_device(text: String, device: Option<&DevicePlan>) -> String {
    device.map_or(text.clone(), |device| format!("{text}\n{}", device.text()))
}
