//! The gist tree against a plain recursion, over random appends and refreshes; what it refuses.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::{
    BaseModel, GistDtype, GistSource, GistTree, Hierarchy, Node, StoreOptions, TokenEmbeddings, TreeFolder,
    write_tree,
};
use megacontext_base::decoder::Decoder;
use megacontext_base::error::Result;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_base::weights::Weights;
use megacontext_kernels::precision::Precision;
use proptest::prelude::*;

use super::support::{Kind, Plain, Table, VOCABULARY, base, cases, empty, grown, says, tokens};

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures")
}

/// A node's gist by the definition: that of its children, one block at a time.
fn gist(tokens: &[u32], node: Node, hierarchy: Hierarchy, table: &Table, source: &Plain) -> Vec<f32> {
    match hierarchy.children(node) {
        None => table.embeddings(&tokens[node.index as usize..][..1]).unwrap(),
        Some(children) => {
            let of = |index| gist(tokens, Node { lod: node.lod - 1, index }, hierarchy, table, source);
            let children: Vec<f32> = children.flat_map(of).collect();
            source.gists(&children, 1).unwrap()
        }
    }
}

/// Every node against the definition; there are no others.
fn check(tree: &GistTree, table: &Table, source: &Plain) {
    let hierarchy = tree.hierarchy();
    for lod in 1..=hierarchy.levels() {
        let nodes = tree.len() / hierarchy.span(lod);
        assert_eq!(tree.nodes(lod), nodes);
        assert_eq!(tree.gists(lod).len() as u64, nodes * tree.width() as u64);
        for index in 0..nodes {
            let node = Node { lod, index };
            let expected = gist(tree.tokens(), node, hierarchy, table, source);
            assert_eq!(tree.gist(node).unwrap(), expected, "{node}");
        }
        assert_eq!(tree.gist(Node { lod, index: nodes }), None);
        assert_eq!(tree.versions(lod), vec![source.version; nodes as usize]);
    }
}

/// Sizes of appends to trees of blocks of 2 to 5 on 1 to 4 levels.
fn appends() -> impl Strategy<Value = (usize, u8, Vec<usize>)> {
    (2..6usize, 1..5u8, prop::collection::vec(0..90usize, 0..12))
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn any_split_of_the_appends_gives_the_same_bytes_and_makes_each_node_once(
        (block, levels, sizes) in appends(),
        curved in any::<bool>(),
    ) {
        let table = Table { width: 3 };
        let kind = if curved { Kind::Curved } else { Kind::Mean };
        let source = Plain::new(kind, block, 3, 4);
        let all = tokens(sizes.iter().sum(), 3);
        let mut tree = empty(block, levels, 3);
        let mut made = vec![0; usize::from(levels)];
        let mut from = 0;
        for size in &sizes {
            let calls = source.calls.get();
            let new = tree.append(&all[from..from + size], &table, &source).unwrap();
            // One call for each level that got nodes, however many.
            prop_assert_eq!(source.calls.get() - calls, new.iter().filter(|n| **n > 0).count());
            made.iter_mut().zip(new).for_each(|(made, new)| *made += new);
            from += size;
        }
        let nodes: Vec<usize> = (1..=levels).map(|lod| tree.nodes(lod) as usize).collect();
        prop_assert_eq!(&made, &nodes);
        prop_assert_eq!(source.blocks.get(), nodes.iter().sum::<usize>());
        let mut at_once = empty(block, levels, 3);
        at_once.append(&all, &table, &source).unwrap();
        prop_assert_eq!(&tree, &at_once);
        check(&tree, &table, &source);
        prop_assert_eq!(tree.verify(.., &table, &source, 0.0).unwrap(), nodes.iter().sum::<usize>());
    }

    #[test]
    fn a_refresh_of_a_range_leaves_no_parent_that_its_children_do_not_make(
        block in 2..5usize,
        levels in 1..4u8,
        n in 0..150usize,
        ends in (0.0..1.0f64, 0.0..1.0f64),
    ) {
        let table = Table { width: 2 };
        let [old, new] = [0, 1].map(|version| Plain::new(Kind::Curved, block, 2, version));
        let mut tree = empty(block, levels, 2);
        tree.append(&tokens(n, 5), &table, &old).unwrap();
        let at = |part: f64| (part * (n + 1) as f64) as u64;
        let (start, end) = (at(ends.0.min(ends.1)), at(ends.0.max(ends.1)));
        let before = tree.clone();
        let made = tree.refresh(start..end, &table, &new).unwrap();
        let nodes: usize = (1..=levels).map(|lod| tree.nodes(lod) as usize).sum();
        let made: usize = made.iter().sum();
        prop_assert_eq!(new.blocks.get(), made);
        prop_assert_eq!(tree.stale(1), nodes - made);
        // Each node is of one version and is the gist that version makes of its children.
        prop_assert_eq!(tree.verify(.., &table, &new, 0.0).unwrap(), made);
        for lod in 1..=levels {
            for index in 0..tree.nodes(lod) {
                let node = Node { lod, index };
                let span = tree.hierarchy().tokens(node);
                let fresh = tree.versions(lod)[index as usize] == 1;
                if span.start < end && start < span.end && start < end {
                    prop_assert!(fresh, "{} over {:?} is stale after {}..{}", node, span, start, end);
                }
                if !fresh {
                    prop_assert_eq!(tree.gist(node), before.gist(node));
                }
            }
        }
        // The rest, and nothing twice.
        let rest: usize = tree.refresh(.., &table, &new).unwrap().iter().sum();
        prop_assert_eq!(made + rest, nodes);
        check(&tree, &table, &new);
        prop_assert_eq!(tree.refresh(.., &table, &new).unwrap().iter().sum::<usize>(), 0);
    }
}

