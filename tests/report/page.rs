//! What is on the page.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use temper::analysis::report::{Report, arms};

use crate::runs::{Made, N, PLAIN, pair, reward, right};
use crate::{page_of, succeed, temper, text};

/// The values behind a figure, as its tooltips read them.
fn data(page: &str, figure: &str) -> Value {
    let from = page.find(&format!("<figure id=\"{figure}\"")).unwrap_or_else(|| panic!("no figure {figure}"));
    let start = "<script type=\"application/json\">";
    let json = &page[from + page[from..].find(start).unwrap() + start.len()..];
    serde_json::from_str(&json[..json.find("</script>").unwrap()]).unwrap()
}

#[test]
fn every_section_is_there_and_values_are_those_of_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    pair(&runs);
    let page = page_of(&runs);
    for section in ["results", "accuracy", "learning", "injection", "layers", "machine", "samples", "configuration"] {
        assert!(page.contains(&format!("<section id=\"{section}\">")), "{section}");
    }
    for fact in ["<h1>pair</h1>", "2 × 2 (4 runs)", "tiny-4x64", "0123456789", "2026-01-02", "CPU (abacus, 2 threads)"]
    {
        assert!(page.contains(fact), "{fact}");
    }
    for check in
        ["agrees with the plan in all 32 steps", "No update was skipped", "No warnings", "Every run is finished"]
    {
        assert!(page.contains(check), "{check}");
    }
    // Curves: every step of every seed.
    let values = data(&page, "reward_mean");
    for (arm, name) in ["off", "on"].into_iter().enumerate() {
        let found = &values["values"]["arms"][arm];
        assert_eq!(found["name"], name);
        assert_eq!(found["steps"], serde_json::json!([1, 2, 3, 4, 5, 6, 7, 8]));
        for (place, seed) in [0, 3].into_iter().enumerate() {
            for step in 1..=8 {
                let expected = reward(&Made { seed, ..PLAIN }, step);
                let got = found["runs"][place][step as usize - 1].as_f64().unwrap();
                assert!((got / expected - 1.0).abs() < 1e-5, "{got} {expected}");
            }
        }
    }
    // Of the 40 questions of seeds 0 and 3, 18 and 21 are right without, 21 and 24 with: 45 and 52.5 %, 52.5 and 60 %.
    let off = Made { ..PLAIN };
    assert_eq!((N, right(&off, 8, 0)), (40, 18));
    for cell in ["48.8 ± 3.8", "56.2 ± 3.8", "+7.5 ± 0.0", "[30.7, 60.2]", ">45.0<", ">52.5<", ">2 × 40<"] {
        assert!(page.contains(cell), "{cell}");
    }
    assert_eq!(data(&page, "accuracy_noisy")["values"]["arms"][1]["runs"][1], serde_json::json!([37.5, 57.5]));
    // What was planned is beside what was measured.
    assert_eq!(data(&page, "matmul_forward")["values"]["arms"][0]["planned"][0], serde_json::json!([1, 0.05]));
    assert_eq!(data(&page, "aqn_sigma")["values"]["arms"][0]["planned"][3], serde_json::json!([4, 0.0025]));
    let map = data(&page, "layers_aqn_ratio_on");
    assert_eq!(map["values"]["rows"], serde_json::json!(["0", "1"]));
    assert_eq!(map["values"]["cells"][1][7], 1.1);
    // sqrt((0.05^2 + 0.051^2) / 2) / 0.05 = 1.01005
    assert_eq!(data(&page, "layers_matmul_forward_ratio_off")["values"]["cells"][0][0], 1.01);
    assert!(page.contains("<td>noise_injection.enabled</td><td>false</td><td>true</td>"), "differences");
    assert!(page.contains("6 * 7 = 42") && data(&page, "gpu_power_w")["values"]["unit"] == "W");
}

