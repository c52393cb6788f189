//! SIGINT and SIGTERM: the first asks the run to finish its step and write a checkpoint, the second leaves at once
//! with exit code 130.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{Error, Result};

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Handle to the process-wide flag. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Interrupt {
    requested: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handlers (once per process; later calls return the same flag).
    pub fn install() -> Result<Interrupt> {
        if let Some(requested) = REQUESTED.get() {
            return Ok(Interrupt { requested: requested.clone() });
        }
        let requested = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // Order matters: handlers run in the order of registration, so the first signal passes the shutdown
            // (flag still false) and then sets the flag; the second meets a set flag and ends the process.
            signal_hook::flag::register_conditional_shutdown(signal, 130, requested.clone())
                .and_then(|_| signal_hook::flag::register(signal, requested.clone()))
                .map_err(|e| Error::Runtime(format!("cannot handle signal {signal}: {e}")))?;
        }
        let requested = REQUESTED.get_or_init(|| requested).clone();
        Ok(Interrupt { requested })
    }

    /// A flag that no signal reaches, for tests and library use; `request` sets it.
    pub fn never() -> Interrupt {
        Interrupt { requested: Arc::new(AtomicBool::new(false)) }
    }

    /// For commands that write at their end alone.
    ///
    /// # Errors
    /// `Interrupted` once a signal has asked to stop.
    pub fn check(&self) -> Result<()> {
        match self.requested() {
            true => Err(Error::Interrupted("nothing was written".into())),
            false => Ok(()),
        }
    }

    /// True once a signal has arrived.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Sets the flag as a signal would.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }
}
