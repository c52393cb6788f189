//! GPUs and their driver, through NVML. A machine without a driver is a value (`Err` with the reason), not a failure.
//!
//! `reading`: what a GPU says now; `monitor`, `step`: what it did during each step of a run; `processes`: who else is
//! on it; `selection`: which one is CUDA's device N; `peak`: how fast its tensor cores are at most.

pub mod monitor;
pub mod peak;
pub mod processes;
pub mod reading;
pub mod selection;
mod step;

use std::ffi::OsStr;
use std::path::Path;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::Serialize;

use super::kernels;
use reading::Reading;
use selection::Card;

#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    pub index: u32,
    pub name: String,
    /// (major, minor); an A100 is (8, 0), an H200 (9, 0).
    pub compute_capability: Option<(u32, u32)>,
    pub memory_total_bytes: Option<u64>,
    pub memory_free_bytes: Option<u64>,
    pub power_limit_w: Option<f64>,
    #[serde(flatten)]
    pub now: Reading,
}

#[derive(Clone, Debug, Serialize)]
pub struct Gpus {
    /// "580.95.05".
    pub driver_version: String,
    /// The newest CUDA that the driver supports, "13.0".
    pub driver_cuda_version: Option<String>,
    pub gpus: Vec<Gpu>,
}

/// Asks NVML what is there now. `Err` holds NVML's reason on a machine without a driver.
pub fn probe() -> Result<Gpus, String> {
    let nvml = open(None)?;
    let count = nvml.device_count().map_err(|e| e.to_string())?;
    let gpus = (0..count).filter_map(|index| {
        let device = nvml.device_by_index(index).ok()?;
        let memory = device.memory_info().ok();
        Some(Gpu {
            index,
            name: device.name().unwrap_or_else(|_| "unknown GPU".to_owned()),
            compute_capability: device
                .cuda_compute_capability()
                .ok()
                .and_then(|c| Some((u32::try_from(c.major).ok()?, u32::try_from(c.minor).ok()?))),
            memory_total_bytes: memory.as_ref().map(|m| m.total),
            memory_free_bytes: memory.as_ref().map(|m| m.free),
            power_limit_w: device.power_management_limit().ok().map(|mw| f64::from(mw) / 1000.0),
            now: Reading::of(&device),
        })
    });
    Ok(Gpus {
        driver_version: nvml.sys_driver_version().map_err(|e| e.to_string())?,
        driver_cuda_version: nvml.sys_cuda_driver_version().ok().map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
        gpus: gpus.collect(),
    })
}

/// The name of CUDA's device `index`.
pub fn name_of_cuda(index: usize) -> Option<String> {
    let nvml = open(None).ok()?;
    let card = Card::Cuda(index).index(&nvml).ok()?;
    nvml.device_by_index(card).and_then(|device| device.name()).ok()
}

/// `library`, else the driver's: drivers install `libnvidia-ml.so.1`; the bare name comes only with development packages.
fn open(library: Option<&Path>) -> Result<Nvml, String> {
    let named = library.map_or(OsStr::new("libnvidia-ml.so.1"), Path::as_os_str);
    let opened = Nvml::builder().lib_path(named).init();
    let opened = if library.is_none() { opened.or_else(|_| Nvml::init()) } else { opened };
    opened.map_err(|e| match e {
        NvmlError::LibloadingError(_) => format!("no NVIDIA driver: {} was not found", named.display()),
        other => format!("NVML: {other}"),
    })
}

/// The oldest driver that this libtorch's CUDA runs with (NVIDIA's compatibility table, by CUDA major version).
pub fn driver_needed() -> Option<u32> {
    match kernels::TORCH_CUDA?.split('.').next()? {
        "13" => Some(580),
        "12" => Some(525),
        "11" => Some(450),
        _ => None,
    }
}
