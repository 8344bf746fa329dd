//! `metrics.jsonl`: what a run measured, one JSON object a line, in the order it happened.
//!
//! A line has a `kind` (`stage`, `train`, `evaluation`; `gist_step`, `gist_baselines`, `gist_validation`; `lens_step`,
//! `lens_validation`; `cycle_step`, `phase`) and a `step`; every field that depends on the clock or on the
//! machine begins with `wall_`, all others are the same in every run with the same seed. Losses are nats per token.
//!
//! Resuming cuts the file back to what the checkpoint knows ([`MetricsLog::resume`]), so that apart from `wall_` fields
//! an interrupted run ends with the file of an uninterrupted one. A last line without its newline (torn by a kill) is
//! dropped. Call [`MetricsLog::sync`] before a checkpoint: then the file never knows less than the checkpoint.
//!
//! Errors: `Io` with the path; `Data` for a broken line in the middle when the file is read for a report.
//!
//! JSON has no NaN: a number that is not finite is written as null and read as NaN.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use gistnet_adapter::validate::{Baseline, Validation};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{IoResultExt, PluginError, Result};

/// The file's name in a run folder.
pub const METRICS: &str = "metrics.jsonl";

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A stage begins.
    Stage(StageRecord),
    /// An optimiser step was done.
    Train(TrainRecord),
    /// A model was evaluated at one context length.
    Evaluation(EvaluationRecord),
    /// An optimiser step of GistNet was done.
    GistStep(GistStepRecord),
    /// What else could stand for a block was measured.
    GistBaselines(GistBaselinesRecord),
    /// GistNet was validated.
    GistValidation(Box<GistValidationRecord>),
    /// An optimiser step of LensNet was done.
    LensStep(LensStepRecord),
    /// LensNet was validated.
    LensValidation(Box<LensValidationRecord>),
    /// An optimiser step of a phase of alternating optimisation was done.
    CycleStep(CycleStepRecord),
    /// Such a phase ended.
    Phase(Box<PhaseRecord>),
}

/// A stage begins after `step` optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Context length, tokens.
    pub context: usize,
    /// `s2` or `dense`.
    pub attention: String,
    /// Group size of `s2`, tokens.
    pub group: Option<usize>,
    /// RoPE factor.
    pub factor: f64,
    /// Optimiser steps of the stage.
    pub steps: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
}

/// Optimiser step number `step` (from 1) was done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Number of the step in the run, from 1.
    pub step: u64,
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Context length, tokens.
    pub context: usize,
    /// Mean loss, nats per token.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "nan_if_null")]
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Tokens trained on since the run began.
    pub tokens: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds of this step.
    pub wall_seconds: f64,
    /// Tokens a second in this step.
    #[serde(deserialize_with = "nan_if_null")]
    pub wall_tokens_per_s: f64,
}

/// A model was evaluated after `step` optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// `base`, `interpolated` or `adapted`.
    pub model: String,
    /// Context length, tokens.
    pub context: usize,
    /// `dense` or `s2`.
    pub attention: String,
    /// exp of the mean loss.
    #[serde(deserialize_with = "nan_if_null")]
    pub perplexity: f64,
    /// Tokens scored.
    pub tokens: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds it took.
    pub wall_seconds: f64,
}

/// Optimiser step number `step` (from 1) of GistNet was done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GistStepRecord {
    /// Number of the step in the run, from 1.
    pub step: u64,
    /// Number of the stage, from 0.
    pub stage: usize,
    /// H.
    pub horizon: usize,
    /// What was made smaller, nats.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Mean ΔNLL@H of the step's rows, nats.
    #[serde(deserialize_with = "nan_if_null")]
    pub delta_nll: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "nan_if_null")]
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Rows of replaced spans.
    pub rows: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds of this step.
    pub wall_seconds: f64,
}

/// What else could stand for a block, over a horizon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GistBaselinesRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// H.
    pub horizon: usize,
    /// ΔNLL@H of each, nats.
    pub delta_nll: BTreeMap<Baseline, f64>,
    /// ΔNLL@H of deletion under sparse attention, and of deleting spans of the second level.
    pub sparse_deleted: Option<f64>,
    /// See there.
    pub level2_deleted: Option<f64>,
    /// Seconds since 1970.
    pub wall_time: f64,
}

