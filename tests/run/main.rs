//! The run directory's promises, each tested by breaking it: killed writers, full disks, foreign directories.
#![allow(clippy::unwrap_used)]

mod checkpoints;
mod directory;
mod jsonl;
mod machine;
mod signals;
mod tensorboard;
