//! Writes a small Llama that finds planted facts by construction, and a GistNet for it: `cargo run --release --example
//! planted_base -- models/induction`. With them `mclora train lensnet --data planted:400` has a known answer.
#![allow(clippy::unwrap_used)]

#[path = "../tests/common/induction.rs"]
mod induction;

use std::path::PathBuf;

fn main() {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("planted_base: expected the folder to write, got none");
        std::process::exit(2);
    };
    induction::write(&dir, serde_json::json!({}));
    induction::write_gistnet(&dir, 32);
    println!("{}", dir.display());
}
