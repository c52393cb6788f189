//! Who else computes on a GPU: processes with a CUDA context there, by name, without this one and its children.

use std::fs;
use std::path::Path;

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuProcess {
    pub pid: u32,
    /// Absent where /proc does not show the process: another user's, or of another container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_used_bytes: Option<u64>,
}

impl std::fmt::Display for GpuProcess {
    /// `1234 (python), 12.1 GiB`.
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "{} ({})", self.pid, self.name.as_deref().unwrap_or("unknown"))?;
        self.memory_used_bytes.map_or(Ok(()), |bytes| write!(out, ", {:.1} GiB", gib(bytes)))
    }
}

pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1u32 << 30)
}

pub(super) fn named(listed: Vec<ProcessInfo>) -> Vec<GpuProcess> {
    let one = |process: ProcessInfo| GpuProcess {
        pid: process.pid,
        name: fs::read_to_string(format!("/proc/{}/comm", process.pid)).ok().map(|text| text.trim().to_string()),
        memory_used_bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    };
    listed.into_iter().map(one).collect()
}

/// Those of `all` that are neither this process nor its children.
///
/// `None` where that cannot be told: in a container NVML lists the host's numbers, so that none is ours and some are
/// not in our /proc.
pub fn foreign(all: &[GpuProcess]) -> Option<Vec<GpuProcess>> {
    let (ours, others): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|process| is_ours(process.pid));
    let unseen = others.iter().any(|process| !Path::new("/proc").join(process.pid.to_string()).exists());
    (!ours.is_empty() || !unseen).then_some(others)
}

/// This process, or one whose parents lead to it.
fn is_ours(pid: u32) -> bool {
    let own = std::process::id();
    std::iter::successors(Some(pid), |pid| parent(*pid)).take(100).any(|pid| pid == own)
}

/// The fourth field of /proc/PID/stat; the second, in brackets, may hold blanks and brackets.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_and_our_children_are_not_foreign() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let process = |pid| GpuProcess { pid, name: None, memory_used_bytes: None };
        let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
        let own = std::process::id();
        let listed = [own, child.id(), 1].map(process);
        let found = foreign(&listed);
        // Numbers that cannot be in use: the kernel's largest is below 2^22.
        let unseen = [1, 1 << 30].map(process);
        let of_a_container = foreign(&unseen);
        let beside_ours = foreign(&[process(own), process(1 << 30)]);
        child.kill()?;
        child.wait()?;
        assert_eq!(found, Some(vec![process(1)]));
        assert_eq!(of_a_container, None);
        assert_eq!(beside_ours, Some(vec![process(1 << 30)]));
        assert_eq!(foreign(&[]), Some(Vec::new()));
        Ok(())
    }
}
