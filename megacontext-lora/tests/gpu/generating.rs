//! `generate` and `eval passkey`: the texts and the answers that the processor gives.

use serde_json::Value;

use crate::common::mclora;
use crate::support::{GPU, Machine, first_line};

/// A result without what depends on the device.
fn said(result: &Value) -> Value {
    let mut result = result.clone();
    for key in ["device", "prefill", "decoding"] {
        result[key].take();
    }
    result
}

#[test]
fn texts_are_those_of_the_processor() {
    let Some(machine) = Machine::new() else { return };
    let base = machine.fixture.at("base");
    #[rustfmt::skip]
    let args = [
        "generate", "--base", &base, "--prompt", "Anna went", "--prompt", "In the beginning there was a house", "--max-new-tokens",
        "6", "--ignore-end", "--json",
    ];
    let on_cpu = mclora(&[&args[..], &["--device", "cpu"]].concat()).success().json();
    let outcome = machine.launches(&[&args[..], &["--device", "cuda:0"]].concat(), 100);
    assert!(first_line(&outcome).contains(GPU), "{}", outcome.stderr);
    let on_gpu = outcome.json();
    assert_eq!(on_gpu["device"], GPU);
    assert_eq!(on_gpu["results"][1]["tokens"].as_array().unwrap().len(), 6);
    assert_eq!(said(&on_gpu), said(&on_cpu));
    let tokens =
        |result: &Value| [&result["prefill"]["tokens"], &result["decoding"]["tokens"]].map(Value::clone);
    assert_eq!(tokens(&on_gpu), tokens(&on_cpu));
}

#[test]
fn passkeys_are_answered_as_on_the_processor_and_begun_there_go_on_here() {
    let Some(machine) = Machine::new() else { return };
    let (base, out) = (machine.fixture.at("base"), machine.fixture.at("passkey"));
    #[rustfmt::skip]
    let args = [
        "eval", "passkey", "--base", &base, "--lengths", "300", "--depths", "0,1", "--trials", "1", "--json",
    ];
    let on_cpu = mclora(&[&args[..], &["--device", "cpu", "--out", &out]].concat()).success().json();
    let outcome = machine.launches(&[&args[..], &["--device", "cuda:0"]].concat(), 100);
    assert_eq!(said(&outcome.json()), said(&on_cpu));
    // Taken up where nothing is left to do: the other device is said, what is there stays.
    let taken_up = [&args[..], &["--device", "cuda:0", "--out", &out, "--resume"]].concat();
    let outcome = machine.mclora(&taken_up).success();
    assert!(outcome.stderr.contains(&format!("begun on cpu, goes on on {GPU}")), "{}", outcome.stderr);
    assert_eq!(outcome.json()["cells"], on_cpu["cells"]);
}
