//! Which device a command takes, and what it says where that is not the one that was hoped for.

use std::fs;

use serde_json::json;

use crate::common::{finish, tree};
use crate::support::{GPU, Machine, first_line};

/// Perplexity of a few tokens.
fn ppl<'a>(base: &'a str, data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["eval", "ppl", "--base", base, "--data", data, "--contexts", "32", "--max-tokens", "40"];
    [&args[..], more].concat()
}

#[test]
fn auto_takes_the_gpu_and_says_why_where_it_does_not() {
    let Some(machine) = Machine::new() else { return };
    let (base, data) = (machine.fixture.at("base"), machine.fixture.at("data"));
    for device in [&["--device", "auto"][..], &[]] {
        let told = machine.launches(&ppl(&base, &data, device), 20);
        assert_eq!(first_line(&told), format!("device: {GPU}"));
    }
    for (variable, value, why) in [
        ("EMULATED_DEVICES", "0", "no GPU: CUDA: the driver is there, but no device"),
        (
            "EMULATED_VERSION",
            "11080",
            "no GPU: CUDA: the driver is too old: expected one for CUDA 12.0 or newer, got one for CUDA 11.8",
        ),
        (
            "EMULATED_CAPABILITY",
            "75",
            "no GPU: CUDA: device 0 (emulated device 0): expected compute capability 8.0 or newer, got 7.5",
        ),
    ] {
        let mut command = machine.command(&ppl(&base, &data, &["--device", "auto", "--json"]));
        command.env(variable, value);
        let told = finish(command).success();
        let event: serde_json::Value = serde_json::from_str(first_line(&told)).unwrap();
        let expected = json!({
            "device": "cpu", "description": "cpu", "asked": "auto", "note": why, "text": format!("device: cpu ({why})")
        });
        assert_eq!(event["data"], expected);
        assert_eq!(told.json()["device"], "cpu");
    }
}

#[test]
fn a_model_that_the_gpu_cannot_run_is_refused_by_name_and_left_to_the_processor_by_auto() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    // Heads of four.
    fixture.model_of("narrow", 1, json!({ "num_attention_heads": 8 }));
    let (base, data, out) = (fixture.at("narrow"), fixture.at("data"), fixture.at("out"));
    #[rustfmt::skip]
    let extend = [
        "extend", "--base", &base, "--data", &data, "--out", &out, "--context", "64", "--stages", "64:1",
        "--tokens-per-step", "64", "--eval-tokens", "64", "--rank", "2",
    ];
    let cycle = fixture.at("cycle.toml");
    let settings = "contexts = [32]\nhorizon = 4\nbudget = 12\nprotected = 4\n[network]\nblock = 4\n";
    fs::write(&cycle, settings).unwrap();
    let train = ["train", &cycle, "--base", &base, "--data", &data, "--out", &out];
    let why =
        "cuda:0: expected heads whose width is a multiple of 8 up to 256, got 4; the processor takes it";
    fs::create_dir(fixture.path("cache")).unwrap();
    let before = tree(&fixture.path(""));
    for args in [&extend[..], &train, &ppl(&base, &data, &["--out", &out])] {
        let args = [args, &["--device", "cuda:0"]].concat();
        machine.mclora(&args).refused(2, &[why]);
        fs::remove_dir_all(fixture.path("cache")).unwrap();
        fs::create_dir(fixture.path("cache")).unwrap();
        assert_eq!(tree(&fixture.path("")), before);
    }
    let told = machine.mclora(&extend).success();
    let said: Vec<&str> = told.stderr.lines().filter(|line| line.starts_with("device: ")).collect();
    assert_eq!(said.len(), 2, "{}", told.stderr);
    assert_eq!(said[0], format!("device: {GPU}"));
    assert!(
        said[1].starts_with(&format!("device: cpu (not on {GPU}: ")) && said[1].contains(why),
        "{said:?}"
    );
    assert_eq!(crate::common::read_json(&fixture.path("out/summary.json"))["device"], "cpu");
}

#[test]
fn what_there_is_is_listed() {
    let Some(machine) = Machine::new() else { return };
    let told = machine.mclora(&["plugin", "check", "--json"]).success().json();
    let gpu = json!({
        "device": "cuda:0", "name": "emulated device 0", "compute_capability": "8.0", "memory_bytes": 1u64 << 34,
        "unusable": null,
    });
    assert_eq!(told["devices"], json!([{ "device": "cpu" }, gpu]));
    assert!(told["no_gpu"].is_null());
    let names = told["capabilities"].as_array().unwrap();
    assert!(names.contains(&"device:cuda:0".into()), "{names:?}");
}
