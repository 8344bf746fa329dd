//! Generation and long-context evaluation as a user meets them: passkeys that a model finds, or cannot find, for reasons that
//! are known; interrupted evaluations; what is refused.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{Fixture, Running, induction, mclora, read_json, tree};
use serde_json::{Value, json};

impl Fixture {
    /// A model that finds passkeys, in `induction/`.
    fn induction() -> Self {
        let fixture = Self::new();
        induction::write(&fixture.path("induction"), json!({}));
        fixture
    }

    /// `eval passkey` on a model with some flags.
    fn passkey(&self, model: &str, flags: &[&str]) -> Vec<String> {
        let base = self.at(model);
        let args = ["eval", "passkey", "--base", &base, "--threads", "2"];
        args.iter().chain(flags).map(|arg| arg.to_string()).collect()
    }

    /// `eval ppl` or `eval gap` on the micro model with some flags.
    fn perplexity(&self, kind: &str, flags: &[&str]) -> Vec<String> {
        let (base, data) = (self.at("base"), self.at("data"));
        let args = ["eval", kind, "--base", &base, "--data", &data, "--max-tokens", "600", "--threads", "2"];
        args.iter().chain(flags).map(|arg| arg.to_string()).collect()
    }

    /// `generate` with the passkey model and some flags.
    fn generate(&self, flags: &[&str]) -> Vec<String> {
        let base = self.at("induction");
        ["generate", "--base", &base].iter().chain(flags).map(|arg| arg.to_string()).collect()
    }
}

fn with(args: &[String], more: &[&str]) -> Vec<String> {
    args.iter().cloned().chain(more.iter().map(|arg| arg.to_string())).collect()
}

/// Found keys by (length, depth).
fn cells(result: &Value) -> Vec<(u64, f64, u64)> {
    let number = |cell: &Value, key: &str| cell[key].as_u64().unwrap();
    let cells = result["cells"].as_array().unwrap();
    cells.iter().map(|c| (number(c, "length"), c["depth"].as_f64().unwrap(), number(c, "right"))).collect()
}