#[test]
fn the_mean_of_means_is_the_mean_of_the_tokens() {
    let (width, block) = (4, 32);
    let table = Table { width };
    let mut tree = empty(block, 2, width);
    let all = tokens(3000, 1);
    assert_eq!(tree.append(&all, &table, &Plain::new(Kind::Mean, block, width, 0)).unwrap(), [93, 2]);
    for index in 0..2 {
        let rows = table.embeddings(&all[index * 1024..(index + 1) * 1024]).unwrap();
        for at in 0..width {
            let mean = rows.iter().skip(at).step_by(width).map(|v| f64::from(*v)).sum::<f64>() / 1024.0;
            let got = f64::from(tree.gist(Node { lod: 2, index: index as u64 }).unwrap()[at]);
            assert!((got - mean).abs() < 1e-7, "{got} {mean}");
        }
    }
}

#[test]
fn many_wide_blocks_are_asked_for_in_several_calls() {
    let (width, block) = (2048, 32);
    let source = Plain::new(Kind::Mean, block, width, 0);
    let all = tokens(150 * block, 2);
    let mut tree = empty(block, 1, width);
    tree.append(&all, &Table { width }, &source).unwrap();
    // 64 blocks of 32 · 2048 values are 16 MiB.
    assert_eq!((source.calls.get(), source.blocks.get()), (3, 150));
    let mut parts = empty(block, 1, width);
    for part in all.chunks(7 * block + 1) {
        parts.append(part, &Table { width }, &source).unwrap();
    }
    assert_eq!(tree, parts);
    assert_eq!(tree.verify(.., &Table { width }, &source, 0.0).unwrap(), 150);
    let newer = Plain::new(Kind::Mean, block, width, 1);
    assert_eq!(tree.refresh(.., &Table { width }, &newer).unwrap(), [150]);
    assert_eq!(newer.calls.get(), 3);
    assert_eq!(tree.gists(1), parts.gists(1));
}

#[test]
fn appending_goes_on_after_a_refresh() {
    let table = Table { width: 2 };
    let source = |version| Plain::new(Kind::Curved, 3, 2, version);
    let mut tree = grown(3, 3, 2, 50);
    tree.refresh(.., &table, &source(7)).unwrap();
    tree.append(&tokens(60, 9), &table, &source(7)).unwrap();
    check(&tree, &table, &source(7));
}

