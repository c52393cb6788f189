//! Batch jobs on other machines: which hosts there are, how to reach them, what they are asked.
//!
//! Everything that happens over there is `agent/*.sh`, POSIX sh that travels with every call; this side quotes, sends,
//! reads, and decides what the answers mean. A call that failed to reach its host says so (`Error::Unavailable`) and
//! never that a job failed.

pub mod connection;
pub mod fetch;
pub mod fleet;
pub mod hosts;
pub mod job;
pub mod quote;
pub mod snapshot;
pub mod submit;
