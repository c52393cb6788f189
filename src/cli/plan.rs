//! `temper plan CONFIG`: sigma of every training step, what is injected into every module, and how much memory it takes.
//!
//! Works without weights (`model.preset`) and without data (`--steps-per-epoch`).

use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::plan_memory::Memory;
use super::{Global, common};
use crate::config::{self, Config};
use crate::data::section::DataKind;
use crate::inject::plan::{InjectionPlan, ModuleKind, ModulePlan};
use crate::inject::schedule::SigmaSchedule;
use crate::inject::section::PhaseSet;
use crate::model::checkpoint::resolve_model_path;
use crate::model::config::Qwen2Config;
use crate::model::lora::{self, all_modules};
use crate::run::console::to_stderr;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// The experiment's YAML
    pub config: PathBuf,
    /// Override a key: a.b=v (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Instead of counting the training rows
    #[arg(long, value_name = "N")]
    pub steps_per_epoch: Option<u64>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let config = config::load(&args.config, &args.overrides)?;
    let place = args.config.display();
    if let Some(steps) = args.steps_per_epoch.filter(|steps| !(1..0xFFFF).contains(steps)) {
        bail_input!("--steps-per-epoch: found {steps}, expected 1 to 65534");
    }
    let steps = steps_per_epoch(&config, args.steps_per_epoch).map_err(|e| e.at(&place))?;
    let schedule = config.sigma_schedule(steps).map_err(|e| e.at(&place))?;
    let shapes = shapes(&config).map_err(|e| e.at(&place))?;
    let plan = config.injection_plan(&all_modules(&shapes, config.model.lora.as_ref())).map_err(|e| e.at(&place))?;
    let memory = Memory::of(&config, &shapes, &plan);

    let text = if global.json {
        to_json(&config, &shapes, &schedule, &plan, &memory).to_string()
    } else {
        format!("{}\n{}", to_text(&config, &shapes, &schedule, &plan, global.verbose > 0), memory.text())
    };
    super::print(text.trim_end())?;
    if !global.quiet {
        for notice in notices(&config, &shapes, &schedule, &plan) {
            to_stderr(format_args!("notice: {notice}"));
        }
        for key in schedule.unused_keys() {
            to_stderr(format_args!("notice: {key}: set, but not used by this kind of schedule"));
        }
    }
    Ok(())
}

/// Steps per epoch: as given, else from the training rows.
fn steps_per_epoch(config: &Config, given: Option<u64>) -> Result<u64> {
    if let Some(given) = given {
        return Ok(given);
    }
    let data = &config.data;
    let rows = match (data.kind, &data.train) {
        (DataKind::Generated, _) => data.generated.train_problems.min(data.train_limit.unwrap_or(usize::MAX)),
        (_, Some(path)) => crate::data::count(Path::new(path), data.train_limit).map_err(|e| {
            with_hint(e.at("data.train"), "set it with --set data.train=FILE, or give --steps-per-epoch N")
        })?,
        (_, None) => bail_input!("data.train: not set; set it with --set data.train=FILE, or give --steps-per-epoch N"),
    };
    config.steps_per_epoch(rows)
}

/// What is missing is usually where temper does not look: say what to do.
fn with_hint(error: Error, hint: &str) -> Error {
    match error {
        Error::Input(m) => Error::Input(format!("{m}; {hint}")),
        other => other,
    }
}

/// The shapes of the model directory where it is on this machine, else of the preset.
pub fn shapes(config: &Config) -> Result<Qwen2Config> {
    let model = &config.model;
    let directory = model.path.as_deref().map(resolve_model_path);
    match (directory, &model.preset) {
        (Some(Ok(directory)), _) => Qwen2Config::from_dir(&directory),
        (_, Some(preset)) => Qwen2Config::preset(preset),
        (Some(Err(error)), None) => {
            Err(with_hint(error.at("model.path"), "or give the shapes alone with --set model.preset=qwen2.5-1.5b"))
        }
        (None, None) => bail_input!("model.path: not set; set it with --set model.path=DIRECTORY"),
    }
}

fn to_json(
    config: &Config,
    shapes: &Qwen2Config,
    schedule: &SigmaSchedule,
    plan: &InjectionPlan,
    memory: &Memory,
) -> Value {
    let sigma: Vec<Value> = (1..=schedule.total_steps())
        .map(|step| json!({"step": step, "epoch": schedule.epoch(step), "sigma": schedule.sigma(step), "stage": schedule.stage(step)}))
        .collect();
    json!({
        "name": config.name,
        "config_hash": config.hash(),
        "steps_per_epoch": schedule.steps_per_epoch(),
        "total_steps": schedule.total_steps(),
        "sigma": sigma,
        "modules": plan.modules,
        "activation_scale": plan.activation_scale,
        "lora": trained_adapters(config, shapes),
        "unused_keys": schedule.unused_keys(),
        "notices": notices(config, shapes, schedule, plan),
        "memory": memory.json(),
    })
}

