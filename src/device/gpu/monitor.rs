//! What a GPU did during each step of a run: a thread reads it every second, the step's row sums its readings up.
//!
//! One NVML handle stays open; a reading is a handful of NVML calls, without CUDA and outside the training thread. A
//! step's row has a reading at its begin and at its end besides, so a short step has numbers too and energy is the
//! step's own. Warnings are said once: for a limiter that means trouble, for more uncorrected ECC errors than before,
//! for a foreign process.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use serde_json::{Map, Value};

use super::reading::Reading;
use super::selection::Card;
use super::step::StepTotals;
use super::{open, processes};

/// What to monitor, and how often.
#[derive(Clone, Debug)]
pub struct Watch {
    /// None: the driver's libnvidia-ml.so.1.
    pub library: Option<PathBuf>,
    pub card: Card,
    pub every: Duration,
}

impl Watch {
    /// The driver's NVML, once a second.
    pub fn card(card: Card) -> Watch {
        Watch { library: None, card, every: Duration::from_secs(1) }
    }
}

/// Reads until it is dropped.
pub struct Monitor {
    shared: Arc<Shared>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    nvml: Nvml,
    index: u32,
    state: Mutex<State>,
    warn: Box<dyn Fn(&str) + Send + Sync>,
}

#[derive(Default)]
struct State {
    step: StepTotals,
    warned: Warned,
}

/// What was said already.
#[derive(Default)]
struct Warned {
    throttle: BTreeSet<&'static str>,
    ecc_uncorrected: u64,
    pids: BTreeSet<u32>,
}

impl Monitor {
    /// `warn` gets one line per warning, from another thread too.
    ///
    /// # Errors
    /// Why there is nothing to read: no driver, or no such card.
    pub fn start(watch: &Watch, warn: impl Fn(&str) + Send + Sync + 'static) -> Result<Monitor, String> {
        let nvml = open(watch.library.as_deref())?;
        let index = watch.card.index(&nvml)?;
        nvml.device_by_index(index).map_err(|e| format!("NVML: GPU {index}: {e}"))?;
        let shared = Arc::new(Shared { nvml, index, state: Mutex::default(), warn: Box::new(warn) });
        let (stop, stopped) = channel();
        let (reader, every) = (shared.clone(), watch.every);
        let thread = std::thread::Builder::new()
            .name("gpu monitor".into())
            .spawn(move || {
                while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                    reader.sample();
                }
            })
            .map_err(|e| format!("no thread for the GPU monitor: {e}"))?;
        Ok(Monitor { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// A step begins: what was read since the last one (a validation) is in no step's row.
    pub fn begin_step(&self) {
        self.shared.state().step = StepTotals::default();
        self.shared.sample();
    }

    /// The keys of the step that now ends, for timing.jsonl.
    pub fn end_step(&self) -> Map<String, Value> {
        self.shared.sample();
        self.shared.state().step.row()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop = None;
        // A panic in the thread would have lost readings, nothing else.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self) {
        // One at a time from reading to adding: an older reading must not follow a newer one.
        let mut state = self.state();
        // A card that fell off the bus answers nothing: an empty reading.
        let reading = self.nvml.device_by_index(self.index).map(|device| Reading::of(&device)).unwrap_or_default();
        let foreign = reading.processes.as_deref().and_then(processes::foreign);
        let warnings = state.warned.not_said_yet(self.index, &reading, foreign.as_deref().unwrap_or_default());
        state.step.add(Instant::now(), &reading, foreign);
        drop(state);
        warnings.iter().for_each(|line| (self.warn)(line));
    }
}

impl Warned {
    fn not_said_yet(&mut self, index: u32, reading: &Reading, foreign: &[processes::GpuProcess]) -> Vec<String> {
        let mut lines = Vec::new();
        let trouble: Vec<&str> = reading.trouble().into_iter().filter(|name| self.throttle.insert(name)).collect();
        if !trouble.is_empty() {
            let at = reading.temperature_c.map_or(String::new(), |celsius| format!(" at {celsius} °C"));
            lines.push(format!("GPU {index} is throttled: {}{at}", trouble.join(", ")));
        }
        if let Some(errors) = reading.ecc_uncorrected.filter(|errors| *errors > self.ecc_uncorrected) {
            self.ecc_uncorrected = errors;
            lines.push(format!("GPU {index} has {errors} uncorrected ECC error(s) since its driver was loaded"));
        }
        for process in foreign.iter().filter(|process| self.pids.insert(process.pid)) {
            let name = process.name.as_deref().unwrap_or("unknown");
            let used = process.memory_used_bytes.map_or("memory".into(), |b| format!("{:.1} GiB", processes::gib(b)));
            lines.push(format!("process {} ({name}) uses {used} on this GPU ({index})", process.pid));
        }
        lines
    }
}
