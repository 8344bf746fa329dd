//! Label tables: what edits of working contexts were measured to cost, in Parquet files that other tools read too.
//!
//! Source: MegaContext's `artifacts/deltas/*.parquet` (block_id, action, delta_nll, timestamp), with the columns that it takes to
//! learn from them. A row is one edit of one context; its columns, all required:
//!
//! | column | type | |
//! |---|---|---|
//! | `block_id` | INT64, unsigned | the node that is expanded, or that the siblings become: level in the topmost byte, index below |
//! | `action` | BYTE_ARRAY, string | `expand` or `collapse` |
//! | `delta_nll` | DOUBLE | loss@H of the edited context less that of the context as it is, nats per token |
//! | `timestamp` | INT64, milliseconds | since 1970 |
//! | `document` | INT64, unsigned | number of the document |
//! | `context` | INT64, unsigned | number of the context within the table |
//! | `entry_start` | INT64, unsigned | first token of the gist, or of the first sibling |
//! | `lod` | INT32, unsigned 8 | its level |
//! | `nll_now` | DOUBLE | loss@H of the context as it is, nats per token |
//! | `target` | DOUBLE | what its score learns from it, −1 to 1 |
//!
//! The file says what its labels hold for, as key-value metadata `megacontext.*` ([`LabelStamp`]), and carries a SHA-256 of stamp
//! and rows, since Parquet's own checksums are optional and not written here. Labels of anything else are refused: gists of
//! another version cost something else.
//!
//! A file is whole or absent; the same stamp and rows give the same bytes. Errors: `Data` for a file that is no such table, is
//! damaged or stale, and for rows that are none; `Io` with the path. Left out on purpose: appending (a round of labels is one
//! file) and compression (dictionaries already make the repeated columns small).

use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use lensnet_adapter::allocator::Action;
use megacontext_base::atomic::write_file;
use megacontext_base::context::Node;
use parquet::basic::Type as Physical;
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use sha2::{Digest, Sha256};

use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::model_error;

/// The layout described above.
pub const FORMAT_VERSION: u32 = 1;

const SCHEMA: &str = "message labels {
    required int64 block_id (INTEGER(64, false));
    required binary action (STRING);
    required double delta_nll;
    required int64 timestamp (TIMESTAMP(MILLIS, true));
    required int64 document (INTEGER(64, false));
    required int64 context (INTEGER(64, false));
    required int64 entry_start (INTEGER(64, false));
    required int32 lod (INTEGER(8, false));
    required double nll_now;
    required double target;
}";

/// Rows that are read at a time.
const ROWS: usize = 1 << 16;

/// What labels were measured with, and hold for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelStamp {
    /// Fingerprint of the base model's weights.
    pub base: String,
    /// Fingerprint of the adapter on it; none without one.
    pub adapter: Option<String>,
    /// Version of the gists.
    pub gist_version: u16,
    /// H, tokens.
    pub horizon: usize,
    /// K, tokens.
    pub block: usize,
}

/// One edit of one context; see the module for the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Label {
    pub block: Node,
    pub action: Action,
    pub delta_nll: f64,
    pub timestamp_ms: i64,
    pub document: u64,
    pub context: u64,
    pub entry_start: u64,
    pub lod: u8,
    pub nll_now: f64,
    pub target: f64,
}

