//! Every warning of a comparison, each from runs that differ in nothing else.

use serde_json::json;

use crate::command;
use crate::runs::{Made, forty};

/// The warnings about two arms of two seeds after `change` of the second arm's runs.
fn warnings(change: impl Fn(&mut Made)) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..2 {
        let mut one = Made::new("one", "11111111", seed, &forty(20, seed as usize));
        let mut two = Made::new("two", "22222222", seed, &forty(25, seed as usize));
        for made in [&mut one, &mut two] {
            made.validations[1].1.push(("noisy", forty(18, 0)));
        }
        change(&mut two);
        one.write(dir.path());
        two.write(dir.path());
    }
    let found = command::json(&[dir.path().to_str().unwrap(), "--baseline", "one"]);
    found["warnings"].as_array().unwrap().iter().map(|w| w.as_str().unwrap().to_string()).collect()
}

fn set(path: &'static str, value: serde_json::Value) -> impl Fn(&mut Made) {
    move |made| {
        let place = path.split('.').fold(&mut made.config, |value, key| &mut value[key]);
        *place = value.clone();
    }
}

fn set_run(path: &'static str, value: serde_json::Value) -> impl Fn(&mut Made) {
    move |made| {
        let place = path.split('.').fold(&mut made.run, |value, key| &mut value[key]);
        *place = value.clone();
    }
}

#[test]
fn comparable_runs_have_none() {
    assert_eq!(warnings(|_| {}), Vec::<String>::new());
    // What a validation does not depend on, a section that is off, and where files lie.
    assert_eq!(warnings(set("optimizer.lr", json!(1.0))), Vec::<String>::new());
    assert_eq!(warnings(set("fake_quant.weights", json!("nvfp4_single_level"))), Vec::<String>::new());
    assert_eq!(warnings(set("noisy_ops.draw", json!("shared"))), Vec::<String>::new());
}

type Change = Box<dyn Fn(&mut Made)>;

