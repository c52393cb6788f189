//! Batch jobs: a real sshd on loopback, real detached processes, and a stand-in for temper whose end a test decides.

mod cancel;
mod executors;
mod fetch;
mod links;
mod queue;
mod sshd;
mod submit;
mod support;
mod sweep;
