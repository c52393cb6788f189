//! What runs gave: their files, statistics, charts, a page about them.

pub mod arms;
pub mod compare;
pub mod decision;
pub mod plot;
pub mod report;
pub mod run_files;
pub mod statistics;
pub mod warnings;
