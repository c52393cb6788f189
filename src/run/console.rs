//! What people see while a run works: one line per step, notes, warnings, a progress bar on a terminal.
//!
//! Everything goes to stderr (stdout belongs to results) and, once `log_to` was called, to console.log as well.
//! Lines have the form that people already grep:
//! `step:12 - reward/mean:0.53 - ...` and `step:20 - val-core/gsm8k/acc/mean@1:0.6164 (clean 0.6702, n=1319)`.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// How much reaches stderr. console.log gets what `Normal` shows, and details when they are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Warnings only.
    Quiet,
    #[default]
    Normal,
    /// Details too.
    Verbose,
}

impl Verbosity {
    /// From `-q` and the number of `-v`.
    pub fn from_flags(quiet: bool, verbose: u8) -> Verbosity {
        match (quiet, verbose) {
            (true, _) => Verbosity::Quiet,
            (false, 0) => Verbosity::Normal,
            (false, _) => Verbosity::Verbose,
        }
    }
}

/// The one place that decides what reaches the terminal. Cheap to clone; clones share the log.
#[derive(Clone)]
pub struct Console {
    verbosity: Verbosity,
    bars: Option<MultiProgress>,
    log: Arc<Mutex<Option<File>>>,
}

impl Console {
    pub fn new(verbosity: Verbosity) -> Console {
        let terminal = std::io::stderr().is_terminal() && verbosity > Verbosity::Quiet;
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(5)));
        Console { verbosity, bars, log: Arc::new(Mutex::new(None)) }
    }

    /// Appends to `path` (console.log) from now on.
    pub fn log_to(&self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::io(path, e))?;
        *self.log() = Some(file);
        Ok(())
    }

    /// One training step: `row` is the object of metrics.jsonl; its numbers are shown in their order.
    pub fn step(&self, row: &Map<String, Value>) {
        self.line(Verbosity::Normal, &step_line(row));
    }

    /// One validation: the headline condition's accuracy, then other conditions in brackets.
    /// `source` names the data set, e.g. `gsm8k`.
    pub fn validation(&self, step: u64, source: &str, accuracy: f64, others: &[(&str, f64)], n: u64) {
        self.line(Verbosity::Normal, &validation_line(step, source, accuracy, others, n));
    }

    pub fn note(&self, text: &str) {
        self.line(Verbosity::Normal, text);
    }

    /// Shown with `-v`.
    pub fn detail(&self, text: &str) {
        self.line(Verbosity::Verbose, text);
    }

    /// Shown always.
    pub fn warn(&self, text: &str) {
        self.line(Verbosity::Quiet, &format!("warning: {text}"));
    }

    /// A piece of work with a known number of parts. On a terminal a bar; otherwise a line every 15 seconds, and at
    /// the end of what took longer than that.
    pub fn progress(&self, label: &str, total: u64) -> Progress {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(total));
            if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta}") {
                bar.set_style(style);
            }
            bar.set_prefix(label.to_string());
            bar
        });
        Progress {
            console: self.clone(),
            label: label.to_string(),
            total,
            done: 0,
            message: String::new(),
            started: Instant::now(),
            last_line: Instant::now(),
            spoke: false,
            bar,
        }
    }

    fn line(&self, needs: Verbosity, text: &str) {
        if self.verbosity >= needs {
            match &self.bars {
                Some(bars) => bars.suspend(|| to_stderr(text)),
                None => to_stderr(text),
            }
        }
        if needs > Verbosity::Normal && self.verbosity < needs {
            return;
        }
        let mut log = self.log();
        let failed = log.as_mut().and_then(|file| file.write_all(format!("{text}\n").as_bytes()).err());
        if let Some(e) = failed {
            // console.log is a copy for people: losing it must not stop the run, but it is said once.
            *log = None;
            to_stderr(format_args!("warning: console.log: {e}; no further lines are kept"));
        }
    }

    fn log(&self) -> MutexGuard<'_, Option<File>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A closed stderr (a pager that quit) is no reason to stop a run, so `eprintln!`, which panics then, is not used.
