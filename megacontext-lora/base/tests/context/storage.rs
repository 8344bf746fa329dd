//! Stored trees: bytes at their places, round trips, both layouts, a writer that is killed, and one test for each thing
//! that is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use megacontext_base::context::{
    BaseModel, CtxFile, CtxHeader, GistDtype, GistSource, GistTree, Hierarchy, Layout, Node, StoreOptions,
    TreeFolder, write_tree,
};
use megacontext_base::error::Result;
use proptest::prelude::*;
use serde_json::Value;

use super::support::{Kind, Plain, Table, base, cases, empty, grown, says, tokens};

fn f32s() -> StoreOptions {
    StoreOptions { dtype: GistDtype::F32, ..StoreOptions::default() }
}

fn stored(tree: &GistTree, options: &StoreOptions) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("tree");
    write_tree(&dir, tree, options).unwrap();
    (root, dir)
}

fn load(dir: &Path) -> Result<GistTree> {
    TreeFolder::open(dir)?.load(&base())
}

/// Changes the bytes of a file.
fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes a folder's metadata.
fn edit_metadata(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("metadata.json");
    let mut metadata: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut metadata);
    fs::write(path, metadata.to_string()).unwrap();
}

fn header(lod: u8, entries: u64, dtype: GistDtype) -> CtxHeader {
    let dtype = (lod > 0).then_some(dtype);
    CtxHeader { lod, block: 32, width: 2048, dtype, entries, model_name: "SmolLM3-3B".into() }
}

#[test]
fn a_million_tokens_take_the_bytes_of_the_formats_own_example() {
    let hierarchy = Hierarchy::new(32, 2).unwrap();
    let bytes = |lod| {
        let header = header(lod, hierarchy.nodes(1_000_000, lod), GistDtype::F16);
        assert_eq!(header.file_bytes(), Some(header.offset(header.entries)));
        header.offset(header.entries)
    };
    assert_eq!([0, 1, 2].map(bytes), [4_000_064, 128_000_064, 3_997_760]);
    // A token is found by its block and its place there.
    let (block, i) = (1234, 17);
    assert_eq!(header(0, 1_000_000, GistDtype::F16).offset(32 * block + i), 64 + 4 * (32 * block + i));
    assert_eq!(header(1, 31_250, GistDtype::F16).offset(7), 64 + 7 * 2048 * 2);
    assert_eq!(header(1, 31_250, GistDtype::F32).offset(7), 64 + 7 * 2048 * 4);
}

#[test]
fn a_header_is_these_bytes() {
    let mut expected = vec![0x54, 0x43, 0x43, 0x4D, 1, 0, 2, 0, 32, 0, 0, 8, 2, 0];
    expected.extend(976u64.to_le_bytes());
    expected.extend(b"SmolLM3-3B");
    expected.resize(64, 0);
    let header = header(2, 976, GistDtype::Bf16);
    let bytes = header.encode().unwrap();
    assert_eq!(bytes[..], expected);
    let size = header.file_bytes().unwrap();
    assert_eq!(CtxHeader::decode(&bytes, size).unwrap(), (header, Layout::A));
}

