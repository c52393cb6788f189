//! `temper doctor`: what this machine has, and what to do about what is missing. Always exits 0: absence is an answer.

use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::device::{self, gpu, host, kernels};
use crate::run::machine::SOURCES;

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, global: &super::Global) -> Result<()> {
    let report = Report::collect();
    if global.json { super::print(report.to_json()) } else { super::print(report.to_text().trim_end()) }
}

struct Report {
    host: host::Host,
    free_disk_bytes: Option<u64>,
    gpus: std::result::Result<gpu::Gpus, String>,
    /// CUDA devices that can be used, or why there is none.
    cuda: std::result::Result<usize, String>,
    to_do: Vec<String>,
}

impl Report {
    fn collect() -> Report {
        let mut report = Report {
            host: host::probe(),
            free_disk_bytes: host::free_disk_bytes(Path::new(".")),
            gpus: gpu::probe(),
            cuda: device::cuda_devices(),
            to_do: Vec::new(),
        };
        report.to_do = report.what_to_do();
        report
    }

    fn what_to_do(&self) -> Vec<String> {
        let mut to_do = Vec::new();
        if let Err(reason) = &self.cuda {
            to_do.push(format!("GPU: {reason}"));
        }
        if let Ok(found) = &self.gpus {
            if let (Some(needed), Some(have)) = (gpu::driver_needed(), driver_major(&found.driver_version))
                && have < needed
            {
                to_do.push(format!(
                    "driver {}: this libtorch (CUDA {}) needs {needed} or later; update the driver, or point LIBTORCH \
                     at a torch for an older CUDA and build again",
                    found.driver_version,
                    kernels::TORCH_CUDA.unwrap_or("none")
                ));
            }
            for gpu in &found.gpus {
                if let Some((major, minor)) = gpu.compute_capability
                    && kernels::WHY_NOT_BUILT.is_none()
                    && !kernels::runs_on(major, minor)
                {
                    to_do.push(format!(
                        "GPU {} ({}): the kernels were built for {}; build again with CUDA_ARCHES={major}{minor}",
                        gpu.index,
                        gpu.name,
                        kernels::ARCHES.join(", ")
                    ));
                }
            }
        }
        if cfg!(target_arch = "x86_64") && !["avx2", "fma"].iter().all(|f| self.host.cpu_features.contains(f)) {
            to_do.push("CPU: no AVX2 with FMA, so noise on the CPU runs about four times slower".into());
        }
        if self.free_disk_bytes.is_some_and(|b| b < 10 << 30) {
            to_do.push("disk: less than 10 GiB free here; a 1.5B checkpoint with its optimizer takes 22 GiB".into());
        }
        to_do
    }

    fn to_json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "sources": SOURCES,
            "device": if self.cuda.is_ok() { "cuda:0" } else { "cpu" },
            "gpus": self.gpus.as_ref().map(|g| json!(g.gpus)).unwrap_or(json!([])),
            "driver": {
                "version": self.gpus.as_ref().ok().map(|g| &g.driver_version),
                "cuda_version": self.gpus.as_ref().ok().and_then(|g| g.driver_cuda_version.as_ref()),
                "needed": gpu::driver_needed(),
                "problem": self.gpus.as_ref().err(),
            },
            "libtorch": {
                "version": kernels::TORCH_VERSION,
                "cuda_version": kernels::TORCH_CUDA,
                "cuda_available": device::torch_cuda_devices() > 0,
                "cuda_devices": device::torch_cuda_devices(),
            },
            "kernels": {
                "names": kernels::EMBEDDED.iter().map(|k| k.name).collect::<Vec<_>>(),
                "arches": kernels::ARCHES,
                "problem": kernels::WHY_NOT_BUILT,
            },
            "cuda_usable": self.cuda.is_ok(),
            "cuda_problem": self.cuda.as_ref().err(),
            "host": self.host,
            "free_disk_bytes": self.free_disk_bytes,
            "to_do": self.to_do,
        })
    }

    fn to_text(&self) -> String {
        let mut lines = vec![("temper", format!("{}, sources {}", env!("CARGO_PKG_VERSION"), &SOURCES[..12]))];
        match &self.gpus {
            Ok(found) => {
                for g in &found.gpus {
                    lines.push(("GPU", describe(g)));
                    lines.extend(state(g).into_iter().map(|line| ("", line)));
                }
                if found.gpus.is_empty() {
                    lines.push(("GPU", "none".into()));
                }
                let cuda = found.driver_cuda_version.as_deref().unwrap_or("unknown");
                let needed = gpu::driver_needed().map_or("none".to_owned(), |d| d.to_string());
                lines.push(("driver", format!("{} (up to CUDA {cuda}; needed: {needed})", found.driver_version)));
            }
            Err(reason) => lines.push(("GPU", format!("none ({reason})"))),
        }
        let sees = match device::torch_cuda_devices() {
            0 => "sees no CUDA device".to_owned(),
            n => format!("sees {n} CUDA device(s)"),
        };
        lines.push(("libtorch", format!("{}, {sees}", kernels::TORCH_VERSION.unwrap_or("unknown version"))));
        let names: Vec<&str> = kernels::EMBEDDED.iter().map(|k| k.name).collect();
        lines.push((
            "kernels",
            match kernels::WHY_NOT_BUILT {
                Some(reason) => format!("none: {reason}"),
                None => format!("{} for {}", names.join(", "), kernels::ARCHES.join(", ")),
            },
        ));
        lines.push(("CPU", format!("{} cores, {}", self.host.cores, self.host.cpu_features.join(" "))));
        lines.push((
            "memory",
            format!("{} total, {} available", gib(self.host.memory_total_bytes), gib(self.host.memory_available_bytes)),
        ));
        lines.push(("disk", format!("{} free here", gib(self.free_disk_bytes))));
        lines.push(("device", if self.cuda.is_ok() { "cuda:0 by default" } else { "cpu by default" }.to_owned()));
        let mut text: String = lines.iter().map(|(key, value)| format!("{key:<9} {value}\n")).collect();
        for item in &self.to_do {
            text += &format!("to do     {item}\n");
        }
        text
    }
}

fn describe(gpu: &gpu::Gpu) -> String {
    let capability = gpu.compute_capability.map_or("unknown".to_owned(), |(major, minor)| format!("sm_{major}{minor}"));
    format!(
        "{}: {} ({capability}), {} memory, {} free",
        gpu.index,
        gpu.name,
        gib(gpu.memory_total_bytes),
        gib(gpu.memory_free_bytes)
    )
}

/// What may slow or spoil a run on it: limiters of its clocks, ECC errors, processes.
fn state(gpu: &gpu::Gpu) -> Vec<String> {
    let now = &gpu.now;
    let mut lines = Vec::new();
    if let Some(reasons) = &now.throttle_reasons {
        let named = if reasons.is_empty() { "nothing".to_owned() } else { reasons.join(", ") };
        lines.push(format!("   clocks limited by {named}"));
    }
    if let (Some(corrected), Some(uncorrected)) = (now.ecc_corrected, now.ecc_uncorrected) {
        lines.push(format!("   ECC errors since the driver was loaded: {corrected} corrected, {uncorrected} not"));
    }
    let processes = now.processes.iter().flatten();
    lines.extend(processes.map(|process| format!("   in use by process {process}")));
    lines
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".to_owned(), |b| format!("{:.1} GiB", b as f64 / f64::from(1u32 << 30)))
}

fn driver_major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}
