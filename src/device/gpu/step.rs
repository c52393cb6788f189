//! A step's readings summed up: means of rates, largest of levels, energy. A key that nothing answered is absent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::processes::GpuProcess;
use super::reading::Reading;

#[derive(Default)]
pub(super) struct StepTotals {
    utilization: Mean,
    memory_utilization: Mean,
    power: Mean,
    sm_clock: Mean,
    memory_clock: Mean,
    memory_used_bytes: Option<u64>,
    temperature_c: Option<u32>,
    throttle: Option<BTreeSet<&'static str>>,
    ecc_corrected: Option<u64>,
    ecc_uncorrected: Option<u64>,
    /// By pid, with the most memory seen.
    foreign: Option<BTreeMap<u32, GpuProcess>>,
    energy: Energy,
}

impl StepTotals {
    pub(super) fn add(&mut self, at: Instant, reading: &Reading, foreign: Option<Vec<GpuProcess>>) {
        self.utilization.add(reading.utilization_ratio);
        self.memory_utilization.add(reading.memory_utilization_ratio);
        self.power.add(reading.power_w);
        self.sm_clock.add(reading.sm_clock_mhz.map(f64::from));
        self.memory_clock.add(reading.memory_clock_mhz.map(f64::from));
        self.memory_used_bytes = self.memory_used_bytes.max(reading.memory_used_bytes);
        self.temperature_c = self.temperature_c.max(reading.temperature_c);
        if let Some(names) = &reading.throttle_reasons {
            self.throttle.get_or_insert_default().extend(names);
        }
        self.ecc_corrected = reading.ecc_corrected.or(self.ecc_corrected);
        self.ecc_uncorrected = reading.ecc_uncorrected.or(self.ecc_uncorrected);
        if let Some(processes) = foreign {
            let seen = self.foreign.get_or_insert_default();
            for process in processes {
                let before = seen.get(&process.pid).and_then(|p| p.memory_used_bytes);
                let memory_used_bytes = process.memory_used_bytes.max(before);
                seen.insert(process.pid, GpuProcess { memory_used_bytes, ..process });
            }
        }
        self.energy.add(at, reading);
    }

    pub(super) fn row(&self) -> Map<String, Value> {
        let (energy_j, energy_source) = self.energy.of_step().unzip();
        let foreign = self.foreign.as_ref().map(|seen| json!(seen.values().collect::<Vec<_>>()));
        let all = [
            ("gpu_utilization_ratio", self.utilization.json()),
            ("gpu_memory_utilization_ratio", self.memory_utilization.json()),
            ("gpu_memory_used_bytes", self.memory_used_bytes.map(Value::from)),
            ("gpu_power_w", self.power.json()),
            ("gpu_temperature_c", self.temperature_c.map(Value::from)),
            ("gpu_sm_clock_mhz", self.sm_clock.json()),
            ("gpu_memory_clock_mhz", self.memory_clock.json()),
            ("gpu_throttle_reasons", self.throttle.as_ref().map(|names| json!(names))),
            ("gpu_ecc_corrected", self.ecc_corrected.map(Value::from)),
            ("gpu_ecc_uncorrected", self.ecc_uncorrected.map(Value::from)),
            ("gpu_foreign_processes", foreign),
            ("gpu_energy_j", energy_j.map(Value::from)),
            ("gpu_energy_source", energy_source.map(Value::from)),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))).collect()
    }
}

#[derive(Default)]
struct Mean {
    sum: f64,
    n: u32,
}

impl Mean {
    fn add(&mut self, value: Option<f64>) {
        self.sum += value.unwrap_or(0.0);
        self.n += u32::from(value.is_some());
    }

    fn json(&self) -> Option<Value> {
        (self.n > 0).then(|| json!(self.sum / f64::from(self.n)))
    }
}

/// The difference of NVML's counter; without one, or where it went back (the driver was loaded again), power over time
/// by the trapezoidal rule.
#[derive(Default)]
struct Energy {
    first_j: Option<f64>,
    last_j: Option<f64>,
    went_back: bool,
    last_power: Option<(Instant, f64)>,
    integral_j: Option<f64>,
}

