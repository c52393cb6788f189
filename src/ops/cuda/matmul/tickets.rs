//! The counters by which the splits of a tile find out who is last. A kernel leaves them zero as it found them, and launches of a
//! device follow each other on one stream, so all launches share one block of zeros: clearing some for each would be a launch more.
//! Within a launch every tile has its own.

use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use crate::Result;

/// Of a device: more tiles than a launch with splits ever has.
const SHARED: i64 = 16384;

static OF_DEVICES: Mutex<Vec<(Device, Tensor)>> = Mutex::new(Vec::new());

/// i32, at least `tiles` of them, zero. On the CPU, where kernels' host builds run at the same time, of the caller's own.
///
/// # Errors
/// Torch's, where there is no memory.
pub fn tickets(device: Device, tiles: i64) -> Result<Tensor> {
    if device == Device::Cpu || tiles > SHARED {
        return Ok(Tensor::f_zeros([tiles], (Kind::Int, device))?);
    }
    let mut all = OF_DEVICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, shared)) = all.iter().find(|(of, _)| *of == device) {
        return Ok(shared.shallow_clone());
    }
    let shared = Tensor::f_zeros([SHARED], (Kind::Int, device))?;
    all.push((device, shared.shallow_clone()));
    Ok(shared)
}
