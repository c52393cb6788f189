//! One reading of one GPU: whatever NVML answers now. What a card does not support is `None` and left out of JSON, never 0.

use nvml_wrapper::Device;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use serde::Serialize;

use super::processes::{self, GpuProcess};

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reading {
    /// Share of the driver's last sample period in which some kernel ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utilization_ratio: Option<f64>,
    /// Share in which device memory was read or written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_utilization_ratio: Option<f64>,
    /// Without what the driver reserves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_used_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power_w: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sm_clock_mhz: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_clock_mhz: Option<u32>,
    /// Why clocks are below their highest; names as NVML's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_reasons: Option<Vec<&'static str>>,
    /// ECC errors since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ecc_corrected: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ecc_uncorrected: Option<u64>,
    /// Processes with a CUDA context on it, this one included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processes: Option<Vec<GpuProcess>>,
    /// Since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_j: Option<f64>,
}

/// NVML's limiters, with their names. An idle GPU and a power limit are no trouble; those of [`TROUBLE`] are.
const REASONS: [(ThrottleReasons, &str); 9] = [
    (ThrottleReasons::GPU_IDLE, "gpu_idle"),
    (ThrottleReasons::APPLICATIONS_CLOCKS_SETTING, "applications_clocks_setting"),
    (ThrottleReasons::SW_POWER_CAP, "sw_power_cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hw_slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync_boost"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "sw_thermal_slowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hw_thermal_slowdown"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hw_power_brake_slowdown"),
    (ThrottleReasons::DISPLAY_CLOCK_SETTING, "display_clock_setting"),
];

/// Heat, and the power supply's brake. `hw_slowdown` alone also comes with a change of the power state.
pub const TROUBLE: [&str; 3] = ["sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"];

impl Reading {
    pub(super) fn of(device: &Device) -> Reading {
        let percent = |value: u32| f64::from(value) / 100.0;
        let utilization = device.utilization_rates().ok();
        let ecc = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
        Reading {
            utilization_ratio: utilization.as_ref().map(|u| percent(u.gpu)),
            memory_utilization_ratio: utilization.as_ref().map(|u| percent(u.memory)),
            memory_used_bytes: device.memory_info().ok().map(|memory| memory.used),
            power_w: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
            sm_clock_mhz: device.clock_info(Clock::SM).ok(),
            memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
            throttle_reasons: device.current_throttle_reasons().ok().map(names),
            ecc_corrected: ecc(MemoryError::Corrected),
            ecc_uncorrected: ecc(MemoryError::Uncorrected),
            processes: device.running_compute_processes().ok().map(processes::named),
            energy_j: device.total_energy_consumption().ok().map(|millijoules| millijoules as f64 / 1000.0),
        }
    }

    /// The limiters now active that mean trouble.
    pub fn trouble(&self) -> Vec<&'static str> {
        self.throttle_reasons.iter().flatten().copied().filter(|name| TROUBLE.contains(name)).collect()
    }
}

fn names(active: ThrottleReasons) -> Vec<&'static str> {
    REASONS.iter().filter(|(reason, _)| active.contains(*reason)).map(|(_, name)| *name).collect()
}