/// GistNet was validated after `step` optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GistValidationRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// Number of the stage, from 0.
    pub stage: usize,
    /// What was found.
    #[serde(flatten)]
    pub validation: Validation,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds it took.
    pub wall_seconds: f64,
}

/// Optimiser step number `step` (from 1) of LensNet was done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LensStepRecord {
    /// Number of the step in the run, from 1.
    pub step: u64,
    /// What was made smaller.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "nan_if_null")]
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Contexts scored.
    pub contexts: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds of this step.
    pub wall_seconds: f64,
}

/// LensNet was validated after `step` optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LensValidationRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// What was found.
    #[serde(flatten)]
    pub validation: lensnet_adapter::validate::Validation,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds it took.
    pub wall_seconds: f64,
}

/// Optimiser step number `step` (from 1, of all phases) was done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CycleStepRecord {
    /// Number of the step in the run, from 1.
    pub step: u64,
    /// `warm_gistnet`, `warm_lensnet`, `jt1`, `jt2` or `jt3`.
    pub phase: String,
    /// From 1; 0 is the warm start.
    pub cycle: usize,
    /// Number of the step in the phase, from 1.
    pub phase_step: u64,
    /// What was made smaller.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Mean ΔNLL@H of GistNet's rows, loss@H of JT3's contexts, nats.
    pub measured: Option<f64>,
    /// Learning rate of the step.
    #[serde(deserialize_with = "nan_if_null")]
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Rows, labels or contexts.
    pub items: u64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Seconds of this step.
    pub wall_seconds: f64,
}

/// A phase of alternating optimisation ended after `step` optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseRecord {
    /// Optimiser steps done in the run.
    pub step: u64,
    /// What it came to.
    pub summary: crate::jobs::train::PhaseSummary,
    /// Seconds since 1970.
    pub wall_time: f64,
}

fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Record {
    /// When it was written, seconds since 1970.
    pub fn wall_time(&self) -> f64 {
        match self {
            Self::Stage(r) => r.wall_time,
            Self::Train(r) => r.wall_time,
            Self::Evaluation(r) => r.wall_time,
            Self::GistStep(r) => r.wall_time,
            Self::GistBaselines(r) => r.wall_time,
            Self::GistValidation(r) => r.wall_time,
            Self::LensStep(r) => r.wall_time,
            Self::LensValidation(r) => r.wall_time,
            Self::CycleStep(r) => r.wall_time,
            Self::Phase(r) => r.wall_time,
        }
    }
}

/// Seconds since 1970, for the `wall_time` fields.
pub fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The file, open at its end.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    lines: u64,
}

impl MetricsLog {
    /// An empty file; an older one is emptied.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = File::create(&path).at(&path)?;
        Ok(Self { path, file, lines: 0 })
    }

    /// The file cut back to its first `keep` lines, and the records they hold. A missing file is an empty one.
    ///
    /// `warn` is told when lines that should be there are missing or broken; the file then ends before them.
    pub fn resume(
        path: impl Into<PathBuf>,
        keep: u64,
        warn: &mut dyn FnMut(String),
    ) -> Result<(Self, Vec<Record>)> {
        let path = path.into();
        let bytes = match std::fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            bytes => bytes.at(&path)?,
        };
        let mut records = Vec::new();
        let mut end = 0;
        for line in whole_lines(&bytes) {
            if records.len() as u64 >= keep {
                break;
            }
            let Ok(record) = serde_json::from_slice::<Record>(line) else {
                let number = records.len() + 1;
                warn(format!("{}: line {number} is broken: it and what follows are dropped", path.display()));
                break;
            };
            end += line.len() + 1;
            records.push(record);
        }
        let lines = records.len() as u64;
        if lines < keep {
            warn(format!("{}: expected at least {keep} lines, got {lines}", path.display()));
        }
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).open(&path).at(&path)?;
        file.set_len(end as u64).and_then(|()| file.sync_all()).at(&path)?;
        Ok((Self { path, file, lines }, records))
    }

    /// Appends one line, in one write.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line =
            serde_json::to_vec(record).map_err(|e| PluginError::internal(format!("metrics line: {e}")))?;
        line.push(b'\n');
        self.file.write_all(&line).at(&self.path)?;
        self.lines += 1;
        Ok(())
    }

    /// Makes all lines durable.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().at(&self.path)
    }

    /// Lines so far: store it in the checkpoint, for [`MetricsLog::resume`].
    pub fn lines(&self) -> u64 {
        self.lines
    }
}

