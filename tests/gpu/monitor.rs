//! What the monitor reads, sums up per step, warns of once, and does not know.

use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use temper::device::gpu::monitor::{Monitor, Watch};
use temper::device::gpu::selection::{Card, PciAddress};

use crate::support::FakeNvml;

const NEVER: Duration = Duration::from_secs(3600);

type Warnings = Arc<Mutex<Vec<String>>>;

fn start(fake: &FakeNvml, card: Card, every: Duration) -> (Monitor, Warnings) {
    let warnings = Warnings::default();
    let watch = Watch { library: Some(fake.library()), card, every };
    let sink = warnings.clone();
    let monitor = Monitor::start(&watch, move |line| sink.lock().unwrap().push(line.to_string())).unwrap();
    (monitor, warnings)
}

/// A step at whose begin the GPU says the first script and at whose end the second.
fn step(fake: &FakeNvml, monitor: &Monitor, scripts: [&str; 2]) -> Map<String, Value> {
    fake.says(scripts[0]);
    monitor.begin_step();
    fake.says(scripts[1]);
    monitor.end_step()
}

fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Another program, which is no child of ours: its shell ends and leaves it to init.
struct Stranger(u32);

impl Stranger {
    fn new() -> Stranger {
        let shell = Command::new("sh").args(["-c", "sleep 600 >&- 2>&- & echo $!"]).output().unwrap();
        Stranger(String::from_utf8(shell.stdout).unwrap().trim().parse().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        Command::new("kill").arg(self.0.to_string()).status().unwrap();
    }
}

#[test]
fn a_step_has_means_of_rates_largest_levels_and_its_energy() {
    let fake = FakeNvml::new("");
    let (monitor, warnings) = start(&fake, Card::Index(3), NEVER);
    let first = "3.utilization 20\n3.power 100000\n3.temperature 61\n3.memory_used 5000\n3.sm_clock 1000\n3.throttle 1\n\
                 3.energy 7000\n3.ecc_corrected 2";
    let last = "3.utilization 90\n3.power 300000\n3.temperature 55\n3.memory_used 4000\n3.sm_clock 1200\n3.throttle 4\n\
                3.energy 19500\n3.ecc_corrected 5";
    let expected = json!({
        "gpu_utilization_ratio": 0.55, "gpu_memory_utilization_ratio": 0.25, "gpu_memory_used_bytes": 5000,
        "gpu_power_w": 200.0, "gpu_temperature_c": 61, "gpu_sm_clock_mhz": 1100.0, "gpu_memory_clock_mhz": 1215.0,
        "gpu_throttle_reasons": ["gpu_idle", "sw_power_cap"], "gpu_ecc_corrected": 5, "gpu_ecc_uncorrected": 0,
        "gpu_foreign_processes": [], "gpu_energy_j": 12.5, "gpu_energy_source": "counter",
    });
    assert_eq!(Value::Object(step(&fake, &monitor, [first, last])), expected);
    // The next step is not mixed with it.
    let next = step(&fake, &monitor, [last, last]);
    assert_eq!((&next["gpu_utilization_ratio"], &next["gpu_energy_j"]), (&json!(0.9), &json!(0.0)));
    assert_eq!(next["gpu_throttle_reasons"], json!(["sw_power_cap"]));
    assert!(warnings.lock().unwrap().is_empty(), "a power limit and an idle GPU are no trouble");
}

#[test]
fn a_counter_that_begins_again_gives_way_to_power() {
    let fake = FakeNvml::new("");
    let (monitor, _) = start(&fake, Card::Index(0), NEVER);
    fake.says("0.energy 900000\n0.power 100000");
    let started = Instant::now();
    monitor.begin_step();
    let inside = Instant::now();
    std::thread::sleep(Duration::from_millis(50));
    fake.says("0.energy 10\n0.power 100000");
    let least = inside.elapsed();
    let row = monitor.end_step();
    let (least, most) = (100.0 * least.as_secs_f64(), 100.0 * started.elapsed().as_secs_f64());
    assert_eq!(row["gpu_energy_source"], "power");
    let joules = row["gpu_energy_j"].as_f64().unwrap();
    assert!(joules >= 0.9 * least && joules <= most, "{joules}: {least} to {most}");
}

#[test]
fn what_a_card_does_not_support_is_absent() {
    let fake = FakeNvml::new("");
    let (monitor, _) = start(&fake, Card::Index(0), NEVER);
    let keys = ["utilization", "power", "temperature", "memory_used", "sm_clock", "memory_clock", "throttle", "energy"];
    let mut script: String = keys.iter().map(|key| format!("0.{key} -\n")).collect();
    script += "0.ecc_corrected -\n0.ecc_uncorrected -";
    let row = step(&fake, &monitor, [&script, &script]);
    assert_eq!(Value::Object(row), json!({"gpu_foreign_processes": []}));
    let row = step(&fake, &monitor, ["0.energy -", "0.energy -"]);
    assert_eq!(row["gpu_energy_source"], "power");
}

#[test]
fn trouble_is_said_once_and_again_when_it_changes() {
    let fake = FakeNvml::new("");
    let (monitor, warnings) = start(&fake, Card::Index(5), NEVER);
    let said = |script: &str| {
        step(&fake, &monitor, [script, script]);
        std::mem::take(&mut *warnings.lock().unwrap())
    };
    assert_eq!(said("5.throttle 4"), [""; 0]);
    // hw_slowdown | hw_thermal_slowdown.
    let hot = "5.throttle 72\n5.temperature 91";
    assert_eq!(said(hot), ["GPU 5 is throttled: hw_thermal_slowdown at 91 °C"]);
    assert_eq!(said(hot), [""; 0]);
    assert_eq!(said("5.throttle 0"), [""; 0]);
    assert_eq!(said(hot), [""; 0], "the same again");
    assert_eq!(said("5.throttle 200\n5.temperature 91"), ["GPU 5 is throttled: hw_power_brake_slowdown at 91 °C"]);
    assert_eq!(said("5.ecc_corrected 9"), [""; 0]);
    assert_eq!(said("5.ecc_uncorrected 1"), ["GPU 5 has 1 uncorrected ECC error(s) since its driver was loaded"]);
    assert_eq!(said("5.ecc_uncorrected 1"), [""; 0]);
    assert_eq!(said("5.ecc_uncorrected 3"), ["GPU 5 has 3 uncorrected ECC error(s) since its driver was loaded"]);
    // Another card's trouble is not ours.
    assert_eq!(said("4.throttle 64\n4.ecc_uncorrected 1\n4.process 1 1"), [""; 0]);
}

#[test]
fn foreign_processes_are_named_and_ours_are_not() {
    let fake = FakeNvml::new("");
    let (monitor, warnings) = start(&fake, Card::Index(0), NEVER);
    let stranger = Stranger::new();
    let mut child: Child = Command::new("sleep").arg("600").spawn().unwrap();
    let (own, bytes) = (std::process::id(), 12_992_276_070u64);
    let script = format!("0.process {own} 1\n0.process {} 2\n0.process {} {bytes}", child.id(), stranger.0);
    let row = step(&fake, &monitor, [&script, &script]);
    child.kill().unwrap();
    child.wait().unwrap();
    let expected = json!([{"pid": stranger.0, "name": "sleep", "memory_used_bytes": bytes}]);
    assert_eq!(row["gpu_foreign_processes"], expected);
    let expected = format!("process {} (sleep) uses 12.1 GiB on this GPU (0)", stranger.0);
    assert_eq!(*warnings.lock().unwrap(), [expected]);
    // Numbers of another container's host: nothing is said of them.
    let row = step(&fake, &monitor, ["0.process 1073741824 1", "0.process 1073741824 1"]);
    assert_eq!(row.get("gpu_foreign_processes"), None);
    assert_eq!(warnings.lock().unwrap().len(), 1);
}

#[test]
fn a_thread_reads_between_the_steps_with_one_handle_and_ends_with_the_monitor() {
    let fake = FakeNvml::new("");
    let (monitor, warnings) = start(&fake, Card::Index(2), Duration::from_millis(5));
    monitor.begin_step();
    let before = fake.logged("reading 2");
    fake.says("2.throttle 64\n2.temperature 95");
    wait_until("a warning without a step's end", || !warnings.lock().unwrap().is_empty());
    wait_until("readings", || fake.logged("reading 2") >= before + 5);
    fake.says("");
    let row = monitor.end_step();
    assert_eq!(
        (&row["gpu_temperature_c"], &row["gpu_throttle_reasons"]),
        (&json!(95), &json!(["hw_thermal_slowdown"]))
    );
    assert_eq!((fake.logged("init"), fake.logged("shutdown")), (1, 0));
    drop(monitor);
    let after = fake.logged("reading 2");
    assert_eq!(fake.logged("shutdown"), 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(fake.logged("reading 2"), after);
}

#[test]
fn a_card_is_found_by_its_address_and_absence_has_a_reason() {
    let fake = FakeNvml::new("");
    let at = |bus| Card::Pci(PciAddress { domain: 0, bus, device: 0 });
    let (monitor, _) = start(&fake, at(0x70), NEVER);
    let row = step(&fake, &monitor, ["6.temperature 77", "6.temperature 77"]);
    assert_eq!(row["gpu_temperature_c"], 77);
    let reason = |watch: Watch| Monitor::start(&watch, |_| ()).err().unwrap();
    let watch = |card| Watch { library: Some(fake.library()), ..Watch::card(card) };
    assert_eq!(reason(watch(at(0x99))), "NVML has no GPU at 00000000:99:00.0");
    assert!(reason(watch(Card::Index(8))).starts_with("NVML: GPU 8: "));
    let none = Watch { library: Some("/nowhere/libnvidia-ml.so.1".into()), ..Watch::card(Card::Index(0)) };
    assert!(reason(none).starts_with("no NVIDIA driver: "));
}
