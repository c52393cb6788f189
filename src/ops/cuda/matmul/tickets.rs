//! The counters by which the splits of a tile find out who is last. A kernel leaves them zero as it found them, and launches of a
//! device follow each other on one stream, so all launches share one block of zeros: clearing some for each would be a launch more.
//! A work that is captured as a graph has run before (torch_graph.rs), so they are never made, and cleared, in a capture.
//! Within a launch every tile has its own.

use std::cell::RefCell;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use crate::Result;

/// Of a device: more tiles than a launch with splits ever has.
const SHARED: i64 = 16384;

static OF_GPUS: Mutex<Vec<(Device, Tensor)>> = Mutex::new(Vec::new());

thread_local! {
    /// There each thread is a device of its own: it waits for its launches.
    static ON_CPU: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// i32, at least `tiles` of them, zero.
///
/// # Errors
/// Torch's, where there is no memory.
pub fn tickets(device: Device, tiles: i64) -> Result<Tensor> {
    let new = |count| -> Result<Tensor> { Ok(Tensor::f_zeros([count], (Kind::Int, device))?) };
    if tiles > SHARED {
        return new(tiles);
    }
    if device == Device::Cpu {
        return ON_CPU.with_borrow_mut(|shared| {
            let tensor = shared.take().map_or_else(|| new(SHARED), Ok)?;
            Ok(shared.insert(tensor).shallow_clone())
        });
    }
    let mut all = OF_GPUS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, shared)) = all.iter().find(|(of, _)| *of == device) {
        return Ok(shared.shallow_clone());
    }
    let shared = new(SHARED)?;
    all.push((device, shared.shallow_clone()));
    Ok(shared)
}
