//! What build.rs compiled: the CUDA kernels embedded in this binary, and the libtorch it was built against.

/// One file of kernels/, compiled by build.rs.
pub struct EmbeddedKernels {
    /// The file's stem: `fake_quant_mxfp4`, `noise`.
    pub name: &'static str,
    /// Machine code of every architecture in [`ARCHES`], and PTX of the newest.
    pub fatbin: &'static [u8],
    /// What ptxas said: registers, spills and shared memory of every kernel and architecture.
    pub ptxas: &'static str,
}

// EMBEDDED: &[EmbeddedKernels], empty without nvcc. ARCHES: &[&str], "sm_80" for machine code, "compute_90" for PTX.
// WHY_NOT_BUILT: Option<&str>. TORCH_VERSION: Option<&str>, "2.11.0+cu130". TORCH_CUDA: Option<&str>, "13.0".
include!(concat!(env!("OUT_DIR"), "/embedded_kernels.rs"));

/// Whether the embedded kernels run on a GPU of this compute capability: machine code of the same major version and
/// no newer minor, or PTX that is no newer.
pub fn runs_on(major: u32, minor: u32) -> bool {
    ARCHES.iter().any(|arch| {
        let (machine_code, digits) = match (arch.strip_prefix("sm_"), arch.strip_prefix("compute_")) {
            (Some(digits), _) => (true, digits),
            (None, Some(digits)) => (false, digits),
            (None, None) => return false,
        };
        // An "a" architecture runs on exactly that GPU.
        let exact = digits.ends_with('a');
        let Ok(number) = digits.trim_end_matches('a').parse::<u32>() else {
            return false;
        };
        let built = (number / 10, number % 10);
        if exact || machine_code {
            built.0 == major && if exact { built.1 == minor } else { built.1 <= minor }
        } else {
            built <= (major, minor)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_architectures_cover_ampere_and_later() {
        if ARCHES != ["sm_80", "sm_90", "compute_90", "sm_90a"] {
            println!("skipped: built for {ARCHES:?}");
            return;
        }
        for (capability, runs) in [((8, 0), true), ((8, 6), true), ((9, 0), true), ((12, 0), true), ((7, 5), false)] {
            assert_eq!(runs_on(capability.0, capability.1), runs, "{capability:?}");
        }
    }
}
