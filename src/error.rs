//! The library's error type. Every error is one line; the kind decides the exit code.

use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's input is wrong: configuration, arguments, a missing or broken file. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// Reading or writing failed for a reason outside the input (full disk, permission). Exit code 1.
    #[error("{path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// libtorch refused an operation; its first line. Exit code 1.
    #[error("libtorch: {0}")]
    Torch(String),
    /// Device memory ran out. Exit code 1 unless the caller splits its work.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Something this build or machine lacks, with the remedy. Exit code 1.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else that is not the user's input. Exit code 1.
    #[error("{0}")]
    Runtime(String),
    /// SIGINT or SIGTERM, after a checkpoint was written. Exit code 130.
    #[error("interrupted: {0}")]
    Interrupted(String),
}

impl Error {
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Input(_) => 2,
            Error::Interrupted(_) => 130,
            _ => 1,
        }
    }

    /// An I/O error on `path`. A missing file, or a path through a file, is the user's input; everything else is not.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        use std::io::ErrorKind;
        let path = path.as_ref().to_path_buf();
        match source.kind() {
            ErrorKind::NotFound => Error::Input(format!("{}: no such file or directory", path.display())),
            ErrorKind::NotADirectory => {
                Error::Input(format!("{}: a file stands where a directory is expected", path.display()))
            }
            ErrorKind::IsADirectory => Error::Input(format!("{}: found a directory, expected a file", path.display())),
            // What reading a text says of bytes that are none.
            ErrorKind::InvalidData => Error::Input(format!("{}: found bytes that are not UTF-8", path.display())),
            _ => Error::Io { path, source },
        }
    }

    /// What libtorch said, on several lines.
    pub fn of_torch(text: &str) -> Error {
        let first = text.lines().next().unwrap_or("unknown error").trim().to_string();
        if text.contains("out of memory") || text.contains("DefaultCPUAllocator: can't allocate") {
            Error::OutOfMemory(first)
        } else {
            Error::Torch(first)
        }
    }

    /// Prefixes the message with the place (file, key, tensor) where it happened.
    pub fn at(self, place: impl std::fmt::Display) -> Error {
        match self {
            Error::Input(m) => Error::Input(format!("{place}: {m}")),
            Error::Torch(m) => Error::Torch(format!("{place}: {m}")),
            Error::OutOfMemory(m) => Error::OutOfMemory(format!("{place}: {m}")),
            Error::Unavailable(m) => Error::Unavailable(format!("{place}: {m}")),
            Error::Runtime(m) => Error::Runtime(format!("{place}: {m}")),
            other => other,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Error {
        Error::of_torch(&e.to_string())
    }
}

/// A message of another library, or of what a user wrote, as the one line that every error is.
pub fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `Error::Input` from a format string.
#[macro_export]
macro_rules! input_error {
    ($($arg:tt)*) => { $crate::Error::Input(format!($($arg)*)) };
}

/// Returns `Err(Error::Input)` from a format string.
#[macro_export]
macro_rules! bail_input {
    ($($arg:tt)*) => { return Err($crate::input_error!($($arg)*)) };
}