#[test]
fn tokens_and_gists_lie_where_the_format_says() {
    let tree = grown(4, 2, 3, 45);
    let (_root, dir) = stored(&tree, &f32s());
    let [lod0, lod1, lod2] = [0, 1, 2].map(|lod| fs::read(dir.join(format!("LOD{lod}.ctx"))).unwrap());
    assert_eq!([lod0.len(), lod1.len(), lod2.len()], [64 + 45 * 4, 64 + 11 * 12, 64 + 2 * 12]);
    for (i, token) in tree.tokens().iter().enumerate() {
        assert_eq!(lod0[64 + 4 * i..][..4], token.to_le_bytes());
    }
    for (lod, bytes) in [(1, lod1), (2, lod2)] {
        for index in 0..tree.nodes(lod) {
            let gist = tree.gist(Node { lod, index }).unwrap();
            let expected: Vec<u8> = gist.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(bytes[64 + index as usize * 12..][..12], expected, "level {lod}, {index}");
        }
    }
    let metadata: Value = serde_json::from_slice(&fs::read(dir.join("metadata.json")).unwrap()).unwrap();
    for (pointer, expected) in [
        ("/version", 1.into()),
        ("/model_name", "tiny".into()),
        ("/embedding_dim", 3.into()),
        ("/block_size", 4.into()),
        ("/levels/LOD0/num_blocks", 11.into()),
        ("/levels/LOD0/num_tokens", 45.into()),
        ("/levels/LOD1/num_gists", 11.into()),
        ("/levels/LOD2/file_size_bytes", 88.into()),
        ("/gistnet_checkpoint", Value::Null),
        ("/ingestion_complete", false.into()),
        ("/megacontext/base_fingerprint", "0123456789abcdef".into()),
        ("/megacontext/gist_versions/LOD1", serde_json::json!([[0, 11]])),
    ] {
        assert_eq!(metadata.pointer(pointer), Some(&expected), "{pointer}");
    }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn a_tree_comes_back_to_the_bit(
        (block, levels, n) in (2..6usize, 1..4u8, 0..200usize),
        (from, version) in (0.0..1.0f64, 1..u16::MAX),
        (at, len) in (0.0..1.0f64, 0.0..1.0f64),
    ) {
        let mut tree = grown(block, levels, 3, n);
        let table = Table { width: 3 };
        let newer = Plain::new(Kind::Curved, block, 3, version);
        tree.refresh((from * n as f64) as u64.., &table, &newer).unwrap();
        let (_root, dir) = stored(&tree, &f32s());
        let folder = TreeFolder::open(&dir).unwrap();
        let again = folder.load(&base()).unwrap();
        prop_assert_eq!(&again, &tree);
        prop_assert_eq!(again.verify(.., &table, &newer, 0.0).unwrap(), tree.verify(.., &table, &newer, 0.0).unwrap());
        // Any piece of it by its offset.
        for lod in 0..=levels {
            let nodes = tree.nodes(lod);
            let start = (at * (nodes + 1) as f64) as u64;
            let end = start + (len * (nodes - start + 1) as f64) as u64;
            if lod == 0 {
                prop_assert_eq!(folder.tokens(start..end).unwrap(), &tree.tokens()[start as usize..end as usize]);
            } else {
                let values = start as usize * 3..end as usize * 3;
                prop_assert_eq!(folder.gists(lod, start..end).unwrap(), &tree.gists(lod)[values]);
                prop_assert_eq!(folder.versions(lod), tree.versions(lod));
            }
        }
        // And goes on growing.
        let mut again = again;
        if tree.refresh(.., &table, &newer).is_ok() && again.refresh(.., &table, &newer).is_ok() {
            again.append(&tokens(30, 2), &table, &newer).unwrap();
            tree.append(&tokens(30, 2), &table, &newer).unwrap();
            prop_assert_eq!(again, tree);
        }
    }
}

proptest! {
    #![proptest_config(cases(5000))]

    /// Whatever a file of layout A is cut to or grown to, it is not taken for one of layout B.
    #[test]
    fn a_file_of_another_size_is_refused_in_either_layout(
        name in "[ -~]{1,32}",
        entries in prop_oneof![0..70u64, 0..1_000_000u64, 0..u64::MAX >> 20],
        size in prop_oneof![64..400u64, 64..100_000_000u64],
        lod in 0..3u8,
    ) {
        let header = CtxHeader { model_name: name, width: 3, ..header(lod, entries, GistDtype::F16) };
        let read = CtxHeader::decode(&header.encode().unwrap(), size);
        match header.file_bytes() == Some(size) {
            true => prop_assert_eq!(read, Ok((header.clone(), Layout::A))),
            false => prop_assert!(read.is_err(), "{:?}", read),
        }
        let whole = header.file_bytes().unwrap();
        prop_assert_eq!(CtxHeader::decode(&header.encode().unwrap(), whole), Ok((header, Layout::A)));
    }

    #[test]
    fn layout_b_is_read_with_as_many_entries_as_the_file_has(name in "[ -~]{1,32}", entries in 0..1000u64) {
        let a = CtxHeader { model_name: name.clone(), width: 3, ..header(1, entries, GistDtype::F16) };
        let bytes = layout_b(&a);
        prop_assert_eq!(CtxHeader::decode(&bytes, 64 + 6 * entries), Ok((a, Layout::B)));
        let error = CtxHeader::decode(&bytes, 64 + 6 * entries + 5).unwrap_err();
        prop_assert!(error.contains("whole entries of 6"), "{}", error);
    }
}

/// The header as the other description has it.
fn layout_b(header: &CtxHeader) -> [u8; 64] {
    let mut bytes = header.encode().unwrap();
    let name = bytes[22..54].to_vec();
    bytes[14..46].copy_from_slice(&name);
    bytes[46..].fill(0);
    bytes
}

