//! A host's tensors on the session's GPU: every call gives the bytes that it gives for the host's own, waits for the host's stream, and
//! refuses before anything is changed. Each test runs in a process of its own, in which the loader finds the emulated driver.

use std::process::Command;

use gistnet_adapter::{GistNet, GistNetConfig};
use lensnet_adapter::{Identity, LensNet, LensNetConfig};
use megacontext_lora_abi::{
    AbiError, ContextView, DType, EntriesView, ErrorKind, NO_TARGET, Session, Stream, TensorView,
    TensorViewMut,
};
use serde_json::json;

use crate::common::{Fixture, VOCAB, finish};
use crate::host::Host;
use crate::libraries::search_path;

const T: usize = 7;
const WIDTH: usize = 32;
const HALF: usize = 4;
const BLOCK: usize = 4;
const IDS: [u32; T] = [5, 17, 0, 299, 42, 42, 7];
const GAP: f32 = -77.0;

/// Runs an ignored test of this program on a machine with the emulated GPU; nothing without a compiler.
#[track_caller]
pub fn alone(test: &str) {
    let Some(path) = search_path().unwrap() else { return };
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", path).env("MEGACONTEXT_CUDA_CACHE", cache.path());
    let outcome = finish(command).success();
    assert!(outcome.stdout.contains("1 passed"), "{}", outcome.stdout);
}

/// A session on the GPU over the micro model.
fn open(host: &Host) -> (Fixture, Session) {
    let fixture = Fixture::new();
    let session = host.open(&json!({ "base": fixture.path("base"), "device": "cuda:0" }));
    let on = session.describe().unwrap()["device"].as_str().unwrap().to_string();
    assert!(on.starts_with("cuda:0"), "{on}");
    (fixture, session)
}

/// Strides of a matrix: row-major, with something behind each row, with something behind each value, transposed.
fn layouts([rows, columns]: [usize; 2]) -> [[usize; 2]; 4] {
    [[columns, 1], [columns + 3, 1], [2 * columns + 1, 2], [1, rows + 1]]
}

/// Holds what a call wrote into matrices of the GPU, laid out in every way, against what it wrote for the host.
#[track_caller]
fn same_bytes(
    host: &Host,
    shape: [usize; 2],
    expected: &[f32],
    call: impl Fn(TensorViewMut<'_>) -> Result<(), AbiError>,
) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    for strides in layouts(shape) {
        let mut out = host.strided(&vec![3.0; expected.len()], &shape, &strides, GAP);
        call(out.out(host.stream())).unwrap();
        assert_eq!(bits(&host.values(&out)), bits(expected), "strides {strides:?}");
    }
}

