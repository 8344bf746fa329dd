//! Tells the plugin how it was built, for a host that wants to know (`mclora plugin check`).

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
}
