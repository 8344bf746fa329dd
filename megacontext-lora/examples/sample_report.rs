//! Writes a run folder with made-up numbers, to look at the report page and at TensorBoard without training anything, and beside
//! it the page of a run that trained GistNet, `gistnet.html`:
//!
//! ```sh
//! cargo run -p megacontext-lora --example sample_report -- /tmp/sample-run
//! ```
//!
//! The numbers in `sample_report.json` and `sample_gist_report.json` were invented for the pages' layout; no model reached them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use megacontext_lora::jobs::train_gistnet::GistSummary;
use megacontext_lora::report::gistnet::{GistReport, render as render_gistnet};
use megacontext_lora::report::{REPORT, RunReport, render};
use megacontext_lora::run::Telemetry;
use megacontext_lora::run::folder::{CONFIG, RunFolder};
use megacontext_lora::run::metrics::Record;
use megacontext_lora::run::summary::SUMMARY;
use serde::Deserialize;

#[derive(Deserialize)]
struct GistSample {
    summary: GistSummary,
    records: Vec<Record>,
    config: String,
}

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
    let sample: GistSample = serde_json::from_str(include_str!("sample_gist_report.json"))?;
    let report = GistReport { summary: &sample.summary, records: &sample.records, config: &sample.config };
    println!("{}", folder.write("gistnet.html", render_gistnet(&report).as_bytes())?.display());
    Ok(())
}