impl LabelStamp {
    /// Keys and values, as they stand in the file.
    fn pairs(&self) -> [(&'static str, String); 6] {
        [
            ("megacontext.format_version", FORMAT_VERSION.to_string()),
            ("megacontext.base", self.base.clone()),
            ("megacontext.adapter", self.adapter.clone().unwrap_or_default()),
            ("megacontext.gist_version", self.gist_version.to_string()),
            ("megacontext.horizon", self.horizon.to_string()),
            ("megacontext.block", self.block.to_string()),
        ]
    }

    /// Do labels of this stamp hold for `now`?
    ///
    /// # Errors
    /// `Data` for the first thing that is another.
    pub fn check(&self, now: &Self) -> Result<()> {
        let adapter = |stamp: &Self| match &stamp.adapter {
            Some(adapter) => format!("the adapter {adapter}"),
            None => "no adapter".to_string(),
        };
        let held = [
            ("base", now.base.clone(), self.base.clone()),
            ("adapter", adapter(now), adapter(self)),
            ("gist_version", now.gist_version.to_string(), self.gist_version.to_string()),
            ("horizon", now.horizon.to_string(), self.horizon.to_string()),
            ("block", now.block.to_string(), self.block.to_string()),
        ];
        match held.into_iter().find(|(_, expected, got)| expected != got) {
            None => Ok(()),
            Some((what, expected, got)) => Err(PluginError::data(format!(
                "{what}: expected labels measured with {expected}, got those of {got}; measure them anew"
            ))),
        }
    }
}

/// An action as the table has it; [`action_of`] is the way back.
fn action_text(action: Action) -> &'static str {
    match action {
        Action::Expand => "expand",
        Action::Collapse => "collapse",
    }
}

fn action_of(text: &[u8]) -> Option<Action> {
    [Action::Expand, Action::Collapse].into_iter().find(|action| action_text(*action).as_bytes() == text)
}

impl Label {
    /// What makes it a row: finite numbers, a target that is a score.
    fn check(&self, row: usize) -> std::result::Result<(), String> {
        for (column, value) in
            [("delta_nll", self.delta_nll), ("nll_now", self.nll_now), ("target", self.target)]
        {
            if !value.is_finite() {
                return Err(format!("row {row}: {column}: expected a finite number, got {value}"));
            }
        }
        if self.target.abs() > 1.0 {
            return Err(format!("row {row}: target: expected −1 to 1, got {}", self.target));
        }
        Ok(())
    }
}

