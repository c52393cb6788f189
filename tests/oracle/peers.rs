//! scripts/bench_peers.py on a CPU: it runs, its numbers fit together, and the noise it times is the replaced system's.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use temper::bench::lengths::{Lengths, Limits};

use crate::expected::{python_command, python_has, scratch};

fn script(args: &[&str]) -> Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench_peers.py");
    python_command().arg(path).args(args).env("OMP_NUM_THREADS", "2").output().unwrap()
}

fn succeed(args: &[&str]) -> String {
    let output = script(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn peers_run_on_a_cpu_with_the_fields_of_tempers_own() {
    if let Err(reason) = python_has("torch, transformers") {
        println!("skipped: {reason}");
        return;
    }
    let dir = scratch("bench_peers");
    let lengths = dir.join("lengths.txt");
    let lengths = lengths.to_str().unwrap();
    succeed(&["--tiny", "--write-lengths", lengths]);
    let drawn = Lengths::File(lengths.into())
        .draw(4, 2, 0, Limits { prompt: 1024, response: 1024, sequence: 4096 })
        .unwrap_or_else(|e| panic!("what the script writes, temper reads: {e}"));
    let ours = dir.join("ours.json");
    let phase = |phase: &str, rate: f64| json!({"phase": phase, "tokens_per_s": rate});
    let variants = json!([{"name": "recipe", "phases": [phase("rollout", 50.0), phase("update", 70.0)]}]);
    let mean = |all: &[usize]| all.iter().sum::<usize>() as f64 / all.len() as f64;
    // Embedding, two layers with biases and norms, the last norm.
    let parameters = 512 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 64 + 2 * 32 + 3 * 64 * 128 + 2 * 64) + 64;
    let ours_of = |parameters: usize| {
        let (prompts, responses) = (mean(&drawn.prompts), mean(&drawn.responses));
        json!({"variants": variants, "parameters": parameters, "sequences": 8, "prompt_tokens_mean": prompts,
               "response_tokens_mean": responses})
    };
    std::fs::write(&ours, ours_of(parameters + 1).to_string()).unwrap();
    let other = script(&["--device", "cpu", "--tiny", "--lengths", lengths, "--beside", ours.to_str().unwrap()]);
    let line = String::from_utf8_lossy(&other.stderr).into_owned();
    assert_eq!(other.status.code(), Some(2), "{line}");
    assert!(line.contains("parameters: found 107073, expected 107072"), "{line}");
    std::fs::write(&ours, ours_of(parameters).to_string()).unwrap();
    let text = succeed(&[
        "--device",
        "cpu",
        "--tiny",
        "--steps",
        "1",
        "--lengths",
        lengths,
        "--beside",
        ours.to_str().unwrap(),
    ]);
    let report: Value = serde_json::from_str(&text).unwrap();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"));
    assert_eq!((&report["sequences"], &report["group_size"]), (&8.into(), &2.into()));
    let phases: Vec<(&str, &Value)> =
        report["variants"].as_array().unwrap().iter().map(|v| (v["name"].as_str().unwrap(), &v["phases"][0])).collect();
    let names: Vec<&str> = phases.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["transformers_generate", "torch_update_noisy", "torch_update_clean"]);
    assert_eq!(phases[0].1["tokens"], drawn.responses.iter().sum::<usize>());
    for (name, phase) in &phases {
        let median = number(&phase["seconds"], "median");
        assert!(median > 0.0 && number(phase, "flops") > 0.0, "{name}: {phase}");
        assert!((number(phase, "tokens_per_s") * median - number(phase, "tokens")).abs() < 1e-6, "{name}: {phase}");
    }
    let ratios = &report["temper_over_peer_tokens_per_s"];
    let rollout = 50.0 / number(phases[0].1, "tokens_per_s");
    let update = 70.0 / number(phases[1].1, "tokens_per_s");
    assert!((number(ratios, "rollout over transformers generate") - rollout).abs() < 1e-9 * rollout, "{ratios}");
    assert!((number(ratios, "update over patched torch") - update).abs() < 1e-9 * update, "{ratios}");
    assert_eq!(ratios.as_object().unwrap().len(), 2, "no ratio without both: {ratios}");
    assert!(number(&report["logprob_gap"], "max_abs") >= number(&report["logprob_gap"], "mean_abs"));

    let output = script(&["--lengths", ours.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "a file of another kind");
}

/// 5 % on y, dX and dW of every linear but the head, and none once the patch is off.
#[test]
fn the_peers_noise_is_five_percent_in_all_three_products() {
    if let Err(reason) = python_has("torch, transformers") {
        println!("skipped: {reason}");
        return;
    }
    let check = r#"
import sys, torch
sys.path.insert(0, "scripts")
import bench_peers as peers
torch.manual_seed(0)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
def products(linear):
    x = torch.ones(128, 64).normal_(generator=torch.Generator().manual_seed(1)).requires_grad_()
    linear.weight.grad = None
    y = linear(x) - linear.bias
    y.backward(torch.ones_like(y) * torch.linspace(.5, 2, 96))
    return y.detach(), x.grad, linear.weight.grad.clone()
model = Model()
clean = products(model.body), products(model.lm_head)
peers.patch(model, True)
noisy = products(model.body), products(model.lm_head)
peers.patch(model, False)
again = products(model.body)
for a, b in zip(clean[0], noisy[0]):
    std = ((b - a).square().sum() / a.square().sum()).sqrt().item()
    assert 0.045 < std < 0.055, std
assert all(torch.equal(a, b) for a, b in zip(clean[1], noisy[1])), "the head"
assert all(torch.equal(a, b) for a, b in zip(clean[0], again)), "taken off"
"#;
    let output = python_command().args(["-c", check]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
