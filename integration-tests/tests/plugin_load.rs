//! A host outside: loads the built plugin, refuses what is none, and uses a session as a host's runtime would.
//! Golden logits are transformers' (see `fixtures/README.md`).

#![allow(clippy::unwrap_used)] // Helpers of tests, which the lint does not see as tests.

use integration_tests::{fixture, model_with_tokenizer, plugin};
use megacontext_lora_abi::{
    ABI_REVISION, AbiError, Answer, ContextView, DType, Device, EntriesView, ErrorKind, Host, JobParameters,
    LoadOptions, NO_TARGET, Plugin, Session, TensorView, TensorViewMut, VERSION_LINE,
};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

#[path = "plugin_load/gpu.rs"]
mod gpu;
#[path = "plugin_load/refusing.rs"]
mod refusing;

fn load() -> Plugin {
    Plugin::load(plugin().unwrap(), &LoadOptions::default()).unwrap()
}

/// A session over the golden model of this name; the folder lives as long as the first value.
fn open(name: &str) -> (tempfile::TempDir, Session) {
    open_on("auto", name)
}

/// The same on a device.
fn open_on(device: &str, name: &str) -> (tempfile::TempDir, Session) {
    let folder = tempfile::tempdir().unwrap();
    model_with_tokenizer(name, 64, folder.path()).unwrap();
    let session = load().open_session(&json!({ "base": folder.path(), "device": device }), ()).unwrap();
    (folder, session)
}

/// Tokens and logits of the first row of a golden case: T, tokens `[T]`, logits [T, V].
fn golden(name: &str) -> (usize, Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
    let length = tokens.shape()[1];
    let ids = tokens.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
    let values = logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (length, ids.take(length).collect(), values.take(length * logits.shape()[2]).collect())
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_plugin_says_what_it_is() {
    let plugin = load();
    assert_eq!(plugin.abi_revision(), ABI_REVISION);
    assert_eq!(plugin.version_line(), VERSION_LINE);
    assert!(plugin.build_info().rustc.starts_with("rustc "));
    assert_eq!(plugin.build_info().crate_version, env!("CARGO_PKG_VERSION"));
    let can = plugin.capabilities();
    let told = plugin.open_session(&json!({}), ()).unwrap().describe().unwrap();
    let jobs: Vec<&str> = told["jobs"].as_array().unwrap().iter().map(|job| job.as_str().unwrap()).collect();
    assert!(can.contains(&"device:cpu".to_string()), "{can:?}");
    assert_eq!(told["devices"][0], json!({ "device": "cpu" }));
    assert!(jobs.contains(&"extend") && jobs.contains(&"sweep"), "{jobs:?}");
    assert_eq!(can.iter().filter(|name| name.starts_with("job:")).count(), jobs.len());
    for job in jobs {
        assert!(can.contains(&format!("job:{job}")), "{job}: {can:?}");
    }
}

#[test]
fn loading_twice_gives_the_same_plugin() {
    let (one, two) = (load(), load());
    assert_eq!(one.build_info(), two.build_info());
    two.open_session(&json!({}), ()).unwrap().describe().unwrap();
    one.open_session(&json!({}), ()).unwrap().describe().unwrap();
}

#[test]
fn a_session_without_a_base_runs_jobs_only() {
    let session = load().open_session(&json!({}), ()).unwrap();
    assert_eq!(session.describe().unwrap()["base"], Value::Null);
    let refused = load().open_session(&json!({ "device": "cpu" }), ()).err().unwrap();
    assert_eq!(refused.message(), "session: a device needs a base, got cpu without one; jobs name their own");
    let mut out = [0f32; 4];
    let error =
        session.embed(TensorView::of(&[1u32]), TensorViewMut::new(&mut out, &[1, 4]).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    let error = session.run("dance", &json!({})).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("extend"), "{error}");
    let error = session.run("extend", &json!({ "contxt": 1 })).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("contxt"), "{error}");
}

#[test]
fn opening_says_what_is_wrong() {
    let plugin = load();
    let kind = |config: Value| plugin.open_session(&config, ()).err().map(|e| e.kind());
    assert_eq!(kind(json!({ "bas": "x" })), Some(ErrorKind::Usage));
    assert_eq!(kind(json!({ "adapter": "x" })), Some(ErrorKind::Usage));
    assert_eq!(kind(json!([])), Some(ErrorKind::Usage));
    assert!(matches!(kind(json!({ "base": "/no/such/model" })), Some(ErrorKind::Model | ErrorKind::Io)));
}

