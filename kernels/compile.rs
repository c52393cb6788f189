//! build.rs's part for the kernels: nvcc to fatbins, and g++ to the host build that the tests run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::{Result, Torch, compile_library, files, up_to_date, write};

/// Flags of every kernel. No contraction of a product and a sum: the kernels must give the bits of the CPU
/// definition, and say `fmaf` where the definition has one. Denormals are kept, divisions are IEEE's.
const NVCC_FLAGS: [&str; 10] = [
    "-fatbin",
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "-Xptxas",
    "-v",
    "-DTEMPER_CUDA",
];

pub fn kernels(root: &Path, out: &Path, torch: &Torch) -> Result<()> {
    let dir = root.join("kernels");
    let sources = files(&dir, &["cu"])?;
    let arches = arches()?;
    let Some(nvcc) = find_nvcc(root) else {
        println!(
            "cargo:warning=nvcc was not found (CUDA_HOME/bin, .venv/cuda/bin, PATH): built without CUDA kernels. \
             scripts/bootstrap.sh installs it; then touch build.rs"
        );
        return write_embedded(out, torch, &[], &[], Some("nvcc was not found when temper was built"));
    };
    let mut flags: Vec<String> = NVCC_FLAGS.iter().map(|f| f.to_string()).collect();
    flags.push(format!("-I{}", dir.join("include").display()));
    let mut for_all = flags.clone();
    for_all.extend(arches.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")));
    // PTX lets a GPU newer than every listed architecture run. An "a" architecture's PTX runs nowhere else.
    let newest = arches.iter().filter(|a| a.bytes().all(|b| b.is_ascii_digit())).max_by_key(|a| a.parse::<u32>().ok());
    let mut built: Vec<String> = arches.iter().map(|a| format!("sm_{a}")).collect();
    if let Some(arch) = newest {
        for_all.push(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
        built.push(format!("compute_{arch}"));
    }
    // What only a Hopper's instructions can do; nothing of it where no Hopper is asked for.
    let mut for_hopper = flags;
    for_hopper.push("-gencode=arch=compute_90a,code=sm_90a".to_owned());
    let is_hoppers = |source: &Path| source.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_sm90"));
    let has_hopper = arches.iter().any(|arch| arch == "90" || arch == "90a");
    let sources: Vec<PathBuf> = sources.into_iter().filter(|source| has_hopper || !is_hoppers(source)).collect();
    if has_hopper && !built.iter().any(|arch| arch == "sm_90a") {
        built.push("sm_90a".to_owned());
    }
    let flags_of = |source: &Path| if is_hoppers(source) { &for_hopper } else { &for_all };
    let results: Vec<Result<String>> = std::thread::scope(|scope| {
        let jobs: Vec<_> =
            sources.iter().map(|source| scope.spawn(|| compile_kernel(&nvcc, flags_of(source), source, out))).collect();
        jobs.into_iter().map(|j| j.join().unwrap_or_else(|_| Err("a compile thread panicked".to_owned()))).collect()
    });
    let names = results.into_iter().collect::<Result<Vec<String>>>()?;
    write_embedded(out, torch, &names, &built, None)
}

/// Compiles `source` to `<stem>.fatbin`, with ptxas's account of registers and spills in `<stem>.ptxas`.
fn compile_kernel(nvcc: &Path, flags: &[String], source: &Path, out: &Path) -> Result<String> {
    let stem = source.file_stem().and_then(|s| s.to_str()).ok_or("a kernel file without a name")?.to_owned();
    let (fatbin, ptxas) = (out.join(format!("{stem}.fatbin")), out.join(format!("{stem}.ptxas")));
    let mut inputs = Vec::new();
    with_included(source, &mut inputs)?;
    let command = format!("{} {}", nvcc.display(), flags.join(" "));
    if up_to_date(&fatbin, &inputs, &command) && ptxas.exists() {
        return Ok(stem);
    }
    let run = Command::new(nvcc).args(flags).arg("-o").arg(&fatbin).arg(source).output();
    let run = run.map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let messages = String::from_utf8_lossy(&run.stderr).into_owned();
    if !run.status.success() {
        let text = String::from_utf8_lossy(&run.stdout).into_owned() + &messages;
        return Err(format!("{}: nvcc failed\n{text}", source.display()));
    }
    write(&ptxas, &messages)?;
    write(&fatbin.with_extension("fatbin.command"), &command)?;
    Ok(stem)
}

/// `file` and every header of kernels/include that it includes, directly or through others: what it depends on.
fn with_included(file: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    if found.iter().any(|known| known == file) {
        return Ok(());
    }
    found.push(file.to_path_buf());
    let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let directory = file.parent().unwrap_or(Path::new("."));
    let names = text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
    let places = |name: &str| [directory.join("include").join(name), directory.join(name)];
    // Headers that are not there are the host shim's, which nvcc does not read.
    let headers: Vec<PathBuf> = names.filter_map(|name| places(name).into_iter().find(|path| path.is_file())).collect();
    headers.iter().try_for_each(|header| with_included(header, found))
}

fn write_embedded(out: &Path, torch: &Torch, names: &[String], arches: &[String], why_not: Option<&str>) -> Result<()> {
    let mut text = String::from("// Generated by build.rs.\npub static EMBEDDED: &[EmbeddedKernels] = &[\n");
    for name in names {
        text += &format!(
            "    EmbeddedKernels {{ name: {name:?}, fatbin: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\")), \
             ptxas: include_str!(concat!(env!(\"OUT_DIR\"), \"/{name}.ptxas\")) }},\n"
        );
    }
    text += &format!(
        "];\npub const ARCHES: &[&str] = &{arches:?};\npub const WHY_NOT_BUILT: Option<&str> = {why_not:?};\n\
         pub const TORCH_VERSION: Option<&str> = {:?};\npub const TORCH_CUDA: Option<&str> = {:?};\n",
        torch.version_field("__version__"),
        torch.version_field("cuda"),
    );
    write(&out.join("embedded_kernels.rs"), &text)
}

/// `CUDA_ARCHES`: "80,90" or "sm_80;sm_90a".
fn arches() -> Result<Vec<String>> {
    let text = env::var("CUDA_ARCHES").unwrap_or_else(|_| "80,90".to_owned());
    let split = text.split([',', ';', ' ']).map(|a| a.trim().trim_start_matches("sm_").to_owned());
    let arches: Vec<String> = split.filter(|a| !a.is_empty()).collect();
    match arches.iter().find(|a| !a.starts_with(|c: char| c.is_ascii_digit())) {
        Some(bad) => Err(format!("CUDA_ARCHES={text}: {bad:?} is no architecture; expected for example 80,90")),
        None if arches.is_empty() => {
            Err(format!("CUDA_ARCHES={text:?} names no architecture; expected for example 80,90"))
        }
        None => Ok(arches),
    }
}

fn find_nvcc(root: &Path) -> Option<PathBuf> {
    let mut candidates = Vec::new();
    if let Ok(home) = env::var("CUDA_HOME") {
        candidates.push(Path::new(&home).join("bin/nvcc"));
    }
    candidates.push(root.join(".venv/cuda/bin/nvcc"));
    if let Ok(pythons) = fs::read_dir(root.join(".venv/lib")) {
        for python in pythons.flatten() {
            candidates.push(python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
        }
    }
    if let Some(path) = env::var_os("PATH") {
        candidates.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
    }
    candidates.into_iter().find(|p| p.is_file())
}

/// The same .cu files by g++ under kernels/host/shim.h. Contraction off and no fast-math for the reason given at
/// [`NVCC_FLAGS`]: these tests compare bits. Always built: it is small, and only tests refer to it, so the linker
/// leaves it out of the binary.
pub fn host_kernels(root: &Path, out: &Path, torch: &Torch) -> Result<()> {
    let dir = root.join("kernels");
    let sources = files(&dir.join("host"), &["cpp"])?;
    let mut inputs = sources.clone();
    inputs.extend(files(&dir, &["cu"])?);
    inputs.extend(files(&dir.join("include"), &["cuh"])?);
    inputs.extend(files(&dir.join("host"), &["h"])?);
    inputs.push(dir.join("compile.rs"));
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).cargo_metadata(false).warnings(true).files(&sources);
    build.flag("-ffp-contract=off").flag("-fno-fast-math").flag("-fno-strict-aliasing");
    build.flag("-Wno-unknown-pragmas").includes([dir.join("host"), dir.join("include"), dir.clone()]);
    // NVIDIA's own cuda_fp4.h and cuda_fp8.h, where they are, as an oracle for the codecs.
    if let Some(include) = &torch.cuda_include {
        build.flag("-isystem").flag(include.as_os_str());
    }
    let command = format!("{sources:?} {:?}", torch.cuda_include);
    compile_library(build, "temper_kernels_host", out, &inputs, &command)?;
    println!("cargo:rustc-link-lib=static=temper_kernels_host");
    Ok(())
}
