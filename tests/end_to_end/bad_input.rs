//! What users get wrong, through the binary: one line that begins with `error: `, exit code 2, nothing left behind.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{config, model, names, run, stderr_of};

/// Collects what goes wrong in a table, so that one run shows all of it.
struct Table {
    dir: tempfile::TempDir,
    failures: Vec<String>,
    tried: usize,
}

impl Table {
    fn new() -> Table {
        Table { dir: tempfile::tempdir().unwrap(), failures: Vec::new(), tried: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    /// `args` must be refused with one line that contains `expected`, and must leave the directory as it was.
    fn refused(&mut self, args: &[&str], expected: &str) {
        self.tried += 1;
        let before = names(self.dir.path());
        let mut all = args.to_vec();
        if !args.contains(&"--device") {
            all.extend(["--device", "cpu"]);
        }
        let output = run(&all);
        let stderr = stderr_of(&output);
        let mut complaints = Vec::new();
        if output.status.code() != Some(2) {
            complaints.push(format!("{}, expected exit code 2", output.status));
        }
        if stderr.lines().count() != 1 || !stderr.starts_with("error: ") {
            complaints.push("expected one line that begins with `error: `".to_string());
        }
        if !stderr.contains(expected) {
            complaints.push(format!("expected {expected:?}"));
        }
        if !output.stdout.is_empty() {
            complaints.push("wrote to stdout".to_string());
        }
        let after = names(self.dir.path());
        if after != before {
            complaints.push(format!("left {after:?}, before {before:?}"));
            let _ = fs::remove_dir_all(self.path("out"));
        }
        if !complaints.is_empty() {
            let shown: String = stderr.chars().take(600).collect();
            self.failures.push(format!("{}\n  {}\n  stderr: {shown}", all.join(" "), complaints.join("; ")));
        }
    }

    /// Every command that reads a configuration.
    fn config_refused(&mut self, commands: &[&str], config: &Path, sets: &[&str], expected: &str) {
        let (config, out) = (config.to_str().unwrap().to_string(), self.text("out"));
        for command in commands {
            let mut args = match *command {
                "train" => vec!["train", config.as_str(), "--out", out.as_str()],
                "dry-run" => vec!["train", config.as_str(), "--out", out.as_str(), "--dry-run"],
                "plan" => vec!["plan", config.as_str()],
                "eval" => vec!["eval", model().to_str().unwrap(), "--config", config.as_str()],
                other => panic!("{other}"),
            };
            for set in sets {
                args.extend(["--set", set]);
            }
            self.refused(&args, expected);
        }
    }

    fn finish(self) {
        println!("{} commands", self.tried);
        assert!(self.failures.is_empty(), "{} of {}:\n{}", self.failures.len(), self.tried, self.failures.join("\n"));
    }
}

const READERS: [&str; 4] = ["train", "dry-run", "plan", "eval"];

#[test]
fn keys() {
    let mut table = Table::new();
    for (name, yaml, expected) in [
        ("unknown", "trainer: {colour: 1}", "unknown.yaml: trainer.colour: unknown key"),
        ("misspelt", "noise_injection: {sigma_strat: 1}", "nearest known key: noise_injection.sigma_start"),
        ("twice", "seed: 1\nseed: 2", "duplicate"),
        ("typed", "trainer: {epochs: many}", "trainer.epochs: found string \"many\", expected a whole number"),
        ("range", "rollout: {group_size: 1}", "rollout.group_size: found 1, expected 2 or more"),
        ("broken", "trainer: {epochs: [", "broken.yaml: "),
    ] {
        let path = config(table.dir.path(), name, yaml);
        table.config_refused(&READERS, &path, &[], expected);
    }
    let good = config(table.dir.path(), "good", "");
    for (set, expected) in [
        ("trainer.epoch=3", "--set trainer.epoch=3: trainer.epoch: unknown key; nearest known key: trainer.epochs"),
        ("seed=-1", "seed: found `-1`"),
        ("optimizer.lr=.inf", "optimizer.lr: found inf"),
        ("noisy_ops.error_scale=5", "noisy_ops.error_scale: found 5, expected a number in [0, 1]"),
        ("trainer.epochs", "found no `=`"),
        ("data={kind: generated, kind: gsm8k}", "duplicate"),
    ] {
        table.config_refused(&READERS, &good, &[set], expected);
    }
    // Numbers that no machine can serve.
    for (set, key) in [
        ("trainer.epochs=18446744073709551615", "trainer.epochs: "),
        ("trainer.epochs=20000", "trainer.epochs: "),
        ("trainer.threads=0", "trainer.threads: "),
        ("trainer.threads=4000000000", "trainer.threads: "),
        ("trainer.val_batch_size=0", "trainer.val_batch_size: "),
        ("trainer.microbatch_sequences=0", "trainer.microbatch_sequences: "),
        ("trainer.microbatch_tokens=0", "trainer.microbatch_tokens: "),
        ("rollout.max_sequences=1", "rollout.max_sequences: "),
        ("data.max_response_tokens=18446744073709551615", "data.max_response_tokens: "),
        ("data.max_prompt_tokens=18446744073709551615", "found "),
        ("data.prompts_per_step=0", "data.prompts_per_step: "),
        ("data.generated.train_problems=18446744073709551615", "data.generated.train_problems: "),
        ("data.generated.val_problems=18446744073709551615", "data.generated.val_problems: "),
        ("rollout.group_size=18446744073709551615", "rollout.group_size: "),
        ("noise_injection.stages_per_epoch=18446744073709551615", "noise_injection.stages_per_epoch: "),
    ] {
        table.config_refused(&["train", "plan"], &good, &[set], key);
    }
    table.config_refused(
        &["train", "dry-run", "eval"],
        &good,
        &["data.max_prompt_tokens=3"],
        "data.max_prompt_tokens: ",
    );
    table.config_refused(
        &["train", "dry-run", "eval"],
        &good,
        &["data.max_response_tokens=4000"],
        "data.max_response_tokens: ",
    );
    let missing = table.path("missing.yaml");
    table.config_refused(&READERS, &missing, &[], "missing.yaml: no such file");
    let folder = table.dir.path().to_path_buf();
    table.config_refused(&READERS, &folder, &[], "found a directory, expected a YAML file");
    table.refused(&["plan", good.to_str().unwrap(), "--steps-per-epoch", "0"], "--steps-per-epoch");
    table.refused(&["plan", good.to_str().unwrap(), "--steps-per-epoch", "18446744073709551615"], "--steps-per-epoch");
    table.finish();
}

/// A copy of the model in `to`, with one thing changed.
fn broken_model(to: &Path, change: impl FnOnce(&Path)) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for name in names(model()) {
        fs::copy(model().join(&name), to.join(&name)).unwrap();
    }
    change(to);
}

fn edit(file: PathBuf, from: &str, to: &str) {
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replace(from, to)).unwrap();
}