#[test]
fn logits_and_nll_are_those_of_transformers() {
    for name in ["llama/tied_f32", "llama/untied_bf16_sharded", "llama/untied_f32_linear"] {
        let (_folder, session) = open(name);
        let sizes = session.describe().unwrap();
        let (v, (t, tokens, expected)) = (sizes["vocab_size"].as_u64().unwrap() as usize, golden(name));
        let mut logits = vec![0f32; t * v];
        session
            .logits(ContextView::tokens(&tokens), TensorViewMut::new(&mut logits, &[t, v]).unwrap())
            .unwrap();
        assert!(largest_difference(&logits, &expected) < 2e-4, "{name}");

        let mut nll = vec![0f32; t];
        session.nll(ContextView::tokens(&tokens), TensorViewMut::of(&mut nll)).unwrap();
        assert!(nll[t - 1].is_nan(), "nothing follows the last token");
        for (i, got) in nll[..t - 1].iter().enumerate() {
            let row = &expected[i * v..(i + 1) * v];
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            let want = sum.ln() - f64::from(row[tokens[i + 1] as usize]);
            assert!((f64::from(*got) - want).abs() < 2e-4, "{name}, entry {i}: {got} and {want}");
        }
    }
}

#[test]
fn a_host_switches_adapters_and_merges_one_without_opening_the_base_again() {
    let (_folder, session) = open("llama/tied_f32");
    let (length, tokens, with_peft) = golden("llama/tied_f32_peft");
    let logits = || {
        let mut out = vec![0f32; with_peft.len()];
        let view = TensorViewMut::new(&mut out, &[length, 64]).unwrap();
        session.logits(ContextView::tokens(&tokens), view).unwrap();
        out
    };
    let bare = logits();
    let told = session.load_adapter("peft", &fixture("llama/tied_f32_peft")).unwrap();
    assert_eq!(told, json!({ "active": null, "adapters": ["peft"] }));
    assert!(logits() == bare);
    session.set_adapter(Some("peft")).unwrap();
    let adapted = logits();
    assert!(largest_difference(&adapted, &with_peft) < 1e-4);
    session.merge_adapter().unwrap();
    assert!(largest_difference(&logits(), &with_peft) < 1e-4);
    session.unmerge_adapter().unwrap();
    assert!(logits() == adapted);
    session.set_adapter(None).unwrap();
    assert!(logits() == bare);
    session.unload_adapter("peft", false).unwrap();
    let error = session.set_adapter(Some("peft")).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("peft"), "{error}");
}

#[test]
fn embeddings_with_positions_are_the_same_context() {
    let name = "llama/tied_f32";
    let (_folder, session) = open(name);
    let (t, tokens, expected) = golden(name);
    let sizes = session.describe().unwrap();
    let size = |key: &str| sizes[key].as_u64().unwrap() as usize;
    let (e, v) = (size("hidden_size"), size("vocab_size"));
    let mut x = vec![0f32; t * e];
    session.embed(TensorView::of(&tokens), TensorViewMut::new(&mut x, &[t, e]).unwrap()).unwrap();

    let mu: Vec<f64> = (0..t).map(|i| i as f64).collect();
    let targets = vec![NO_TARGET; t];
    let context = ContextView::new(EntriesView::Embeddings(TensorView::new(&x, &[t, e]).unwrap()))
        .with_mu(TensorView::of(&mu))
        .with_targets(TensorView::of(&targets));
    let mut logits = vec![0f32; t * v];
    session.logits(context, TensorViewMut::new(&mut logits, &[t, v]).unwrap()).unwrap();
    assert!(largest_difference(&logits, &expected) < 2e-4);
    let mut nll = vec![0f32; t];
    session.nll(context, TensorViewMut::of(&mut nll)).unwrap();
    assert!(nll.iter().all(|n| n.is_nan()), "no target, no score");

    // Positions shifted by a constant give the same logits; blurred ones others.
    let shifted: Vec<f64> = mu.iter().map(|m| m + 1000.0).collect();
    session
        .logits(context.with_mu(TensorView::of(&shifted)), TensorViewMut::new(&mut logits, &[t, v]).unwrap())
        .unwrap();
    assert!(largest_difference(&logits, &expected) < 2e-3);
    let sigma = vec![4f64; t];
    session
        .logits(context.with_sigma(TensorView::of(&sigma)), TensorViewMut::new(&mut logits, &[t, v]).unwrap())
        .unwrap();
    assert!(largest_difference(&logits, &expected) > 1e-2);
}

