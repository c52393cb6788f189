//! What nvcc made and build.rs embedded: every kernel, for every architecture, without spills.

use temper::device::kernels::{ARCHES, EMBEDDED, WHY_NOT_BUILT};

fn built() -> bool {
    if let Some(reason) = WHY_NOT_BUILT {
        println!("skipped: {reason}");
        assert!(EMBEDDED.is_empty() && ARCHES.is_empty());
    }
    WHY_NOT_BUILT.is_none()
}

/// The (is machine code, architecture number) of each entry of a fatbin: a header of 16 bytes (magic, version, header
/// size u16, size u64), then entries of kind u16 (1 PTX, 2 ELF), unknown u16, header size u32, payload size u64, ...
/// with the architecture at byte 28.
fn entries(fatbin: &[u8]) -> Vec<(bool, u32)> {
    let u16_at = |at: usize| u16::from_le_bytes(fatbin[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(fatbin[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(fatbin[at..at + 8].try_into().unwrap());
    let (mut found, mut start) = (Vec::new(), 0);
    while start + 16 <= fatbin.len() && u32_at(start) == 0xBA55_ED50 {
        let end = start + u16_at(start + 6) as usize + u64_at(start + 8) as usize;
        let mut at = start + u16_at(start + 6) as usize;
        while at + 32 <= end {
            found.push((u16_at(at) == 2, u32_at(at + 28)));
            at += u32_at(at + 4) as usize + u64_at(at + 8) as usize;
        }
        start = end;
    }
    found
}

#[test]
fn every_fatbin_holds_every_architecture() {
    if !built() {
        return;
    }
    let names: Vec<&str> = EMBEDDED.iter().map(|k| k.name).collect();
    let files = [
        "amax",
        "decode_attention",
        "fake_quant_fp8",
        "fake_quant_mxfp4",
        "fake_quant_nvfp4",
        "fake_quant_variants",
        "matmul_f32",
        "matmul_nn",
        "matmul_nt",
        "matmul_sm90",
        "matmul_tn",
        "matmul_w4",
        "noise",
        "rms_norm",
        "rotary",
        "sample",
        "swiglu",
    ];
    let has_hopper = ARCHES.contains(&"sm_90a");
    let expected: Vec<&str> = files.into_iter().filter(|file| has_hopper || !file.ends_with("_sm90")).collect();
    assert_eq!(names, expected);
    for kernel in EMBEDDED {
        let found = entries(kernel.fatbin);
        for arch in arches_of(kernel.name) {
            let number: u32 = arch.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap();
            assert!(found.contains(&(arch.starts_with("sm_"), number)), "{}: {arch} not in {found:?}", kernel.name);
        }
    }
    if std::env::var_os("CUDA_ARCHES").is_none() {
        assert_eq!(ARCHES, ["sm_80", "sm_90", "compute_90", "sm_90a"]);
    }
}

/// Hopper's instructions are for sm_90a alone, which nothing else needs.
fn arches_of(file: &str) -> impl Iterator<Item = &'static str> {
    let is_hoppers = file.ends_with("_sm90");
    ARCHES.iter().copied().filter(move |arch| (*arch == "sm_90a") == is_hoppers)
}

#[test]
fn no_kernel_spills_and_registers_stay_in_budget() {
    if !built() {
        return;
    }
    for kernel in EMBEDDED {
        // As ptxas says it where it waits for every product of a warpgroup before it issues the next.
        assert!(!kernel.ptxas.contains("serialized"), "{}: {}", kernel.name, kernel.ptxas);
        let (mut functions, mut name) = (0, "");
        for line in kernel.ptxas.lines() {
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                name = rest.split('\'').next().unwrap();
            }
            if line.contains("spill stores") {
                let none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
                assert!(line.contains(none), "{name}: {line}");
            }
            if let Some(rest) = line.split("Used ").nth(1) {
                let numbers = |text: &str| text.split(' ').next().unwrap().parse::<u32>().unwrap();
                assert!(numbers(rest) <= most_registers(name), "{name}: {line}");
                let shared = rest.split(", ").find_map(|part| part.strip_suffix(" bytes smem")).map_or(0, numbers);
                assert!(shared <= most_static_shared(name), "{name}: {line}");
                functions += 1;
            }
        }
        assert!(
            functions >= arches_of(kernel.name).filter(|a| a.starts_with("sm_")).count(),
            "{}: ptxas said nothing",
            kernel.name
        );
    }
}

/// Of 65536 on a multiprocessor, by how many blocks of how many threads shall live there.
fn most_registers(kernel: &str) -> u32 {
    let (threads, resident) = match kernel {
        _ if kernel.ends_with("_errors") || kernel.contains("4over6") => (256, 2),
        _ if kernel.starts_with("noise") || kernel == "matmul_f32" => (256, 2),
        _ if kernel.starts_with("rms_norm") && kernel.ends_with("_wide") => (256, 1),
        _ if kernel == "sample" => (1024, 1),
        _ if kernel.starts_with("decode_attention_join") => (128, 8),
        _ if kernel.starts_with("decode_attention") => (128, 2),
        _ if kernel.contains("sm90") => (384, 1),
        _ if kernel.contains("64x128") => (128, 3),
        _ if kernel.contains("w4_64x256") => (128, 1),
        _ if kernel.starts_with("matmul") => (128, 2),
        _ if kernel.starts_with("fake_quant_mxfp4") || kernel.starts_with("fake_quant_nvfp4_2d") => (256, 6),
        _ if kernel.starts_with("fake_quant_nvfp4_single") => (256, 4),
        _ if kernel.starts_with("fake_quant_nvfp4") => (256, 6),
        _ => (256, 4),
    };
    // Registers are given out by eights.
    65536 / threads / resident / 8 * 8
}

/// Bytes. What a launch asks for besides (src/ops/cuda/matmul/tile.rs) stays below the 163 KiB that a block of an A100 can have.
fn most_static_shared(kernel: &str) -> u32 {
    match kernel {
        "matmul_f32" => 16 << 10,
        _ if kernel.starts_with("decode_attention_") && !kernel.contains("join") => 37 << 10,
        _ => 1024,
    }
}
