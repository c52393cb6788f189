//! Builds what is not Rust: the C++ that joins torch, the CUDA kernels, and the kernels' host build for the tests.
//!
//! 1. [`BRIDGE`] -> a static library against `$LIBTORCH`.
//! 2. (kernels/compile.rs) `kernels/*.cu` -> one fatbin each (machine code of every architecture in `CUDA_ARCHES`, default 80 and 90, and
//!    PTX of the newest), embedded by `$OUT_DIR/embedded_kernels.rs`. No nvcc: a warning now, a typed error at use.
//!    nvcc failing: the build fails with nvcc's message.
//! 3. (kernels/compile.rs) `kernels/host/*.cpp`, which includes the same .cu files -> a static library that only the tests call.
//! 4. [`SOURCES`] -> their SHA-256 as `TEMPER_SOURCES`: what the binary was made of, which no later commit or edit changes.
//!
//! Every output is skipped while it is newer than its inputs and its command is the same: a change of one kernel must
//! not compile torch's headers again (20 s).

use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs};

use sha2::{Digest, Sha256};

#[path = "kernels/compile.rs"]
mod compile;

type Result<T> = std::result::Result<T, String>;

/// The C++ that is compiled against torch.
const BRIDGE: [&str; 5] = [
    "src/ops/cuda/stream.cpp",
    "src/ops/cuda/memory.cpp",
    "src/ops/cuda/torch_graph.cpp",
    "src/ops/autograd/bridge.cpp",
    "src/ops/autograd/flash.cpp",
];

/// What a binary is made of, besides its libraries.
const SOURCES: [&str; 6] = ["Cargo.lock", "Cargo.toml", "build.rs", "configs/quickstart.yaml", "kernels", "src"];