#[test]
fn levels_say_where_entries_stand() {
    let name = "llama/tied_f32";
    let (_folder, session) = open(name);
    let (t, tokens, _) = golden(name);
    let sizes = session.describe().unwrap();
    let size = |key: &str| sizes[key].as_u64().unwrap() as usize;
    let (half, v) = (size("head_dim") / 2, size("vocab_size"));
    // Two gists of 32 tokens, then tokens: centres of spans, and their spans as spreads.
    let lod: Vec<u32> = (0..t).map(|i| u32::from(i < 2)).collect();
    let place = |i: usize| if i < 2 { 32.0 * i as f64 + 16.0 } else { 64.0 + (i - 2) as f64 };
    let mu: Vec<f64> = (0..t).map(place).collect();
    let sigma: Vec<f64> = (0..t).map(|i| if i < 2 { 32.0 } else { 0.0 }).collect();
    let context = ContextView::tokens(&tokens);
    let by_level = context.with_lod(TensorView::of(&lod));
    let outright = context.with_mu(TensorView::of(&mu)).with_sigma(TensorView::of(&sigma));
    let logits = |context: ContextView<'_>| {
        let mut logits = vec![0f32; t * v];
        session.logits(context, TensorViewMut::new(&mut logits, &[t, v]).unwrap()).unwrap();
        logits
    };
    assert_eq!(logits(by_level), logits(outright));
    assert_ne!(logits(by_level), logits(context));

    let tables = |context: ContextView<'_>| {
        let (mut cos, mut sin) = (vec![9f32; t * half], vec![9f32; t * half]);
        let shape = [t, half];
        session
            .context_tables(
                context,
                TensorViewMut::new(&mut cos, &shape).unwrap(),
                TensorViewMut::new(&mut sin, &shape).unwrap(),
            )
            .unwrap();
        (cos, sin)
    };
    assert_eq!(tables(by_level), tables(outright));
    // Nothing is left of the fastest band of a gist; tokens are certain.
    let (cos, sin) = tables(by_level);
    assert!(cos[0].hypot(sin[0]) < 1e-6 && (cos[2 * half].hypot(sin[2 * half]) - 1.0).abs() < 1e-6);

    let short = [0u32; 1];
    let mut out = vec![0f32; t * v];
    let error = session
        .logits(context.with_lod(TensorView::of(&short)), TensorViewMut::new(&mut out, &[t, v]).unwrap())
        .unwrap_err();
    assert!(error.message().contains("lod"), "{error}");
}

#[test]
fn rope_tables_are_cosines_and_sines() {
    let (_folder, session) = open("llama/tied_f32");
    let half = session.describe().unwrap()["head_dim"].as_u64().unwrap() as usize / 2;
    let mu = [0f64, 3.0];
    let (mut cos, mut sin) = (vec![9f32; 2 * half], vec![9f32; 2 * half]);
    let shape = [2, half];
    session
        .rope_tables(
            TensorView::of(&mu),
            TensorView::of::<f64>(&[]),
            TensorViewMut::new(&mut cos, &shape).unwrap(),
            TensorViewMut::new(&mut sin, &shape).unwrap(),
        )
        .unwrap();
    assert!(cos[..half].iter().all(|&c| c == 1.0) && sin[..half].iter().all(|&s| s == 0.0));
    // Band 0 turns by one radian a token.
    assert!((cos[half] - 3f32.cos()).abs() < 1e-6 && (sin[half] - 3f32.sin()).abs() < 1e-6);
}

