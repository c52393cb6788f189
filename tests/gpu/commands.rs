//! `temper gpu` and `temper doctor` on eight GPUs, and on none.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::FakeNvml;

const SCRIPT: &str = "3.process 1 13000000000\n3.throttle 72\n3.ecc_corrected 4\n3.ecc_uncorrected 2\n5.power -\n5.ecc_corrected -\n\
                      5.utilization -";

fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn gpu_shows_every_card_and_leaves_out_what_is_not_known() {
    let fake = FakeNvml::new(SCRIPT);
    let all: Value = serde_json::from_str(&stdout(fake.temper(&["gpu", "--json"]))).unwrap();
    let gpus = all["gpus"].as_array().unwrap();
    assert_eq!((gpus.len(), &all["problem"]), (8, &Value::Null));
    let busy = &gpus[3];
    assert_eq!((&busy["index"], &busy["name"]), (&json!(3), &json!("Fake A100")));
    assert_eq!((&busy["utilization_ratio"], &busy["memory_used_bytes"]), (&json!(0.5), &json!(10u64 << 30)));
    assert_eq!(busy["throttle_reasons"], json!(["hw_slowdown", "hw_thermal_slowdown"]));
    assert_eq!((&busy["ecc_corrected"], &busy["ecc_uncorrected"]), (&json!(4), &json!(2)));
    assert_eq!(
        (&busy["processes"][0]["pid"], &busy["processes"][0]["memory_used_bytes"]),
        (&json!(1), &json!(13000000000u64))
    );
    assert_eq!((&busy["power_w"], &busy["power_limit_w"]), (&json!(200.0), &json!(400.0)));
    let silent = gpus[5].as_object().unwrap();
    for key in ["power_w", "ecc_corrected", "utilization_ratio"] {
        assert!(!silent.contains_key(key) && busy.get(key).is_some(), "{key}");
    }

    let table = stdout(fake.temper(&["gpu"]));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 9, "{table}");
    assert!(lines[0].contains("GPU") && lines[0].contains("processes"), "{table}");
    for part in ["Fake A100", "50 %", "10.0 of 80.0", "200 of 400", "hw_thermal_slowdown", "6 (2)", "12.1 GiB"] {
        assert!(lines[4].contains(part), "{part}: {}", lines[4]);
    }
    assert!(lines[6].contains("- of 400"), "{}", lines[6]);
}

#[test]
fn doctor_shows_limiters_errors_and_processes() {
    let fake = FakeNvml::new(SCRIPT);
    let text = stdout(fake.temper(&["doctor"]));
    let third = text.lines().skip_while(|line| !line.contains("3: Fake A100")).take(4).collect::<Vec<_>>().join("\n");
    for part in ["clocks limited by hw_slowdown, hw_thermal_slowdown", "4 corrected, 2 not", "process 1 (", "12.1 GiB"]
    {
        assert!(third.contains(part), "{part}: {third}");
    }
    let json: Value = serde_json::from_str(&stdout(fake.temper(&["doctor", "--json"]))).unwrap();
    assert_eq!(json["gpus"][3]["ecc_uncorrected"], 2);
}

#[test]
fn no_driver_is_an_answer() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_temper")).args(["gpu", "--json"]).output().unwrap();
    let found: Value = serde_json::from_str(&stdout(output)).unwrap();
    // A machine with a driver has none of this to say.
    assert!(found["problem"].is_null() || found["gpus"] == json!([]), "{found}");
}
