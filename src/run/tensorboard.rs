//! Scalars for TensorBoard: event files under `tb/`.
//!
//! A file is a sequence of records `length u64 | crc(length) u32 | event | crc(event) u32` (little endian), where
//! crc is the masked CRC-32C, `rotate_right(crc, 15) + 0xa282ead8`, and the event is a protobuf message of which four
//! fields are needed (tensorflow/core/util/event.proto): wall_time 1 (double), step 2 (int64), file_version 3 (string),
//! summary 5 {value 1 {tag 1 (string), simple_value 2 (float)}}, session_log 7 {status 1 (enum, START = 1)}.
//! Written by hand because the one library for it is no longer kept.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::{Error, Result};

const FILE_PREFIX: &str = "events.out.tfevents.";

pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// Begins a new event file in `dir`. Where an earlier process wrote files, a session start at the step after
    /// `resumed_after` (step 0 for `None`) makes TensorBoard forget what that process wrote from there on, so curves
    /// do not double.
    pub fn open(dir: &Path, resumed_after: Option<u64>) -> Result<TensorBoard> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let earlier = newest_file_number(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        // TensorBoard reads files in the order of their names, so a later file needs a larger number than every file
        // that is there, even when the clock stands still or went back.
        let number = earlier.map_or(now, |e| now.max(e.saturating_add(1)));
        let path = dir.join(format!("{FILE_PREFIX}{number:010}.temper"));
        let file = OpenOptions::new().create_new(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        let mut writer = TensorBoard { path, file };
        let mut version = Message::event(None);
        version.bytes_field(3, b"brain.Event:2");
        writer.record(&version)?;
        if earlier.is_some() {
            let mut start = Message::event(Some(resumed_after.map_or(0, |step| step + 1)));
            let mut session_log = Message::default();
            session_log.varint_field(1, 1);
            start.bytes_field(7, &session_log.0);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    /// The numbers of one row of metrics.jsonl, under their own names, at the row's step.
    pub fn row(&mut self, step: u64, row: &Map<String, Value>) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in row.iter().filter(|(tag, _)| *tag != "step") {
            if let Some(x) = value.as_f64() {
                let mut scalar = Message::default();
                scalar.bytes_field(1, tag.as_bytes());
                scalar.fixed32_field(2, (x as f32).to_bits());
                summary.bytes_field(1, &scalar.0);
            }
        }
        let mut event = Message::event(Some(step));
        event.bytes_field(5, &summary.0);
        self.record(&event)
    }

    fn record(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let mut bytes = Vec::with_capacity(event.0.len() + 16);
        bytes.extend_from_slice(&length);
        bytes.extend_from_slice(&masked_crc(&length).to_le_bytes());
        bytes.extend_from_slice(&event.0);
        bytes.extend_from_slice(&masked_crc(&event.0).to_le_bytes());
        self.file.write_all(&bytes).map_err(|e| Error::io(&self.path, e))
    }
}

fn newest_file_number(dir: &Path) -> Result<Option<u64>> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let numbers = entries.flatten().filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.strip_prefix(FILE_PREFIX)?.split('.').next()?.parse().ok()
    });
    Ok(numbers.max())
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protobuf message under construction. Wire types: 0 varint, 1 64-bit, 2 length-delimited, 5 32-bit.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn event(step: Option<u64>) -> Message {
        let wall_time_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let mut event = Message::default();
        event.0.push(1 << 3 | 1);
        event.0.extend_from_slice(&wall_time_s.to_le_bytes());
        if let Some(step) = step {
            event.varint_field(2, step);
        }
        event
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint_field(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn fixed32_field(&mut self, field: u64, bits: u32) {
        self.varint(field << 3 | 5);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }

    fn bytes_field(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_are_little_endian_groups_of_seven() {
        for (value, bytes) in [(0u64, vec![0u8]), (127, vec![127]), (128, vec![0x80, 1]), (300, vec![0xac, 2])] {
            let mut message = Message::default();
            message.varint(value);
            assert_eq!(message.0, bytes);
        }
    }

    #[test]
    fn the_checksum_is_the_masked_one() {
        // CRC-32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4).
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
