//! TensorBoard event files: scalars and text that `tensorboard --logdir` shows, with no TensorFlow.
//!
//! Format: a file of TFRecords, each `length u64 LE | masked CRC-32C of the length | data | masked CRC-32C of the data`,
//! mask(c) = rotate_right(c, 15) + 0xa282ead8 (TensorFlow, `record_writer.cc`). The data are protobuf messages `Event`
//! (`event.proto`, `summary.proto`, `tensor.proto`); only the fields written here are declared, with their numbers. The
//! first event names the version, `brain.Event:2`.
//!
//! The file is made of the metrics log alone: a resumed run writes it anew from the lines it kept ([`super::Telemetry`]),
//! so steps never appear twice.
//!
//! Errors: `Io` with the path.
//!
//! Left out on purpose: histograms, images, graphs; reading (the tests have a reader of their own).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use prost::Message;

use super::metrics::Record;
use crate::error::{IoResultExt, Result};

const PREFIX: &str = "events.out.tfevents.";
const SUFFIX: &str = ".mclora";

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "8")]
    Tensor(TextTensor),
}

/// `SummaryMetadata`.
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
    /// `DataClass`: 2 is a tensor.
    #[prost(int32, tag = "4")]
    data_class: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

/// `TensorProto` of strings; no shape is a scalar's shape.
#[derive(Clone, PartialEq, Message)]
struct TextTensor {
    /// `DataType`: 7 is a string.
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorShape {}

/// An event file, open at its end.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new event file in `dir`, in place of older ones of this program.
    ///
    /// `wall_time` (seconds since 1970) becomes a part of the name, with the host's name.
    pub fn create(dir: &Path, wall_time: f64) -> Result<Self> {
        for entry in fs::read_dir(dir).at(dir)? {
            let entry = entry.at(dir)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
                fs::remove_file(entry.path()).at(entry.path())?;
            }
        }
        let path = dir.join(format!("{PREFIX}{:010}.{}{SUFFIX}", wall_time as u64, host_name()));
        let file = File::create(&path).at(&path)?;
        let mut events = Self { path, file };
        events.write(wall_time, 0, What::FileVersion("brain.Event:2".into()))?;
        Ok(events)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Numbers of one step, each under its tag.
    pub fn scalars(&mut self, wall_time: f64, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let value = values.iter().map(|(tag, value)| Value {
            tag: (*tag).to_owned(),
            metadata: None,
            content: Some(Content::SimpleValue(*value as f32)),
        });
        self.write(wall_time, step, What::Summary(Summary { value: value.collect() }))
    }

    /// A text (markdown) under its tag.
    pub fn text(&mut self, wall_time: f64, step: u64, tag: &str, text: &str) -> Result<()> {
        let value = Value {
            tag: tag.to_owned(),
            metadata: Some(Metadata {
                plugin_data: Some(PluginData { plugin_name: "text".into() }),
                data_class: 2,
            }),
            content: Some(Content::Tensor(TextTensor {
                dtype: 7,
                tensor_shape: Some(TensorShape {}),
                string_val: vec![text.as_bytes().to_vec()],
            })),
        };
        self.write(wall_time, step, What::Summary(Summary { value: vec![value] }))
    }