#[test]
fn wrong_views_are_refused_by_name() {
    let (_folder, session) = open("llama/tied_f32");
    let tokens = [1u32, 2, 3];
    let context = ContextView::tokens(&tokens);
    let message = |result: Result<(), megacontext_lora_abi::AbiError>| {
        let error = result.expect_err("must be refused");
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error.to_string()
    };
    let mut small = vec![0f32; 3 * 63];
    assert!(
        message(session.logits(context, TensorViewMut::new(&mut small, &[3, 63]).unwrap())).contains("out")
    );
    let mut flat = vec![0f32; 3 * 64];
    assert!(
        message(session.logits(context, TensorViewMut::of(&mut flat)))
            .contains("expected 2 dimensions, got 1")
    );
    let mut doubles = vec![0f64; 3 * 64];
    let out = TensorViewMut::new(&mut doubles, &[3, 64]).unwrap();
    assert!(message(session.logits(context, out)).contains("out: expected F32, got F64"));
    // SAFETY: the receiver refuses the null pointer before it writes; this is what the test shows.
    let null = unsafe {
        TensorViewMut::from_raw_parts(std::ptr::null_mut(), DType::F32, Device::CPU, &[3, 64], &[64, 1])
    };
    assert!(message(session.logits(context, null)).contains("out: null pointer"));
    let mu = [0f64, 1.0];
    let out = TensorViewMut::new(&mut flat, &[3, 64]).unwrap();
    assert!(
        message(session.logits(context.with_mu(TensorView::of(&mu)), out))
            .contains("mu: expected the shape [3]")
    );
    let out = TensorViewMut::new(&mut flat, &[3, 64]).unwrap();
    assert!(message(session.logits(ContextView::tokens(&[1, 64, 3]), out)).contains("64"));
    // After all that it still works.
    session.logits(context, TensorViewMut::new(&mut flat, &[3, 64]).unwrap()).unwrap();
}