/// All records of a file; a torn last line is passed over.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).at(path)?;
    whole_lines(&bytes)
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_slice(line)
                .map_err(|e| PluginError::data(format!("{}: line {}: {e}", path.display(), i + 1)))
        })
        .collect()
}

/// The lines that end with a newline, without it.
fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|b| *b == b'\n').filter_map(|line| line.strip_suffix(b"\n"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::error::Kind;
    use std::fs;

    pub(in crate::run) fn train(step: u64) -> Record {
        Record::Train(TrainRecord {
            step,
            stage: 0,
            context: 512,
            loss: 3.0 + 1.0 / step as f64,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens: step * 2048,
            wall_time: 1e9 + step as f64,
            wall_seconds: 0.25,
            wall_tokens_per_s: 8192.0,
        })
    }

    pub(in crate::run) fn evaluation(step: u64) -> Record {
        Record::Evaluation(EvaluationRecord {
            step,
            model: "adapted".into(),
            context: 1024,
            attention: "dense".into(),
            perplexity: 12.5,
            tokens: 4096,
            wall_time: 1e9,
            wall_seconds: 1.0,
        })
    }

    fn written(dir: &Path, records: &[Record]) -> PathBuf {
        let path = dir.join(METRICS);
        let mut log = MetricsLog::create(&path).unwrap();
        records.iter().for_each(|r| log.append(r).unwrap());
        log.sync().unwrap();
        path
    }

    fn resume(path: &Path, keep: u64) -> (MetricsLog, Vec<Record>, Vec<String>) {
        let mut warnings = Vec::new();
        let (log, records) = MetricsLog::resume(path, keep, &mut |w| warnings.push(w)).unwrap();
        (log, records, warnings)
    }

    #[test]
    fn interrupted_is_uninterrupted() {
        let dir = tempfile::tempdir().unwrap();
        let all = [train(1), train(2), evaluation(2), train(3), train(4)];
        let path = written(dir.path(), &all);
        let whole = fs::read(&path).unwrap();
        for (keep, from) in [(3, 3), (2, 2), (5, 5)] {
            let (mut log, records, warnings) = resume(&path, keep);
            assert_eq!((records.as_slice(), log.lines()), (&all[..from], from as u64));
            assert!(warnings.is_empty());
            all[from..].iter().for_each(|r| log.append(r).unwrap());
            assert_eq!(fs::read(&path).unwrap(), whole, "{keep:?}");
        }
        assert_eq!(read(&path).unwrap(), all);
    }

    #[test]
    fn torn_last_line_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), &[train(1), train(2)]);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(read(&path).unwrap(), [train(1)]);
        let (mut log, records, _) = resume(&path, 1);
        assert_eq!(records, [train(1)]);
        log.append(&train(2)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn broken_line_ends_the_file_with_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), &[train(1)]);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(b"\0\0\0\n");
        fs::write(&path, &bytes).unwrap();
        let error = read(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Data);
        assert!(error.message.contains("line 2"), "{error}");
        let (_, records, warnings) = resume(&path, 2);
        assert_eq!((records.len(), warnings.len()), (1, 2));
        assert!(warnings[0].contains("line 2 is broken"), "{warnings:?}");
    }

    #[test]
    fn missing_file_is_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, records, _) = resume(&dir.path().join("m"), 0);
        assert!(records.is_empty());
        log.append(&train(1)).unwrap();
        assert_eq!(read(&dir.path().join("m")).unwrap(), [train(1)]);
    }

    #[test]
    fn not_a_number_survives() {
        let dir = tempfile::tempdir().unwrap();
        let Record::Train(mut record) = train(1) else { unreachable!() };
        record.loss = f64::NAN;
        let path = written(dir.path(), &[Record::Train(record)]);
        assert!(fs::read_to_string(&path).unwrap().starts_with(r#"{"kind":"train","step":1,"#));
        let Record::Train(back) = &read(&path).unwrap()[0] else { unreachable!() };
        assert!(back.loss.is_nan());
    }

    #[test]
    fn full_disk_is_io_with_the_path() {
        let mut log =
            MetricsLog { path: "/dev/full".into(), file: File::create("/dev/full").unwrap(), lines: 0 };
        let error = log.append(&train(1)).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.starts_with("/dev/full: "), "{error}");
    }
}