#[test]
fn a_decoder_embeds_a_trees_tokens() {
    let dir = fixtures().join("llama/tied_f32");
    let config = DecoderConfig::from_dir(&dir).unwrap();
    let decoder = Decoder::from_weights(config, &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap();
    let width = decoder.config().hidden_size;
    let source = Plain::new(Kind::Mean, 4, width, 0);
    let all: Vec<u32> = (0..21).collect();
    let mut tree = empty(4, 2, width);
    assert_eq!(tree.append(&all, &decoder, &source).unwrap(), [5, 1]);
    let rows: Vec<f32> = decoder.embed(&all[4..8], 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(tree.gist(Node { lod: 1, index: 1 }).unwrap(), source.gists(&rows, 1).unwrap());
    assert_eq!(decoder.embeddings(&[]).unwrap(), [] as [f32; 0]);
    let before = tree.clone();
    says(tree.append(&[3, 64], &decoder, &source), &["64"]);
    assert_eq!(tree, before);
}

/// Numbers of nodes and where they stand, as the original's tree has them.
#[test]
fn the_golden_hierarchys_positions() {
    let path = fixtures().join("megacontext/gist_hier_k8.safetensors");
    let golden: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let starts = |name: &str| golden[name].get(0).unwrap().to_vec1::<i64>().unwrap();
    let tree = grown(8, 2, 3, golden["in.base"].dims()[1]);
    assert_eq!(tree.len(), 69);
    let rule = SigmaRule { preset: SigmaPreset::Original, block: 8, uniform: false };
    for (lod, name) in [(1, "fp32.pos1"), (2, "fp32.pos2")] {
        let start = |index| tree.hierarchy().tokens(Node { lod, index }).start;
        let places: Vec<i64> =
            (0..tree.nodes(lod)).map(|i| rule.place(start(i) as f64, u32::from(lod)).0 as i64).collect();
        assert_eq!(places, starts(name), "level {lod}");
    }
}

#[test]
fn nodes_that_are_not_whole_are_not_there() {
    let tree = grown(4, 2, 2, 27);
    assert_eq!([0, 1, 2, 3].map(|lod| tree.nodes(lod)), [27, 6, 1, 0]);
    assert_eq!(tree.node_at(1, 23), Some(Node { lod: 1, index: 5 }));
    assert_eq!(tree.node_at(1, 24), None);
    assert_eq!(tree.node_at(0, 26), Some(Node { lod: 0, index: 26 }));
    assert_eq!(tree.node_at(0, 27), None);
    assert_eq!(tree.node_at(3, 0), None);
    assert_eq!(tree.parent(Node { lod: 1, index: 3 }), Some(Node { lod: 2, index: 0 }));
    assert_eq!(tree.parent(Node { lod: 1, index: 4 }), None);
    assert_eq!(tree.gist(Node { lod: 0, index: 0 }), None);
    assert_eq!(tree.gist(Node { lod: 1, index: u64::MAX }), None);
}

/// An append of tokens that this source spoils is refused with these words, and nothing has changed.
#[track_caller]
fn spoiled(parts: &[&str], gists: impl Fn(Vec<f32>, usize) -> Vec<f32>) {
    struct Spoiled<'a>(Plain, &'a dyn Fn(Vec<f32>, usize) -> Vec<f32>);
    impl GistSource for Spoiled<'_> {
        fn block(&self) -> usize {
            self.0.block
        }
        fn width(&self) -> usize {
            self.0.width
        }
        fn version(&self) -> u16 {
            self.0.version
        }
        fn gists(&self, children: &[f32], blocks: usize) -> Result<Vec<f32>> {
            Ok(self.1(self.0.gists(children, blocks)?, self.0.calls.get()))
        }
    }
    let source = |version| Spoiled(Plain::new(Kind::Curved, 3, 2, version), &gists);
    let mut tree = grown(3, 2, 2, 31);
    let before = tree.clone();
    says(tree.append(&tokens(40, 1), &Table { width: 2 }, &source(0)), parts);
    assert_eq!(tree, before);
    says(tree.refresh(.., &Table { width: 2 }, &source(1)), &parts[1..]);
    assert_eq!(tree, before);
    assert_eq!(
        tree.append(&tokens(40, 1), &Table { width: 2 }, &Plain::new(Kind::Curved, 3, 2, 0)).unwrap(),
        [13, 4]
    );
}

