//! Live parity with transformers: log-probs, greedy tokens, gradients, and directories it can load.
//!
//! The expected values are made on the spot by make_models.py in a Python that has torch and transformers:
//! `$TEMPER_PYTHON`, else `.venv/bin/python`. Without one, and where ../shared is absent, the tests that need them
//! skip and say so.
#![allow(clippy::unwrap_used)]

mod commands;
mod expected;
mod library;
mod written;