/// Changes the header of a safetensors file without moving its data.
fn edit_header(file: PathBuf, from: &str, to: &str) {
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replacen(from, to, 1);
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.bytes());
    changed.extend(&bytes[8 + length..]);
    fs::write(file, changed).unwrap();
}

#[test]
fn models() {
    type Change = fn(&Path);
    let weights: [(&str, Change); 6] = [
        ("found no weights, expected model.safetensors", |d| fs::remove_file(d.join("model.safetensors")).unwrap()),
        ("model.safetensors: truncated", |d| {
            let bytes = fs::read(d.join("model.safetensors")).unwrap();
            fs::write(d.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("model.safetensors: ", |d| fs::write(d.join("model.safetensors"), "PK\u{3}\u{4} not this").unwrap()),
        ("model.safetensors: ", |d| fs::write(d.join("model.safetensors"), "").unwrap()),
        ("tensor model.norm.weight: found [8, 8], expected [64]", |d| {
            let name = "\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":";
            edit_header(d.join("model.safetensors"), &format!("{name}[64]"), &format!("{name}[8,8]"));
        }),
        ("tensor model.norm.weight: missing", |d| {
            edit_header(d.join("model.safetensors"), "\"model.norm.weight\"", "\"model.norm.weights\"");
        }),
    ];
    let configs: [(&str, Change); 8] = [
        ("config.json: no such file", |d| fs::remove_file(d.join("config.json")).unwrap()),
        ("config.json: not valid JSON", |d| fs::write(d.join("config.json"), "{\"hidden_size\": ").unwrap()),
        ("config.json: architectures: ", |d| edit(d.join("config.json"), "Qwen2ForCausalLM", "LlamaForCausalLM")),
        ("config.json: hidden_size: ", |d| edit(d.join("config.json"), "\"hidden_size\"", "\"hiddensize\"")),
        ("config.json: num_key_value_heads: ", |d| {
            edit(d.join("config.json"), "\"num_attention_heads\": 4", "\"num_attention_heads\": 3");
        }),
        ("config.json: num_key_value_heads: ", |d| {
            edit(d.join("config.json"), "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
        }),
        ("config.json: hidden_size: ", |d| edit(d.join("config.json"), "\"hidden_size\": 64", "\"hidden_size\": 0")),
        ("config.json: num_hidden_layers: ", |d| {
            edit(d.join("config.json"), "\"num_hidden_layers\": 4", "\"num_hidden_layers\": \"four\"");
        }),
    ];
    let tokenizers: [(&str, Change); 3] = [
        ("tokenizer.json: no such file", |d| fs::remove_file(d.join("tokenizer.json")).unwrap()),
        ("tokenizer.json: ", |d| fs::write(d.join("tokenizer.json"), "{\"version\": ").unwrap()),
        ("tokenizer.json: ", |d| fs::write(d.join("tokenizer.json"), "{}").unwrap()),
    ];
    let mut table = Table::new();
    let (broken, out) = (table.text("broken"), table.text("out"));
    let good = config(table.dir.path(), "good", "");
    let good = good.to_str().unwrap().to_string();
    let set = format!("model.path={broken}");
    let train = ["train", &good, "--set", &set, "--out", &out];
    let dry_run = ["train", &good, "--set", &set, "--out", &out, "--dry-run"];
    let plan = ["plan", &good, "--set", &set];
    let eval = ["eval", &broken, "--config", &good];
    let score_ids = ["score", &broken, "--ids", "1,2,3"];
    let score_text = ["score", &broken, "--text", "1 + 2"];
    let generate_ids = ["generate", &broken, "--ids", "1,2,3"];
    let generate_text = ["generate", &broken, "--prompt", "1 + 2"];
    let quantize = ["quantize", &broken, &out, "--format", "mxfp4"];
    for (expected, change) in weights {
        broken_model(Path::new(&broken), change);
        for args in [&train[..], &dry_run, &eval, &score_ids, &generate_ids, &quantize] {
            table.refused(args, expected);
        }
    }
    for (expected, change) in configs {
        broken_model(Path::new(&broken), change);
        for args in [&train[..], &dry_run, &plan, &eval, &score_ids, &generate_ids, &quantize] {
            table.refused(args, expected);
        }
    }
    for (expected, change) in tokenizers {
        broken_model(Path::new(&broken), change);
        for args in [&train[..], &dry_run, &eval, &score_text, &generate_text] {
            table.refused(args, expected);
        }
    }
    fs::remove_dir_all(&broken).unwrap();
    for args in [&train[..], &dry_run, &plan, &eval, &score_ids, &generate_ids, &quantize] {
        table.refused(args, "broken: no such file or directory");
    }
    for args in
        [["score", "Qwen/nothing-like-this", "--ids", "1,2"], ["generate", "Qwen/nothing-like-this", "--ids", "1"]]
    {
        table.refused(&args, "hf download Qwen/nothing-like-this");
    }
    table.finish();
}

#[test]
fn data_files() {
    let mut table = Table::new();
    let line = "{\"question\": \"1 + 2?\", \"answer\": \"#### 3\"}\n";
    let contents: [(&str, Vec<u8>, &str); 8] = [
        ("empty.jsonl", Vec::new(), "empty.jsonl"),
        ("blank.jsonl", b"\n\n".to_vec(), "blank.jsonl"),
        ("half.jsonl", format!("{line}{line}{{\"question\": \"1").into_bytes(), "half.jsonl:3: "),
        ("keys.jsonl", b"{\"q\": 1}\n".to_vec(), "keys.jsonl:1: "),
        ("answer.jsonl", b"{\"question\": \"1?\", \"answer\": \"three\"}\n".to_vec(), "answer.jsonl:1: "),
        ("bytes.jsonl", vec![0xff; 40], "bytes.jsonl:1: "),
        ("garbage.parquet", b"PAR1 not a parquet file PAR1".to_vec(), "garbage.parquet: "),
        ("data.csv", b"question,answer\n".to_vec(), "data.csv: "),
    ];
    for (name, bytes, _) in &contents {
        fs::write(table.path(name), bytes).unwrap();
    }
    let sound = table.text("sound.jsonl");
    fs::write(&sound, line.repeat(8)).unwrap();
    let config = config(table.dir.path(), "good", &format!("data: {{kind: auto, train: {sound}, val: {sound}}}"));
    let missing =
        [("missing.jsonl", "missing.jsonl: no such file"), ("missing.parquet", "missing.parquet: no such file")];
    let all = contents.iter().map(|(name, _, expected)| (*name, *expected)).chain(missing);
    for (name, expected) in all.collect::<Vec<_>>() {
        let (train, val) = (format!("data.train={}", table.text(name)), format!("data.val={}", table.text(name)));
        // plan counts rows and reads no further.
        let readers: &[&str] = match name {
            "half.jsonl" | "keys.jsonl" | "answer.jsonl" | "bytes.jsonl" => &["train", "dry-run"],
            _ => &["train", "dry-run", "plan"],
        };
        table.config_refused(readers, &config, &[&train], expected);
        table.config_refused(&["train", "dry-run", "eval"], &config, &[&val], expected);
    }
    let few = table.text("few.jsonl");
    fs::write(&few, line).unwrap();
    table.config_refused(
        &["train", "dry-run", "plan"],
        &config,
        &[&format!("data.train={few}")],
        "data.prompts_per_step",
    );
    table.config_refused(&["train", "dry-run", "plan"], &config, &["data.train=null"], "data.train: ");
    table.config_refused(&["train", "dry-run", "eval"], &config, &["data.val=null"], "data.val: ");
    table.finish();
}

#[test]
fn arguments() {
    let mut table = Table::new();
    let model = model().to_str().unwrap();
    let long = vec!["1"; 3000].join(",");
    for (ids, expected) in [
        ("", "--ids: found \"\""),
        ("1,,2", "--ids: found \"\""),
        ("1,two", "--ids: found \"two\""),
        ("1,2.5", "--ids: found \"2.5\""),
        ("1,99999", "99999"),
        ("1,4294967296", "4294967296"),
        (long.as_str(), "max_position_embeddings"),
    ] {
        table.refused(&["score", model, "--ids", ids], expected);
        table.refused(&["generate", model, "--ids", ids], expected);
    }
    let text = "1+2".repeat(2000);
    table.refused(&["score", model, "--ids=-1,2"], "--ids: found \"-1\"");
    table.refused(&["score", model, "--ids", "5"], "at least 2");
    table.refused(&["score", model, "--text", ""], "at least 2");
    table.refused(&["score", model, "--text", &text], "max_position_embeddings");
    let ids = vec!["5"; 5000].join(",");
    table.refused(&["generate", model, "--ids", &ids], "max_position_embeddings");
    for (flag, value, expected) in [
        ("--max-new-tokens", "100000", "max_position_embeddings"),
        ("--max-new-tokens", "18446744073709551615", "max_position_embeddings"),
        ("--temperature", "nan", "--temperature: found NaN"),
        ("--top-p", "0", "--top-p: found 0"),
        ("--top-p", "2", "--top-p: found 2"),
        ("--device", "tpu", "tpu"),
        ("--device", "cuda:x", "cuda:x"),
        ("--device", "cuda:4096", "cuda"),
    ] {
        table.refused(&["generate", model, "--ids", "1,2", flag, value], expected);
    }
    let good = config(table.dir.path(), "good", "");
    let good = good.to_str().unwrap();
    table.refused(&["train", good, "--out", &table.text("out"), "--device", "cuda:4096"], "cuda");
    table.refused(&["eval", model, "--config", good, "--device", "cuda:4096"], "cuda");
    if !Path::new("/dev/nvidiactl").exists() {
        table.refused(&["score", model, "--ids", "1,2", "--device", "cuda"], "--device cpu");
    }
    // Places that cannot be written.
    let (file, inside) = (table.text("file"), table.text("file/run"));
    fs::write(&file, "mine").unwrap();
    for out in [&file, &inside] {
        table.refused(&["train", good, "--out", out], "file");
        table.refused(&["quantize", model, out, "--format", "mxfp4"], "file");
        table.refused(&["eval", model, "--config", good, "--answers", &table.text("file/a.jsonl")], "file/a.jsonl");
    }
    table.refused(&["quantize", model, &table.text("no/where"), "--format", "mxfp4"], "no such file or directory");
    table.refused(
        &["eval", model, "--config", good, "--answers", &table.text("no/a.jsonl")],
        "no such file or directory",
    );
    for format in ["mxfp5", "", "nvfp4:", "mxfp4:even:even"] {
        table.refused(&["quantize", model, &table.text("out"), "--format", format], "");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    table.finish();
}

/// clap's own errors may take several lines; the code is the same.
#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &["nonsense"][..],
        &["train"],
        &["train", "x.yaml", "--resum"],
        &["score", "model"],
        &["generate", "model", "--ids", "1", "--prompt", "x"],
        &["generate", "model", "--ids", "1", "--max-new-tokens", "-3"],
        &["plan", "x.yaml", "--steps-per-epoch", "many"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr_of(&output).starts_with("error: "), "{args:?}: {}", stderr_of(&output));
    }
}