#[test]
fn passkeys_are_found_by_a_model_that_can_look_back() {
    let fixture = Fixture::induction();
    let flags = ["--lengths", "128,600,1500", "--depths", "0,0.5,1", "--trials", "4", "--json"];
    let result = mclora(&fixture.passkey("induction", &flags)).success().json();
    let cells = cells(&result);
    let places: Vec<(u64, f64)> = cells.iter().map(|cell| (cell.0, cell.1)).collect();
    let grid = [128, 600, 1500].map(|length| [0.0, 0.5, 1.0].map(|depth| (length, depth))).concat();
    assert_eq!(places, grid);
    // It looks at two tokens: a key in which two digits come twice in a row can lead it astray. Chance is 1 in 90 000.
    let accuracy = result["accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.85, "{result}");
    assert!(cells.iter().all(|cell| cell.2 >= 2), "{result}");
    for (key, value) in [("attention", "dense"), ("rope", "none"), ("dtype", "f32")] {
        assert_eq!(result[key], value);
    }
    assert!(result["scoring"].as_str().unwrap().contains("greedy") && result["seed"] == 0);

    // Another seed, other keys; the same seed, the same result, whatever runs together.
    let again = mclora(&with(&fixture.passkey("induction", &flags), &["--batch", "3"])).success().json();
    assert_eq!(again["cells"], result["cells"]);
}

#[test]
fn passkeys_are_not_found_by_a_model_that_knows_nothing() {
    let fixture = Fixture::new();
    let flags = ["--lengths", "400", "--depths", "0.5", "--trials", "6", "--json"];
    let result = mclora(&fixture.passkey("base", &flags)).success().json();
    assert_eq!(cells(&result), [(400, 0.5, 0)]);
}

#[test]
fn passkeys_are_lost_when_positions_are_not_what_they_were() {
    let fixture = Fixture::induction();
    let flags = ["--lengths", "300", "--depths", "0.5", "--trials", "6", "--factor", "4", "--json"];
    let result = mclora(&fixture.passkey("induction", &flags)).success().json();
    assert_eq!((cells(&result)[0].2, &result["rope"]), (0, &json!("linear x4")));
}

#[test]
fn a_passkey_table_for_people() {
    let fixture = Fixture::induction();
    let outcome = mclora(&fixture.passkey("induction", &["--lengths", "200", "--depths", "0,1"])).success();
    assert!(outcome.stdout.contains("Keys found, of 5 each:"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("depth / tokens") && outcome.stdout.contains("attention: dense"));
    // No terminal: a line for each cell, and the last step's.
    assert!(outcome.stderr.contains("length     200  depth 0") && outcome.stderr.contains("step 10/10"));
}

/// Everything in the folder but the lock.
fn files(fixture: &Fixture, name: &str) -> Vec<(String, String)> {
    let files = tree(&fixture.path(name));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&fixture.at(name), "OUT");
    files
        .into_iter()
        .map(|(path, bytes)| (path.file_name().unwrap().to_string_lossy().into_owned(), text(bytes)))
        .filter(|(name, _)| name != ".lock")
        .collect()
}

#[test]
fn an_interrupted_evaluation_ends_with_the_files_of_one_that_was_not() {
    let fixture = Fixture::induction();
    let flags = ["--lengths", "150,300", "--depths", "0,0.5,1", "--trials", "2"];
    let args = |out: &str| with(&fixture.passkey("induction", &flags), &["--out", &fixture.at(out)]);
    mclora(&args("whole")).success();
    let whole = files(&fixture, "whole");
    let names: Vec<&str> = whole.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.toml", "report.html", "result.json", "results.jsonl"]);
    let page = &whole[1].1;
    assert!(page.contains("class=\"heat h10\"") && page.contains("Keys found by length and depth"));

    // Killed while it wrote its third cell.
    let results = fs::read_to_string(fixture.path("whole/results.jsonl")).unwrap();
    let end: usize = results.lines().take(3).map(|line| line.len() + 1).sum();
    fixture.copy("whole", "cut");
    for gone in ["report.html", "result.json"] {
        fs::remove_file(fixture.path(&format!("cut/{gone}"))).unwrap();
    }
    fs::write(fixture.path("cut/results.jsonl"), &results[..end + 40]).unwrap();
    let outcome = mclora(&["eval", "passkey", "--resume", "--out", &fixture.at("cut")]).success();
    assert_eq!(outcome.stderr.matches("keys found").count(), 4, "{}", outcome.stderr);
    assert_eq!(files(&fixture, "cut"), whole);

    // Killed for good, wherever that was.
    let mut running = Running::start(&args("killed"), fixture.path("killed.log"));
    let lines = || fs::read_to_string(fixture.path("killed/results.jsonl")).map_or(0, |t| t.lines().count());
    if running.wait_until(|| lines() >= 2) {
        running.signal("KILL");
    }
    running.end();
    mclora(&with(&args("killed"), &["--resume"])).success();
    assert_eq!(files(&fixture, "killed"), whole);
}

#[test]
fn a_stopped_evaluation_says_how_to_go_on() {
    let fixture = Fixture::induction();
    let flags = ["--lengths", "3000", "--depths", "0,0.5,1", "--trials", "50", "--out", &fixture.at("run")];
    let mut running = Running::start(&fixture.passkey("induction", &flags), fixture.path("log"));
    assert!(running.wait_until(|| fixture.path("run/results.jsonl").exists()));
    running.signal("INT");
    assert_eq!(running.end(), (Some(130), None));
    let said = running.said();
    let command = format!("eval passkey --resume --out {}", fixture.at("run"));
    assert!(said.contains(&command), "{said}");
}

#[test]
fn perplexities_say_how_they_were_measured_and_can_be_taken_up() {
    let fixture = Fixture::new();
    let flags = ["--contexts", "32,64", "--json"];
    let args = |out: &str| with(&fixture.perplexity("ppl", &flags), &["--out", &fixture.at(out)]);
    let result = mclora(&args("whole")).success().json();
    for one in result["results"].as_array().unwrap() {
        assert_eq!((&one["attention"], &one["rope"]), (&json!("dense"), &json!("none")));
        assert!(one["scoring"].as_str().unwrap().starts_with("strided, each token once"));
    }
    assert_eq!(read_json(&fixture.path("whole/result.json")), result);
    let whole = files(&fixture, "whole");
    let results = fs::read_to_string(fixture.path("whole/results.jsonl")).unwrap();
    let end: usize = results.lines().take(2).map(|line| line.len() + 1).sum();
    fixture.copy("whole", "cut");
    fs::write(fixture.path("cut/results.jsonl"), &results[..end]).unwrap();
    fs::remove_file(fixture.path("cut/report.html")).unwrap();
    mclora(&["eval", "ppl", "--resume", "--out", &fixture.at("cut")]).success();
    assert_eq!(files(&fixture, "cut"), whole);

    let seeded = mclora(&with(&fixture.perplexity("ppl", &flags), &["--seed", "5"])).success().json();
    assert_ne!(seeded["results"][0]["nll"], result["results"][0]["nll"]);
}

#[test]
fn the_gap_is_sparse_over_dense_on_the_same_tokens() {
    let fixture = Fixture::new();
    let run = |group: &str| {
        let flags =
            ["--contexts", "32,64", "--group", group, "--json", "--out", &fixture.at(&format!("gap{group}"))];
        mclora(&fixture.perplexity("gap", &flags)).success().json()
    };
    let result = run("8");
    let dense = mclora(&fixture.perplexity("ppl", &["--contexts", "32,64", "--json"])).success().json();
    let sparse = mclora(
        &fixture.perplexity("ppl", &["--contexts", "32,64", "--json", "--attention", "s2", "--group", "8"]),
    );
    let sparse = sparse.success().json();
    for (at, gap) in result["results"].as_array().unwrap().iter().enumerate() {
        assert_eq!(gap["dense"], dense["results"][at]);
        assert_eq!(gap["sparse"], sparse["results"][at]);
        assert_eq!(gap["sparse"]["attention"], "s2 (group 8)");
        let number = |key: &str| gap[key]["perplexity"].as_f64().unwrap();
        let want = number("sparse") / number("dense") - 1.0;
        assert!((gap["gap"].as_f64().unwrap() - want).abs() < 1e-12 && want != 0.0, "{gap}");
    }
    assert!(fs::read_to_string(fixture.path("gap8/report.html")).unwrap().contains("Sparse against dense"));
    // A group of the whole context is dense attention.
    assert!(run("64")["results"].as_array().unwrap().iter().all(|gap| gap["gap"] == 0.0));
}

#[test]
fn a_text_is_continued() {
    let fixture = Fixture::induction();
    let prompt = "The pass key is 40718. The market fills up. The pass key is";
    let outcome = mclora(&fixture.generate(&["--prompt", prompt, "--max-new-tokens", "5"])).success();
    assert_eq!(outcome.stdout, "40718\n");
    fs::write(fixture.path("p.txt"), "An owl calls 3 boats. An owl").unwrap();
    let file = fixture.at("p.txt");
    let flags = ["--prompt", prompt, "--prompt-file", &file, "--max-new-tokens", "3", "--json"];
    let result = mclora(&fixture.generate(&flags)).success().json();
    let texts: Vec<&str> =
        result["results"].as_array().unwrap().iter().map(|row| row["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["407", "calls3boats"]);
    assert_eq!((&result["attention"], &result["rope"]), (&json!("dense"), &json!("none")));
    assert_eq!(result["results"][1]["prompt_tokens"], 8);
    // 19 and 8 tokens of prompt, two more each that are run, 2 blocks, 2 heads of 256, keys and values, f32.
    assert_eq!(result["cache_bytes"], (21 + 10) * 2 * 2 * 256 * 2 * 4);
    // The first new token comes from the prompt's last one; each of the other two is a step of both rows.
    for (part, tokens) in [("prefill", 19 + 8), ("decoding", 2 * 2)] {
        let told = &result[part];
        let (seconds, rate) = (told["seconds"].as_f64().unwrap(), told["tokens_per_s"].as_f64().unwrap());
        assert_eq!(told["tokens"], tokens, "{part}");
        assert!(seconds > 0.0 && (rate * seconds / tokens as f64 - 1.0).abs() < 1e-9, "{told}");
    }

    let drawn = |seed: &str| {
        let flags = ["--prompt", prompt, "--temperature", "30", "--top-p", "0.9", "--seed", seed, "--json"];
        mclora(&fixture.generate(&flags)).success().json()["results"][0]["text"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn generation_ends_at_any_end_token_that_a_file_names() {
    let fixture = Fixture::induction();
    let prompt = "The pass key is 40718. The market fills up. The pass key is";
    let vocabulary = read_json(&fixture.path("induction/tokenizer.json"))["model"]["vocab"].clone();
    let generation = json!({"eos_token_id": [0, vocabulary["7"]]});
    fs::write(fixture.path("induction/generation_config.json"), generation.to_string()).unwrap();
    let run = |more: &[&str]| {
        let args = fixture.generate(&["--prompt", prompt, "--max-new-tokens", "5", "--json"]);
        mclora(&with(&args, more)).success().json()["results"][0].clone()
    };
    assert_eq!((&run(&[])["text"], &run(&[])["ended"]), (&json!("40"), &json!(true)));
    let on = run(&["--ignore-end"]);
    assert_eq!((&on["text"], &on["ended"]), (&json!("40718"), &json!(false)));
}

// What is refused.

#[test]
fn a_depth_out_of_range() {
    let fixture = Fixture::new();
    let flags = ["--lengths", "200", "--depths", "0.5,1.5", "--out", &fixture.at("run")];
    mclora(&fixture.passkey("base", &flags))
        .refused(2, &["depths: expected numbers from 0 (beginning) to 1 (end), got 1.5"]);
    assert!(!fixture.path("run").exists());
}

#[test]
fn a_length_without_room_for_the_prompt() {
    let fixture = Fixture::new();
    let flags = ["--lengths", "4000,20", "--out", &fixture.at("run")];
    mclora(&fixture.passkey("base", &flags)).refused(
        2,
        &["lengths: expected at least", "room for the key's line, the question and the answer, got 20"],
    );
    assert!(!fixture.path("run").exists());
}

#[test]
fn a_length_twice() {
    let fixture = Fixture::new();
    mclora(&fixture.passkey("base", &["--lengths", "300,400,300"]))
        .refused(2, &["lengths: expected each once, got 300 twice"]);
}

#[test]
fn a_batch_of_no_prompts() {
    let fixture = Fixture::new();
    mclora(&fixture.passkey("base", &["--lengths", "300", "--batch", "0"]))
        .refused(2, &["batch: expected at least 1 prompt, got 0"]);
}

#[test]
fn no_trials() {
    let fixture = Fixture::new();
    mclora(&fixture.passkey("base", &["--lengths", "300", "--trials", "0"]))
        .refused(2, &["trials: expected 1 to", "got 0"]);
}

#[test]
fn a_cache_that_does_not_fit() {
    let fixture = Fixture::induction();
    // 8 kB of keys and values a token: beyond any machine's memory here.
    let flags = ["--lengths", "16000000", "--out", &fixture.at("run")];
    let message = mclora(&fixture.passkey("induction", &flags)).refused(
        1,
        &[
            "the evaluation of 1 prompts of 16000000 tokens at a time needs about",
            "131.1 GB of it keys and values",
        ],
    );
    assert!(message.contains("What would help: ") && !fixture.path("run").exists(), "{message}");
}

#[test]
fn an_evaluation_taken_up_with_other_settings() {
    let fixture = Fixture::new();
    let flags = ["--lengths", "200", "--depths", "1", "--trials", "1", "--out", &fixture.at("run")];
    mclora(&fixture.passkey("base", &flags)).success();
    let before = tree(&fixture.path("run"));
    mclora(&with(&fixture.passkey("base", &flags), &["--resume", "--seed", "3"]))
        .refused(2, &["seed: expected 0, with which", "got 3"]);
    // Without --resume the folder is not touched.
    mclora(&fixture.passkey("base", &flags)).refused(2, &["expected an empty folder"]);
    assert_eq!(tree(&fixture.path("run")), before);
}

#[test]
fn an_evaluation_taken_up_with_other_weights() {
    let fixture = Fixture::new();
    let flags = ["--lengths", "200", "--depths", "1", "--trials", "1", "--out", &fixture.at("run")];
    mclora(&fixture.passkey("base", &flags)).success();
    fs::remove_dir_all(fixture.path("base")).unwrap();
    fixture.model("base", 2);
    mclora(&with(&fixture.passkey("base", &flags), &["--resume"]))
        .refused(2, &["base_fingerprint: expected"]);
}

#[test]
fn nothing_to_take_up() {
    let fixture = Fixture::new();
    mclora(&with(
        &fixture.passkey("base", &["--lengths", "200"]),
        &["--resume", "--out", &fixture.at("none")],
    ))
    .refused(2, &["expected a run to resume, got no such folder"]);
}

#[test]
fn an_empty_prompt() {
    let fixture = Fixture::induction();
    mclora(&fixture.generate(&["--prompt", " "]))
        .refused(2, &["prompts: expected a text of at least one token, got an empty one at 0"]);
}

#[test]
fn a_prompt_file_that_there_is_not() {
    let fixture = Fixture::induction();
    mclora(&fixture.generate(&["--prompt-file", &fixture.at("none.txt")]))
        .refused(1, &["none.txt: No such file"]);
}

#[test]
fn no_tokens_to_make() {
    let fixture = Fixture::induction();
    mclora(&fixture.generate(&["--prompt", "The", "--max-new-tokens", "0"]))
        .refused(2, &["max_new_tokens: expected 1 to", "got 0"]);
}

#[test]
fn a_share_without_a_temperature() {
    let fixture = Fixture::induction();
    mclora(&fixture.generate(&["--prompt", "The", "--top-p", "0.5"]))
        .refused(2, &["top_p: expected a temperature to draw with, got none beside top_p 0.5"]);
}

#[test]
fn a_temperature_of_zero() {
    let fixture = Fixture::induction();
    mclora(&fixture.generate(&["--prompt", "The", "--temperature", "0"]))
        .refused(2, &["temperature: expected a number above 0, got 0"]);
}

#[test]
fn a_model_without_an_end_token() {
    let fixture = Fixture::new();
    induction::write(&fixture.path("induction"), json!({"eos_token_id": null}));
    common::edit_json(&fixture.path("induction/tokenizer.json"), |tokenizer| {
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let id = vocabulary.remove("</s>").unwrap();
        vocabulary.insert("<none>".into(), id);
    });
    let args = fixture.generate(&["--prompt", "The river runs", "--max-new-tokens", "2"]);
    mclora(&args).refused(
        1,
        &["expected an end-of-sequence token in config.json, generation_config.json", "ignore_end"],
    );
    mclora(&with(&args, &["--ignore-end"])).success();
}