impl Energy {
    fn add(&mut self, at: Instant, reading: &Reading) {
        if let Some(joules) = reading.energy_j {
            self.first_j.get_or_insert(joules);
            self.went_back |= self.last_j.is_some_and(|last| joules < last);
            self.last_j = Some(joules);
        }
        if let Some(watts) = reading.power_w {
            if let Some((before, power)) = self.last_power {
                let seconds = at.saturating_duration_since(before).as_secs_f64();
                *self.integral_j.get_or_insert(0.0) += 0.5 * (power + watts) * seconds;
            }
            self.last_power = Some((at, watts));
        }
    }

    fn of_step(&self) -> Option<(f64, &'static str)> {
        let counted = self.first_j.zip(self.last_j).filter(|_| !self.went_back).map(|(first, last)| last - first);
        counted.map(|joules| (joules, "counter")).or(self.integral_j.map(|joules| (joules, "power")))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn row(readings: &[Reading], foreign: &[Option<Vec<GpuProcess>>]) -> Value {
        let (mut totals, start) = (StepTotals::default(), Instant::now());
        for (i, reading) in readings.iter().enumerate() {
            let at = start + Duration::from_secs(2 * i as u64);
            totals.add(at, reading, foreign.get(i).cloned().flatten());
        }
        Value::Object(totals.row())
    }

    #[test]
    fn rates_are_averaged_levels_are_the_largest_and_what_is_unknown_is_absent() {
        let one = Reading {
            utilization_ratio: Some(0.5),
            memory_used_bytes: Some(30),
            temperature_c: Some(70),
            throttle_reasons: Some(vec!["sw_power_cap"]),
            ecc_corrected: Some(1),
            ..Reading::default()
        };
        let two = Reading {
            utilization_ratio: Some(1.0),
            memory_used_bytes: Some(20),
            temperature_c: Some(75),
            throttle_reasons: Some(vec!["gpu_idle", "sw_power_cap"]),
            ecc_corrected: Some(4),
            ..Reading::default()
        };
        let process = |bytes| GpuProcess { pid: 7, name: None, memory_used_bytes: bytes };
        // A card that does not answer between the two changes nothing.
        let found =
            row(&[one, Reading::default(), two], &[Some(vec![process(Some(9))]), None, Some(vec![process(Some(5))])]);
        let expected = json!({
            "gpu_utilization_ratio": 0.75, "gpu_memory_used_bytes": 30, "gpu_temperature_c": 75,
            "gpu_throttle_reasons": ["gpu_idle", "sw_power_cap"], "gpu_ecc_corrected": 4,
            "gpu_foreign_processes": [{"pid": 7, "memory_used_bytes": 9}],
        });
        assert_eq!(found, expected);
        assert_eq!(row(&[Reading::default()], &[]), json!({}));
        assert_eq!(row(&[Reading::default()], &[Some(vec![])]), json!({"gpu_foreign_processes": []}));
    }

    #[test]
    fn energy_is_the_counters_or_else_power_over_time() {
        let at = |energy_j: Option<f64>, power_w: Option<f64>| Reading { energy_j, power_w, ..Reading::default() };
        let energy = |readings: &[Reading]| {
            let row = row(readings, &[]);
            (row["gpu_energy_j"].as_f64(), row["gpu_energy_source"].as_str().map(str::to_string))
        };
        let counted = [at(Some(1000.0), Some(1.0)), at(None, Some(1.0)), at(Some(1600.5), Some(1.0))];
        assert_eq!(energy(&counted), (Some(600.5), Some("counter".into())));
        // 100 W -> 300 W -> 300 W, 2 s each.
        let power = [at(None, Some(100.0)), at(None, Some(300.0)), at(None, Some(300.0))];
        assert_eq!(energy(&power), (Some(1000.0), Some("power".into())));
        // A counter that begins again, even where it ends above its first value.
        let again = [at(Some(50.0), Some(100.0)), at(Some(1.0), Some(100.0)), at(Some(60.0), Some(100.0))];
        assert_eq!(energy(&again), (Some(400.0), Some("power".into())));
        assert_eq!(energy(&[at(None, None), at(None, None)]), (None, None));
        assert_eq!(energy(&[at(None, Some(5.0))]), (None, None), "one reading spans no time");
    }
}