    /// A line of the metrics log: `train/…` by step, `perplexity/<model>/<context>` (`perplexity_s2/…` when sparse),
    /// `delta_nll/<stand-in>/<horizon>` and `val/…` of GistNet, `val/…` of LensNet.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Stage(r) => self.scalars(
                r.wall_time,
                r.step,
                &[("stage/context", r.context as f64), ("stage/rope_factor", r.factor)],
            ),
            Record::Train(r) => self.scalars(
                r.wall_time,
                r.step,
                &[
                    ("train/loss", r.loss),
                    ("train/lr", r.lr),
                    ("train/grad_norm", r.grad_norm),
                    ("train/tokens_per_s", r.wall_tokens_per_s),
                ],
            ),
            Record::Evaluation(r) => {
                let sparse = if r.attention == "dense" { String::new() } else { format!("_{}", r.attention) };
                let tag = format!("perplexity{sparse}/{}/{}", r.model, r.context);
                self.scalars(r.wall_time, r.step, &[(tag.as_str(), r.perplexity)])
            }
            Record::CycleStep(r) => {
                let measured = if r.phase == "jt3" { "train/loss_at_h" } else { "train/delta_nll" };
                let mut all =
                    vec![("train/loss", r.loss), ("train/lr", r.lr), ("train/grad_norm", r.grad_norm)];
                all.extend(r.measured.map(|value| (measured, value)));
                self.scalars(r.wall_time, r.step, &all)
            }
            Record::Phase(r) => {
                let after = &r.summary.after;
                let mut all = vec![
                    ("val/loss_at_h", after.loss_at_h),
                    ("val/full_loss", after.full_loss),
                    ("val/delta_nll_degradation", after.delta_nll_degradation),
                    ("val/swap_rate", after.swap_rate),
                    ("val/mean_residency", after.residency_mean),
                    ("val/token_budget_utilization", after.utilization),
                    ("val/phase_kept", f64::from(u8::from(r.summary.verdict.kept()))),
                ];
                all.extend(after.sparse_dense_gap.map(|gap| ("val/sparse_dense_gap", gap)));
                let costs: Vec<(String, f64)> =
                    after.delta_nll.iter().map(|(name, cost)| (format!("delta_nll/{name}"), *cost)).collect();
                all.extend(costs.iter().map(|(tag, cost)| (tag.as_str(), *cost)));
                self.scalars(r.wall_time, r.step, &all)
            }
            Record::GistStep(r) => self.scalars(
                r.wall_time,
                r.step,
                &[
                    ("train/loss", r.loss),
                    ("train/delta_nll", r.delta_nll),
                    ("train/lr", r.lr),
                    ("train/grad_norm", r.grad_norm),
                    ("train/horizon_length", r.horizon as f64),
                ],
            ),
            Record::GistBaselines(r) => {
                let tags: Vec<(String, f64)> = r
                    .delta_nll
                    .iter()
                    .map(|(baseline, value)| (format!("delta_nll/{}/{}", baseline.name(), r.horizon), *value))
                    .collect();
                let tags: Vec<(&str, f64)> = tags.iter().map(|(tag, value)| (tag.as_str(), *value)).collect();
                self.scalars(r.wall_time, r.step, &tags)
            }
            Record::GistValidation(r) => {
                let v = &r.validation;
                let own = format!("delta_nll/gist/{}", v.horizon);
                let mut tags = vec![
                    (own.as_str(), v.delta_nll),
                    ("val/substitutability", v.substitutability),
                    ("val/perplexity_ratio", v.perplexity_ratio),
                    ("val/degradation", v.degradation),
                ];
                let some = [
                    ("val/diversity", v.diversity),
                    ("val/contrast_gap", v.contrast_gap),
                    ("val/attention_entropy", v.attention_entropy),
                    ("val/level2_delta_nll", v.level2_delta_nll),
                    ("val/sparse_dense_gap", v.sparse_dense_gap()),
                    ("val/recovered", v.recovered),
                    ("val/level2_recovered", v.level2_recovered),
                    ("val/sparse_recovered", v.sparse_recovered),
                ];
                tags.extend(some.into_iter().filter_map(|(tag, value)| Some((tag, value?))));
                self.scalars(r.wall_time, r.step, &tags)
            }
            Record::LensStep(r) => self.scalars(
                r.wall_time,
                r.step,
                &[("train/lens_loss", r.loss), ("train/lr", r.lr), ("train/grad_norm", r.grad_norm)],
            ),
            Record::LensValidation(r) => {
                let v = &r.validation;
                let mut tags = vec![
                    ("val/loss_at_h", v.loss_at_h),
                    ("val/swap_rate", v.swap_rate),
                    ("val/mean_residency", v.residency_mean),
                    ("val/token_budget_utilization", v.utilization),
                ];
                let some = [
                    ("val/of_oracle", v.of_oracle),
                    ("val/ranking_accuracy", v.ranking_accuracy),
                    ("val/pearson", v.pearson),
                    ("val/budget_balance", v.budget_balance),
                    ("val/legality_rate", v.legality_rate),
                    ("val/facts_shown", v.facts_shown),
                ];
                tags.extend(some.into_iter().filter_map(|(tag, value)| Some((tag, value?))));
                self.scalars(r.wall_time, r.step, &tags)
            }
        }
    }

    /// Makes all events durable.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().at(&self.path)
    }

    fn write(&mut self, wall_time: f64, step: u64, what: What) -> Result<()> {
        let event = Event { wall_time, step: step.cast_signed(), what: Some(what) };
        self.file.write_all(&frame(&event.encode_to_vec())).at(&self.path)
    }
}