#[test]
fn a_host_drives_a_phase_and_takes_the_adapter_away() {
    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);
    impl Host for Recorder {
        fn phase_entered(&self, _: &str) -> Answer {
            self.0.lock().unwrap().push("entered".to_owned());
            Answer::Continue
        }
        fn phase_left(&self, _: &str) -> Answer {
            self.0.lock().unwrap().push("left".to_owned());
            Answer::Continue
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    model_with_tokenizer("llama/tied_f32", 64, &base).unwrap();
    let recorder = Arc::new(Recorder::default());
    let session = load().open_session(&json!({ "base": base }), recorder.clone()).unwrap();
    let batch = json!({ "tokens": [[1, 2, 3, 4, 5, 6, 7, 8, 9]] });
    assert_eq!(session.step(&batch).unwrap_err().kind(), ErrorKind::Usage, "nothing learns yet");

    let before = session.evaluate(&batch).unwrap()["nll"].as_f64().unwrap();
    session
        .enter_phase(&json!({ "groups": ["lora"], "lora": { "r": 2 }, "optimizer": { "lr": 0.05, "warmup_steps": 1 } }))
        .unwrap();
    for _ in 0..10 {
        session.step(&batch).unwrap();
    }
    let after = session.evaluate(&batch).unwrap()["nll"].as_f64().unwrap();
    assert!(after < before - 0.1, "{before} to {after}");
    session.leave_phase().unwrap();
    assert_eq!(*recorder.0.lock().unwrap(), ["entered", "left"]);

    let groups = session.parameter_groups().unwrap();
    let names = |group: &str| groups[group]["parameters"].as_array().map_or(0, Vec::len);
    assert!(names("lora") == 16 && names("base") > 0, "{groups}");

    // k_proj is 16 x 32: the delta must be that way round.
    let module = "model.layers.0.self_attn.k_proj";
    let mut delta = vec![0f32; 16 * 32];
    session.lora_delta(module, TensorViewMut::new(&mut delta, &[16, 32]).unwrap()).unwrap();
    assert!(delta.iter().any(|&d| d != 0.0));
    let error = session.lora_delta(module, TensorViewMut::new(&mut delta, &[32, 16]).unwrap()).unwrap_err();
    assert!(error.message().contains("expected the shape [16, any]"), "{error}");

    // The delta is scale · B · A of the parameters that the session hands out.
    let named = |factor: &str| format!("{module}.{factor}.weight");
    let of = |factor: &str| session.parameter(&named(factor)).unwrap();
    let (a, b) = (of("lora_A"), of("lora_B"));
    assert_eq!((a.shape(), b.shape()), (vec![2, 32], vec![16, 2]));
    let (a, b) = (a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap());
    // The same without a copy, read-only, and nobody steps meanwhile.
    let shared = session.shared_parameter(&named("lora_B")).unwrap();
    assert!(shared.read_only());
    assert_eq!(shared.view().unwrap().read::<f32>("lora_B", &[Some(16), Some(2)]).unwrap(), b);
    session.enter_phase(&json!({ "groups": ["lora"] })).unwrap();
    let error = session.step(&batch).unwrap_err();
    assert!(error.message().contains("got 1 of shared_parameter that are still held"), "{error}");
    drop(shared);
    session.leave_phase().unwrap();
    let product = |o: usize, i: usize| 8.0 * (b[2 * o] * a[i] + b[2 * o + 1] * a[32 + i]);
    for (at, got) in delta.iter().enumerate() {
        assert!((got - product(at / 32, at % 32)).abs() < 1e-4, "{at}: {got}");
    }

    let adapter = folder.path().join("adapter");
    session.export(&adapter).unwrap();
    let again = load().open_session(&json!({ "base": base, "adapter": adapter }), ()).unwrap();
    let reread = again.evaluate(&batch).unwrap()["nll"].as_f64().unwrap();
    assert!((reread - after).abs() < 1e-5, "{after} and {reread}");
}

/// What a host has read of a job's parameters, between its phases.
#[derive(Default)]
struct Reader(Mutex<Vec<(String, Value)>>);

impl Host for Reader {
    fn parameters(&self, when: &str, json: &str, parameters: &JobParameters<'_>) {
        let phase: Value = serde_json::from_str(json).unwrap();
        let groups = parameters.groups().unwrap();
        let sum = |name: &str| {
            let view = parameters.get(name).unwrap();
            let dims: Vec<_> = view.shape().iter().map(|dim| Some(*dim)).collect();
            // The frozen base is stored in bf16 here, what learns in f32.
            match view.dtype() {
                DType::Bf16 => {
                    view.read::<half::bf16>(name, &dims).unwrap().iter().map(|v| v.to_f32()).sum::<f32>()
                }
                _ => view.read::<f32>(name, &dims).unwrap().iter().sum::<f32>(),
            }
        };
        let network = |module: &str| -> Vec<f32> {
            let list = groups[module][module]["parameters"].as_array().unwrap();
            list.iter().map(|entry| sum(entry["name"].as_str().unwrap())).collect()
        };
        let module = "model.layers.0.self_attn.k_proj";
        let mut delta = vec![0f32; 16 * 32];
        parameters.lora_delta(module, TensorViewMut::new(&mut delta, &[16, 32]).unwrap()).unwrap();
        let error = parameters.lora_delta(module, TensorViewMut::new(&mut delta, &[32, 16]).unwrap());
        assert!(error.unwrap_err().message().contains("expected the shape [16, 32]"));
        let error = parameters.get("lensnet/none").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.message().contains("got \"lensnet/none\""), "{error}");
        let of = |factor: &str| {
            let name = format!("model/{module}.{factor}.weight");
            let view = parameters.get(&name).unwrap();
            view.read::<f32>(&name, &[None, None]).unwrap().into_owned()
        };
        let (a, b) = (of("lora_A"), of("lora_B"));
        let product = |o: usize, i: usize| 8.0 * (b[2 * o] * a[i] + b[2 * o + 1] * a[32 + i]);
        assert!(delta.iter().enumerate().all(|(at, d)| (d - product(at / 32, at % 32)).abs() < 1e-5));
        let frozen = &groups["model"]["base"];
        assert_eq!((&frozen["learns"], &frozen["parameters"][0]["stored"]), (&json!(false), &json!("bf16")));
        let read = json!({
            "phase": phase["phase"], "learns": groups["gistnet"]["gistnet"]["learns"], "gistnet": network("gistnet"),
            "lensnet": network("lensnet"), "delta": delta.iter().map(|d| d.abs()).sum::<f32>(),
            "base": sum(frozen["parameters"][0]["name"].as_str().unwrap()),
        });
        self.0.lock().unwrap().push((when.to_owned(), read));
    }
}

