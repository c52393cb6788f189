//! What run.json says about where and when a run was started.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What decides whether a resumed run can be bitwise the same on CPU: the vector width and the thread count change
/// the order of additions in a matrix product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuKind {
    pub model: String,
    pub simd: String,
}

impl CpuKind {
    pub fn of_this_machine() -> CpuKind {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name").and_then(|rest| rest.split_once(':')))
            .map_or_else(|| "unknown".to_string(), |(_, name)| name.trim().to_string());
        CpuKind { model, simd: simd().to_string() }
    }
}

#[cfg(target_arch = "x86_64")]
fn simd() -> &'static str {
    if is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "avx2"
    } else {
        "sse2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn simd() -> &'static str {
    std::env::consts::ARCH
}

/// SHA-256 of what this binary was built from, in hexadecimal: build.rs says of what, and how to compute it for a commit.
pub const SOURCES: &str = env!("TEMPER_SOURCES");

/// The commit this binary was built from: told by the build, else asked of git where the binary lies. `None` when
/// neither knows. `-dirty` is appended when tracked files were changed.
pub fn git_commit() -> Option<String> {
    if let Some(commit) = option_env!("TEMPER_GIT_COMMIT").filter(|c| !c.is_empty()) {
        return Some(commit.to_string());
    }
    let executable = std::env::current_exe().ok()?;
    let output = Command::new("git")
        .arg("-C")
        .arg(executable.parent().unwrap_or(Path::new(".")))
        .args(["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_string();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// Now, as `2026-01-31T23:59:59Z`.
pub fn utc_now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    utc_text(seconds)
}

/// Seconds since 1970 as a date: days to (year, month, day) over 400-year cycles that begin on 1 March.
pub(super) fn utc_text(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468; // days since 0000-03-01
    let (cycle, day_of_cycle) = (z / 146_097, z % 146_097);
    let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // 0 = March
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}