#[test]
fn a_gist_that_is_no_number_is_refused() {
    spoiled(&["gist of node 3 of level 2", "expected finite numbers, got NaN"], |mut gists, call| {
        if call == 2 {
            gists[0] = f32::NAN;
        }
        gists
    });
}

#[test]
fn an_infinite_gist_is_refused() {
    spoiled(&["gist of node 12 of level 1", "expected finite numbers, got inf"], |mut gists, _| {
        gists[5] = f32::INFINITY;
        gists
    });
}

#[test]
fn fewer_gists_than_blocks_are_refused() {
    spoiled(&["gists of 13 blocks from node 10 of level 1: expected 26 values", "got 2"], |mut gists, _| {
        gists.truncate(2);
        gists
    });
}

#[test]
fn gists_of_another_width_are_refused() {
    spoiled(&["13 blocks", "(2 each), got"], |gists, _| gists.iter().flat_map(|v| [*v, 0.0]).collect());
}

#[test]
fn a_source_of_another_block_or_width_is_refused() {
    let mut tree = grown(3, 2, 2, 31);
    for (block, width) in [(4, 2), (3, 5)] {
        let source = Plain::new(Kind::Mean, block, width, 0);
        let said = format!("got a source for {block} entries of width {width}");
        let parts = ["expected gists of 3 entries of width 2", &said];
        says(tree.append(&[1], &Table { width: 2 }, &source), &parts);
        says(tree.refresh(.., &Table { width: 2 }, &source), &parts);
        says(tree.verify(.., &Table { width: 2 }, &source, 0.0), &parts);
        says(tree.check_source(&source), &parts);
    }
    assert_eq!(tree.len(), 31);
}

#[test]
fn embeddings_of_another_width_are_refused() {
    let mut tree = grown(3, 2, 2, 31);
    let source = Plain::new(Kind::Mean, 3, 2, 0);
    says(tree.append(&[1], &Table { width: 3 }, &source), &["expected embeddings of width 2, got 3"]);
    struct Short;
    impl TokenEmbeddings for Short {
        fn width(&self) -> usize {
            2
        }
        fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>> {
            Ok(vec![if tokens.len() > 1 { 0.0 } else { f32::NAN }; 2])
        }
    }
    says(tree.append(&[1, 2, 3, 4], &Short, &source), &["2 tokens: expected 4 values (2 each), got 2"]);
    says(
        empty(3, 1, 2).append(&[5], &Short, &source),
        &["embedding of token 5: expected finite numbers, got NaN"],
    );
    assert_eq!(tree, grown(3, 2, 2, 31));
}

#[test]
fn a_token_without_embedding_is_refused_though_its_block_is_not_whole() {
    let mut tree = grown(32, 2, 2, 40);
    let before = tree.clone();
    let source = Plain::new(Kind::Curved, 32, 2, 0);
    says(tree.append(&[VOCABULARY], &Table { width: 2 }, &source), &["below 1000, got 1000"]);
    assert_eq!(tree, before);
}

#[test]
fn an_append_beside_stale_siblings_is_refused() {
    let mut tree = grown(3, 2, 2, 32);
    let before = tree.clone();
    let newer = Plain::new(Kind::Curved, 3, 2, 1);
    says(
        tree.append(&[1], &Table { width: 2 }, &newer),
        &["expected siblings of gist version 1, got version 0 from node 9 of level 1", "from token 27 on"],
    );
    assert_eq!(tree, before);
    // What is under whole parents may wait.
    assert_eq!(tree.refresh(27.., &Table { width: 2 }, &newer).unwrap(), [1, 0]);
    assert_eq!(tree.append(&tokens(4, 0), &Table { width: 2 }, &newer).unwrap(), [2, 1]);
    assert_eq!(tree.stale(1), 12);
}

