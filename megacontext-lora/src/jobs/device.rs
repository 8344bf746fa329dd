//! What a job's model runs on: opened once before anything is changed, told to the host, and given to the decoder.
//!
//! Names are [`DeviceChoice`]'s. `auto` is the processor where the program was built without CUDA, and nothing is said then. With
//! CUDA it is the first GPU, or the processor with a note why: because there is no GPU that can be used, or because that GPU
//! cannot run this model. A device that was named and cannot be had is an error.
//!
//! Parameters as they are stored, and files, are the host's, so a run may go on on another device; its settings' hash does not know the
//! device. Networks (GistNet, LensNet) go with the model.
//!
//! The event `device` says `device` (`cpu`, `cuda:0`), `description`, `asked`, `note` and `text`, a line for people.
//!
//! Errors: `Usage`, with what was expected and what came. Left out: several GPUs at once.

use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::device::{Device, DeviceChoice, gpus};
use serde_json::{Value, json};

use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::model_error;

/// What a job's model runs on.
pub(crate) struct OnDevice {
    asked: DeviceChoice,
    device: Device,
}

impl OnDevice {
    /// Opens the device and tells the host.
    ///
    /// # Errors
    /// When a GPU was named that this program or this machine does not have.
    pub fn open(asked: DeviceChoice, host: &dyn HostApi) -> Result<Self> {
        let opened = asked.open().map_err(model_error)?;
        let note = opened.note.map(|note| format!("no GPU: {}", note.trim_start_matches("device: ")));
        tell(asked, &opened.device, note, host);
        Ok(Self { asked, device: opened.device })
    }

    /// For a model of this configuration: under `auto` the processor, and the host is told why, where the device cannot run it.
    ///
    /// # Errors
    /// When a device that was named cannot run it.
    pub fn running(self, model: &DecoderConfig, host: &dyn HostApi) -> Result<Self> {
        match self.device.check(model) {
            Err(error) if self.asked == DeviceChoice::Auto => {
                let note = format!("not on {}: {error}", self.device.describe());
                tell(self.asked, &Device::Cpu, Some(note), host);
                Ok(Self { device: Device::Cpu, ..self })
            }
            Err(error) => Err(model_error(error)),
            Ok(()) => Ok(self),
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The decoder's passes run on the device from here on.
    ///
    /// # Errors
    /// When it cannot run this model: ask [`OnDevice::running`] before anything is planned.
    pub fn take(&self, decoder: &mut Decoder) -> Result<()> {
        decoder.set_device(&self.device).map_err(model_error)
    }
}

/// A network's blocks go where the model's passes run (`set_device`'s result). One that the device cannot run stays on the
/// processor, and the host is told why.
pub(crate) fn network_beside(name: &str, placed: megacontext_base::error::Result<()>, host: &dyn HostApi) {
    if let Err(error) = placed {
        host.event("log", &json!({ "message": format!("{name} runs on the processor: {error}") }));
    }
}

fn tell(asked: DeviceChoice, device: &Device, note: Option<String>, host: &dyn HostApi) {
    let description = device.describe();
    let text = match &note {
        Some(note) => format!("device: {description} ({note})"),
        // Nobody asked, and there is nothing to choose from.
        None if asked == DeviceChoice::Auto && device.is_cpu() => return,
        None => format!("device: {description}"),
    };
    host.event(
        "device",
        &json!({ "device": device.name(), "description": description, "asked": asked, "note": note, "text": text }),
    );
}

/// The devices that there are, for hosts: each by name, GPUs with what they are, and why there is no GPU.
pub(crate) fn listed() -> Value {
    let cpu = json!({ "device": Device::Cpu.name() });
    let (gpus, none) = match gpus() {
        Ok(gpus) => (gpus, None),
        Err(why) => (&[][..], Some(why)),
    };
    let devices: Vec<Value> = [cpu].into_iter().chain(gpus.iter().map(|gpu| json!(gpu))).collect();
    json!({ "devices": devices, "no_gpu": none })
}

/// Names of what a session or a job can be told to run on, and of CUDA where it was built in.
pub(crate) fn capabilities() -> Vec<String> {
    let built = cfg!(feature = "cuda").then(|| "built:cuda".to_string());
    let usable = gpus().unwrap_or_default().iter().filter(|gpu| gpu.unusable.is_none());
    let names = [Device::Cpu.name()].into_iter().chain(usable.map(|gpu| gpu.device.clone()));
    names.map(|name| format!("device:{name}")).chain(built).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Hearing(Mutex<Vec<Value>>);

    impl HostApi for Hearing {
        fn event(&self, kind: &str, json: &Value) {
            assert_eq!(kind, "device");
            self.0.lock().unwrap().push(json.clone());
        }

        fn cancelled(&self) -> bool {
            false
        }
    }

    fn heard(asked: DeviceChoice) -> (Result<OnDevice>, Vec<Value>) {
        let host = Hearing::default();
        let opened = OnDevice::open(asked, &host);
        (opened, host.0.into_inner().unwrap())
    }

    #[test]
    fn the_processor_is_said_where_it_was_asked_for() {
        let (opened, events) = heard(DeviceChoice::Cpu);
        assert!(opened.unwrap().device.is_cpu());
        let expected = json!({
            "device": "cpu", "description": "cpu", "asked": "cpu", "note": null, "text": "device: cpu"
        });
        assert_eq!(events, [expected]);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_auto_is_the_processor_and_silent() {
        let (opened, events) = heard(DeviceChoice::Auto);
        assert!(opened.unwrap().device.is_cpu());
        assert!(events.is_empty(), "{events:?}");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_a_gpu_is_refused_and_nothing_is_told() {
        let (opened, events) = heard(DeviceChoice::Cuda(0));
        let error = opened.err().unwrap();
        assert_eq!(error.kind, crate::error::Kind::Usage);
        assert!(error.message.contains("built with the feature cuda for cuda:0"), "{error}");
        assert!(events.is_empty());
    }
}
