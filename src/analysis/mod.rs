//! What runs gave: their files, statistics, charts.

pub mod compare;
pub mod decision;
pub mod plot;
pub mod run_files;
pub mod statistics;
