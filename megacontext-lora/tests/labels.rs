//! Label tables and traces: what is written is read, for as long as it holds; cut, damaged and stale files are refused.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use lensnet_adapter::allocator::{Action, AllocatorConfig, refocus};
use megacontext_base::context::{
    BaseModel, Entry, GistSource, GistTree, Hierarchy, Limits, Node, TokenEmbeddings, WorkingContext,
};
use megacontext_base::random::Random;
use megacontext_lora::error::Kind;
use megacontext_lora::run::labels::{Label, LabelStamp, read, read_any, write};
use megacontext_lora::run::traces::{self, Trace, TraceEdit, TraceLog};
use tempfile::TempDir;

fn stamp() -> LabelStamp {
    LabelStamp {
        base: "0123456789abcdef".into(),
        adapter: Some("fedcba9876543210".into()),
        gist_version: 3,
        horizon: 64,
        block: 32,
    }
}

fn labels(count: usize) -> Vec<Label> {
    let mut random = Random::new(1);
    (0..count)
        .map(|at| Label {
            block: Node { lod: 1 + (at % 2) as u8, index: random.below(1 << 30) as u64 },
            action: if random.below(2) == 0 { Action::Expand } else { Action::Collapse },
            delta_nll: random.normal(),
            timestamp_ms: 1_780_000_000_000 + at as i64,
            document: random.next_u64(),
            context: (at / 10) as u64,
            entry_start: random.below(1 << 40) as u64,
            lod: (at % 3) as u8,
            nll_now: random.normal().abs(),
            target: random.uniform(-1.0, 1.0),
        })
        .collect()
}

/// A table of these in a folder that goes with the test.
fn table(labels: &[Label]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.parquet");
    write(&path, &stamp(), labels).unwrap();
    (dir, path)
}

#[test]
fn what_is_written_is_read_to_the_bit() {
    for count in [0, 1, 7, 150_000] {
        let labels = labels(count);
        let (dir, path) = table(&labels);
        assert_eq!(read(&path, &stamp()).unwrap(), labels);
        assert_eq!(read_any(&path).unwrap().0, stamp());
        // The same rows, the same bytes; nothing else is left in the folder.
        let first = fs::read(&path).unwrap();
        write(&path, &stamp(), &labels).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    let bare = LabelStamp { adapter: None, ..stamp() };
    let (_dir, path) = table(&[]);
    write(&path, &bare, &[]).unwrap();
    assert_eq!(read_any(&path).unwrap(), (bare, vec![]));
}

/// Labels of this stamp are refused in these words.
#[track_caller]
fn stale(other: LabelStamp, expected: &str) {
    let (_dir, path) = table(&labels(3));
    let error = read(&path, &other).unwrap_err();
    assert_eq!(error.kind, Kind::Data);
    assert_eq!(error.message, format!("{}: {expected}; measure them anew", path.display()));
}

#[test]
fn labels_of_another_base_are_refused() {
    stale(
        LabelStamp { base: "aa".into(), ..stamp() },
        "base: expected labels measured with aa, got those of 0123456789abcdef",
    );
}

#[test]
fn labels_of_another_adapter_are_refused() {
    stale(
        LabelStamp { adapter: None, ..stamp() },
        "adapter: expected labels measured with no adapter, got those of the adapter fedcba9876543210",
    );
    stale(
        LabelStamp { adapter: Some("bb".into()), ..stamp() },
        "adapter: expected labels measured with the adapter bb, got those of the adapter fedcba9876543210",
    );
}

#[test]
fn labels_of_another_gist_version_are_refused() {
    stale(
        LabelStamp { gist_version: 4, ..stamp() },
        "gist_version: expected labels measured with 4, got those of 3",
    );
}

#[test]
fn labels_of_another_horizon_or_block_are_refused() {
    stale(
        LabelStamp { horizon: 32, ..stamp() },
        "horizon: expected labels measured with 32, got those of 64",
    );
    stale(LabelStamp { block: 8, ..stamp() }, "block: expected labels measured with 8, got those of 32");
}

#[test]
fn a_table_that_was_cut_is_refused_at_every_length() {
    let (_dir, path) = table(&labels(5));
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = read(&path, &stamp()).unwrap_err();
        assert_eq!(error.kind, Kind::Data, "{length} of {} bytes: {error}", whole.len());
    }
}

#[test]
fn a_table_with_one_byte_changed_is_refused_or_says_the_same() {
    let kept = labels(5);
    let (_dir, path) = table(&kept);
    let whole = fs::read(&path).unwrap();
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= if at % 2 == 0 { 0x01 } else { 0x80 };
        fs::write(&path, &damaged).unwrap();
        match read(&path, &stamp()) {
            Ok(found) => assert_eq!(found, kept, "byte {at}"),
            Err(error) => {
                assert_eq!(error.kind, Kind::Data, "byte {at}: {error}");
                refused += 1;
            }
        }
    }
    // What is not looked at: statistics, sizes for planning.
    assert!(refused > whole.len() / 2, "{refused} of {} changes", whole.len());
}

