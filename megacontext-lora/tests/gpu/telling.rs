//! What a session tells its host about networks, who may ask it while it is told.

use std::sync::{Arc, Mutex, OnceLock};

use gistnet_adapter::{GistNet, GistNetConfig};
use lensnet_adapter::{Identity, LensNet, LensNetConfig};
use megacontext_lora_abi::{Host as HostCalls, Session, TensorView};
use serde_json::{Value, json};

use crate::common::Fixture;
use crate::host::Host;
use crate::tensors::alone;

/// A host that asks its session whenever it is told something.
#[derive(Clone, Default)]
struct Asking {
    session: Arc<OnceLock<Session>>,
    said: Arc<Mutex<Vec<String>>>,
}

impl HostCalls for Asking {
    fn event(&self, kind: &str, json: &str) {
        let Some(session) = self.session.get() else { return };
        session.describe().unwrap();
        session.tree_append(TensorView::of(&[1u32])).ok();
        let json: Value = serde_json::from_str(json).unwrap();
        self.said.lock().unwrap().push(format!("{kind}: {}", json["message"].as_str().unwrap_or("")));
    }
}

#[test]
fn a_host_is_told_of_networks_that_stay_on_the_processor_and_may_ask_meanwhile() {
    alone("telling::asks");
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn asks() {
    let (machine, fixture, host) = (Host::new(), Fixture::new(), Asking::default());
    let config = json!({ "base": fixture.path("base"), "device": "cuda:0" });
    assert!(host.session.set(machine.plugin.open_session(&config, host.clone()).unwrap()).is_ok());
    let session = host.session.get().unwrap();
    let base = session.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
    // Heads of four.
    let (gists, lens) = (fixture.path("gistnet.safetensors"), fixture.path("lensnet.safetensors"));
    let config = GistNetConfig { block: 4, ..GistNetConfig::new(32, 8) };
    GistNet::new(config, 3).unwrap().save(&gists, &gistnet_adapter::Identity::of_base(&base)).unwrap();
    let config = LensNetConfig { block: 4, ..LensNetConfig::new(32, 8) };
    let identity = Identity { gist_version: Some(0), ..Identity::of_base(&base) };
    LensNet::new(config, 5).unwrap().save(&lens, &identity).unwrap();

    let opened = session.open_tree(&json!({ "network": gists })).unwrap();
    assert_eq!(opened["tokens"], 0);
    session.open_lens(&json!({ "network": lens })).unwrap();
    let said = host.said.lock().unwrap().clone();
    let [gistnet, lensnet] = &said[..] else { panic!("{said:?}") };
    for (said, name) in [(gistnet, "GistNet"), (lensnet, "LensNet")] {
        let expected =
            format!("log: {name} runs on the processor: device: cuda:0: expected heads whose width");
        assert!(said.starts_with(&expected), "{said}");
    }
    // Both times it was there to be appended to.
    assert_eq!(session.tree_append(TensorView::of(&[7u32])).unwrap()["tokens"], 3);
}