pub fn to_stderr(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Progress of one piece of work. Dropping it finishes it.
pub struct Progress {
    console: Console,
    label: String,
    total: u64,
    done: u64,
    message: String,
    started: Instant,
    last_line: Instant,
    spoke: bool,
    bar: Option<ProgressBar>,
}

const LINE_EVERY: Duration = Duration::from_secs(15);

impl Progress {
    pub fn inc(&mut self, parts: u64) {
        self.done += parts;
        match &self.bar {
            Some(bar) => bar.inc(parts),
            None => {
                if self.last_line.elapsed() >= LINE_EVERY && self.done < self.total {
                    self.plain_line();
                }
            }
        }
    }

    /// A short remark beside the bar, e.g. `reward 0.53`.
    pub fn set_message(&mut self, message: impl Into<String>) {
        self.message = message.into();
        if let Some(bar) = &self.bar {
            bar.set_message(self.message.clone());
        }
    }

    pub fn finish(self) {} // Drop does it

    fn plain_line(&mut self) {
        self.last_line = Instant::now();
        self.spoke = true;
        let text = progress_line(&self.label, self.done, self.total, self.started.elapsed(), &self.message);
        self.console.line(Verbosity::Normal, &text);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match &self.bar {
            Some(bar) => bar.finish_and_clear(),
            None if self.spoke || self.started.elapsed() >= LINE_EVERY => self.plain_line(),
            None => {}
        }
    }
}

fn progress_line(label: &str, done: u64, total: u64, elapsed: Duration, message: &str) -> String {
    let percent = (done * 100).checked_div(total).unwrap_or(100);
    let mut text = format!("{label}: {done}/{total} ({percent} %) after {} s", elapsed.as_secs());
    if !message.is_empty() {
        let _ = write!(text, " - {message}");
    }
    text
}

fn step_line(row: &Map<String, Value>) -> String {
    let step = row.get("step").and_then(Value::as_u64).unwrap_or(0);
    let mut text = format!("step:{step}");
    for (key, value) in row.iter().filter(|(key, _)| *key != "step") {
        if let Value::Number(number) = value {
            let shown = match number.as_f64() {
                Some(x) if number.is_f64() => short(x),
                _ => number.to_string(),
            };
            let _ = write!(text, " - {key}:{shown}");
        }
    }
    text
}

fn validation_line(step: u64, source: &str, accuracy: f64, others: &[(&str, f64)], n: u64) -> String {
    let mut text = format!("step:{step} - val-core/{source}/acc/mean@1:{accuracy:.4} (");
    for (name, value) in others {
        let _ = write!(text, "{name} {value:.4}, ");
    }
    let _ = write!(text, "n={n})");
    text
}

/// Four significant digits, without trailing zeros: 0.53, 12.35, 5e-7.
fn short(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    let magnitude = x.abs().log10().floor() as i32;
    if !(-4..6).contains(&magnitude) {
        let text = format!("{x:.3e}");
        return match text.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", without_trailing_zeros(digits)),
            None => text,
        };
    }
    let decimals = usize::try_from(3 - magnitude).unwrap_or(0);
    without_trailing_zeros(&format!("{x:.decimals$}")).to_string()
}

fn without_trailing_zeros(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_step_is_one_line_of_the_known_form() {
        let row =
            json!({"step": 12, "kind": "train", "reward/mean": 0.53, "lr": 5e-7, "aqn/modules": 57, "kl/ref": null});
        let row = row.as_object().cloned().unwrap_or_default();
        assert_eq!(step_line(&row), "step:12 - reward/mean:0.53 - lr:5e-7 - aqn/modules:57");
    }

    #[test]
    fn a_validation_names_the_other_conditions_and_n() {
        assert_eq!(
            validation_line(20, "gsm8k", 0.6164, &[("clean", 0.6702)], 1319),
            "step:20 - val-core/gsm8k/acc/mean@1:0.6164 (clean 0.6702, n=1319)"
        );
        assert_eq!(validation_line(0, "gsm8k", 0.5, &[], 4), "step:0 - val-core/gsm8k/acc/mean@1:0.5000 (n=4)");
    }

    #[test]
    fn numbers_keep_four_significant_digits() {
        for (x, text) in [
            (0.53, "0.53"),
            (0.0, "0"),
            (-0.123456, "-0.1235"),
            (12.3456, "12.35"),
            (123456.7, "123457"),
            (0.00031623, "0.0003162"),
            (0.00001, "1e-5"),
            (1.0, "1"),
            (100.0, "100"),
            (2.5e8, "2.5e8"),
        ] {
            assert_eq!(short(x), text);
        }
    }

    #[test]
    fn a_progress_line_without_total_does_not_divide_by_zero() {
        assert_eq!(progress_line("rollout", 0, 0, Duration::from_secs(3), ""), "rollout: 0/0 (100 %) after 3 s");
        assert_eq!(progress_line("val", 1, 4, Duration::ZERO, "acc 0.5"), "val: 1/4 (25 %) after 0 s - acc 0.5");
    }
}
