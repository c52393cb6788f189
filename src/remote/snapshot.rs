//! What a job runs: this binary and a resolved configuration, named by their content, so that a later build or edit cannot
//! change what a job that waits will do.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

#[derive(Clone)]
pub struct Snapshot {
    pub binary: PathBuf,
    pub binary_bytes: u64,
    /// SHA-256 of the binary, in hexadecimal.
    pub blob: String,
    /// The resolved configuration.
    pub config: String,
}

impl Snapshot {
    /// Of the running binary, or of `binary`.
    pub fn new(binary: Option<&Path>, config: String) -> Result<Snapshot> {
        let binary = match binary {
            Some(binary) => binary.to_path_buf(),
            None => std::env::current_exe().map_err(|e| Error::io("this program", e))?,
        };
        let (blob, binary_bytes) = digest_of(&binary)?;
        Ok(Snapshot { binary, binary_bytes, blob, config })
    }

    /// The same binary with another configuration.
    pub fn with_config(&self, config: String) -> Snapshot {
        Snapshot { config, ..self.clone() }
    }

    /// Names the pair: 16 digits of the SHA-256 of both digests.
    pub fn hash(&self) -> String {
        let both = format!("{}\n{}\n", self.blob, hex(&Sha256::digest(self.config.as_bytes())));
        hex(&Sha256::digest(both.as_bytes()))[..16].to_string()
    }
}

/// SHA-256 and length of a file.
pub fn digest_of(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let (mut digest, mut total, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer).map_err(|e| Error::io(path, e))?;
        if n == 0 {
            return Ok((hex(&digest.finalize()), total));
        }
        digest.update(&buffer[..n]);
        total += n as u64;
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