#[test]
fn another_writers_folder_in_layout_b_is_read() {
    let tree = grown(4, 2, 3, 45);
    let (_root, dir) = stored(&tree, &f32s());
    for lod in 0..3 {
        let path = dir.join(format!("LOD{lod}.ctx"));
        let header = CtxFile::open(&path).unwrap().header().clone();
        edit(&path, |bytes| bytes[..64].copy_from_slice(&layout_b(&header)));
        assert_eq!(CtxFile::open(&path).unwrap().layout(), Layout::B);
    }
    edit_metadata(&dir, |m| {
        m.as_object_mut().unwrap().remove("megacontext");
        m["version"] = "1.0".into();
        m["notes"] = "a key that is not ours".into();
    });
    assert_eq!(load(&dir).unwrap(), tree);
    let other = BaseModel { name: "large".into(), ..base() };
    says(TreeFolder::open(&dir).unwrap().load(&other), &["base model \"large\", got one of \"tiny\""]);
}

/// How much the rounding of a stored tree is, and that its nodes are then their children's gists only so far.
#[test]
fn sixteen_bits_round_gists_and_what_follows_from_them() {
    let table = Table { width: 16 };
    let tree = grown(8, 2, 16, 5000);
    let source = Plain::new(Kind::Curved, 8, 16, 0);
    for (dtype, rounding) in [(GistDtype::F16, 2f32.powi(-11)), (GistDtype::Bf16, 2f32.powi(-8))] {
        let (_root, dir) = stored(&tree, &StoreOptions { dtype, ..StoreOptions::default() });
        let mut again = load(&dir).unwrap();
        for lod in 1..=2 {
            for (exact, got) in tree.gists(lod).iter().zip(again.gists(lod)) {
                assert_eq!(*got, dtype.rounded(*exact));
                assert!((exact - got).abs() <= rounding * exact.abs().max(2f32.powi(-14)), "{exact} {got}");
            }
        }
        says(
            again.verify(.., &table, &source, 0.0),
            &["node 0 of level 1: expected the gist of its children"],
        );
        // Σ (k + 1)·sin makes at most 36 times the difference of it.
        assert_eq!(again.verify(.., &table, &source, 37.0 * rounding).unwrap(), 625 + 78);
        says(again.verify(.., &table, &source, rounding), &["of level 2: expected the gist of its children"]);
        // Written once more, it is the same.
        let before = again.clone();
        write_tree(&dir, &again, &StoreOptions { dtype, ..StoreOptions::default() }).unwrap();
        again = load(&dir).unwrap();
        assert_eq!(again, before);
    }
}

#[test]
fn a_folder_says_when_it_was_made_and_when_changed() {
    let tree = grown(4, 1, 2, 9);
    let at = |seconds| StoreOptions { now: UNIX_EPOCH + Duration::from_secs(seconds), ..f32s() };
    let (_root, dir) = stored(&tree, &at(951_827_696));
    let options = StoreOptions {
        gistnet_checkpoint: Some("runs/7/gistnet.safetensors".into()),
        ingestion_complete: true,
        ..at(1_709_164_800)
    };
    write_tree(&dir, &tree, &options).unwrap();
    let folder = TreeFolder::open(&dir).unwrap();
    let metadata = folder.metadata();
    assert_eq!(metadata.created_at, "2000-02-29T12:34:56Z");
    assert_eq!(metadata.last_modified, "2024-02-29T00:00:00Z");
    assert_eq!(metadata.gistnet_checkpoint.as_deref(), Some("runs/7/gistnet.safetensors"));
    assert!(metadata.ingestion_complete);
}

#[test]
fn an_older_tree_is_read_while_it_is_being_replaced() {
    let tree = grown(4, 2, 2, 40);
    let (root, dir) = stored(&tree, &f32s());
    // What is half written has a hidden name.
    fs::create_dir(root.path().join(".tree.x.tmp")).unwrap();
    fs::write(root.path().join(".tree.x.tmp/LOD0.ctx"), "TCCM").unwrap();
    assert_eq!(load(&dir).unwrap(), tree);
    // Between the two renames.
    fs::rename(&dir, root.path().join(".tree.previous")).unwrap();
    assert_eq!(load(&dir).unwrap(), tree);
    let longer = grown(4, 2, 2, 80);
    write_tree(&dir, &longer, &f32s()).unwrap();
    assert_eq!(load(&dir).unwrap(), longer);
    assert!(!root.path().join(".tree.previous").exists());
}

