//! What the machine has, and which device a run uses: `cpu` or `cuda[:N]`.

pub mod gpu;
pub mod host;
pub mod kernels;

pub use tch::Device;

use crate::{Error, Result, bail_input};

/// The device that `--device` names: `cpu`, `cuda` (= `cuda:0`) or `cuda:N`; without a name, `cuda:0` when a usable
/// GPU is there, else `cpu`.
///
/// # Errors
/// `Error::Input` for an unknown name, a device number that does not exist, or CUDA where it cannot be used; the
/// message says why and what to do.
pub fn parse(text: Option<&str>) -> Result<Device> {
    select(text, cuda_devices())
}

/// The number of CUDA devices that can be used, or why there is none and the remedy.
pub fn cuda_devices() -> std::result::Result<usize, String> {
    if let Some(reason) = kernels::WHY_NOT_BUILT {
        return Err(format!("{reason}; run scripts/bootstrap.sh, touch build.rs and build again"));
    }
    if kernels::TORCH_CUDA.is_none() {
        return Err("libtorch is a CPU-only build; run scripts/bootstrap.sh or point LIBTORCH at a CUDA build".into());
    }
    match torch_cuda_devices() {
        0 => Err(why_no_device()),
        n => Ok(n),
    }
}

/// The number of CUDA devices that libtorch sees.
pub fn torch_cuda_devices() -> usize {
    if !tch::Cuda::is_available() {
        return 0;
    }
    usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// Sizes the thread pools of libtorch and of our own loops (None: all cores). Only the first call counts: both
/// libraries take the size once, before the first parallel work.
pub fn set_threads(threads: Option<usize>) {
    static POOLS: std::sync::Once = std::sync::Once::new();
    POOLS.call_once(|| {
        let threads = threads.unwrap_or_else(|| host::probe().cores);
        tch::set_num_threads(threads as i32);
        tch::set_num_interop_threads(1);
        // Fails only where a pool exists already; none does before this.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    });
}

/// The GPU's name, or `cpu`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => gpu::name_of_cuda(index).unwrap_or_else(|| format!("cuda:{index}")),
        _ => "cpu".to_string(),
    }
}

fn why_no_device() -> String {
    let needed = gpu::driver_needed().map_or(String::new(), |d| format!(" (this libtorch needs driver {d} or later)"));
    match gpu::probe() {
        Err(_) => format!("no NVIDIA driver was found{needed}; install one, or use --device cpu"),
        Ok(found) if found.gpus.is_empty() => "the NVIDIA driver sees no GPU; use --device cpu".into(),
        Ok(found) => format!(
            "libtorch sees none of the {} GPU(s) of driver {}{needed}; update the driver, check CUDA_VISIBLE_DEVICES, \
             or point LIBTORCH at a torch for an older CUDA",
            found.gpus.len(),
            found.driver_version
        ),
    }
}

fn select(text: Option<&str>, cuda: std::result::Result<usize, String>) -> Result<Device> {
    let Some(text) = text else {
        return Ok(if cuda.is_ok() { Device::Cuda(0) } else { Device::Cpu });
    };
    if text == "cpu" {
        return Ok(Device::Cpu);
    }
    let index = match text.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse::<usize>().ok()),
        None => None,
    };
    let Some(index) = index else {
        bail_input!("--device {text:?}: expected cpu, cuda or cuda:N");
    };
    match cuda {
        Err(reason) => Err(Error::Input(format!("--device {text}: {reason}"))),
        Ok(count) if index >= count => {
            bail_input!("--device {text}: this machine has {count} usable CUDA device(s), numbered from 0")
        }
        Ok(_) => Ok(Device::Cuda(index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_selected_by_name_and_presence() {
        let none = || Err("no NVIDIA driver was found; use --device cpu".to_owned());
        assert_eq!(select(None, none()).ok(), Some(Device::Cpu));
        assert_eq!(select(None, Ok(2)).ok(), Some(Device::Cuda(0)));
        assert_eq!(select(Some("cpu"), Ok(2)).ok(), Some(Device::Cpu));
        assert_eq!(select(Some("cuda"), Ok(2)).ok(), Some(Device::Cuda(0)));
        assert_eq!(select(Some("cuda:1"), Ok(2)).ok(), Some(Device::Cuda(1)));
        for (text, cuda) in [("cuda:2", Ok(2)), ("cuda", none()), ("gpu", Ok(1)), ("cuda:x", Ok(1)), ("", Ok(1))] {
            let error = select(Some(text), cuda).err();
            assert_eq!(error.map(|e| e.exit_code()), Some(2), "{text}");
        }
    }
}
