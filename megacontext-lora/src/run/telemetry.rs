//! What a run measures, to both places at once: the metrics log and the TensorBoard file made from it.
//!
//! The log is the truth; the TensorBoard file is derived. Resuming cuts the log back to the checkpoint and writes the
//! event file anew from the lines that stay.
//!
//! Errors: those of [`super::metrics`] and [`super::tensorboard`].

use super::folder::RunFolder;
use super::metrics::{METRICS, MetricsLog, Record, wall_time};
use super::tensorboard::EventFile;
use crate::error::Result;

/// Both files, open at their ends.
#[derive(Debug)]
pub struct Telemetry {
    log: MetricsLog,
    events: EventFile,
    records: Vec<Record>,
}

impl Telemetry {
    /// Starts both files. `config` (TOML) is shown by TensorBoard as text.
    pub fn create(folder: &RunFolder, config: &str) -> Result<Self> {
        let log = MetricsLog::create(folder.path().join(METRICS))?;
        Ok(Self { log, events: events(folder, config, &[])?, records: Vec::new() })
    }

    /// Takes both files up again where the checkpoint left them; see [`MetricsLog::resume`].
    pub fn resume(folder: &RunFolder, config: &str, keep: u64, warn: &mut dyn FnMut(String)) -> Result<Self> {
        let (log, records) = MetricsLog::resume(folder.path().join(METRICS), keep, warn)?;
        Ok(Self { log, events: events(folder, config, &records)?, records })
    }

    /// Writes one measurement to both.
    pub fn record(&mut self, record: Record) -> Result<()> {
        self.log.append(&record)?;
        self.events.record(&record)?;
        self.records.push(record);
        Ok(())
    }

    /// Makes both durable. Call it before a checkpoint.
    pub fn sync(&mut self) -> Result<()> {
        self.log.sync()?;
        self.events.sync()
    }

    /// Lines in the log: the checkpoint stores it for [`Telemetry::resume`].
    pub fn lines(&self) -> u64 {
        self.log.lines()
    }

    /// Everything measured so far, of the resumed part too.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

fn events(folder: &RunFolder, config: &str, records: &[Record]) -> Result<EventFile> {
    let now = records.first().map_or_else(wall_time, Record::wall_time);
    let mut events = EventFile::create(folder.path(), now)?;
    // Indented by four: markdown shows it as it is.
    let text: String = config.lines().map(|line| format!("    {line}\n")).collect();
    events.text(now, 0, "config", &text)?;
    records.iter().try_for_each(|r| events.record(r))?;
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::metrics::tests::{evaluation, train};
    use crate::run::tensorboard::tests::scalars;

    #[test]
    fn resumed_event_file_equals_the_uninterrupted_one() {
        let dir = tempfile::tempdir().unwrap();
        let whole = RunFolder::create(dir.path().join("whole")).unwrap();
        let torn = RunFolder::create(dir.path().join("torn")).unwrap();
        let mut expected = Telemetry::create(&whole, "seed = 7").unwrap();
        let mut first = Telemetry::create(&torn, "seed = 7").unwrap();
        let mut lines = 0;
        for step in 1..=4 {
            expected.record(train(step)).unwrap();
            first.record(train(step)).unwrap();
            if step == 2 {
                lines = first.lines();
            }
        }
        expected.record(evaluation(4)).unwrap();
        drop(first);
        let mut resumed = Telemetry::resume(&torn, "seed = 7", lines, &mut |w| panic!("{w}")).unwrap();
        for record in [train(3), train(4), evaluation(4)] {
            resumed.record(record).unwrap();
        }
        resumed.sync().unwrap();
        assert_eq!(resumed.records(), expected.records());
        assert_eq!(scalars(resumed.events.path()), scalars(expected.events.path()));
        let log = |run: &RunFolder| std::fs::read(run.path().join(METRICS)).unwrap();
        assert_eq!(log(&torn), log(&whole));
    }
}
