//! `report.html`: one page about one run, for a reader who was not there.
//!
//! The page is self-contained: no script, no font, no image, no address. It reads on a phone and on a desktop, in light
//! and in dark, on paper too. All of it comes from `summary.json`, `metrics.jsonl` and `config.toml`; [`RunReport::read`]
//! makes it again for any run folder.
//!
//! [`verdict`](verdict()) says what the numbers mean, `plots` draws them, `html` lays out the page. Text from outside
//! (paths, names, settings) is escaped wherever it appears.
//!
//! [`sweep`] is the page of a sweep over ranks, in the same frame.
//! [`gistnet`] is the page of a run that trained GistNet.
//! [`lensnet`] is the page of a run that trained LensNet.
//! [`compare`] is the page of several runs side by side.
//! [`cycle`] is the page of a run of alternating optimisation.
//! [`evaluation`] is the page of an evaluation, with the same frame and drawings.
//!
//! Errors: `Io` and `Data` with the path while a run folder is read; rendering has none.

mod axes;
pub mod compare;
pub mod cycle;
pub mod evaluation;
mod focus;
mod format;
mod gist_curves;
pub mod gistnet;
mod heat;
mod html;
pub mod lensnet;
mod plots;
mod rope;
pub mod stand_ins;
pub mod sweep;
mod verdict;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{IoResultExt, Result};
use crate::run::folder::CONFIG;
use crate::run::metrics::{self, METRICS, Record};
use crate::run::summary::{SUMMARY, Summary};

pub use html::render;
pub use rope::{RopePicture, rope_picture};
pub use verdict::{Verdict, verdict};

/// The file's name in a run folder.
pub const REPORT: &str = "report.html";

/// What the page is made of.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Heading of the page; empty: made from the context lengths.
    pub title: String,
    /// The outcome.
    pub summary: Summary,
    /// What was measured on the way, in its order.
    pub records: Vec<Record>,
    /// The settings as resolved, TOML.
    pub config: String,
}

impl RunReport {
    /// Collects the report of a finished run from its folder.
    pub fn read(run_dir: &Path) -> Result<Self> {
        let config = run_dir.join(CONFIG);
        Ok(Self {
            title: String::new(),
            summary: Summary::read(&run_dir.join(SUMMARY))?,
            records: metrics::read(&run_dir.join(METRICS))?,
            config: std::fs::read_to_string(&config).at(&config)?,
        })
    }
}

#[cfg(test)]
pub(crate) fn sample() -> RunReport {
    let text = include_str!("../../examples/sample_report.json");
    serde_json::from_str(text).expect("the sample is a RunReport")
}