fn to_text(
    config: &Config,
    shapes: &Qwen2Config,
    schedule: &SigmaSchedule,
    plan: &InjectionPlan,
    every_module: bool,
) -> String {
    let mut text = format!(
        "{} ({}): {} steps = {} epochs x {}\n\n",
        config.name,
        config.hash(),
        schedule.total_steps(),
        config.trainer.epochs,
        schedule.steps_per_epoch()
    );
    text += &format!("{}\n\n", sigma_table(schedule));
    text += &format!("{}\n", module_table(plan, every_module));
    let phases = |set: PhaseSet| match set {
        PhaseSet::ALL => "all".to_string(),
        set => set.iter().map(name_of).collect::<Vec<_>>().join(", "),
    };
    if let (Some(lora), Some(of)) = (&config.model.lora, trained_adapters(config, shapes)) {
        let (trained, all) = (&of["trained_parameters"], &of["parameters"]);
        text += &format!("LoRA: rank {}, alpha {}; {trained} of {all} parameters are trained\n", lora.rank, lora.alpha);
    }
    if !plan.matmul_phases.is_empty() {
        text += &format!(
            "matmul error: {}; phases {}; draw {}; dW {}\n",
            name_of(plan.error_law),
            phases(plan.matmul_phases),
            name_of(plan.draw),
            name_of(plan.dw_draw)
        );
    }
    if !plan.quant_phases.is_empty() {
        text += &format!("fake quantization: phases {}", phases(plan.quant_phases));
        if plan.modules.iter().any(|m| m.activation_format.is_some()) {
            text += &format!("; activation scale {}", name_of(plan.activation_scale));
        }
        if plan.modules.iter().any(|m| plan.needs_activation_amax(m)) {
            text += &format!(", from the first {} training prompts", config.fake_quant.calibration_prompts());
        }
        text += "\n";
    }
    if plan.aqn_enabled {
        let count = plan.modules.iter().filter(|m| m.aqn_multiplier > 0.0).count();
        text += &format!("AQN: {count} modules; applied to {}\n", name_of(plan.aqn_apply_to));
    }
    text
}

/// What `model.lora` trains; None without it.
fn trained_adapters(config: &Config, shapes: &Qwen2Config) -> Option<Value> {
    let lora = config.model.lora.as_ref()?;
    let trained = lora::elements(shapes, lora);
    Some(json!({
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": lora.targets,
        "trained_parameters": trained,
        "parameters": shapes.parameter_count() + trained,
    }))
}

/// A row per run of steps with one sigma.
fn sigma_table(schedule: &SigmaSchedule) -> Table {
    let mut table = table(&["steps", "epoch", "stage", "sigma"]);
    let row = |step| (schedule.epoch(step), schedule.stage(step), schedule.sigma(step));
    let mut first = 1;
    for step in 1..=schedule.total_steps() {
        if step == schedule.total_steps() || row(step + 1) != row(first) {
            let (epoch, stage, sigma) = row(first);
            let sigma = if sigma == 0.0 { "0".to_string() } else { format!("{sigma:.3e}") };
            table.add_row([range(first, step), epoch.to_string(), stage.to_string(), sigma]);
            first = step + 1;
        }
    }
    table
}

/// A row per module, or per module name with the layers that get the same.
fn module_table(plan: &InjectionPlan, every_module: bool) -> Table {
    let mut table = table(&["module", "layers", "kind", "AQN multiplier", "matmul error", "weights", "activations"]);
    let mut groups: Vec<(String, Vec<usize>, &ModulePlan)> = Vec::new();
    for module in &plan.modules {
        let name = match module.layer {
            Some(layer) if !every_module => module.name.replacen(&format!(".{layer}."), ".*.", 1),
            _ => module.name.clone(),
        };
        let same = groups.iter_mut().find(|(other, _, m)| *other == name && injected(m) == injected(module));
        match same {
            Some((_, layers, _)) => layers.extend(module.layer),
            None => groups.push((name, module.layer.into_iter().collect(), module)),
        }
    }
    for (name, layers, module) in groups {
        let number = |x: f64| {
            if x == 0.0 { "-".to_string() } else { x.to_string() }
        };
        let format =
            |f: &Option<_>| f.as_ref().map_or("-".to_string(), |f: &crate::numerics::format::Format| f.to_string());
        let kind = match module.kind {
            ModuleKind::Embedding => "embedding",
            ModuleKind::Rmsnorm => "rmsnorm",
            ModuleKind::Linear => "linear",
            ModuleKind::Adapter => "adapter",
        };
        table.add_row([
            name,
            ranges(&layers),
            kind.to_string(),
            number(module.aqn_multiplier),
            number(module.matmul_error),
            format(&module.weight_format),
            format(&module.activation_format),
        ]);
    }
    table
}

/// What makes two modules equal in the table.
fn injected(
    m: &ModulePlan,
) -> (u64, u64, Option<crate::numerics::format::Format>, Option<crate::numerics::format::Format>) {
    (m.aqn_multiplier.to_bits(), m.matmul_error.to_bits(), m.weight_format, m.activation_format)
}

pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(header);
    table
}

/// "0-13, 18-27" of ascending numbers.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => parts.push((n, n)),
        }
    }
    parts.iter().map(|&(a, b)| range(a as u64, b as u64)).collect::<Vec<_>>().join(", ")
}

fn range(first: u64, last: u64) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

/// The YAML name of an enum value.
fn name_of(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        _ => String::new(),
    }
}

fn notices(config: &Config, shapes: &Qwen2Config, schedule: &SigmaSchedule, plan: &InjectionPlan) -> Vec<String> {
    let of_recipe = common::recipe(config).notices(shapes.max_position_embeddings);
    [plan.notices.as_slice(), &schedule.notices(), &of_recipe].concat()
}
