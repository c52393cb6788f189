//! Statistics against scipy, statsmodels and values computed by hand; comparisons of hand-made run directories.
#![allow(clippy::unwrap_used)]

mod command;
mod coverage;
mod hand_values;
mod oracle;
mod runs;
mod warnings;