#[test]
fn an_earlier_source_is_refused() {
    let mut tree = grown(3, 2, 2, 31);
    let table = Table { width: 2 };
    let source = |version| Plain::new(Kind::Curved, 3, 2, version);
    tree.refresh(.., &table, &source(5)).unwrap();
    let parts = ["expected a source of gist version 5 or later", "got version 4"];
    says(tree.append(&[1], &table, &source(4)), &parts);
    says(tree.refresh(.., &table, &source(4)), &parts);
    says(
        tree.check_source(&source(4)),
        &["expected nodes of gist version 4, got 13 of other versions, such as 5"],
    );
    tree.check_source(&source(5)).unwrap();
}

#[test]
fn a_tree_of_another_base_model_is_refused() {
    let tree = grown(3, 2, 2, 31);
    tree.check_base(&base()).unwrap();
    let other = BaseModel { fingerprint: "ff".into(), ..base() };
    says(tree.check_base(&other), &["expected a tree of the base model", "\"ff\"", "\"0123456789abcdef\""]);
    let other = BaseModel { name: "large".into(), ..base() };
    says(tree.check_base(&other), &["\"large\"", "\"tiny\""]);
}

#[test]
fn ranges_beyond_the_history_are_refused() {
    let mut tree = grown(3, 2, 2, 31);
    let newer = Plain::new(Kind::Curved, 3, 2, 1);
    let table = Table { width: 2 };
    says(tree.refresh(4..32, &table, &newer), &["expected a range of the 31 tokens, got 4..32"]);
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 9..4;
    says(tree.refresh(reversed, &table, &newer), &["got 9..4"]);
    says(tree.verify(..=31, &table, &newer, 0.0), &["got 0..32"]);
    assert_eq!(tree.refresh(31..31, &table, &newer).unwrap(), [0, 0]);
}

#[test]
fn a_gist_that_its_children_do_not_make_is_found() {
    let table = Table { width: 2 };
    let tree = grown(3, 2, 2, 31);
    // The same version by name, another function: what a tree of another checkpoint looks like.
    let other = Plain::new(Kind::Mean, 3, 2, 0);
    says(tree.verify(.., &table, &other, 0.0), &["node 0 of level 1: expected the gist of its children"]);
    says(tree.verify(12..31, &table, &other, 1e-3), &["node 4 of level 1"]);
    let source = Plain::new(Kind::Curved, 3, 2, 0);
    assert_eq!(tree.verify(.., &table, &source, 0.0).unwrap(), 13);
    assert_eq!(tree.verify(9..18, &table, &source, 0.0).unwrap(), 4);
}

/// Embeddings of a thousandth of [`Table`]'s; `turn` is added to a token's number.
struct Small {
    turn: u32,
}

impl TokenEmbeddings for Small {
    fn width(&self) -> usize {
        16
    }

    fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let turned: Vec<u32> = tokens.iter().map(|token| (token + self.turn) % VOCABULARY).collect();
        let rows = Table { width: 16 }.embeddings(&turned)?;
        Ok(rows.into_iter().map(|value| 1e-3 * value).collect())
    }
}

#[test]
fn small_gists_are_held_as_closely_as_large_ones() {
    // What sixteen bits take from a gist is within 2 % of its own size, however small that is; another gist is not.
    let source = Plain::new(Kind::Mean, 8, 16, 0);
    let mut tree = empty(8, 1, 16);
    tree.append(&tokens(400, 7), &Small { turn: 0 }, &source).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for dtype in [GistDtype::F16, GistDtype::Bf16] {
        let dir = dir.path().join(format!("{dtype:?}"));
        write_tree(&dir, &tree, &StoreOptions { dtype, ..StoreOptions::default() }).unwrap();
        let stored = TreeFolder::open(&dir).unwrap().load(&base()).unwrap();
        assert_eq!(stored.verify(.., &Small { turn: 0 }, &source, 2e-2).unwrap(), 50);
        for node in 0..50 {
            let other = stored.verify(8 * node..8 * (node + 1), &Small { turn: 1 }, &source, 2e-2);
            says(other, &["expected the gist of its children"]);
        }
    }
}

#[test]
fn a_tree_without_width_is_refused() {
    let hierarchy = Hierarchy::new(3, 2).unwrap();
    says(GistTree::new(hierarchy, 0, base()), &["width: expected at least 1, got 0"]);
}