#[test]
fn what_is_no_table_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.parquet");
    let error = read(&path, &stamp()).unwrap_err();
    assert_eq!(error.kind, Kind::Io);
    fs::write(&path, "block_id,action\n").unwrap();
    let error = read(&path, &stamp()).unwrap_err();
    assert!(error.message.contains("expected a whole Parquet file, got "), "{error}");
}

#[test]
fn numbers_that_are_none_are_not_written() {
    let (_dir, path) = table(&labels(2));
    let before = fs::read(&path).unwrap();
    let mut rows = labels(3);
    rows[2].delta_nll = f64::NAN;
    let error = write(&path, &stamp(), &rows).unwrap_err();
    assert!(error.message.ends_with("row 2: delta_nll: expected a finite number, got NaN"), "{error}");
    rows[2] = Label { target: -1.5, ..rows[1] };
    let error = write(&path, &stamp(), &rows).unwrap_err();
    assert!(error.message.ends_with("row 2: target: expected −1 to 1, got -1.5"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

struct Plain;

impl TokenEmbeddings for Plain {
    fn width(&self) -> usize {
        1
    }

    fn embeddings(&self, tokens: &[u32]) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(tokens.iter().map(|token| *token as f32).collect())
    }
}

impl GistSource for Plain {
    fn block(&self) -> usize {
        4
    }

    fn width(&self) -> usize {
        1
    }

    fn version(&self) -> u16 {
        0
    }

    fn gists(&self, children: &[f32], _: usize) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(children.chunks_exact(4).map(|block| block.iter().sum()).collect())
    }
}

/// A refocus that expands tokens 0 … 3 and collapses 16 … 31.
fn trace(step: u64) -> Trace {
    let base = BaseModel { name: "tiny".into(), fingerprint: "0123456789abcdef".into() };
    let mut tree = GistTree::new(Hierarchy::new(4, 2).unwrap(), 1, base).unwrap();
    tree.append(&(0..32).collect::<Vec<u32>>(), &Plain, &Plain).unwrap();
    let entries = (0..8).map(|n| Entry { start: 4 * n, lod: 1 }).collect();
    let mut context = WorkingContext::new(entries, &tree, Limits::new(11, 0).unwrap()).unwrap();
    let mut score = |c: &WorkingContext| {
        let wish = |e: &Entry| match e.start {
            0 if e.lod == 1 => 0.75,
            16.. if e.lod == 1 => -0.5,
            _ => 0.0,
        };
        Ok(c.entries().iter().map(wish).collect())
    };
    let config = AllocatorConfig::default();
    let done = refocus(&config, &mut context, &mut score, &mut Random::new(0)).unwrap();
    Trace::of(step, &done, &context, 1.5)
}

#[test]
fn a_trace_says_what_was_done() {
    let trace = trace(7);
    let expanded = TraceEdit {
        block_id: 1 << 56,
        start: 0,
        lod: 1,
        utility: 0.75,
        budget_before: 8,
        budget_after: 11,
        residency: 1,
    };
    let collapsed = TraceEdit {
        block_id: 2 << 56 | 1,
        start: 16,
        utility: -0.5,
        budget_before: 11,
        budget_after: 8,
        ..expanded
    };
    assert_eq!((trace.expanded, trace.collapsed), (vec![expanded], vec![collapsed]));
    assert_eq!(trace.working_context, [(0, 0, 4), (4, 1, 3), (16, 2, 1)]);
}

#[test]
fn traces_are_cut_back_where_a_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("traces.jsonl");
    let mut log = TraceLog::open(&path, 0).unwrap();
    (0..4).for_each(|step| log.append(&trace(step)).unwrap());
    log.sync().unwrap();
    let whole = fs::read(&path).unwrap();
    assert_eq!(traces::read(&path).unwrap(), (0..4).map(trace).collect::<Vec<_>>());
    let text = String::from_utf8(whole.clone()).unwrap();
    let keys = r#"{"step":0,"expanded":[{"block_id":72057594037927936,"start":0,"lod":1,"utility":0.75,"budget_before":8,"#;
    assert!(text.starts_with(keys), "{text}");
    // Torn, and resumed at step 2.
    fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    assert_eq!(traces::read(&path).unwrap().len(), 3);
    let mut log = TraceLog::open(&path, 2).unwrap();
    (2..4).for_each(|step| log.append(&trace(step)).unwrap());
    assert_eq!(fs::read(&path).unwrap(), whole);
    fs::write(&path, "{\n{}\n").unwrap();
    let error = traces::read(&path).unwrap_err();
    assert!(error.kind == Kind::Data && error.message.contains("line 1: "), "{error}");
}
