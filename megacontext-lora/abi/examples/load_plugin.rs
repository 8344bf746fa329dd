//! A host in forty lines: loads the plugin, opens a model, asks what follows a few tokens.
//!
//! ```text
//! cargo build --release && cargo run --release -p megacontext-lora-abi --example load_plugin -- \
//!     target/release/libmegacontext_lora.so assets/tiny-llama
//! ```

use anyhow::{Context, Result};
use megacontext_lora_abi::{ContextView, Host, LoadOptions, Plugin, TensorViewMut};
use serde_json::json;

/// Prints what the plugin has to say.
struct Printer;

impl Host for Printer {
    fn event(&self, kind: &str, json: &str) {
        eprintln!("{kind}: {json}");
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let library = arguments.next().context("usage: load_plugin LIBRARY MODEL-FOLDER")?;
    let base = arguments.next().context("usage: load_plugin LIBRARY MODEL-FOLDER")?;

    let plugin = Plugin::load(&library, &LoadOptions::default())?;
    println!("{}, built by {}", plugin.version_line(), plugin.build_info().rustc);
    println!("can: {}", plugin.capabilities().join(", "));

    let session = plugin.open_session(&json!({ "base": base }), Printer)?;
    let description = session.describe()?;
    println!("{description:#}");

    let tokens = [1u32, 2, 3, 4];
    let vocabulary = description["vocab_size"].as_u64().context("vocab_size")? as usize;
    let mut logits = vec![0f32; tokens.len() * vocabulary];
    let out = TensorViewMut::new(&mut logits, &[tokens.len(), vocabulary])?;
    session.logits(ContextView::tokens(&tokens), out)?;

    let last = &logits[(tokens.len() - 1) * vocabulary..];
    let best = (0..vocabulary).max_by(|&a, &b| last[a].total_cmp(&last[b])).context("a vocabulary")?;
    println!("after {tokens:?} the likeliest token is {best}");
    Ok(())
}