/// The variable that says where the next test is to write for ever.
const VICTIM: &str = "MEGACONTEXT_TEST_TREE";

/// The process that [`a_killed_writer_leaves_a_whole_tree`] kills; run without its variable, it has nothing to do.
#[test]
fn the_writer_that_is_killed() {
    let Some(dir) = std::env::var_os(VICTIM) else { return };
    let trees = [grown(4, 2, 8, 3000), grown(4, 2, 8, 4000)];
    for tree in trees.iter().cycle() {
        write_tree(Path::new(&dir), tree, &f32s()).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_tree() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("tree");
    write_tree(&dir, &grown(4, 2, 8, 3000), &f32s()).unwrap();
    let trees = [grown(4, 2, 8, 3000), grown(4, 2, 8, 4000)];
    let mut seen = [0; 2];
    for round in 0..16 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage::the_writer_that_is_killed"])
            .env(VICTIM, &dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(30 + 7 * round));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let tree = load(&dir).unwrap();
        let which = trees.iter().position(|whole| *whole == tree).expect("one of the two, whole");
        seen[which] += 1;
    }
    println!("killed {} times, then there was the one tree {} times, the other {}", 16, seen[0], seen[1]);
}

/// A tree with a file or the metadata changed is refused with these words.
#[track_caller]
fn refused(change: impl FnOnce(&Path), parts: &[&str]) {
    let (_root, dir) = stored(&grown(4, 2, 3, 45), &f32s());
    load(&dir).unwrap();
    change(&dir);
    says(load(&dir), parts);
}

fn refused_file(name: &str, change: impl FnOnce(&mut Vec<u8>), parts: &[&str]) {
    let parts: Vec<&str> = parts.iter().copied().chain([name]).collect();
    refused(|dir| edit(&dir.join(name), change), &parts);
}

#[test]
fn a_wrong_magic_number_is_refused() {
    refused_file(
        "LOD1.ctx",
        |b| b[..4].copy_from_slice(b"MCCT"),
        &["expected the magic number 0x4d434354 of a .ctx file, got 0x5443434d"],
    );
}

#[test]
fn another_version_is_refused() {
    refused_file("LOD0.ctx", |b| b[4] = 2, &["version: expected 1, got 2"]);
}

#[test]
fn a_file_cut_short_is_refused() {
    refused_file(
        "LOD1.ctx",
        |b| b.truncate(100),
        &["expected 196 bytes for 11 entries of 12, got 100: it is cut short"],
    );
    refused_file(
        "LOD0.ctx",
        |b| b.truncate(243),
        &["expected 244 bytes for 45 entries of 4, got 243: it is cut short"],
    );
    refused_file("LOD2.ctx", |b| b.truncate(63), &["expected a header of 64 bytes, got 63: it is cut short"]);
}

#[test]
fn trailing_bytes_are_refused() {
    refused_file(
        "LOD1.ctx",
        |b| b.extend([0; 12]),
        &["expected 196 bytes", "got 208: it has something appended"],
    );
}

#[test]
fn a_gist_that_is_no_number_is_refused() {
    refused_file(
        "LOD1.ctx",
        |b| b[64 + 5 * 12 + 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes()),
        &["gist of node 5 of level 1: expected finite numbers, got NaN"],
    );
}

#[test]
fn a_name_that_is_no_text_is_refused() {
    refused_file("LOD0.ctx", |b| b[22] = 0xFF, &["expected a model name in UTF-8, padded with zeros"]);
    refused_file("LOD0.ctx", |b| b[60] = 1, &["expected a model name in UTF-8, padded with zeros"]);
}

#[test]
fn an_unknown_dtype_is_refused() {
    refused_file("LOD1.ctx", |b| b[12] = 9, &["dtype: expected 1, 2 or 3 (f16, bf16, f32) for gists, got 9"]);
    refused_file("LOD0.ctx", |b| b[12] = 1, &["dtype: expected 0 (u32) for tokens, got 1"]);
}

#[test]
fn a_block_or_width_of_none_is_refused() {
    refused_file("LOD1.ctx", |b| b[10] = 0, &["width of at least 1, got 4 and 0"]);
    refused_file("LOD1.ctx", |b| b[8] = 1, &["expected a block of at least 2", "got 1 and 3"]);
}

#[test]
fn more_entries_than_a_file_can_have_are_refused() {
    refused_file(
        "LOD1.ctx",
        |b| b[14..22].fill(0xFF),
        &["entries that fits a file, got 18446744073709551615"],
    );
}

