//! GPUs and their driver, through NVML. A machine without a driver is a value (`Err` with the reason), not a failure.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::Serialize;

use super::kernels;

#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    pub index: u32,
    pub name: String,
    /// (major, minor); an A100 is (8, 0), an H200 (9, 0).
    pub compute_capability: Option<(u32, u32)>,
    pub memory_total_bytes: Option<u64>,
    pub memory_free_bytes: Option<u64>,
    pub temperature_c: Option<u32>,
    pub power_w: Option<f64>,
    pub power_limit_w: Option<f64>,
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
    let nvml = open()?;
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
            temperature_c: device.temperature(nvml_wrapper::enum_wrappers::device::TemperatureSensor::Gpu).ok(),
            power_w: device.power_usage().ok().map(|mw| f64::from(mw) / 1000.0),
            power_limit_w: device.power_management_limit().ok().map(|mw| f64::from(mw) / 1000.0),
        })
    });
    Ok(Gpus {
        driver_version: nvml.sys_driver_version().map_err(|e| e.to_string())?,
        driver_cuda_version: nvml.sys_cuda_driver_version().ok().map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
        gpus: gpus.collect(),
    })
}

/// Memory, power and temperature of GPU `index` now, for a log; empty where NVML does not answer.
pub fn sample(index: usize) -> serde_json::Map<String, serde_json::Value> {
    let mut row = serde_json::Map::new();
    let found = probe().ok().and_then(|all| all.gpus.into_iter().nth(index));
    if let Some(gpu) = found {
        let used = gpu.memory_total_bytes.zip(gpu.memory_free_bytes).map(|(total, free)| total - free);
        row.insert("gpu_memory_used_bytes".into(), used.into());
        row.insert("gpu_power_w".into(), gpu.power_w.into());
        row.insert("gpu_temperature_c".into(), gpu.temperature_c.into());
    }
    row
}

/// Drivers install `libnvidia-ml.so.1`; the bare name comes only with development packages.
fn open() -> Result<Nvml, String> {
    let library = OsStr::new("libnvidia-ml.so.1");
    Nvml::builder().lib_path(library).init().or_else(|_| Nvml::init()).map_err(|e| match e {
        NvmlError::LibloadingError(_) => "no NVIDIA driver: libnvidia-ml.so.1 was not found".to_owned(),
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