/// SHA-256 of stamp and rows, whatever their encoding in the file.
fn digest(stamp: &LabelStamp, labels: &[Label]) -> String {
    let mut sha = Sha256::new();
    for (key, value) in stamp.pairs() {
        sha.update((value.len() as u64).to_le_bytes());
        sha.update(key);
        sha.update(value);
    }
    for label in labels {
        for number in [
            label.block.id(),
            label.action as u64,
            label.delta_nll.to_bits(),
            label.timestamp_ms as u64,
            label.document,
            label.context,
            label.entry_start,
            u64::from(label.lod),
            label.nll_now.to_bits(),
            label.target.to_bits(),
        ] {
            sha.update(number.to_le_bytes());
        }
    }
    sha.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Writes a table; an older one is replaced. The folder has to exist.
///
/// # Errors
/// `Data` for a number that is none; `Io`. Nothing has changed then.
pub fn write(path: &Path, stamp: &LabelStamp, labels: &[Label]) -> Result<()> {
    let wrong = labels.iter().enumerate().try_for_each(|(row, label)| label.check(row));
    wrong.map_err(|message| PluginError::data(format!("{}: {message}", path.display())))?;
    let bytes = encode(stamp, labels).map_err(|e| PluginError::internal(format!("label table: {e}")))?;
    write_file(path, &bytes).map_err(model_error)
}

fn encode(stamp: &LabelStamp, labels: &[Label]) -> parquet::errors::Result<Vec<u8>> {
    let mut pairs: Vec<KeyValue> =
        stamp.pairs().into_iter().map(|(key, value)| KeyValue::new(key.to_string(), value)).collect();
    pairs.push(KeyValue::new("megacontext.sha256".to_string(), digest(stamp, labels)));
    let properties = WriterProperties::builder()
        .set_created_by("megacontext-lora".to_string())
        .set_key_value_metadata(Some(pairs))
        .build();
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let longs = |of: fn(&Label) -> u64| -> Vec<i64> { labels.iter().map(|l| of(l) as i64).collect() };
    let doubles = |of: fn(&Label) -> f64| -> Vec<f64> { labels.iter().map(of).collect() };
    let actions: Vec<ByteArray> = labels.iter().map(|l| ByteArray::from(action_text(l.action))).collect();
    let lods: Vec<i32> = labels.iter().map(|l| i32::from(l.lod)).collect();
    // In the schema's order.
    put::<Int64Type>(&mut group, &longs(|l| l.block.id()))?;
    put::<ByteArrayType>(&mut group, &actions)?;
    put::<DoubleType>(&mut group, &doubles(|l| l.delta_nll))?;
    put::<Int64Type>(&mut group, &longs(|l| l.timestamp_ms as u64))?;
    put::<Int64Type>(&mut group, &longs(|l| l.document))?;
    put::<Int64Type>(&mut group, &longs(|l| l.context))?;
    put::<Int64Type>(&mut group, &longs(|l| l.entry_start))?;
    put::<Int32Type>(&mut group, &lods)?;
    put::<DoubleType>(&mut group, &doubles(|l| l.nll_now))?;
    put::<DoubleType>(&mut group, &doubles(|l| l.target))?;
    group.close()?;
    writer.into_inner()
}

fn put<T: DataType>(
    group: &mut SerializedRowGroupWriter<Vec<u8>>,
    values: &[T::T],
) -> parquet::errors::Result<()> {
    let column = group.next_column()?;
    let mut column = column.ok_or_else(|| ParquetError::General("more columns than the schema".into()))?;
    column.typed::<T>().write_batch(values, None, None)?;
    column.close()
}

/// The labels of a table that hold for `now`.
///
/// # Errors
/// `Data` for a file that is no label table, is cut or damaged, or whose labels hold for something else; `Io`.
pub fn read(path: &Path, now: &LabelStamp) -> Result<Vec<Label>> {
    let (stamp, labels) = read_any(path)?;
    match stamp.check(now) {
        Ok(()) => Ok(labels),
        Err(stale) => Err(PluginError::data(format!("{}: {}", path.display(), stale.message))),
    }
}

/// The labels of a table, and what they hold for.
///
/// # Errors
/// As [`read`], but for the last.
pub fn read_any(path: &Path) -> Result<(LabelStamp, Vec<Label>)> {
    let file = File::open(path).at(path)?;
    // A damaged length inside the file can make the reader panic, which is the file's fault and not this process's.
    let decoded = std::panic::catch_unwind(|| decode(file));
    let decoded = decoded.unwrap_or_else(|_| Err("expected a label table, got a damaged file".to_string()));
    decoded.map_err(|message| PluginError::data(format!("{}: {message}", path.display())))
}

fn decode(file: File) -> std::result::Result<(LabelStamp, Vec<Label>), String> {
    let foreign = |e: ParquetError| format!("expected a whole Parquet file, got {e}");
    let reader = SerializedFileReader::new(file).map_err(foreign)?;
    let metadata = reader.metadata().file_metadata();
    let pairs = metadata.key_value_metadata();
    let value = |key: &str| -> std::result::Result<String, String> {
        let pair = pairs.into_iter().flatten().find(|pair| pair.key == key);
        pair.and_then(|pair| pair.value.clone())
            .ok_or_else(|| format!("expected a label table with the key {key}, which is not in it"))
    };
    let number = |key: &str| -> std::result::Result<u64, String> {
        let text = value(key)?;
        text.parse().map_err(|_| format!("{key}: expected a number, got \"{text}\""))
    };
    let version = value("megacontext.format_version")?;
    if version != FORMAT_VERSION.to_string() {
        return Err(format!("expected a label table of format {FORMAT_VERSION}, got {version}"));
    }
    check_columns(metadata.schema_descr())?;
    let gist_version = number("megacontext.gist_version")?;
    let stamp = LabelStamp {
        base: value("megacontext.base")?,
        adapter: Some(value("megacontext.adapter")?).filter(|adapter| !adapter.is_empty()),
        gist_version: u16::try_from(gist_version)
            .map_err(|_| format!("megacontext.gist_version: expected at most 65535, got {gist_version}"))?,
        horizon: number("megacontext.horizon")? as usize,
        block: number("megacontext.block")? as usize,
    };
    let mut labels = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(foreign)?;
        rows(group.as_ref(), &mut labels)?;
    }
    if value("megacontext.sha256")? != digest(&stamp, &labels) {
        return Err("expected rows of the SHA-256 that the file names, got others: it is damaged".to_string());
    }
    Ok((stamp, labels))
}

