//! One cycle of alternating optimisation: the warm start, JT1, JT2 and JT3.

use std::fs;

use serde_json::{Value, json};

use crate::common::{mclora, metrics, read_json};
use crate::support::{GPU, Machine, close_all, first_line, planned_well};

/// Over histories of 24 tokens in 16 entries, gists of 4.
fn settings(machine: &Machine) -> Value {
    let fixture = &machine.fixture;
    json!({
        "base": fixture.at("base"), "data": [fixture.at("data")], "contexts": [28], "horizon": 4, "budget": 16,
        "protected": 4, "holdout": 0.2, "seed": 7, "cycles": 1,
        "network": { "block": 4, "layers": 1 }, "lens": { "layers": 1 },
        "lora": { "r": 2 },
        "warm_gistnet": { "steps": 2, "batch": 1, "spans": 2 },
        "warm_lensnet": { "steps": 2, "batch": 1, "labels": { "rounds": 1, "histories": 2 } },
        "jt1": { "steps": 2, "batch": 1, "spans": 2 },
        "jt2": { "steps": 2, "batch": 1, "labels": { "rounds": 1, "histories": 2 } },
        "jt3": { "steps": 2, "batch": 1, "teacher": 0.2 },
        "judge": { "tolerance": 1.0, "full_tolerance": 1.0 },
        "validation": { "histories": 2, "test_histories": 2, "spans": 2, "sparse_group": 12 },
        "checkpoint": { "every": 2 },
    })
}

#[test]
fn a_cycle_reaches_what_the_processor_does() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    let config = fixture.at("cycle.toml");
    fs::write(&config, toml::to_string(&settings(&machine)).unwrap()).unwrap();
    let args = |out: &str, device: &str| -> Vec<String> {
        let out = fixture.at(out);
        let args = ["train", &config, "--threads", "2", "--out", &out, "--device", device];
        args.map(str::to_owned).to_vec()
    };
    mclora(&args("cpu", "cpu")).success();
    let ran = machine.launches(&args("gpu", "cuda:0"), 1000);
    assert_eq!(first_line(&ran), format!("device: {GPU}"));
    let (cpu, gpu) = (fixture.path("cpu"), fixture.path("gpu"));
    let summaries = [&gpu, &cpu].map(|run| read_json(&run.join("summary.json")));
    let [got, expected] = &summaries;
    assert_eq!((&got["device"], &expected["device"]), (&GPU.into(), &"cpu".into()));
    // As for LensNet's run.
    planned_well(got, 12.0);
    close_all("summary", got, expected);
    close_all("line", &metrics(&gpu).into(), &metrics(&cpu).into());
}