#[test]
fn a_host_reads_what_a_running_job_has_learned_between_its_phases() {
    let folder = tempfile::tempdir().unwrap();
    let (base, text) = (folder.path().join("base"), folder.path().join("texts"));
    model_with_tokenizer("llama/tied_f32", 64, &base).unwrap();
    std::fs::create_dir(&text).unwrap();
    let mut state = 1u64;
    for document in 0..30 {
        let words: Vec<String> = (0..400)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                format!("w{}", 1 + (state >> 33) % 50)
            })
            .collect();
        std::fs::write(text.join(format!("{document}.txt")), words.join(" ")).unwrap();
    }
    let reader = Arc::new(Reader::default());
    let session = load().open_session(&json!({}), reader.clone()).unwrap();
    let labels = json!({ "rounds": 1, "histories": 4 });
    let settings = json!({
        "base": base, "data": [text], "out": folder.path().join("run"), "contexts": [44], "horizon": 4, "budget": 24, "protected": 4,
        "holdout": 0.2, "cycles": 1, "dtype": "bf16", "network": { "block": 4, "layers": 1 }, "lens": { "layers": 1 },
        "lora": { "r": 2, "alpha": 16 },
        "warm_gistnet": { "steps": 3, "batch": 2, "spans": 3 },
        "warm_lensnet": { "steps": 2, "batch": 2, "labels": labels },
        "jt1": { "steps": 2, "batch": 2, "spans": 3 }, "jt2": { "steps": 2, "batch": 2, "labels": labels },
        "jt3": { "steps": 3, "batch": 2 }, "judge": { "tolerance": 9.0, "full_tolerance": 9.0 },
        "validation": { "histories": 4, "test_histories": 4, "spans": 3 },
    });
    session.run("train", &settings).unwrap();
    let read = std::mem::take(&mut *reader.0.lock().unwrap());
    let whens: Vec<&str> = read.iter().map(|(when, _)| when.as_str()).collect();
    assert_eq!(whens, ["phase_entered", "phase_left"].repeat(5));
    for phase in read.chunks(2) {
        let [(_, entered), (_, left)] = phase else { unreachable!() };
        let name = entered["phase"].as_str().unwrap();
        let learns = |key: &str| match key {
            "gistnet" => name == "warm_gistnet" || name == "jt1",
            "lensnet" => name == "warm_lensnet" || name == "jt2",
            "delta" => name == "jt3",
            _ => false,
        };
        assert_eq!(entered["learns"], learns("gistnet"), "{name}");
        for key in ["gistnet", "lensnet", "delta", "base"] {
            assert_eq!(
                entered[key] != left[key],
                learns(key),
                "{name}: {key}: {} to {}",
                entered[key],
                left[key]
            );
        }
    }
}

#[test]
fn a_job_stops_when_the_host_says_so() {
    struct Impatient;
    impl Host for Impatient {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (base, text) = (folder.path().join("base"), folder.path().join("text.txt"));
    model_with_tokenizer("llama/tied_f32", 64, &base).unwrap();
    std::fs::write(&text, "w1 w2 w3 w4 ".repeat(2000)).unwrap();
    let session = load().open_session(&json!({}), Impatient).unwrap();
    let job =
        json!({ "base": base, "data": [text], "out": folder.path().join("run"), "context": 64, "steps": 2 });
    let error = session.run("extend", &job).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
}

#[test]
fn a_panicking_host_ends_its_job_and_nothing_else() {
    struct Broken;
    impl Host for Broken {
        fn event(&self, _: &str, _: &str) {
            panic!("a callback with a bug");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (base, text) = (folder.path().join("base"), folder.path().join("text.txt"));
    model_with_tokenizer("llama/tied_f32", 64, &base).unwrap();
    std::fs::write(&text, "w1 w2 w3 w4 ".repeat(2000)).unwrap();
    let session = load().open_session(&json!({}), Broken).unwrap();
    let job =
        json!({ "base": base, "data": [text], "out": folder.path().join("run"), "context": 64, "steps": 2 });
    assert_eq!(session.run("extend", &job).unwrap_err().kind(), ErrorKind::Cancelled);
    session.describe().unwrap();
}

#[test]
fn a_session_serves_several_threads() {
    let name = "llama/tied_f32";
    let (_folder, session) = open(name);
    let (t, tokens, expected) = golden(name);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut logits = vec![0f32; expected.len()];
                let shape = [t, expected.len() / t];
                session
                    .logits(ContextView::tokens(&tokens), TensorViewMut::new(&mut logits, &shape).unwrap())
                    .unwrap();
                assert!(largest_difference(&logits, &expected) < 2e-4);
            });
        }
    });
}

