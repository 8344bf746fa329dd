//! Labels of a run that trains LensNet: made round by round on the contexts of the policy as it is, written as they are made.
//!
//! Each label follows from the seed, its round and the network with which the round began. Units: nats per token. Errors: labels of
//! another run, fewer than a round that was learned from had.

use std::path::Path;
use std::time::Instant;

use lensnet_adapter::labels::Label;
use lensnet_adapter::utility::Utilities;
use megacontext_base::random::Random;
use serde_json::{Value, json};

use super::{Data, Run};
use crate::error::{PluginError, Result};
use crate::run::label_log::LabelLog;
use crate::run::labels::{self, LabelStamp};
use crate::run::metrics::wall_time;
use crate::train::labelling::{LOOKED_AT, begun_utilities, label_of, rows, told, unit_of};
use crate::train::plan::since;

impl Run<'_> {
    /// What the best expands of a few contexts save, in nats: what a score of 1 stands for.
    pub(super) fn measure_unit(&mut self, data: &Data) -> Result<f64> {
        let mut found: Vec<Utilities> = Vec::new();
        for history in data.text.iter().take(LOOKED_AT) {
            if self.host.cancelled() {
                return self.cancelled();
            }
            found.push(begun_utilities(self.focus, history, self.config.seed, &mut self.buffers)?);
        }
        Ok(unit_of(&found))
    }

    /// What labels hold for: another run's are not this one's.
    fn stated(&self, data: &Data, round: usize) -> Value {
        json!({
            "round": round,
            "config_hash": self.state.config_hash,
            "base": self.state.inputs.base,
            "frozen": self.state.frozen,
            "gist_version": data.gist_version,
        })
    }

    /// The labels of a round: read as far as they are there, made from there on.
    pub(super) fn label(&mut self, data: &Data, round: usize) -> Result<Vec<Label>> {
        let c = self.config;
        let count = c.labels.histories.min(data.text.len());
        let stated = self.stated(data, round);
        let (mut log, mut labels) = LabelLog::open(self.folder.path(), round + 1, &stated)?;
        labels.truncate(count);
        if labels.len() < count && self.step != round * c.steps {
            return Err(PluginError::data(format!(
                "{}: expected the {count} labels that the round learned from, found {}; begin a new run in another folder",
                log.path().display(),
                labels.len()
            )));
        }
        let begun = (Instant::now(), labels.len());
        for at in labels.len()..count {
            if self.host.cancelled() {
                log.sync()?;
                return self.cancelled();
            }
            // Every round has histories of its own, as far as there are such.
            let number = (round * count + at) % data.text.len();
            let label = self.label_of(data, number, round, at)?;
            log.append(&label)?;
            self.host.event("label", &told(&label, round, at, self.focus.loss.rule().block));
            labels.push(label);
            let done = labels.len();
            let left = since(begun.0) / (done - begun.1) as f64 * (count - done) as f64;
            self.host.event(
                "progress",
                &json!({
                    "job": "train_lensnet", "labels": done, "stage": round + 1, "stages": c.labels.rounds,
                    "step": done, "steps": count, "eta_s": left,
                }),
            );
        }
        log.sync()?;
        let path = log.path().with_extension("parquet");
        if !path.is_file() {
            self.write_table(&path, data, &labels)?;
        }
        Ok(labels)
    }

    /// A round's labels as a table: a row for every edit that was measured.
    fn write_table(&self, path: &Path, data: &Data, round: &[Label]) -> Result<()> {
        let stamp = LabelStamp {
            base: self.identity.base_fingerprint.clone(),
            adapter: self.config.adapter.as_ref().and(self.identity.adapter_fingerprint.clone()),
            gist_version: data.gist_version,
            horizon: self.config.horizon,
            block: self.focus.loss.rule().block,
        };
        let Some(history) = data.text.first() else { return Ok(()) };
        let timestamp_ms = (wall_time() * 1e3) as i64;
        let rows = rows(round, history.tree.hierarchy(), self.scale(), timestamp_ms)?;
        labels::write(path, &stamp, &rows)
    }

    fn label_of(&mut self, data: &Data, number: usize, round: usize, at: usize) -> Result<Label> {
        let c = self.config;
        let mut random = Random::named(c.seed, &format!("label {at} of round {round}"));
        // Nothing is learned before the first round: contexts as every policy begins with them.
        let learned = (round > 0).then_some(&self.trainer.network);
        let history = (number, &data.text[number]);
        label_of(&c.labels, self.focus, learned, history, &mut random, &mut self.buffers)
    }
}