#[test]
fn files_of_different_trees_are_refused() {
    refused_file("LOD2.ctx", |b| b[6] = 1, &["level: expected 2, got 1"]);
    refused_file("LOD2.ctx", |b| b[8] = 5, &["block_size: expected 4, got 5"]);
    refused_file("LOD2.ctx", |b| b[22] = b'T', &["model_name: expected \"tiny\", got \"Tiny\""]);
    let fewer = |b: &mut Vec<u8>| {
        b[14] = 10;
        b.truncate(64 + 10 * 12);
    };
    refused_file("LOD1.ctx", fewer, &["entries: expected 11, got 10"]);
    let wider = |b: &mut Vec<u8>| {
        b[10] = 6;
        b[14] = 1;
    };
    refused_file("LOD2.ctx", wider, &["embedding_dim: expected 3, got 6"]);
    // Metadata that goes along with it does not make it right.
    refused(
        |dir| {
            edit(&dir.join("LOD1.ctx"), fewer);
            edit_metadata(dir, |m| m["levels"]["LOD1"]["num_gists"] = 10.into());
        },
        &["LOD1.ctx", "entries over the tokens of LOD0: expected 11, got 10"],
    );
    refused(
        |dir| edit_metadata(dir, |m| m["levels"]["LOD1"]["file_size_bytes"] = 7.into()),
        &["file_size_bytes: expected 7, got 196"],
    );
}

#[test]
fn a_missing_file_is_refused() {
    refused(|dir| fs::remove_file(dir.join("LOD2.ctx")).unwrap(), &["LOD2.ctx", "No such file"]);
    refused(|dir| fs::remove_file(dir.join("metadata.json")).unwrap(), &["metadata.json", "No such file"]);
    says(TreeFolder::open(Path::new("/nowhere/at/all")), &["/nowhere/at/all", "No such file"]);
}

#[test]
fn damaged_metadata_is_refused() {
    refused(
        |dir| fs::write(dir.join("metadata.json"), "{\"version\": 1").unwrap(),
        &["metadata.json: expected the metadata of a gist tree"],
    );
    refused(|dir| edit_metadata(dir, |m| m["version"] = 2.into()), &["version: expected 1, got 2"]);
    refused(
        |dir| edit_metadata(dir, |m| m["megacontext"]["format"] = 2.into()),
        &["megacontext.format: expected 1, got 2"],
    );
    refused(
        |dir| edit_metadata(dir, |m| drop(m["levels"].as_object_mut().unwrap().remove("LOD1"))),
        &["levels: expected LOD0, LOD1 and so on, got LOD0, LOD2"],
    );
    refused(
        |dir| edit_metadata(dir, |m| m["block_size"] = 1.into()),
        &["expected at least 2 entries, got 1"],
    );
}

#[test]
fn versions_that_do_not_go_over_the_nodes_are_refused() {
    let runs = |runs: Value| {
        move |dir: &Path| edit_metadata(dir, |m| m["megacontext"]["gist_versions"]["LOD1"] = runs)
    };
    refused(
        runs(serde_json::json!([[0, 10]])),
        &["megacontext.gist_versions.LOD1: expected runs over 11 nodes, got 10"],
    );
    refused(
        runs(serde_json::json!([[0, 11], [0, u64::MAX]])),
        &["over 11 nodes, got more than there can be"],
    );
    refused(
        runs(serde_json::json!([[0, 3], [1, 8]])),
        &["node 0 of level 2: expected children of its gist version 0, got one of version 1"],
    );
}

#[test]
fn a_stored_tree_of_another_base_model_is_refused() {
    let (_root, dir) = stored(&grown(4, 2, 3, 45), &f32s());
    let folder = TreeFolder::open(&dir).unwrap();
    let other = BaseModel { fingerprint: "ff".into(), ..base() };
    says(folder.load(&other), &["with fingerprint \"ff\", got \"0123456789abcdef\""]);
    let other = BaseModel { name: "large".into(), ..base() };
    says(folder.load(&other), &["expected a tree of the base model \"large\", got one of \"tiny\""]);
}

#[test]
fn a_stored_tree_of_another_gist_version_is_refused() {
    let (_root, dir) = stored(&grown(4, 2, 3, 45), &f32s());
    let folder = TreeFolder::open(&dir).unwrap();
    folder.check_source(&Plain::new(Kind::Mean, 4, 3, 0)).unwrap();
    says(
        folder.check_source(&Plain::new(Kind::Mean, 4, 3, 6)),
        &["expected gists of version 6, got version 0: refresh the tree"],
    );
}

