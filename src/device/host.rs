//! The CPU, memory and disk of this machine.

use serde::Serialize;
use std::path::Path;
use std::process::Command;

#[derive(Clone, Debug, Serialize)]
pub struct Host {
    pub cores: usize,
    /// Those that the CPU operations can use, of avx2, fma, avx512f, avx512bw, avx512vl, avx512dq.
    pub cpu_features: Vec<&'static str>,
    pub memory_total_bytes: Option<u64>,
    pub memory_available_bytes: Option<u64>,
}

pub fn probe() -> Host {
    Host {
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        cpu_features: cpu_features(),
        memory_total_bytes: meminfo("MemTotal:"),
        memory_available_bytes: meminfo("MemAvailable:"),
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512dq", is_x86_feature_detected!("avx512dq")),
    ];
    all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}

fn meminfo(key: &str) -> Option<u64> {
    line_kib("/proc/meminfo", key)
}

/// The kB after `key` in one of /proc's tables, in bytes.
fn line_kib(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The most memory that this process had resident at once (VmHWM); None where /proc does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    line_kib("/proc/self/status", "VmHWM:")
}

/// Free bytes on the file system of `path`, as POSIX df tells; None where there is no df.
pub fn free_disk_bytes(path: &Path) -> Option<u64> {
    let output = Command::new("df").arg("-Pk").arg(path).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().nth(1)?.split_whitespace().nth(3)?.parse::<u64>().ok()? * 1024)
}
