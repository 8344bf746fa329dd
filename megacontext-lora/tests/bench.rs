//! `mclora bench`: the lines it prints, and one test for each thing refused.
//!
//! Sizes are tiny and nothing is held against a time: what is tested is that every field is there, that what can be counted
//! is right and that what is measured is possible.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write;

use common::{Fixture, edit_json, mclora};
use megacontext_base::config::DecoderConfig;
use serde_json::{Map, Value, json};

/// Runs `mclora bench LINE`: the lines on stdout.
fn bench(line: &str) -> Vec<Value> {
    let args: Vec<&str> = ["bench"].into_iter().chain(line.split_whitespace()).collect();
    let stdout = mclora(&args).success().stdout;
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The same of a command that measures once.
fn one(line: &str) -> Value {
    let lines = bench(line);
    assert_eq!(lines.len(), 1, "{lines:?}");
    lines[0].clone()
}

/// `mclora bench LINE` is refused as a wrong flag.
#[track_caller]
fn refused(line: &str, facts: &[&str]) {
    let args: Vec<&str> = ["bench"].into_iter().chain(line.split_whitespace()).collect();
    mclora(&args).refused(2, facts);
}

/// These fields hold positive numbers.
#[track_caller]
fn positive(line: &Value, fields: &[&str]) {
    for field in fields {
        let value = line[field].as_f64();
        assert!(value.is_some_and(|v| v > 0.0 && v.is_finite()), "{field} in {line}");
    }
}

/// These fields are positive where the system tells of memory.
#[track_caller]
fn memory(line: &Value, fields: &[&str]) {
    if cfg!(target_os = "linux") {
        positive(line, fields);
    }
}

/// Every line says what it is and how clean it is.
#[track_caller]
fn common_fields(line: &Value, what: &str) {
    assert_eq!((&line["lib"], &line["what"]), (&json!("megacontext"), &json!(what)), "{line}");
    assert_eq!((&line["threads"], &line["dtype"]), (&json!(2), &json!("f32")), "{line}");
    assert!(line["cpu"].is_string() && line["profile"].is_string() && line["n_clean"].is_u64(), "{line}");
}

#[test]
fn attention_tells_sizes_times_memory_and_work() {
    let line = one("attention --n 256 --heads 4,2 --head-dim 16 --group 0.25 --reps 1 --threads 2");
    common_fields(&line, "attention");
    let sizes = json!([line["kind"], line["B"], line["H"], line["Hkv"], line["d"], line["n"], line["G"]]);
    assert_eq!(sizes, json!(["s2", 1, 4, 2, 16, 256, 64]));
    positive(&line, &["fb_ms", "best_ms", "fwd_ms", "gflops"]);
    memory(&line, &["peak_extra_MB"]);
    assert!(line["best_ms"].as_f64() <= line["fb_ms"].as_f64(), "{line}");
    // Two heads of 4 groups of 64; two of 32, three of 64, 32; 2·d for a pair of products; 3.5 forward passes.
    let pairs = 2.0 * 4.0 * 64.0 * 64.0 + 2.0 * (3.0 * 64.0 * 64.0 + 2.0 * 32.0 * 32.0);
    let gigaflops = 3.5 * 2.0 * 16.0 * pairs / 1e9;
    assert!((line["gflop_total"].as_f64().unwrap() - gigaflops).abs() < 1e-3, "{line}");
}

#[test]
fn there_are_three_precision_classes() {
    for dtype in ["f32", "mixed", "bf16"] {
        for what in [
            "attention --n 64 --heads 2,1 --head-dim 8 --reps 1",
            "linear --n 64 --in 32 --out 16 --reps 1",
            "loss --n 64 --width 16 --vocab 32 --reps 1",
            "step --n 64 --shape 32,2,4,2,64,128 --steps 1",
        ] {
            let line = one(&format!("{what} --dtype {dtype}"));
            assert_eq!(line["dtype"], json!(dtype), "{line}");
            positive(&line, &[if what.starts_with("step") { "step_s" } else { "fb_ms" }]);
        }
    }
}

#[test]
fn several_lengths_are_several_lines() {
    let lines =
        bench("attention --pattern dense --n 64,96 --heads 2,2 --head-dim 8 --reps 1 --batch 2 --threads 2");
    let sizes: Vec<_> = lines.iter().map(|l| json!([l["kind"], l["B"], l["n"], l["G"]])).collect();
    assert_eq!(sizes, [json!(["dense", 2, 64, 64]), json!(["dense", 2, 96, 96])]);
}

#[test]
fn with_json_all_measurements_are_one_object() {
    let args = "bench attention --json --n 32,64 --heads 2,1 --head-dim 8 --reps 1";
    let told = mclora(&args.split(' ').collect::<Vec<_>>()).success().json();
    let lengths: Vec<_> = told["measurements"].as_array().unwrap().iter().map(|m| &m["n"]).collect();
    assert_eq!(lengths, [&json!(32), &json!(64)]);
}

#[test]
fn a_step_tells_speed_memory_work_and_loss() {
    let line = one("step --shape 32,2,4,2,64,128 --n 64 --attn s2 --group 16 --rank 4 --steps 1 --threads 2");
    common_fields(&line, "lora_step");
    let sizes =
        json!([line["shape"], line["attn"], line["B"], line["n"], line["G"], line["r"], line["ckpt"]]);
    assert_eq!(sizes, json!(["32,2,4,2,64,128", "s2", 1, 64, 16, 4, true]));
    positive(&line, &["step_s", "best_s", "tok_s", "gflops", "tflop"]);
    memory(&line, &["peak_rss_MB", "idle_rss_MB"]);
    // Random weights know nothing: ln V.
    let loss = line["loss"].as_f64().unwrap();
    assert!((loss - 128f64.ln()).abs() < 0.5, "{line}");
    let parts = line["tflop_parts"].as_object().unwrap();
    let sum: f64 = parts.values().map(|v| v.as_f64().unwrap()).sum();
    assert!((sum - line["tflop"].as_f64().unwrap()).abs() < 3e-6, "{line}");
}

#[test]
fn a_step_without_checkpointing_says_so_and_computes_less() {
    let flags = "--shape 32,2,4,2,64,128 --n 64 --attn dense --batch 2 --steps 1";
    let (with, without) = (one(&format!("step {flags}")), one(&format!("step {flags} --no-checkpointing")));
    assert_eq!((&with["ckpt"], &without["ckpt"]), (&json!(true), &json!(false)));
    assert!(without["tflop"].as_f64() < with["tflop"].as_f64(), "{with} {without}");
    // Recomputing gives the same bits.
    assert_eq!(with["loss"], without["loss"]);
}

#[test]
fn a_plan_grows_with_the_length_and_makes_no_model() {
    let lines = bench("plan --shape 4096,32,32,8,14336,128256 --n 1024,65536 --group 1024");
    let gigabytes: Vec<f64> = lines.iter().map(|l| l["peak_rss_MB"].as_f64().unwrap() / 1e3).collect();
    // Weights alone are four bytes each.
    let parameters = lines[0]["parameters"].as_f64().unwrap();
    assert!(parameters > 7e9 && gigabytes[0] > 4.0 * parameters / 1e9, "{lines:?}");
    assert!(gigabytes[1] > gigabytes[0] + 10.0, "{lines:?}");
    positive(&lines[0], &["step_s", "trained"]);
    assert!(lines[0]["bytes"]["activations"].is_u64(), "{lines:?}");
}

#[test]
fn the_processor_is_named_and_has_no_memory_of_a_device() {
    let shape = "--shape 16,1,2,1,32,64 --device cpu";
    for line in [
        one("attention --n 64 --heads 2,1 --head-dim 8 --reps 1 --device cpu"),
        one(&format!("step {shape} --n 64 --steps 1")),
        one(&format!("plan {shape} --n 64")),
        one(&format!("gist {shape} --n 64 --horizon 8 --blocks 1 --block 8 --reps 1")),
    ] {
        assert_eq!(line["device"], "cpu", "{line}");
        assert!(line.get("peak_device_MB").is_none() && line.get("device_bytes").is_none(), "{line}");
    }
}

#[test]
fn loss_tells_sizes_times_and_work() {
    let line = one("loss --n 64 --width 32 --vocab 100 --reps 1 --threads 2");
    common_fields(&line, "loss");
    assert_eq!(json!([line["n"], line["E"], line["V"]]), json!([64, 32, 100]));
    positive(&line, &["fb_ms", "best_ms", "fwd_ms", "gflops"]);
    memory(&line, &["peak_extra_MB"]);
}

#[test]
fn linear_tells_sizes_times_and_work() {
    for rank in [0, 4] {
        let line = one(&format!("linear --n 512 --in 48 --out 24 --rank {rank} --reps 1 --threads 2"));
        common_fields(&line, "linear");
        assert_eq!(json!([line["n"], line["in"], line["out"], line["r"]]), json!([512, 48, 24, rank]));
        positive(&line, &["fb_ms", "best_ms", "fwd_ms", "gflops"]);
        let flops = 2.0 * 512.0 * (2.0 * 48.0 * 24.0 + 3.0 * f64::from(rank) * 72.0);
        assert!((line["gflop_total"].as_f64().unwrap() - flops / 1e9).abs() < 1e-3, "{line}");
    }
}

#[test]
fn gist_tells_both_ways_and_how_they_compare() {
    for (dtype, attn) in [("f32", "dense"), ("bf16", "s2")] {
        let flags =
            "--shape 16,1,2,1,32,64 --n 128 --horizon 8 --blocks 8 --block 8 --group 64 --reps 1 --threads 2";
        let line = one(&format!("gist {flags} --dtype {dtype} --attn {attn}"));
        let sizes = json!([line["what"], line["dtype"], line["n"], line["horizon"], line["B"], line["K"]]);
        assert_eq!(sizes, json!(["gist", dtype, 128, 8, 8, 8]));
        positive(&line, &["fb_ms", "best_ms", "block_ms", "apart_ms", "cheaper"]);
        let cheaper = line["apart_ms"].as_f64().unwrap() / line["fb_ms"].as_f64().unwrap();
        assert!((line["cheaper"].as_f64().unwrap() / cheaper - 1.0).abs() < 0.1, "{line}");
    }
}

#[test]
fn lens_tells_sizes_time_memory_and_work() {
    let line = one("lens --shape 32,2,4 --n 200 --reps 1 --threads 2");
    common_fields(&line, "lens");
    let sizes = json!([line["shape"], line["attn"], line["causal"], line["B"], line["n"], line["G"]]);
    assert_eq!(sizes, json!(["32,2,4", "dense", false, 1, 200, 200]));
    positive(&line, &["fwd_ms", "best_ms", "gflops"]);
    memory(&line, &["peak_extra_MB"]);
    // Two blocks of 12 products of E x E and all pairs; two MLPs of features, the head, 128 wide between.
    let blocks = 2.0 * (24.0 * 200.0 * 32.0 * 32.0 + 4.0 * 200.0 * 200.0 * 32.0);
    let head = 2.0 * 200.0 * (2.0 * 32.0 * 33.0 + 128.0 * 65.0);
    assert!((line["gflop_total"].as_f64().unwrap() - (blocks + head) / 1e9).abs() < 1e-3, "{line}");
}

#[test]
fn lens_by_shifted_sparse_attention_says_how_far_from_dense_it_is() {
    for causal in ["", "--causal"] {
        let flags = format!("lens --shape 32,2,4 --n 200 --attn s2 --compare --reps 1 {causal}");
        let line = one(&format!("{flags} --group 50"));
        assert_eq!((&line["attn"], &line["G"]), (&json!("s2"), &json!(50)));
        positive(&line, &["dense_ms", "pearson", "spearman", "mean_apart", "most_apart", "dense_size"]);
        let close = line["pearson"].as_f64().unwrap();
        assert!((0.5..1.0).contains(&close), "{line}");
        // A group of all is dense.
        let line = one(&format!("{flags} --group 1.0"));
        let same = json!([line["pearson"], line["spearman"], line["most_apart"], line["top_overlap"]]);
        assert_eq!(same, json!([1.0, 1.0, 0.0, 1.0]));
    }
}

#[test]
fn lens_leaves_what_the_peer_reads() {
    let fixture = Fixture::new();
    let folder = fixture.at("lens");
    one(&format!("lens --shape 16,1,2 --n 40 --causal --files {folder} --reps 1"));
    let network = format!("{folder}/lensnet.safetensors");
    let stored =
        candle_core::safetensors::load(format!("{folder}/context.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    let dims = |name: &str| stored[name].dims().to_vec();
    assert_eq!([dims("entries"), dims("cos"), dims("sin")], [vec![1, 40, 16], vec![40, 4], vec![40, 4]]);
    assert_eq!([dims("lod"), dims("start"), dims("scores")], [vec![40], vec![40], vec![40]]);
    // A stored network is what is measured.
    let line = one(&format!("lens --network {network} --n 24 --reps 1"));
    assert_eq!((&line["shape"], &line["n"], &line["causal"]), (&json!("16,1,2"), &json!(24), &json!(false)));
}

#[test]
fn load_tells_how_long_loading_and_a_call_take() {
    let line = one("load --reps 3");
    assert_eq!((&line["what"], &line["reps"]), (&json!("load"), &json!(3)));
    positive(&line, &["load_ms", "best_ms", "open_ms", "call_ns"]);
    assert!(line["best_ms"].as_f64() <= line["load_ms"].as_f64(), "{line}");
}

/// A model folder of about 300 MB of bf16 zeros, in a file without blocks on the disk; the bytes of its weights.
fn hollow_model(fixture: &Fixture, name: &str) -> u64 {
    let dir = fixture.copy("base", name);
    edit_json(&dir.join("config.json"), |config| {
        for (key, value) in [("hidden_size", 1024), ("intermediate_size", 4096), ("num_hidden_layers", 9)] {
            config[key] = json!(value);
        }
        config["head_dim"] = json!(256);
    });
    let config = DecoderConfig::from_dir(&dir).unwrap();
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in config.tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let size = 8 + header.len() as u64 + end;
    file.set_len(size).unwrap();
    size
}

#[test]
fn a_model_is_opened_without_reading_it() {
    let fixture = Fixture::new();
    let size = hollow_model(&fixture, "hollow");
    assert!((250_000_000..350_000_000).contains(&size), "{size}");
    let base = fixture.at("hollow");
    let line = one(&format!("load --reps 1 --base {base} --dtype bf16"));
    positive(&line, &["base_open_ms", "base_file_MB"]);
    assert_eq!(line["dtype"], "bf16");
    let file = line["base_file_MB"].as_f64().unwrap();
    assert!((file - size as f64 / 1e6).abs() < 0.1, "{line}");
    if cfg!(target_os = "linux") {
        // Norms are read; everything else stays in its file.
        assert!(line["base_extra_MB"].as_f64().unwrap() < 0.05 * file, "{line}");
    }
    // Several processes: the middle of each number.
    let base = fixture.at("base");
    let line = one(&format!("load --reps 2 --base {base}"));
    positive(&line, &["base_open_ms", "base_file_MB"]);
}

// What is refused.

#[test]
fn a_base_that_is_not_there() {
    mclora(&["bench", "load", "--reps", "1", "--base", "nowhere"]).refused(1, &["nowhere"]);
}

#[test]
fn a_precision_without_a_base() {
    let outcome = mclora(&["bench", "load", "--dtype", "bf16"]);
    assert_eq!(outcome.status.code(), Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--base"), "{}", outcome.stderr);
}

#[test]
fn an_unknown_pattern() {
    refused("attention --pattern sparse --n 64", &["pattern", "sparse"]);
}

#[test]
fn an_unknown_attention_of_a_step() {
    refused("step --attn sparse --n 64", &["attn", "sparse"]);
}

#[test]
fn an_unknown_dtype() {
    for what in ["attention", "step", "plan", "loss", "linear", "gist", "lens"] {
        refused(&format!("{what} --dtype f8 --n 64"), &["dtype", "f8", "f32"]);
    }
}

#[test]
fn no_entries() {
    for what in ["attention", "step", "plan", "loss", "linear", "gist", "lens"] {
        refused(&format!("{what} --n 0"), &["n: expected 1 to", "got 0"]);
    }
}

#[test]
fn no_entries_among_several_lengths() {
    let args = "bench attention --n 16,0 --heads 2,1 --head-dim 8 --reps 1";
    let args: Vec<&str> = args.split(' ').collect();
    let outcome = mclora(&args);
    assert_eq!(outcome.status.code(), Some(2), "{outcome:?}");
    // The first length was measured; the second is refused by name.
    assert_eq!(outcome.stdout.lines().count(), 1, "{outcome:?}");
    assert!(outcome.stderr.ends_with("n: expected 1 to 16777216, got 0\n"), "{outcome:?}");
}

#[test]
fn kv_heads_that_do_not_divide() {
    refused("attention --n 64 --heads 9,2", &["multiple", "9", "2"]);
    refused("step --n 64 --shape 36,1,9,2,16,32", &["num_key_value_heads", "divisor", "2"]);
}

#[test]
fn one_head_count() {
    refused("attention --n 64 --heads 9", &["heads: expected", "2 numbers", "got 1"]);
}

#[test]
fn no_heads() {
    refused("attention --n 64 --heads 0,0", &["heads", "got 0"]);
    refused("step --n 64 --shape 36,1,0,0,16,32", &["num_attention_heads", "0"]);
}

#[test]
fn a_head_width_of_zero_or_over_256() {
    for width in [0, 257] {
        refused(&format!("attention --n 64 --head-dim {width}"), &["head width", &width.to_string()]);
    }
}

#[test]
fn heads_that_do_not_divide_the_model_width() {
    refused("step --n 64 --shape 35,1,9,3,16,32", &["divisor", "35"]);
}

#[test]
fn a_shape_of_five_numbers() {
    refused("step --n 64 --shape 36,1,9,3,16", &["shape: expected 6 numbers", "got 5"]);
}

#[test]
fn a_shape_that_is_no_number() {
    let outcome = mclora(&["bench", "step", "--n", "64", "--shape", "wide"]);
    assert_eq!(outcome.status.code(), Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("--shape") && outcome.stderr.contains("wide"), "{outcome:?}");
}

#[test]
fn a_group_of_zero_or_one() {
    for group in [0, 1] {
        refused(
            &format!("attention --n 64 --group {group}"),
            &["group: expected at least 2", &group.to_string()],
        );
        refused(&format!("step --n 64 --group {group}"), &["group: expected at least 2", &group.to_string()]);
    }
}

#[test]
fn a_group_that_is_more_than_all() {
    refused("attention --n 64 --group 1.5", &["group: expected a part", "1.5"]);
}

#[test]
fn a_group_that_is_no_number() {
    refused("attention --n 64 --group wide", &["group", "wide"]);
}

#[test]
fn no_rows() {
    refused("attention --n 64 --batch 0", &["batch: expected 1 to", "got 0"]);
    refused("step --n 64 --batch 0", &["batch: expected 1 to", "got 0"]);
}

#[test]
fn no_repetitions() {
    refused("attention --n 64 --reps 0", &["reps: expected 1 to", "got 0"]);
    refused("load --reps 0", &["--reps: expected 1 to", "got 0"]);
}

#[test]
fn no_steps() {
    refused("step --n 64 --steps 0", &["steps: expected 1 to", "got 0"]);
}

#[test]
fn a_rank_of_zero_for_a_step() {
    refused("step --n 64 --rank 0", &["rank", "got 0"]);
}

#[test]
fn a_rank_wider_than_the_layer() {
    refused("linear --n 64 --in 8 --out 16 --rank 17", &["rank: expected 1 to 16", "got 17"]);
}

#[test]
fn a_width_of_zero() {
    refused("loss --n 64 --width 0", &["width: expected 1 to", "got 0"]);
    refused("loss --n 64 --vocab 0", &["vocab: expected 1 to", "got 0"]);
    refused("linear --n 64 --in 0", &["inp: expected 1 to", "got 0"]);
    refused("linear --n 64 --out 0", &["out: expected 1 to", "got 0"]);
}

#[test]
fn a_horizon_of_zero_or_beyond_the_document() {
    for horizon in [0, 65] {
        refused(&format!("gist --n 64 --blocks 2 --horizon {horizon}"), &["horizon: expected 1 to 64"]);
    }
}

#[test]
fn no_blocks() {
    refused("gist --n 128 --horizon 8 --blocks 0", &["blocks: expected 1 to 2", "got 0"]);
}

#[test]
fn lens_of_a_precision_that_it_has_not() {
    refused("lens --n 64 --dtype bf16", &["dtype: expected \"f32\" for LensNet", "got \"bf16\""]);
}

#[test]
fn a_lens_shape_of_two_numbers() {
    refused("lens --n 64 --shape 16,2", &["shape: expected 3 numbers", "got 2"]);
}

#[test]
fn a_lens_whose_heads_do_not_divide_the_width() {
    refused("lens --n 64 --shape 16,2,3", &["heads: expected a divisor of the width 16, got 3"]);
}

#[test]
fn a_lens_file_that_is_not_there() {
    mclora(&["bench", "lens", "--n", "64", "--network", "nowhere"]).refused(1, &["nowhere"]);
}

#[test]
fn no_threads() {
    refused("attention --n 64 --threads 0", &["threads", "got 0"]);
}

#[test]
fn parameters_that_are_no_json() {
    refused("job {", &["parameters as JSON"]);
}

#[test]
fn an_unknown_measurement() {
    refused(r#"job {"what":"weather"}"#, &["what: expected one of", "weather"]);
}

#[test]
fn an_unknown_parameter() {
    refused(r#"job {"what":"attention","size":1}"#, &["size"]);
}