#[test]
fn a_stored_tree_of_another_block_or_width_is_refused() {
    let (_root, dir) = stored(&grown(4, 2, 3, 45), &f32s());
    let folder = TreeFolder::open(&dir).unwrap();
    let parts =
        |block, width| format!("gists of {block} entries of width {width}, got one of 4 entries of width 3");
    says(folder.check_source(&Plain::new(Kind::Mean, 8, 3, 0)), &[&parts(8, 3)]);
    says(folder.check_source(&Plain::new(Kind::Mean, 4, 5, 0)), &[&parts(4, 5)]);
}

#[test]
fn ranges_beyond_a_file_are_refused() {
    let (_root, dir) = stored(&grown(4, 2, 3, 45), &f32s());
    let folder = TreeFolder::open(&dir).unwrap();
    says(folder.tokens(40..46), &["LOD0.ctx", "expected a range of its 45 entries, got 40..46"]);
    says(folder.gists(2, 3..u64::MAX), &["LOD2.ctx", "expected a range of its 2 entries"]);
    says(folder.gists(3, 0..0), &["expected a level of the tree, at most 2, got 3"]);
    says(folder.gists(0, 0..1), &["expected gists, got level 0, tokens"]);
    says(folder.file(1).unwrap().tokens(0..1), &["expected tokens, level 0, got level 1"]);
}

/// A tree that cannot be written so is refused, and the older one stays.
#[track_caller]
fn unwritable(tree: &GistTree, dtype: GistDtype, parts: &[&str]) {
    let older = grown(4, 2, 3, 45);
    let (root, dir) = stored(&older, &f32s());
    says(write_tree(&dir, tree, &StoreOptions { dtype, ..StoreOptions::default() }), parts);
    assert_eq!(load(&dir).unwrap(), older);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn a_width_of_more_than_16_bits_is_refused() {
    unwritable(
        &empty(4, 1, 70_000),
        GistDtype::F32,
        &["embedding_dim: expected at most 65535, as its header has 16 bits for it, got 70000"],
    );
}

#[test]
fn a_block_of_more_than_16_bits_is_refused() {
    unwritable(&empty(65_536, 1, 4), GistDtype::F32, &["block_size: expected at most 65535", "got 65536"]);
}

#[test]
fn a_model_name_of_more_than_32_bytes_is_refused() {
    let named = |name: &str| {
        let base = BaseModel { name: name.into(), ..base() };
        GistTree::new(Hierarchy::new(4, 1).unwrap(), 3, base).unwrap()
    };
    // 17 letters, 34 bytes.
    unwritable(
        &named(&"ä".repeat(17)),
        GistDtype::F32,
        &["model_name: expected 1 to 32 bytes without zeros, got 34"],
    );
    unwritable(&named(""), GistDtype::F32, &["model_name: expected 1 to 32 bytes without zeros, got 0"]);
    unwritable(&named("a\0b"), GistDtype::F32, &["without zeros, got 3"]);
}

#[test]
fn gists_beyond_f16_are_refused() {
    struct Large;
    impl GistSource for Large {
        fn block(&self) -> usize {
            4
        }
        fn width(&self) -> usize {
            1
        }
        fn version(&self) -> u16 {
            0
        }
        fn gists(&self, _: &[f32], blocks: usize) -> Result<Vec<f32>> {
            Ok((0..blocks).map(|n| n as f32 * 1e5).collect())
        }
    }
    let mut tree = empty(4, 1, 1);
    tree.append(&tokens(8, 1), &Table { width: 1 }, &Large).unwrap();
    unwritable(
        &tree,
        GistDtype::F16,
        &[
            "gist of node 1 of level 1: expected values that f16 can hold, at most 65504, got 100000; store it in bf16",
        ],
    );
    let (_root, dir) = stored(&tree, &StoreOptions { dtype: GistDtype::Bf16, ..StoreOptions::default() });
    assert!((load(&dir).unwrap().gists(1)[1] - 1e5).abs() < 400.0);
}

#[test]
fn a_folder_with_something_else_in_it_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("tree");
    fs::create_dir(&dir).unwrap();
    write_tree(&dir, &grown(4, 2, 3, 45), &f32s()).unwrap();
    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "…").unwrap();
    says(
        write_tree(&other, &grown(4, 2, 3, 45), &f32s()),
        &["other", "expected no folder, an empty one or that of a gist tree, got another"],
    );
    assert!(other.join("thesis.tex").exists());
}
