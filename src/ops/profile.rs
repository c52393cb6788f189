//! Where a run's time goes, as the host sees it: nested spans, recorded for a trace file (`run/trace.rs`) and pushed as
//! NVTX ranges, so that Nsight shows them above the kernels they launched.
//!
//! [`span`] costs one atomic read while nothing is recorded. A span ends when its guard is dropped; kernels that it
//! launched may still be running then.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::cuda::nvtx;

/// Spans kept at most, 64 bytes each; later ones are counted, not kept.
const MOST_SPANS: usize = 4 << 20;

static RECORDING: AtomicBool = AtomicBool::new(false);
static RECORDER: Mutex<Option<Recorder>> = Mutex::new(None);

struct Recorder {
    began: Instant,
    spans: Vec<Recorded>,
    left_out: u64,
}

/// A span that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recorded {
    pub name: &'static str,
    /// Which one of its name: the step, or the micro-batch of an update.
    pub number: Option<u64>,
    /// Since the recording began.
    pub begin_us: f64,
    pub duration_us: f64,
    pub thread: i32,
}

/// What was recorded, in the order in which spans ended.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    pub spans: Vec<Recorded>,
    /// Spans that there was no room for.
    pub left_out: u64,
}

impl Recording {
    /// Seconds inside spans of each name; a span that lies in another counts in both.
    pub fn seconds_by_name(&self) -> BTreeMap<&'static str, f64> {
        let mut sums = BTreeMap::new();
        for span in &self.spans {
            *sums.entry(span.name).or_insert(0.0) += span.duration_us / 1e6;
        }
        sums
    }
}

/// Records from now on, from nothing.
pub fn start() {
    *recorder() = Some(Recorder { began: Instant::now(), spans: Vec::new(), left_out: 0 });
    RECORDING.store(true, Relaxed);
}

/// What was recorded so far; the recording goes on, with the same time 0.
pub fn take() -> Recording {
    let mut recorder = recorder();
    let Some(recorder) = recorder.as_mut() else { return Recording::default() };
    Recording { spans: std::mem::take(&mut recorder.spans), left_out: std::mem::take(&mut recorder.left_out) }
}

/// Ends the recording.
pub fn stop() -> Recording {
    RECORDING.store(false, Relaxed);
    let recording = take();
    *recorder() = None;
    recording
}

fn recorder() -> MutexGuard<'static, Option<Recorder>> {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A span from now until the guard is dropped.
#[must_use = "the span ends where its guard is dropped"]
pub struct Span(Option<Open>);

struct Open {
    name: &'static str,
    number: Option<u64>,
    began: Instant,
}

pub fn span(name: &'static str) -> Span {
    open(name, None)
}

/// One of several of a name.
pub fn numbered(name: &'static str, number: u64) -> Span {
    open(name, Some(number))
}

fn open(name: &'static str, number: Option<u64>) -> Span {
    if !RECORDING.load(Relaxed) {
        return Span(None);
    }
    nvtx::push(name);
    Span(Some(Open { name, number, began: Instant::now() }))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(Open { name, number, began }) = self.0.take() else { return };
        let duration_us = began.elapsed().as_secs_f64() * 1e6;
        nvtx::pop();
        let mut recorder = recorder();
        // The recording may have ended inside the span.
        let Some(recorder) = recorder.as_mut() else { return };
        if recorder.spans.len() == MOST_SPANS {
            recorder.left_out += 1;
            return;
        }
        let begin_us = began.saturating_duration_since(recorder.began).as_secs_f64() * 1e6;
        recorder.spans.push(Recorded { name, number, begin_us, duration_us, thread: nvtx::thread_id() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: the recorder is the process's.
    #[test]
    fn spans_nest_and_cost_nothing_while_nothing_is_recorded() {
        drop(span("test before"));
        assert!(take().spans.is_empty());
        start();
        {
            let _outer = numbered("test outer", 7);
            for n in 0..2 {
                let _inner = numbered("test inner", n);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        // Other tests of this process may open spans too.
        let own = |recording: Recording| -> Vec<Recorded> {
            recording.spans.into_iter().filter(|s| s.name.starts_with("test ")).collect()
        };
        let recording = take();
        let seconds = recording.seconds_by_name();
        assert!(seconds["test inner"] >= 0.004 && seconds["test outer"] >= seconds["test inner"], "{seconds:?}");
        let spans = own(recording);
        let names: Vec<(&str, Option<u64>)> = spans.iter().map(|s| (s.name, s.number)).collect();
        assert_eq!(names, [("test inner", Some(0)), ("test inner", Some(1)), ("test outer", Some(7))]);
        let (outer, inner) = (spans[2], spans[1]);
        assert!(outer.begin_us <= spans[0].begin_us && spans[0].begin_us + spans[0].duration_us <= inner.begin_us);
        assert!(inner.begin_us + inner.duration_us <= outer.begin_us + outer.duration_us);
        assert!(own(take()).is_empty(), "taken once");
        let unfinished = span("test unfinished");
        stop();
        drop(unfinished);
        drop(span("test after"));
        assert!(own(stop()).is_empty());
    }
}
