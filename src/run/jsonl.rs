//! Append-only JSON lines: one object per line, in the file as soon as the step is done.
//!
//! Every object carries an integer `step`, and steps never decrease down a file. So "the state at step N" is a
//! prefix of the file, and going back to it is one cut: a killed and resumed run leaves the same bytes as an
//! uninterrupted one. A checkpoint of step N must therefore be committed after the last line of step N was written
//! (validation included), and what depends on the clock belongs into `timing.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Error, Result, input_error};

/// Writes whole lines, straight to the file. NaN and infinities become `null` (JSON has no word for them).
pub struct JsonlWriter {
    path: PathBuf,
    file: File,
    length_bytes: u64,
}

impl JsonlWriter {
    /// Opens `path` for appending, creating it if it is not there.
    pub fn open(path: &Path) -> Result<JsonlWriter> {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::io(path, e))?;
        let length_bytes = file.metadata().map_err(|e| Error::io(path, e))?.len();
        Ok(JsonlWriter { path: path.to_path_buf(), file, length_bytes })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one object.
    pub fn write<T: Serialize>(&mut self, row: &T) -> Result<()> {
        self.write_rows(std::slice::from_ref(row))
    }

    /// Appends the rows of one step with a single write. On an error (full disk: `Error::Io`) none of them stays.
    pub fn write_rows<T: Serialize>(&mut self, rows: &[T]) -> Result<()> {
        let mut bytes = Vec::with_capacity(rows.len() * 256);
        for row in rows {
            serde_json::to_writer(&mut bytes, row)
                .map_err(|e| Error::Runtime(format!("{}: {e}", self.path.display())))?;
            bytes.push(b'\n');
        }
        if let Err(e) = self.file.write_all(&bytes) {
            // A write that met a full disk may have stored a part: take it back, so that no half line stays.
            let _ = self.file.set_len(self.length_bytes);
            return Err(Error::io(&self.path, e));
        }
        self.length_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Makes what was written survive a power cut. Call it before a checkpoint is committed.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io(&self.path, e))
    }
}

/// Cuts `path` back to the state after `step`: drops the lines of later steps and a partial last line, keeps every
/// other byte. `None` cuts to an empty file. A missing file is left missing.
///
/// Errors: a line in the middle that is not an object with an integer `step` (somebody edited the file).
pub fn truncate_to_step(path: &Path, step: Option<u64>) -> Result<()> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(path, e)),
    };
    let keep_bytes = match step {
        None => 0,
        Some(step) => prefix_up_to_step(path, &file, step)?,
    };
    file.set_len(keep_bytes).and_then(|()| file.sync_all()).map_err(|e| Error::io(path, e))
}

/// Length in bytes of the whole lines whose step is at most `step`.
fn prefix_up_to_step(path: &Path, file: &File, step: u64) -> Result<u64> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut keep_bytes = 0u64;
    for number in 1u64.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(|e| Error::io(path, e))?;
        if read == 0 || line.last() != Some(&b'\n') {
            break; // the end, or a line that was being written when the process died
        }
        match step_of(&line) {
            Some(found) if found > step => break,
            Some(_) => keep_bytes += read as u64,
            // After a power cut the last block of a file may hold zeros: that is a partial last line too.
            None if reader.fill_buf().map_err(|e| Error::io(path, e))?.is_empty() => {
                break;
            }
            None => {
                return Err(input_error!(
                    "{}: line {number} is not an object with an integer \"step\"; it was edited or damaged",
                    path.display()
                ));
            }
        }
    }
    Ok(keep_bytes)
}

fn step_of(line: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Row {
        step: u64,
    }
    serde_json::from_slice::<Row>(line).ok().map(|row| row.step)
}
