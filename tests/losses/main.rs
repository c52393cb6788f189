//! The policy loss, the advantage and the optimizer against numbers computed by hand, by TRL and by torch.
#![allow(clippy::unwrap_used)]

mod adamw;
mod advantage;
mod command;
mod entropy;
mod hand_tables;
mod options;
mod trl;
