//! Tells the plugin how it was built, for a host that wants to know (`mclora plugin check`), and `mclora` whether the
//! small model's files are there to be embedded.

use std::path::Path;
use std::process::Command;

fn main() {
    let of = |name: &str| std::env::var(name).unwrap_or_else(|_| "unknown".into());
    let rustc = Command::new(of("RUSTC"))
        .arg("--version")
        .output()
        .ok()
        .filter(|out| out.status.success())
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .map_or_else(|| "unknown".into(), |text| text.trim().to_owned());
    println!("cargo:rustc-env=MEGACONTEXT_RUSTC={rustc}");
    println!("cargo:rustc-env=MEGACONTEXT_TARGET={}", of("TARGET"));
    println!("cargo:rustc-env=MEGACONTEXT_PROFILE={}", of("PROFILE"));
    println!("cargo:rustc-env=MEGACONTEXT_TARGET_FEATURES={}", of("CARGO_CFG_TARGET_FEATURE"));
    println!("cargo:rerun-if-changed=build.rs");

    println!("cargo:rustc-check-cfg=cfg(embedded_base)");
    let base = Path::new("../assets/tiny-llama");
    let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    if files.iter().all(|name| base.join(name).is_file()) {
        println!("cargo:rustc-cfg=embedded_base");
    }
    // The folder is named even while it is absent, so that the build notices when it appears.
    println!("cargo:rerun-if-changed=../assets");
}