fn main() {
    if let Err(message) = run() {
        // cargo shows a failing build script's stderr; the last lines are the compiler's own.
        eprintln!("{message}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    for name in ["LIBTORCH", "LIBTORCH_CXX11_ABI", "CUDA_HOME", "CUDA_ARCHES", "CXX"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    for path in SOURCES {
        println!("cargo:rerun-if-changed={path}");
    }
    let root = PathBuf::from(env_var("CARGO_MANIFEST_DIR")?);
    println!("cargo:rustc-env=TEMPER_SOURCES={}", hash_of_sources(&root)?);
    let out = PathBuf::from(env_var("OUT_DIR")?);
    let torch = Torch::find(&root)?;
    build_bridge(&root, &out, &torch)?;
    torch.link();
    compile::kernels(&root, &out, &torch)?;
    compile::host_kernels(&root, &out, &torch)
}

fn env_var(name: &str) -> Result<String> {
    env::var(name).map_err(|_| format!("{name} is not set; run scripts/bootstrap.sh, which provides it"))
}

/// As `find SOURCES -type f | LC_ALL=C sort | xargs sha256sum | sha256sum` prints it.
fn hash_of_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    let mut left: Vec<PathBuf> = SOURCES.iter().map(PathBuf::from).collect();
    while let Some(path) = left.pop() {
        let there = root.join(&path);
        if !there.is_dir() {
            files.push(path);
            continue;
        }
        let entries = fs::read_dir(&there).map_err(|e| format!("{}: {e}", there.display()))?;
        for entry in entries {
            left.push(path.join(entry.map_err(|e| format!("{}: {e}", there.display()))?.file_name()));
        }
    }
    // By bytes, not by components.
    files.sort_by(|a, b| a.as_os_str().cmp(b.as_os_str()));
    let mut all = Sha256::new();
    for path in files {
        let content = fs::read(root.join(&path)).map_err(|e| format!("{}: {e}", path.display()))?;
        all.update(format!("{}  {}\n", hex(Sha256::digest(content).as_slice()), path.display()));
    }
    Ok(hex(all.finalize().as_slice()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// ---------------------------------------------------------------------------------------------------- torch

struct Torch {
    home: PathBuf,
    cuda_include: Option<PathBuf>, // cuda_runtime_api.h, which torch's CUDA headers include
    has_cuda: bool,                // a CUDA build of torch, whose headers can be used here
}

impl Torch {
    fn find(root: &Path) -> Result<Torch> {
        let home = root.join(env_var("LIBTORCH")?);
        if !home.join("include").is_dir() {
            return Err(format!("LIBTORCH={}: no include directory there; run scripts/bootstrap.sh", home.display()));
        }
        let mut includes = Vec::new();
        // The pip wheels put CUDA's headers beside torch: site-packages/nvidia/cu13/include.
        if let Some(site) = fs::canonicalize(&home).ok().and_then(|h| h.parent().map(Path::to_path_buf)) {
            includes.extend(["cu13", "cuda_runtime"].map(|d| site.join("nvidia").join(d).join("include")));
        }
        if let Ok(cuda) = env::var("CUDA_HOME") {
            includes.push(Path::new(&cuda).join("include"));
        }
        includes.push(PathBuf::from("/usr/local/cuda/include"));
        let cuda_include = includes.into_iter().find(|d| d.join("cuda_runtime_api.h").is_file());
        let has_cuda_library = home.join("lib/libtorch_cuda.so").exists();
        if has_cuda_library && cuda_include.is_none() {
            println!(
                "cargo:warning=torch has CUDA but cuda_runtime_api.h was not found: kernels will run on the default \
                 stream only; set CUDA_HOME"
            );
        }
        Ok(Torch { has_cuda: has_cuda_library && cuda_include.is_some(), home, cuda_include })
    }

    /// A string of the wheel's version.py, as in `cuda: Optional[str] = '13.0'`; a zip of libtorch has none, but a
    /// build-version file.
    fn version_field(&self, name: &str) -> Option<String> {
        if let Ok(text) = fs::read_to_string(self.home.join("version.py")) {
            let is_field = |l: &&str| l.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', ':', '=']));
            return text.lines().find(is_field)?.split('\'').nth(1).map(str::to_owned);
        }
        let version = fs::read_to_string(self.home.join("build-version")).ok()?.trim().to_owned();
        match name {
            "__version__" => Some(version),
            // "2.11.0+cu130" -> "13.0"
            _ => version.split_once("+cu").map(|(_, d)| format!("{}.{}", &d[..d.len() - 1], &d[d.len() - 1..])),
        }
    }

    /// Nothing refers to a symbol of libtorch_cuda, so the linker would drop it and torch would see no GPU.
    fn link(&self) {
        let lib = self.home.join("lib");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        println!("cargo:rustc-link-arg=-L{}", lib.display());
        if lib.join("libtorch_cuda.so").exists() {
            println!("cargo:rustc-link-arg=-Wl,--push-state,--no-as-needed");
            println!("cargo:rustc-link-arg=-ltorch_cuda");
            println!("cargo:rustc-link-arg=-lc10_cuda");
            println!("cargo:rustc-link-arg=-Wl,--pop-state");
        }
    }
}

fn build_bridge(root: &Path, out: &Path, torch: &Torch) -> Result<()> {
    let sources: Vec<PathBuf> = BRIDGE.iter().map(|p| root.join(p)).filter(|p| p.is_file()).collect();
    let mut build = cc::Build::new();
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .debug(false)
        .opt_level(2)
        .cargo_metadata(false)
        .include(torch.home.join("include"))
        .include(torch.home.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .files(&sources);
    if torch.has_cuda {
        build.define("TEMPER_TORCH_CUDA", None);
        build.includes(&torch.cuda_include);
    }
    let command = format!("{sources:?} {abi} {} {}", torch.home.display(), torch.has_cuda);
    let inputs = sources.clone();
    compile_library(build, "temper_bridge", out, &inputs, &command)?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-search=native={}", torch.home.join("lib").display());
    // Whole: torch registers the bridge's autograd functions by static objects that nothing refers to.
    println!("cargo:rustc-link-lib=static:+whole-archive=temper_bridge");
    println!("cargo:rustc-link-lib=stdc++");
    for lib in ["torch", "torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={lib}");
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------- helpers

fn compile_library(build: cc::Build, name: &str, out: &Path, inputs: &[PathBuf], command: &str) -> Result<()> {
    let library = out.join(format!("lib{name}.a"));
    let command = format!("{} {command}", env::var("CXX").unwrap_or_default());
    if up_to_date(&library, inputs, &command) {
        return Ok(());
    }
    build.try_compile(name).map_err(|e| format!("lib{name}: {e}"))?;
    write(&library.with_extension("a.command"), &command)
}

/// Whether `output` is newer than every input and was made by the same command.
fn up_to_date(output: &Path, inputs: &[PathBuf], command: &str) -> bool {
    let extension = output.extension().unwrap_or_default().to_string_lossy().into_owned();
    let recorded = fs::read_to_string(output.with_extension(extension + ".command"));
    let Some(made) = modified(output) else {
        return false;
    };
    let build_script = PathBuf::from("build.rs");
    recorded.is_ok_and(|r| r == command)
        && inputs.iter().chain([&build_script]).all(|i| modified(i).is_some_and(|t| t < made))
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The files of `dir` with one of the extensions, sorted; none if there is no such directory.
fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(Vec::new());
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)))
        .collect();
    found.sort();
    Ok(found)
}