/// What a call writes for the host.
#[track_caller]
fn on_host(shape: &[usize], call: impl FnOnce(TensorViewMut<'_>) -> Result<(), AbiError>) -> Vec<f32> {
    let mut out = vec![9f32; shape.iter().product()];
    call(TensorViewMut::new(&mut out, shape).unwrap()).unwrap();
    out
}

#[test]
fn every_call_gives_the_bytes_that_it_gives_for_the_hosts_tensors() {
    alone("tensors::contexts");
    alone("tensors::deltas");
    alone("tensors::histories");
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn contexts() {
    let host = Host::new();
    let (_fixture, session) = open(&host);
    let stream = host.stream();
    let tokens = host.strided(&IDS, &[T], &[3], 1);
    let embedded = on_host(&[T, WIDTH], |out| session.embed(TensorView::of(&IDS), out));
    same_bytes(&host, [T, WIDTH], &embedded, |out| session.embed(tokens.view(stream), out));
    same_bytes(&host, [T, WIDTH], &embedded, |out| session.embed(TensorView::of(&IDS), out));
    assert_eq!(on_host(&[T, WIDTH], |out| session.embed(tokens.view(stream), out)), embedded);

    let mu: [f64; T] = std::array::from_fn(|i| 1.5 * i as f64 + 0.25);
    let sigma: [f64; T] = std::array::from_fn(|i| 0.5 * (i % 3) as f64);
    let lod: [u32; T] = [1, 1, 0, 0, 0, 0, 0];
    let targets: [u32; T] = [17, 0, NO_TARGET, 42, 42, 7, NO_TARGET];
    let (mu_there, sigma_there) = (host.strided(&mu, &[T], &[2], -1.0), host.dense(&sigma, &[T]));
    let (lod_there, targets_there) = (host.dense(&lod, &[T]), host.strided(&targets, &[T], &[5], 3));
    let entries = || ContextView::new(EntriesView::Tokens(tokens.view(stream)));
    let placed = ContextView::tokens(&IDS)
        .with_mu(TensorView::of(&mu))
        .with_sigma(TensorView::of(&sigma))
        .with_lod(TensorView::of(&lod))
        .with_targets(TensorView::of(&targets));
    let placed_there = entries()
        .with_mu(mu_there.view(stream))
        .with_sigma(sigma_there.view(stream))
        .with_lod(lod_there.view(None))
        .with_targets(targets_there.view(stream));
    for (here, there) in [(ContextView::tokens(&IDS), entries()), (placed, placed_there)] {
        let logits = on_host(&[T, VOCAB], |out| session.logits(here, out));
        assert!(logits.iter().any(|value| *value != logits[0]));
        same_bytes(&host, [T, VOCAB], &logits, |out| session.logits(there, out));
        let nll = on_host(&[T], |out| session.nll(here, out));
        for stride in [1, 3] {
            let mut out = host.strided(&[0.5f32; T], &[T], &[stride], GAP);
            session.nll(there, out.out(stream)).unwrap();
            let (got, expected) = (host.values(&out), &nll);
            assert!(
                got.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{got:?} {expected:?}"
            );
        }
        let cos = on_host(&[T, HALF], |cos| {
            let mut sin = [0f32; T * HALF];
            session.context_tables(here, cos, TensorViewMut::new(&mut sin, &[T, HALF]).unwrap())
        });
        // One of the two on the host.
        same_bytes(&host, [T, HALF], &cos, |out| {
            let mut sin = [0f32; T * HALF];
            session.context_tables(there, out, TensorViewMut::new(&mut sin, &[T, HALF]).unwrap())
        });
    }

    let here = ContextView::new(EntriesView::Embeddings(TensorView::new(&embedded, &[T, WIDTH]).unwrap()));
    let logits = on_host(&[T, VOCAB], |out| session.logits(here, out));
    for strides in layouts([T, WIDTH]) {
        let entries = host.strided(&embedded, &[T, WIDTH], &strides, f32::NAN);
        let there = ContextView::new(EntriesView::Embeddings(entries.view(stream)));
        let mut out = host.dense(&vec![0f32; T * VOCAB], &[T, VOCAB]);
        session.logits(there, out.out(stream)).unwrap();
        assert!(host.values(&out) == logits, "strides {strides:?}");
    }

    let (mut cos, mut sin) = ([9f32; T * HALF], [9f32; T * HALF]);
    let shape = [T, HALF];
    let [out_cos, out_sin] =
        [&mut cos, &mut sin].map(|values| TensorViewMut::new(&mut values[..], &shape).unwrap());
    session.rope_tables(TensorView::of(&mu), TensorView::of(&sigma), out_cos, out_sin).unwrap();
    let [mut cos_there, mut sin_there] = [[8, 2], [1, T]].map(|strides| {
        let zeros = [0f32; T * HALF];
        host.strided(&zeros, &shape, &strides, GAP)
    });
    session
        .rope_tables(
            mu_there.view(stream),
            sigma_there.view(stream),
            cos_there.out(stream),
            sin_there.out(stream),
        )
        .unwrap();
    assert_eq!((&host.values(&cos_there)[..], &host.values(&sin_there)[..]), (&cos[..], &sin[..]));
    assert_ne!(cos, sin);
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn deltas() {
    let host = Host::new();
    let (_fixture, session) = open(&host);
    let phase =
        json!({ "groups": ["lora"], "lora": { "r": 2 }, "optimizer": { "lr": 0.05, "warmup_steps": 1 } });
    session.enter_phase(&phase).unwrap();
    session.step(&json!({ "tokens": [IDS] })).unwrap();
    let module = "model.layers.0.self_attn.k_proj";
    let delta = on_host(&[16, WIDTH], |out| session.lora_delta(module, out));
    assert!(delta.iter().any(|value| *value != 0.0));
    same_bytes(&host, [16, WIDTH], &delta, |out| session.lora_delta(module, out));
    let mut turned = host.dense(&vec![3f32; 16 * WIDTH], &[WIDTH, 16]);
    let error = session.lora_delta(module, turned.out(None)).unwrap_err();
    assert_eq!(error.message(), "out: expected the shape [16, any], got [32, 16]");
    assert_eq!(host.values(&turned), vec![3.0; 16 * WIDTH]);
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn histories() {
    let host = Host::new();
    let (fixture, session) = open(&host);
    let stream = host.stream();
    let base = session.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
    let gistnet = GistNetConfig { block: BLOCK, ..GistNetConfig::new(WIDTH, 4) };
    let path = fixture.path("gistnet.safetensors");
    GistNet::new(gistnet, 3).unwrap().save(&path, &gistnet_adapter::Identity::of_base(&base)).unwrap();
    let lensnet = LensNetConfig { block: BLOCK, ..LensNetConfig::new(WIDTH, 4) };
    let identity = Identity { gist_version: Some(0), ..Identity::of_base(&base) };
    LensNet::new(lensnet, 5).unwrap().save(&fixture.path("lensnet.safetensors"), &identity).unwrap();

    let tokens: Vec<u32> = (0..38).map(|i| (i * 37 + 11) % VOCAB as u32).collect();
    let tokens_there = host.strided(&tokens, &[38], &[2], 0);
    // The same history from either, one after the other.
    let made = [TensorView::of(&tokens), tokens_there.view(stream)].map(|view| {
        session.open_tree(&json!({ "network": path })).unwrap();
        let told = session.tree_append(view).unwrap();
        (told, on_host(&[9, WIDTH], |out| session.tree_gists(1, 0, out)))
    });
    assert_eq!(made[0], made[1]);
    assert_eq!(made[1].0["made"], json!([9, 2]));
    same_bytes(&host, [9, WIDTH], &made[1].1, |out| session.tree_gists(1, 0, out));

    let entries = on_host(&[8, WIDTH], |out| session.embed(TensorView::of(&tokens[..8]), out));
    let shape = [2, BLOCK, WIDTH];
    let entries_there = host.strided(&entries, &shape, &[1, 2 * WIDTH + 3, 2], f32::NAN);
    let gists = on_host(&[2, WIDTH], |out| session.gists(TensorView::new(&entries, &shape).unwrap(), 0, out));
    assert_eq!(gists, made[1].1[..2 * WIDTH]);
    same_bytes(&host, [2, WIDTH], &gists, |out| session.gists(entries_there.view(stream), 0, out));

    session.open_lens(&json!({ "network": fixture.path("lensnet.safetensors") })).unwrap();
    let (start, lod) = ([0i64, 16, 32, 36, 37], [2u32, 2, 1, 0, 0]);
    let (start_there, lod_there) = (host.strided(&start, &[5], &[3], -1), host.dense(&lod, &[5]));
    let scores = on_host(&[5], |out| session.focus_scores(TensorView::of(&start), TensorView::of(&lod), out));
    let mut scores_there = host.strided(&[9f32; 5], &[5], &[2], GAP);
    session.focus_scores(start_there.view(stream), lod_there.view(stream), scores_there.out(stream)).unwrap();
    assert_eq!(host.values(&scores_there), scores);
    assert!(scores.iter().any(|score| *score != 0.0));

    let given = [0.5f32, 0.9, -0.2, 0.0, 0.0];
    let given_there = host.strided(&given, &[5], &[4], 1.0);
    let entries: Vec<(i64, u32)> = start.into_iter().zip(lod).collect();
    let settings = json!({ "budget": 14, "protected": 2, "entries": entries });
    let edited = [TensorView::of(&given), given_there.view(stream)]
        .map(|scores| session.refocus(&settings, Some(scores)).unwrap());
    assert_eq!(edited[0], edited[1]);
    assert!(!edited[1]["edits"].as_array().unwrap().is_empty());
}

#[test]
fn what_the_host_queued_before_a_call_comes_first() {
    alone("tensors::behind_streams");
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn behind_streams() {
    let host = Host::new();
    let (_fixture, session) = open(&host);
    let embedded = |ids: &[u32]| on_host(&[T, WIDTH], |out| session.embed(TensorView::of(ids), out));
    let (early, late) = (embedded(&[1; T]), embedded(&IDS));
    assert_ne!(early, late);
    for stream in [host.stream(), Some(Stream::LEGACY_DEFAULT), Some(Stream::PER_THREAD_DEFAULT)] {
        let (written, tokens) = (host.dense(&IDS, &[T]), host.dense(&[1u32; T], &[T]));
        host.late(stream, true);
        host.queue(&written, &tokens, stream);
        // Who names no stream is not waited for: the copy is still to come.
        assert!(on_host(&[T, WIDTH], |out| session.embed(tokens.view(None), out)) == early);
        let got = on_host(&[T, WIDTH], |out| session.embed(tokens.view(stream), out));
        assert!(got == late, "{stream:?}: the input was read before it was written");

        // The host reads what an earlier call left in the output.
        let (before, copied) = (vec![1.5f32; T * WIDTH], vec![2.5f32; T * WIDTH]);
        let (mut out, copied) = (host.dense(&before, &[T, WIDTH]), host.dense(&copied, &[T, WIDTH]));
        host.queue(&out, &copied, stream);
        session.embed(tokens.view(None), out.out(stream)).unwrap();
        host.late(stream, false);
        assert!(host.values(&out) == late);
        assert!(
            host.values(&copied).iter().all(|value| *value == 1.5),
            "{stream:?}: the output was written before its last use"
        );
    }
}

#[test]
fn what_cannot_be_taken_is_refused_before_anything_is_changed() {
    alone("tensors::refuses");
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn refuses() {
    let host = Host::new();
    let (fixture, session) = open(&host);
    let stream = host.stream();
    let context = ContextView::tokens(&IDS);
    let tokens = host.dense(&IDS, &[T]);
    let mut out = host.strided(&vec![3f32; T * WIDTH], &[T, WIDTH], &[WIDTH + 1, 1], GAP);
    let mut losses = host.dense(&[3f32; T], &[T]);
    let mut here = vec![3f32; T * WIDTH];
    let (shape, strides) = ([T, WIDTH], [WIDTH as isize, 1]);
    // SAFETY: these are refused, and nothing follows their addresses; this is what the test shows.
    let input = |address: usize, id: i32, stream: Option<Stream>| unsafe {
        TensorView::from_cuda(address, DType::U32, id, stream, &[T], &[1])
    };
    // SAFETY: as above.
    let output = |address: usize, dtype: DType, id: i32, strides: &[isize]| unsafe {
        TensorViewMut::from_cuda(address, dtype, id, None, &shape, strides)
    };
    macro_rules! refused {
        ($call:expr, $expected:expr) => {{
            let error = $call.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
            assert_eq!(error.message(), $expected);
        }};
    }
    macro_rules! here {
        () => {
            TensorViewMut::new(&mut here, &shape).unwrap()
        };
    }

    let other = "expected memory on cpu or cuda:0, got cuda:1";
    refused!(session.embed(input(tokens.address, 1, None), here!()), format!("tokens: {other}"));
    refused!(
        session.embed(tokens.view(stream), output(out.address, DType::F32, 1, &strides)),
        format!("out: {other}")
    );
    let of_host = IDS.as_ptr() as usize;
    let unknown = |address: usize| {
        format!("expected memory of cuda:0, got the address {address:#x} that CUDA does not know")
    };
    refused!(session.embed(input(of_host, 0, stream), here!()), format!("tokens: {}", unknown(of_host)));
    let address = here.as_ptr() as usize;
    refused!(
        session.embed(TensorView::of(&IDS), output(address, DType::F32, 0, &strides)),
        format!("out: {}", unknown(address))
    );
    // SAFETY: nothing is read from it.
    let pinned = unsafe { host.context.alloc_pinned::<u32>(T) }.unwrap();
    refused!(
        session.embed(input(pinned.as_ptr().unwrap() as usize, 0, None), here!()),
        "tokens: expected memory of cuda:0, got the host's memory"
    );
    let no_stream = "expected a stream of cuda:0, got 0x1234: CUDA_ERROR_INVALID_HANDLE \
                     (CUDA_ERROR_INVALID_HANDLE)";
    let unknown_stream = Stream::new(0x1234);
    refused!(session.embed(tokens.view(unknown_stream), here!()), format!("tokens: {no_stream}"));
    refused!(session.embed(TensorView::of(&IDS), out.out(unknown_stream)), format!("out: {no_stream}"));
    refused!(
        session.nll(context.with_mu(tokens.view(stream)), losses.out(stream)),
        "mu: expected F64, got U32"
    );
    refused!(session.logits(context, out.out(stream)), "logits: out: expected 2100 values, got 224");
    refused!(session.nll(context, out.out(stream)), "out: expected 1 dimensions, got 2");
    let few = host.dense(&IDS[1..], &[T - 1]);
    refused!(
        session.nll(context.with_targets(few.view(stream)), losses.out(stream)),
        "targets: expected the shape [7], got [6]"
    );
    refused!(
        session.embed(few.view(stream), out.out(stream)),
        "out: expected the shape [6, any], got [7, 32]"
    );
    refused!(
        session.embed(TensorView::of(&IDS), output(out.address, DType::F64, 0, &strides)),
        "out: expected F32, got F64"
    );
    refused!(
        session.embed(TensorView::of(&IDS), output(out.address, DType::F32, 0, &[1, 1])),
        "out: an output's elements overlap in memory (shape [7, 32], strides [1, 1])"
    );
    refused!(
        session.embed(TensorView::of(&IDS), output(out.address + 2, DType::F32, 0, &strides)),
        format!("out: expected a pointer aligned to 4 bytes, got {:#x}", out.address + 2)
    );
    refused!(
        session.embed(tokens.view(stream), output(tokens.address, DType::F32, 0, &strides)),
        "out and tokens share memory"
    );
    // SAFETY: there is one value, and no memory for so many copies of it.
    let many = unsafe { TensorView::from_cuda(tokens.address, DType::U32, 0, None, &[1 << 60], &[0]) };
    refused!(
        session.embed(many, here!()),
        "tokens: no memory for a copy of 1152921504606846976 elements (shape [1152921504606846976])"
    );
    // What goes wrong while it is computed leaves the output as it was too.
    refused!(
        session.embed(host.dense(&[300u32; T], &[T]).view(stream), out.out(stream)),
        "token id: expected below 300, got 300"
    );
    // Beyond the memory that there is.
    let beyond = tokens.address + 4 * (1 << 40) - 1;
    // SAFETY: as for the others that are refused.
    let far = unsafe { TensorView::from_cuda(tokens.address, DType::U32, 0, None, &[2], &[(1 << 40) - 1]) };
    refused!(session.embed(far, here!()), format!("tokens: {}", unknown(beyond)));

    // A session on the processor, and one without a model.
    let processor = host.open(&json!({ "base": fixture.path("base"), "device": "cpu" }));
    let nothing = host.open(&json!({}));
    for session in [&processor, &nothing] {
        refused!(session.embed(tokens.view(stream), here!()), "tokens: expected memory on cpu, got cuda:0");
        refused!(
            session.embed(TensorView::of(&IDS), out.out(stream)),
            "out: expected memory on cpu, got cuda:0"
        );
    }

    assert!(here.iter().all(|value| *value == 3.0));
    assert!(host.values(&out).iter().chain(&host.values(&losses)).all(|value| *value == 3.0));
    assert_eq!(host.values(&tokens), IDS);
    session.embed(tokens.view(stream), out.out(stream)).unwrap();
    assert!(host.values(&out) == on_host(&shape, |out| session.embed(TensorView::of(&IDS), out)));
}
