//! One run on disk: directory, metrics, console, TensorBoard, checkpoints, resume. Knows nothing of RL.
//!
//! | file | what it keeps true |
//! |---|---|
//! | `directory` | a run directory belongs to one configuration and one process |
//! | `jsonl` | one object per line; a killed and resumed run leaves the bytes of an uninterrupted one |
//! | `checkpoints` | what stands under a final name is complete |
//! | `console` | people see one line per step, on a terminal also a progress bar |
//! | `stopped` | which stop rule ended the run |
//! | `tensorboard` | the same scalars as event files |
//! | `trace` | spans as a file that Perfetto loads |
//! | `signals` | the first SIGINT or SIGTERM finishes the step, the second leaves at once |

pub mod atomic_file;
pub mod checkpoints;
pub mod console;
pub mod directory;
pub mod jsonl;
pub mod machine;
pub mod signals;
pub mod stopped;
pub mod tensorboard;
pub mod trace;

pub use checkpoints::{CheckpointScore, CheckpointStore, PendingCheckpoint, Retention};
pub use console::{Console, Progress, Verbosity};
pub use directory::{RunDir, RunSpec, Start};
pub use jsonl::JsonlWriter;
pub use signals::Interrupt;
pub use tensorboard::TensorBoard;