#[test]
fn a_hosts_history_becomes_gists() {
    // There a GPU's tensors are refused.
    let (folder, session) = open_on("cpu", "llama/tied_f32");
    assert!(load().capabilities().contains(&"session:tree".to_string()));
    let told = session.describe().unwrap();
    let (width, block) = (told["hidden_size"].as_u64().unwrap() as usize, 4);
    let path = folder.path().join("gistnet.safetensors");
    let config = gistnet_adapter::GistNetConfig { block, ..gistnet_adapter::GistNetConfig::new(width, 4) };
    let network = gistnet_adapter::GistNet::new(config, 1).unwrap();
    network.save(&path, &gistnet_adapter::Identity::of_base(told["fingerprint"].as_str().unwrap())).unwrap();

    let ids: Vec<u32> = (0..22).map(|i| i * 5 % 64).collect();
    let error = session.tree_append(TensorView::of(&ids)).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("open_tree"), "{error}");
    session.open_tree(&json!({ "network": path, "name": "tied" })).unwrap();
    // Every second of a longer array, and the rest: views need not lie in one piece.
    let spread: Vec<u32> = ids.iter().flat_map(|id| [*id, 9999]).collect();
    // SAFETY: 22 elements with a step of 2 lie within the 44 of `spread`, which outlives the view.
    let strided = unsafe {
        TensorView::from_raw_parts(spread.as_ptr().cast(), DType::U32, Device::CPU, &[ids.len()], &[2])
    };
    let error = session.tree_append(gpu::on_gpu(DType::U32, &[22], &[1])).unwrap_err();
    assert_eq!(error.message(), "tokens: expected memory on cpu, got cuda:0");
    assert_eq!(session.tree_append(strided).unwrap()["made"], json!([5, 1]));
    assert_eq!(
        session.tree_append(TensorView::of(&[1u32, 2])).unwrap()["nodes"],
        json!({ "LOD1": 6, "LOD2": 1 })
    );

    let mut embedded = vec![0f32; 20 * width];
    session
        .embed(TensorView::of(&ids[..20]), TensorViewMut::new(&mut embedded, &[20, width]).unwrap())
        .unwrap();
    let expected = network.gists(&embedded, 5).unwrap();
    let mut gists = vec![0f32; 5 * width];
    session.tree_gists(1, 0, TensorViewMut::new(&mut gists, &[5, width]).unwrap()).unwrap();
    assert_eq!(gists, expected);
    gists.fill(0.0);
    let entries = TensorView::new(&embedded, &[5, block, width]).unwrap();
    session.gists(entries, 0, TensorViewMut::new(&mut gists, &[5, width]).unwrap()).unwrap();
    assert_eq!(gists, expected);
    // They are entries of a context like any other.
    let entries = EntriesView::Embeddings(TensorView::new(&gists, &[5, width]).unwrap());
    let mut logits = vec![0f32; 5 * 64];
    let context = ContextView::new(entries).with_lod(TensorView::of(&[1u32; 5]));
    session.logits(context, TensorViewMut::new(&mut logits, &[5, 64]).unwrap()).unwrap();
    assert!(logits.iter().all(|v| v.is_finite()));

    let stored = folder.path().join("tree");
    session.save_tree(&json!({ "path": stored, "dtype": "f32" })).unwrap();
    let again = session.open_tree(&json!({ "network": path, "name": "tied", "stored": stored })).unwrap();
    assert_eq!(again["tokens"], json!(24));

    let flat = TensorView::new(&embedded, &[20, width]).unwrap();
    let refused = [
        session.gists(flat, 0, TensorViewMut::new(&mut gists, &[5, width]).unwrap()).unwrap_err(),
        session.tree_gists(1, 2, TensorViewMut::new(&mut logits, &[5, 64]).unwrap()).unwrap_err(),
        session.tree_append(TensorView::of(&[1i64])).unwrap_err(),
        session.open_tree(&json!({ "network": folder.path().join("none") })).unwrap_err(),
    ];
    let kinds = refused.each_ref().map(|error| error.kind());
    assert_eq!(kinds, [ErrorKind::Usage, ErrorKind::Usage, ErrorKind::Usage, ErrorKind::Io], "{refused:?}");
    assert_eq!(session.tree_append(TensorView::of(&[] as &[u32])).unwrap()["tokens"], json!(24));
}

