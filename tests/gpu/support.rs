//! The fake NVML: compiled once, copied into a directory of its own for every test.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

pub struct FakeNvml {
    dir: tempfile::TempDir,
}

impl FakeNvml {
    /// That says `script` (lines `GPU.KEY VALUE`, as in fake_nvml.cpp).
    pub fn new(script: &str) -> FakeNvml {
        let fake = FakeNvml { dir: tempfile::tempdir().unwrap() };
        fake.says(script);
        // A file of its own: the loader takes one that it has already for the same library.
        std::fs::copy(built(), fake.library()).unwrap();
        fake
    }

    /// From now on; at once, so that no reading sees half a script.
    pub fn says(&self, script: &str) {
        let next = self.dir.path().join("next");
        std::fs::write(&next, format!("{script}\n")).unwrap();
        std::fs::rename(next, self.dir.path().join("script")).unwrap();
    }

    pub fn library(&self) -> PathBuf {
        self.dir.path().join("libnvidia-ml.so.1")
    }

    /// How often this line is in the log.
    pub fn logged(&self, line: &str) -> usize {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        log.lines().filter(|found| *found == line).count()
    }

    /// temper, which finds this library as the driver's.
    pub fn temper(&self, args: &[&str]) -> std::process::Output {
        let others = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        let path = format!("{}:{others}", self.dir.path().display());
        Command::new(env!("CARGO_BIN_EXE_temper")).args(args).env("LD_LIBRARY_PATH", path).output().unwrap()
    }
}

fn built() -> &'static PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("fake_nvml-{}.so", std::process::id()));
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/fake_nvml.cpp");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let mut command = Command::new(compiler);
        command.args(["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library).arg(source);
        assert!(command.status().unwrap().success());
        library
    })
}