/// A TFRecord with this content.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The host's name in letters that a file name can hold; `localhost` when the system does not say.
fn host_name() -> String {
    let name = ["/proc/sys/kernel/hostname", "/etc/hostname"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_default();
    let name: String =
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::run::metrics::tests::{evaluation, train};

    /// (step, tag, value) of every scalar; panics on a record that does not hold together.
    pub(in crate::run) fn scalars(path: &Path) -> Vec<(i64, String, f32)> {
        decode(&fs::read(path).unwrap())
            .into_iter()
            .filter_map(|e| match e.what {
                Some(What::Summary(s)) => Some((e.step, s)),
                _ => None,
            })
            .flat_map(|(step, s)| s.value.into_iter().map(move |v| (step, v)))
            .filter_map(|(step, v)| match v.content {
                Some(Content::SimpleValue(x)) => Some((step, v.tag, x)),
                _ => None,
            })
            .collect()
    }

    fn decode(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        let crc = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(12);
            let length = usize::try_from(u64::from_le_bytes(head[..8].try_into().unwrap())).unwrap();
            assert_eq!(crc(&head[8..]), masked_crc(&head[..8]));
            let (data, rest) = rest.split_at(length);
            assert_eq!(crc(&rest[..4]), masked_crc(data));
            events.push(Event::decode(data).unwrap());
            bytes = &rest[4..];
        }
        events
    }

    #[test]
    fn checksum_is_the_published_one() {
        // RFC 3720, appendix B.4: CRC-32C of 32 zero bytes, and the usual check value.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        // The masked value by hand: rotate right by 15, add the constant.
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn first_record_is_byte_for_byte_what_tensorflow_writes() {
        // Event { file_version: "brain.Event:2" } with wall_time 1: 09 <f64> 1a 0d <text>.
        let event = Event { wall_time: 1.0, step: 0, what: Some(What::FileVersion("brain.Event:2".into())) };
        let data = [&[9, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x1a, 13][..], b"brain.Event:2"].concat();
        assert_eq!(event.encode_to_vec(), data);
        let record = frame(&data);
        assert_eq!(record[..8], 24u64.to_le_bytes());
        // The masked checksum of the length 24 stands in every TensorBoard file.
        assert_eq!(record[8..12], [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), 1e9).unwrap();
        events.text(1e9, 0, "config", "seed = 7").unwrap();
        events.record(&train(3)).unwrap();
        events.record(&evaluation(3)).unwrap();
        events.sync().unwrap();
        let name = events.path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents.1000000000.") && name.ends_with(".mclora"), "{name}");
        let all = decode(&fs::read(events.path()).unwrap());
        assert_eq!(all[0].what, Some(What::FileVersion("brain.Event:2".into())));
        let Some(What::Summary(summary)) = &all[1].what else { panic!("{:?}", all[1]) };
        let Some(Content::Tensor(tensor)) = &summary.value[0].content else { panic!("{summary:?}") };
        assert_eq!(tensor.string_val, [b"seed = 7"]);
        let scalars = scalars(events.path());
        assert_eq!(scalars[0], (3, "train/loss".into(), 3.0 + 1.0 / 3.0));
        assert_eq!(scalars[4], (3, "perplexity/adapted/1024".into(), 12.5));
    }

    #[test]
    fn older_file_of_ours_is_replaced_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("events.out.tfevents.1.host"), "").unwrap();
        EventFile::create(dir.path(), 1.0).unwrap();
        EventFile::create(dir.path(), 2.0).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn full_disk_is_io_with_the_path() {
        let mut full = EventFile { path: "/dev/full".into(), file: File::create("/dev/full").unwrap() };
        let error = full.scalars(0.0, 0, &[("a", 1.0)]).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.starts_with("/dev/full: "), "{error}");
    }
}