#[test]
fn each_kind_is_said_once() {
    let quantized = |format: &'static str| {
        move |made: &mut Made| {
            made.config["fake_quant"] = json!({"enabled": true, "weights": "mxfp4", "activations": format});
        }
    };
    let cases: Vec<(Change, &[&str])> = vec![
        (
            Box::new(|made| {
                made.steps = 5;
                made.validations[1].0 = 5;
            }),
            &[
                "two seed 0 is not finished: step 5 of 6",
                "two seed 1 is not finished",
                "validation's step differs: 6 (one); 5 (two)",
            ],
        ),
        // Nothing tells the total in one epoch of a file; that the last step was not validated tells it.
        (
            Box::new(|made| {
                made.config["data"]["kind"] = json!("gsm8k");
                made.config["trainer"]["epochs"] = json!(1);
                made.steps = 3;
                made.validations[1].0 = 2;
            }),
            &[
                "two seed 0: trained to step 3, but its last validation is of step 2",
                "two seed 1: trained",
                "validation's step differs",
                "data.kind differs",
                "two and one answered different questions",
            ],
        ),
        (Box::new(set_run("inputs.model", json!("m1"))), &["the content of model differs: m0 (one); m1 (two)"]),
        (
            Box::new(set_run("inputs", json!({"tokenizer": "t0", "model": "m0", "data.val": "v1"}))),
            &["the content of data.val differs: none (one); v1 (two)", "two and one answered different questions"],
        ),
        (
            Box::new(set("data.generated.seed", json!(1))),
            &["data.generated.seed differs: 0 (one); 1 (two)", "two and one answered different questions"],
        ),
        (
            Box::new(|made| made.validations[1].1.iter_mut().for_each(|(_, marks)| marks.truncate(30))),
            &["the number of validation questions differs: 40 (one); 30 (two)"],
        ),
        (
            Box::new(|made| drop(made.validations[1].1.pop())),
            &["what the last validation has differs: clean noisy (one); clean (two)"],
        ),
        (Box::new(set("reward.mode", json!("flexible"))), &["reward.mode differs: strict (one); flexible (two)"]),
        (
            Box::new(set("data.max_response_tokens", json!(12))),
            &["data.max_response_tokens differs: 24 (one); 12 (two)"],
        ),
        (
            Box::new(set("noise_injection.compat", json!("original"))),
            &[
                "noise_injection.compat, which can reproduce a defect of the original, differs: no defect (one); original (two)",
            ],
        ),
        (
            Box::new(set("noisy_ops.exclude_modules", json!([]))),
            &["lm_head is not excluded (two)", "noisy_ops.exclude_modules: \"noisy\" is not the same condition"],
        ),
        (Box::new(set("noisy_ops.dw_draw", json!("per_microbatch"))), &["no defect (one); per_microbatch (two)"]),
        (Box::new(quantized("mxfp4:half_away")), &["no defect (one); mxfp4:half_away (two)"]),
        (Box::new(quantized("nvfp4_single_level")), &["no defect (one); nvfp4_single_level (two)"]),
        (
            Box::new(set("noisy_ops.error_scale", json!(0.1))),
            &["noisy_ops.error_scale: \"noisy\" is not the same condition: it differs: 0.05 (one); 0.1 (two)"],
        ),
        (Box::new(set_run("device", json!("H100"))), &["device differs: cpu (one); H100 (two)"]),
        (Box::new(set_run("threads", json!(4))), &["the number of threads differs: 2 (one); 4 (two)"]),
        (Box::new(set_run("git_commit", json!("c1"))), &["temper's commit differs: c0 (one); c1 (two)"]),
        (Box::new(set_run("temper_version", json!("0.2.0"))), &["temper's version differs"]),
        (Box::new(set_run("libtorch_version", json!("2.12"))), &["libtorch differs: 2.11 (one); 2.12 (two)"]),
        (Box::new(set_run("noise_version", json!(2))), &["noise_version differs: 1 (one); 2 (two)"]),
        (Box::new(set_run("cpu.model", json!("B"))), &["CPU differs: A (one); B (two)"]),
        (Box::new(set_run("cpu.simd", json!("avx512"))), &["SIMD differs: avx2 (one); avx512 (two)"]),
        // A resume elsewhere counts, and a run of one seed is named by it.
        (
            Box::new(|made| {
                if made.seed == 1 {
                    let mut resume = made.run.clone();
                    resume["threads"] = json!(8);
                    made.run["resumes"] = json!([resume]);
                }
            }),
            &["the number of threads differs: 2 (one, two seed 0); 2, then 8 (two seed 1)"],
        ),
        (
            Box::new(|made| made.disagreeing = 2 * made.seed),
            &["two seed 1: in 2 steps the measured noise disagreed with the plan"],
        ),
        (
            Box::new(|made| made.marked = false),
            &["two seed 0: no marks per question", "two seed 1: no marks per question"],
        ),
    ];
    let mut failures = Vec::new();
    for (number, (change, expected)) in cases.iter().enumerate() {
        let found = warnings(change);
        if found.len() != expected.len() || !expected.iter().all(|part| found.iter().any(|w| w.contains(part))) {
            failures.push(format!("case {number}: expected {expected:#?}, found {found:#?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn seeds_that_are_missing_and_runs_that_have_just_begun() {
    let dir = tempfile::tempdir().unwrap();
    Made::new("one", "11111111", 0, &forty(20, 0)).write(dir.path());
    Made::new("one", "11111111", 1, &forty(20, 0)).write(dir.path());
    Made::new("two", "22222222", 1, &forty(20, 0)).write(dir.path());
    let mut young = Made::new("young", "33333333", 0, "1100");
    young.validations.clear();
    young.write(dir.path());
    // The same name under another configuration is another arm, and both show it.
    Made::new("two", "44444444", 0, &forty(20, 0)).write(dir.path());
    let found = command::json(&[dir.path().to_str().unwrap()]);
    let warnings: Vec<&str> = found["warnings"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect();
    let expected = [
        "young-33333333-s0: no validation yet, left out",
        "two-22222222 has no run of seed 0",
        "two-22222222 has one seed only: a difference from one seed is not evidence",
        "two-44444444 has no run of seed 1",
        "two-44444444 has one seed only",
    ];
    assert_eq!(warnings.len(), expected.len(), "{warnings:#?}");
    for (found, expected) in warnings.iter().zip(expected) {
        assert!(found.contains(expected), "{found} {expected}");
    }
}
