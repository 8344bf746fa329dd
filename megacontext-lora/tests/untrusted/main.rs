//! What the fuzz targets try without end, tried for some seconds: random bytes and damaged sound inputs, the same ones every
//! time, through the same readers. Each returns, with a clear reason where it refuses; nothing panics, and nothing
//! allocates what the input's size does not justify.
//!
//! `MCLORA_LONG=1` tries a hundred times as many. `cargo test --workspace --test untrusted -- --ignored` writes `fuzz/corpus` again.
#![allow(clippy::unwrap_used)]

mod mutate;
mod seeds;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use megacontext_lora::untrusted::READERS;
use mutate::{Change, mutated};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// Most bytes at once that an input of some kilobytes justifies.
const MOST: usize = 8 << 20;
/// Beyond this an allocation is refused, which ends the test: a loop that has no end would take all memory.
const TOO_MUCH: usize = 1 << 30;

thread_local! {
    /// The largest single allocation of this thread since it was last set to 0.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

struct Watched;

// SAFETY: every call goes to the system's allocator as it came, or fails as an allocator may.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Not where a thread ends, which has nothing to watch any more.
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        if layout.size() > TOO_MUCH {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn reader(name: &str) -> fn(&[u8]) -> Result<(), String> {
    READERS.iter().find(|(known, _)| *known == name).unwrap().1
}

/// The property. An error's reason says something, and does not say it all again and again.
fn holds(name: &str, bytes: &[u8]) -> Result<(), String> {
    LARGEST.set(0);
    let verdict = reader(name)(bytes);
    let largest = LARGEST.get();
    if let Err(reason) = &verdict {
        assert!(!reason.trim().is_empty() && reason.len() <= 6 * bytes.len() + 4096, "{reason}");
    }
    assert!(largest <= MOST, "{largest} bytes at once for an input of {}", bytes.len());
    verdict
}

/// As many random inputs and damaged seeds as a reader of this speed can be given.
fn tried(name: &str, cases: u32) {
    let cases = if std::env::var_os("MCLORA_LONG").is_some() { 100 * cases } else { cases };
    let config =
        Config { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() };
    let seeds: Vec<Vec<u8>> = seeds::stored(name).into_iter().map(|(_, bytes)| bytes).collect();
    let changes = prop::collection::vec(any::<Change>(), 1..6);
    let damaged = (any::<Index>(), any::<Index>(), changes).prop_map(move |(at, other, changes)| {
        let other: &Vec<u8> = other.get(&seeds);
        mutated(at.get(&seeds).clone(), &changes, other)
    });
    let random = prop::collection::vec(any::<u8>(), 0..300);
    let input = prop_oneof![1 => random, 7 => damaged];
    TestRunner::new(config)
        .run(&input, |bytes| {
            let _ = holds(name, &bytes);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

#[test]
fn every_seed_is_what_its_writer_makes_and_most_are_read() {
    for (name, read) in READERS {
        let stored = seeds::stored(name);
        let mut made = seeds::made(name);
        made.sort();
        for (seed, bytes) in &made {
            let found = stored.iter().find(|(other, _)| other == seed);
            assert!(found.is_some_and(|(_, found)| found == bytes), "{name}/{seed}: write the corpus again");
        }
        let refused: Vec<String> =
            made.iter().filter_map(|(seed, bytes)| Some(format!("{seed}: {}", read(bytes).err()?))).collect();
        let expected = match name {
            // Integers, dimensions that cannot be counted, NaN.
            "safetensors" => 3,
            _ => 0,
        };
        assert_eq!(refused.len(), expected, "{name}: {refused:?}");
    }
}

#[test]
fn model_configs() {
    tried("model_config", 6000);
}

#[test]
fn settings() {
    tried("settings", 6000);
}

#[test]
fn safetensors() {
    tried("safetensors", 3000);
}

#[test]
fn adapters() {
    tried("adapter", 1500);
}

#[test]
fn networks() {
    tried("network", 1500);
}

#[test]
fn ctx_files() {
    tried("ctx", 3000);
}

#[test]
fn trees() {
    tried("tree", 1500);
}

#[test]
fn checkpoints() {
    tried("checkpoint", 1500);
}

#[test]
fn allocations() {
    tried("allocation", 3000);
}

#[test]
fn tensor_views() {
    tried("tensor_view", 20000);
}

/// A seed with one text of it replaced by another.
fn edited(reader: &str, seed: &str, from: &str, to: &str) -> Vec<u8> {
    let (_, bytes) = seeds::stored(reader).into_iter().find(|(name, _)| name == seed).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.contains(from), "{seed}: {from}");
    text.replacen(from, to, 1).into_bytes()
}

#[test]
fn what_was_found_stays_found() {
    let adapter = |from: &str, to: &str| {
        let bytes = seeds::made("adapter").swap_remove(0).1;
        seeds::with_first_part(&bytes, |config| config.replacen(from, to, 1))
    };
    let network = |layers: &str| {
        let bytes = seeds::made("network").into_iter().find(|(name, _)| name == "gistnet").unwrap().1;
        seeds::with_header(&bytes, |header| header.replacen(r#"\"layers\":1"#, layers, 1))
    };
    let found = [
        // Strides of a tensor without elements overflowed.
        ("safetensors", seeds::made("safetensors").swap_remove(3).1, "dimensions that can be counted"),
        // The list of a network's tensors had no end.
        ("network", network(r#"\"layers\":1152921504606846976"#), "layers: expected 1 to 4096"),
        // Horizons, counts of steps and passages overflowed their sums and products.
        ("settings", edited("settings", "gistnet.toml", "horizon = 6", "horizon = 9223372036854775807"), ""),
        ("settings", edited("settings", "gistnet.toml", "block = 4", "block = 9223372036854775807"), ""),
        (
            "settings",
            edited("settings", "lensnet.toml", "histories = 6", "histories = 9223372036854775807"),
            "",
        ),
        ("settings", edited("settings", "lensnet.toml", "horizon = 4", "horizon = 9223372036854775807"), ""),
        // A length that doubled until it overflowed.
        (
            "model_config",
            edited(
                "model_config",
                "llama3",
                r#""original_max_position_embeddings":32"#,
                r#""original_max_position_embeddings":9007199254740992"#,
            ),
            "original_max_position_embeddings: expected a whole number from 1 to 16777216",
        ),
        // Lists of another model's bands, and lengths that no model has.
        (
            "adapter",
            adapter(
                r#""rope_type": "linear""#,
                r#""rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 64"#,
            ),
            "short_factor: expected 2 numbers, one for each band, got 1",
        ),
        (
            "adapter",
            adapter(r#""context_length": 256"#, r#""context_length": 1152921504606846976"#),
            "context_length: expected at most 16777216",
        ),
    ];
    for (number, (name, bytes, says)) in found.into_iter().enumerate() {
        let reason = holds(name, &bytes).expect_err(name);
        assert!(reason.contains(says), "{number}, {name}: {reason}");
    }
}

#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_corpus() {
    for (name, _) in READERS {
        std::fs::create_dir_all(seeds::corpus(name)).unwrap();
        for (seed, bytes) in seeds::made(name) {
            std::fs::write(seeds::corpus(name).join(seed), bytes).unwrap();
        }
    }
}