#[test]
fn what_speaks_against_a_run_is_said_first() {
    let dir = tempfile::tempdir().unwrap();
    Made { steps: 5, disagreeing: &[2, 4], console: "warning: the bell rang\nwarning: the bell rang\n", ..PLAIN }
        .write(&dir.path().join("runs"));
    let page = page_of(&dir.path().join("runs"));
    for said in [
        "disagrees with the plan in 2 of 5 steps",
        "pair-off seed 0: in 2 steps the measured noise disagreed with the plan, the first is 2",
        "Warnings: 1",
        "the bell rang",
        "Unfinished runs: 1 of 1",
        "unfinished: step 5 of 8",
    ] {
        assert!(page.contains(said), "{said}");
    }
    // A run that has only begun is a page as well.
    let begun = dir.path().join("begun");
    let run = Made { steps: 0, ..PLAIN }.write(&begun);
    fs::write(run.join("metrics.jsonl"), "").unwrap();
    let page = page_of(&begun);
    assert!(page.contains("No step was trained yet") && page.contains("No validation yet"));
}

#[test]
fn nothing_from_a_file_becomes_markup() {
    let dir = tempfile::tempdir().unwrap();
    let evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }} </pre>";
    let runs = dir.path().join("runs");
    let name = "pair-<script>alert(1)</script>";
    let named = Made { name, ..PLAIN }.write(&dir.path().join("named"));
    let refused = temper(&["report", text(&named), "-o", dir.path().join("x.html").to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2), "a name that no run has");
    Made { completion: evil, console: "warning: <script>alert(1)</script>\n", ..PLAIN }.write(&runs);
    Made { completion: evil, hash: "00000002", ..PLAIN }.write(&runs);
    let page = page_of(&runs);
    assert!(!page.contains("<script>alert") && !page.contains("<img"), "markup from a file");
    assert!(page.contains("&lt;script&gt;alert(1)") && page.contains("{{ 7 * 7 }}"));
    // The tooltips; every other block is JSON.
    assert_eq!(page.matches("<script>").count(), 1);
    assert_eq!(page.matches("<script").count(), page.matches("</script>").count());
}

#[test]
fn nothing_is_loaded_from_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    pair(&dir.path().join("runs"));
    let page = page_of(&dir.path().join("runs")).replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for reference in ["http:", "https:", "src=", "url(", "@import", "<link rel=\"stylesheet\"", "<iframe", "fetch("] {
        assert!(!page.contains(reference), "{reference}");
    }
    let targets = page.match_indices("href=\"").map(|(at, found)| &page[at + found.len()..]);
    assert!(targets.filter(|rest| !rest.starts_with('#') && !rest.starts_with("data:,")).count() == 0);
}

#[test]
fn every_figure_is_written_as_svg_and_png_under_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, plots, page) = (dir.path().join("runs"), dir.path().join("plots"), dir.path().join("r.html"));
    pair(&runs);
    let args = ["report", text(&runs), "-o", text(&page), "--plots", text(&plots), "--json"];
    let result: Value = serde_json::from_str(&succeed(&args)).unwrap();
    let figures: BTreeSet<String> =
        result["figures"].as_array().unwrap().iter().map(|f| f.as_str().unwrap().to_string()).collect();
    for known in ["accuracy_clean", "reward_mean", "aqn_sigma", "layers_aqn_std_on", "step_s", "gpu_power_w"] {
        assert!(figures.contains(known), "{known}: {figures:?}");
    }
    assert_eq!((&result["runs"], &result["arms"][1]["name"]), (&Value::from(4), &Value::from("on")));
    assert_eq!(result["bytes"], fs::metadata(&page).unwrap().len());
    let expected: BTreeSet<String> = figures.iter().flat_map(|f| [format!("{f}.svg"), format!("{f}.png")]).collect();
    assert_eq!(names(&plots), expected);
    for name in expected {
        let bytes = fs::read(plots.join(&name)).unwrap();
        assert!(bytes.starts_with(if name.ends_with("png") { b"\x89PNG" } else { b"<svg" }), "{name}");
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn one_line_says_what_is_wrong_with_the_input() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    let run = PLAIN.write(&runs);
    PLAIN.write(&dir.path().join("copy"));
    let broken = Made { seed: 9, ..PLAIN }.write(&dir.path().join("broken"));
    fs::write(broken.join("injection.jsonl"), "{\"step\": 1}\n").unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let page = at("page.html");
    for (inputs, output, part) in [
        (vec![at("empty")], &page, "no run.json"),
        (vec![at("nothing")], &page, "no such file"),
        (vec![at("runs"), at("copy")], &page, "the same run"),
        (vec![at("broken")], &page, "injection.jsonl line 1"),
        (vec![at("runs")], &at("none/page.html"), "none/page.html"),
        (vec![at("runs")], &at("empty"), "directory"),
    ] {
        let mut args: Vec<&str> = vec!["report", "-o", output];
        args.extend(inputs.iter().map(String::as_str));
        let result = temper(&args);
        let line = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!((result.status.code(), line.lines().count()), (Some(2), 1), "{inputs:?}: {line}");
        assert!(line.contains(part), "{line}");
    }
    assert!(!Path::new(&page).exists());
    // The same directory twice is no mistake.
    succeed(&["report", &at("runs"), text(&run), "-o", &page]);
}