#[test]
fn a_host_scores_its_history_and_chooses_what_is_looked_at() {
    /// Expands the entry of the highest score, whatever the plugin would do.
    #[derive(Default)]
    struct Chooser(Mutex<Vec<String>>);
    impl Host for Chooser {
        fn event(&self, kind: &str, json: &str) {
            self.0.lock().unwrap().push(format!("{kind} {json}"));
        }
        fn allocate(&self, json: &str) -> Result<Option<String>, AbiError> {
            let question: Value = serde_json::from_str(json).unwrap();
            let scores = question["scores"].as_array().unwrap().iter().map(|score| score.as_f64().unwrap());
            let best = scores.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
            let [start, lod] = [0, 1].map(|at| &question["entries"][best][at]);
            let edit = json!({ "action": "expand", "start": start, "lod": lod });
            Ok(Some(json!({ "edits": [edit] }).to_string()))
        }
    }
    let folder = tempfile::tempdir().unwrap();
    model_with_tokenizer("llama/tied_f32", 64, folder.path()).unwrap();
    let chooser = Arc::new(Chooser::default());
    let session = load().open_session(&json!({ "base": folder.path() }), chooser.clone()).unwrap();
    assert!(load().capabilities().contains(&"session:focus".to_string()));
    let told = session.describe().unwrap();
    let (width, block) = (told["hidden_size"].as_u64().unwrap() as usize, 4);
    let identity = gistnet_adapter::Identity::of_base(told["fingerprint"].as_str().unwrap());
    let [gistnet, lensnet] =
        ["gistnet", "lensnet"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let config = gistnet_adapter::GistNetConfig { block, ..gistnet_adapter::GistNetConfig::new(width, 4) };
    gistnet_adapter::GistNet::new(config, 1).unwrap().save(&gistnet, &identity).unwrap();
    let config = lensnet_adapter::LensNetConfig { block, ..lensnet_adapter::LensNetConfig::new(width, 4) };
    lensnet_adapter::LensNet::new(config, 1).unwrap().save(&lensnet, &identity).unwrap();

    let ids: Vec<u32> = (0..22).map(|i| i * 5 % 64).collect();
    session.open_tree(&json!({ "network": gistnet })).unwrap();
    session.tree_append(TensorView::of(&ids)).unwrap();
    let error = session.refocus(&json!({ "budget": 16 }), None).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("open_lens"), "{error}");
    assert_eq!(session.open_lens(&json!({ "network": lensnet })).unwrap()["config"]["block"], json!(block));

    let (start, lod) = ([0i64, 16, 20, 21], [2u32, 1, 0, 0]);
    let mut scores = [9f32; 4];
    session
        .focus_scores(TensorView::of(&start), TensorView::of(&lod), TensorViewMut::of(&mut scores))
        .unwrap();
    assert!(scores.iter().all(|u| u.abs() <= 1.0) && scores[0] >= 0.0 && scores[2].max(scores[3]) <= 0.0);

    let entries: Vec<(i64, u32)> = start.into_iter().zip(lod).collect();
    let given = [0.1f32, 0.9, 0.0, 0.0];
    let params = json!({ "budget": 16, "entries": entries, "tag": "infer_7" });
    let answer = session.refocus(&params, Some(TensorView::of(&given))).unwrap();
    assert_eq!(answer["edits"][0]["start"], json!(16));
    assert_eq!(answer["entries"].as_array().unwrap().len(), 7);
    let heard = chooser.0.lock().unwrap().clone();
    let event = heard.iter().find_map(|line| line.strip_prefix("focus_allocator ")).unwrap();
    let event: Value = serde_json::from_str(event).unwrap();
    assert_eq!(event, answer["focus_allocator"]);
    assert_eq!((&event["tag"], &event["allocator"]), (&json!("infer_7"), &json!("host")));

    // On with what the session holds, by LensNet's scores.
    let answer = session.refocus(&json!({ "budget": 16 }), None).unwrap();
    assert_eq!(answer["focus_allocator"]["source"], json!("lensnet"));
    let spoiled = [0.1f32, f32::NAN, 0.0, 0.0];
    let error = session.refocus(&params, Some(TensorView::of(&spoiled))).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.message().contains("got NaN for entry 1"), "{error}");
    let error = session
        .focus_scores(TensorView::of(&lod), TensorView::of(&lod), TensorViewMut::of(&mut scores))
        .unwrap_err();
    assert!(error.message().contains("start"), "{error}");
}
