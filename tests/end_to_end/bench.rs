//! `bench kernels` and `selftest`: what they print, and what they say where there is nothing to run.

use serde_json::Value;

use crate::support::{run, stderr_of, succeed};

#[test]
fn bench_kernels_rows_have_times_beside_a_copy_and_a_baseline() {
    let group = "fake_quant bf16 [256, 1536]";
    let text = succeed(&["bench", "kernels", "--device", "cpu", "--threads", "1", "--only", group, "--json", "-q"]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["gpu"], &report["threads"]), (&Value::Null, &Value::from(1)));
    let rows = report["rows"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {text}"));
    let nvfp4 = row("fake_quant nvfp4");
    assert_eq!(nvfp4["baseline"], "mxfp4");
    let number = |row: &Value, key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
    let ratio = number(nvfp4, "min_us") / number(row("fake_quant mxfp4"), "min_us");
    assert!((number(nvfp4, "baseline_ratio") - ratio).abs() < 1e-9);
    let copied = number(nvfp4, "min_us") / number(row("copy"), "min_us");
    assert!((number(nvfp4, "copy_ratio") - copied).abs() < 1e-9);
    assert!(number(nvfp4, "gb_per_s") > 0.0 && number(nvfp4, "median_us") >= number(nvfp4, "min_us"));
}

#[test]
fn a_group_that_does_not_exist_is_an_error() {
    let output = run(&["bench", "kernels", "--device", "cpu", "--only", "no such group", "-q"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr_of(&output);
    assert!(text.lines().count() == 1 && text.contains("--only \"no such group\""), "{text}");
}

#[test]
fn choices_need_a_gpu() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("choices.json");
    let output = run(&["bench", "kernels", "--device", "cpu", "--choices", file.to_str().unwrap()]);
    let text = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.lines().count() == 1 && text.contains("--choices") && !file.exists(), "{text}");
}

#[test]
fn selftest_without_a_gpu_says_that_nothing_was_run() {
    if temper::device::cuda_devices().is_ok() {
        println!("skipped: this machine has a GPU");
        return;
    }
    for (args, code) in
        [(&["selftest"][..], 1), (&["selftest", "--device", "cuda"], 2), (&["selftest", "--device", "cpu"], 2)]
    {
        let output = run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(
            output.stdout.is_empty() && stderr_of(&output).lines().count() == 1,
            "{args:?}: {}",
            stderr_of(&output)
        );
    }
}