#[test]
fn the_tests_between_arms_are_those_of_compare() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    PLAIN.write(&runs);
    assert!(!page_of(&runs).contains("<h3>Comparison</h3>"), "one arm");
    pair(&runs);
    let page = page_of(&runs);
    let compared: Value = serde_json::from_str(&succeed(&["compare", text(&runs), "--json"])).unwrap();
    let pairs = compared["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 2);
    for pair in pairs {
        let difference = 100.0 * pair["difference"].as_f64().unwrap();
        let (arm, condition) = (pair["arm"].as_str().unwrap(), pair["condition"].as_str().unwrap());
        let row =
            format!("<td>{arm} - pair-off</td><td>{condition}</td><td>2</td><td>{N}</td><td>{difference:+.1}</td>");
        assert!(page.contains(&row), "{row}");
    }
}

#[test]
fn what_speaks_against_a_comparison_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    pair(&runs);
    let on = Made { name: "pair-on", hash: "00000002", seed: 5, steps: 5, disagreeing: &[2], ..PLAIN }.write(&runs);
    let run = fs::read_to_string(on.join("run.json")).unwrap();
    fs::write(on.join("run.json"), run.replace("0123456789abcdef", "fedcba9876543210")).unwrap();
    let compared: Value = serde_json::from_str(&succeed(&["compare", text(&runs), "--json"])).unwrap();
    let page = page_of(&runs);
    let warnings = compared["warnings"].as_array().unwrap();
    assert!(warnings.len() >= 6, "{warnings:#?}");
    for warning in warnings {
        // As the template escapes it.
        let text = warning.as_str().unwrap().replace('\'', "&#x27;");
        assert_eq!(page.matches(&text).count(), 1, "{text}");
    }
}

#[test]
fn a_run_that_a_rule_ended_is_not_called_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    let run = Made { steps: 5, ..PLAIN }.write(&dir.path().join("runs"));
    let stopped =
        r#"{"rule": "collapse", "metric": "entropy", "value": 1.5, "comparison": "above", "bound": 1.0, "step": 5}"#;
    fs::write(run.join("stopped.json"), stopped).unwrap();
    let page = page_of(&dir.path().join("runs"));
    assert!(page.contains("Ended by a stop rule: 1 of 1") && page.contains("entropy is 1.5, above 1"));
    assert!(page.contains("Every run is finished"));
    let compared = succeed(&["compare", text(&run)]);
    assert!(compared.contains("ended by stop rule collapse") && !compared.contains("not finished"), "{compared}");
}

/// 12 runs of 28 layers and 116 steps; the figures show all of it.
#[test]
fn a_large_sweep_stays_a_small_page() {
    let dir = tempfile::tempdir().unwrap();
    let names = [("big-a", "00000001"), ("big-b", "00000002"), ("big-c", "00000003"), ("big-d", "00000004")];
    for (name, hash) in names {
        for seed in 0..3 {
            Made { name, hash, seed, steps: 116, layers: 28, ..PLAIN }.write(dir.path());
        }
    }
    let started = std::time::Instant::now();
    let page = Report::new(arms::read(&[dir.path().to_path_buf()]).unwrap()).unwrap().html().unwrap();
    println!("12 runs, 28 layers, 116 steps: {} bytes in {:.1} s", page.len(), started.elapsed().as_secs_f64());
    assert!(page.len() < 5_000_000, "{} bytes", page.len());
    let cells = data(&page, "layers_aqn_std_a")["values"]["cells"].as_array().unwrap().clone();
    assert!(cells.len() == 28 && cells.iter().all(|row| row.as_array().unwrap().len() == 116));
}