/// Are these the columns of a label table, by name and type?
fn check_columns(found: &parquet::schema::types::SchemaDescriptor) -> std::result::Result<(), String> {
    let wanted = parse_message_type(SCHEMA).map_err(|e| e.to_string())?;
    let wanted = parquet::schema::types::SchemaDescriptor::new(Arc::new(wanted));
    let say = |schema: &parquet::schema::types::SchemaDescriptor| -> Vec<(String, Physical, i16, i16)> {
        let columns = schema.columns().iter();
        columns
            .map(|c| (c.path().string(), c.physical_type(), c.max_def_level(), c.max_rep_level()))
            .collect()
    };
    let (wanted, found) = (say(&wanted), say(found));
    let name = |columns: &[(String, Physical, i16, i16)], at: usize| match columns.get(at) {
        Some((name, of, 0, 0)) => format!("{name} ({of})"),
        Some((name, of, ..)) => format!("{name} ({of}, not required)"),
        None => "none".to_string(),
    };
    match (0..wanted.len().max(found.len())).find(|at| wanted.get(*at) != found.get(*at)) {
        None => Ok(()),
        Some(at) => Err(format!("column {at}: expected {}, got {}", name(&wanted, at), name(&found, at))),
    }
}

fn rows(group: &dyn RowGroupReader, labels: &mut Vec<Label>) -> std::result::Result<(), String> {
    let [blocks, times, documents, contexts, starts] = [0, 3, 4, 5, 6].map(|at| get::<Int64Type>(group, at));
    let [deltas, nows, wanted] = [2, 8, 9].map(|at| get::<DoubleType>(group, at));
    let (blocks, times, documents, contexts, starts) = (blocks?, times?, documents?, contexts?, starts?);
    let (deltas, nows, wanted) = (deltas?, nows?, wanted?);
    let (actions, lods) = (get::<ByteArrayType>(group, 1)?, get::<Int32Type>(group, 7)?);
    let count = blocks.len();
    let lengths = [times.len(), documents.len(), contexts.len(), starts.len(), deltas.len(), nows.len()];
    if lengths.iter().chain([&wanted.len(), &actions.len(), &lods.len()]).any(|n| *n != count) {
        return Err(format!("expected {count} rows in every column, got fewer or more"));
    }
    for row in 0..count {
        let id = blocks[row] as u64;
        let label = Label {
            block: Node { lod: (id >> 56) as u8, index: id & (u64::MAX >> 8) },
            action: action_of(actions[row].data()).ok_or_else(|| {
                let text = String::from_utf8_lossy(actions[row].data()).into_owned();
                format!("row {row}: action: expected expand or collapse, got \"{text}\"")
            })?,
            delta_nll: deltas[row],
            timestamp_ms: times[row],
            document: documents[row] as u64,
            context: contexts[row] as u64,
            entry_start: starts[row] as u64,
            lod: u8::try_from(lods[row])
                .map_err(|_| format!("row {row}: lod: expected 0 to 255, got {}", lods[row]))?,
            nll_now: nows[row],
            target: wanted[row],
        };
        label.check(row)?;
        labels.push(label);
    }
    Ok(())
}

/// A column of a row group, whose type has been checked.
fn get<T: DataType>(group: &dyn RowGroupReader, at: usize) -> std::result::Result<Vec<T::T>, String> {
    let damaged = |e: ParquetError| format!("column {at}: expected whole pages, got {e}");
    let mut reader = get_typed_column_reader::<T>(group.get_column_reader(at).map_err(damaged)?);
    let mut values = Vec::new();
    while reader.read_records(ROWS, None, None, &mut values).map_err(damaged)?.0 > 0 {}
    Ok(values)
}
