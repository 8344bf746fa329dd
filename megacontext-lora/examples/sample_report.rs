//! Writes a run folder with made-up numbers, to look at the report page and at TensorBoard without training anything:
//!
//! ```sh
//! cargo run -p megacontext-lora --example sample_report -- /tmp/sample-run
//! ```
//!
//! The numbers in `sample_report.json` were invented for the page's layout; no model reached them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use megacontext_lora::report::{REPORT, RunReport, render};
use megacontext_lora::run::Telemetry;
use megacontext_lora::run::folder::{CONFIG, RunFolder};
use megacontext_lora::run::summary::SUMMARY;

fn main() -> Result<()> {
    let path: PathBuf = std::env::args_os().nth(1).context("expected the path of a new folder")?.into();
    let sample: RunReport = serde_json::from_str(include_str!("sample_report.json"))?;
    let folder = RunFolder::create(path)?;
    folder.write(CONFIG, sample.config.as_bytes())?;
    let mut telemetry = Telemetry::create(&folder, &sample.config)?;
    for record in sample.records {
        telemetry.record(record)?;
    }
    telemetry.sync()?;
    folder.write_json(SUMMARY, &sample.summary)?;
    let page = folder.write(REPORT, render(&RunReport::read(folder.path())?).as_bytes())?;
    println!("{}", page.display());
    Ok(())
}
